"""README.md and the pages of docs/: every command is run, at a small size; every link, function and test that they name
is there; the tables are those of the code and of the study."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.cli import check_ranges, parse_config
from study import tables
from study.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n\n".join(PAGES.values())
# The files that the pages let a reader write: a block of Python that begins with the file's name.
OWN_FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT, re.DOTALL))
# What stands for a policy that has to be downloaded, when its commands are run: the one that the scratch folder has.
PUBLISHED, SMALL_POLICY = "hf:HuggingFaceTB/SmolLM2-135M-Instruct", "out/sft"
# At the end of a command, where they win over what the page says: the same code, with next to nothing to do.
PPO = "--iterations 1 --rollouts 8 --minibatch 8 --warmup 0 --max_new_tokens 8"
SMALL = {
    "sft.py": "--epochs 1 --warmup 0",
    "collect.py": "--n_prompts 4 --max_new_tokens 8",
    "reward_model.py": "--warmup 0 --normalise_samples 8 --max_new_tokens 8",
    "ppo.py": PPO,
    "grpo.py": PPO,
    "dpo.py": "--warmup 0 --max_new_tokens 8",
    "evaluate.py": "--n_prompts 4 --best_of 1 2 --max_new_tokens 8",
    "sample.py": "--max_new_tokens 8",
    "tools.bench": "--size tiny --stages sft --repeats 1 --batch_size 4 --micro_batch 2",
    "tools.plan": "--sizes gpt2",
    "study.run": "--commands",
    "study.best_of_n": "--n_prompts 2 --best_of 1 2 --max_new_tokens 8",
    "study.implicit": "--n_prompts 4",
}
# Not run here, but their flags are read: these need a network, or a person, or what was not run either ...
NEEDS_MORE = ("--annotator web", "--annotator human", "gpt2", "out/real", "out/mine/sft", "--tokenizer", "annotate")
# ... or time
NEEDS_TIME = ("tests/", "pytest", "tools.prepare", "make_vocab")


def commands() -> list[str]:
    """What starts with python in the blocks, and between single backquotes when it names a script."""
    found = []
    for text in PAGES.values():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if language in ("python", "json"):
                continue
            found += [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
        found += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    starts = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?python (?:-m )?\S+")
    return list(
        dict.fromkeys(c for c in found if starts.match(c) and "FILE" not in c and "..." not in c and "RUN" not in c)
    )


def script_of(command: str) -> tuple[str, list[str], dict[str, str]]:
    """A command -> its script or module, its arguments, and what stands before it (NAME=value)."""
    words, environment = shlex.split(command), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    words = words[2:] if words[1] == "-m" else words[1:]
    return words[0], words[1:], environment


def test_there_are_commands():
    """A pattern that finds nothing passes everything."""
    assert len(commands()) >= 80


@pytest.mark.parametrize("command", commands())
def test_a_command_has_flags_that_its_script_knows(command):
    """A flag that was renamed, a value out of range: the reader's first command ends in an error."""
    script, arguments, _ = script_of(command)
    if script == "study.broken" and arguments:
        from study.broken import BROKEN

        assert arguments[0] in BROKEN
        script, arguments = arguments[1], arguments[2:]
    name = script.removesuffix(".py").replace("/", ".")
    if script in OWN_FILES or "--help" in arguments:
        return
    if name.startswith("tests") or script == "pytest":
        assert script == "pytest" or (ROOT / script).exists()
        return
    module = importlib.import_module(name)
    if hasattr(module, "Config") and name not in ("study.broken", "tools.prepare", "tools.annotate"):
        check_ranges(parse_config(module.Config, "", arguments))


RUNNER = """
import json, os, runpy, sys, time
import torch, torch._dynamo, tiktoken, matplotlib.figure
torch.set_num_threads(1)
failed = []
for command, words, environment in json.load(open(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        status = 0
        try:
            sys.argv = words[1:] if words[0] == "-m" else words
            sys.path[0] = os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.abspath(words[0]))
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            print(end.code)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    if os.waitpid(pid, 0)[1]:
        failed.append(command + "\\n" + open("log.txt", encoding="utf-8").read()[-1500:])
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A copy of the project with what the commands start from: a small run of the demo, and files of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    for source in ("data", "lib", "tools", "study", "runs", "assets", "docs"):
        shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
    for source in ROOT.glob("*.py"):
        shutil.copy(source, folder)
    for name, code in OWN_FILES.items():
        (folder / name).write_text(code, encoding="utf-8")
    prepare = [
        "data.tiny --demonstrations 200 --held_out_demonstrations 20 --prompts 100 --held_out_prompts 20",
        "sft.py --data out/data/demonstrations.jsonl --out_dir out/sft --n_layer 2 --n_embd 32 --warmup 0 --epochs 1",
        "collect.py --n_prompts 32 --max_new_tokens 8",
        "collect.py --n_prompts 16 --max_new_tokens 8 --prompts out/data/prompts_held_out.jsonl",
        f"reward_model.py {SMALL['reward_model.py']}",
        f"ppo.py {PPO}",
        f"grpo.py {PPO}",
        f"dpo.py {SMALL['dpo.py']}",
        f"evaluate.py {SMALL['evaluate.py']}",
    ]
    failed = run_all([f"python {'-m ' if c.startswith('data') else ''}{c}" for c in prepare], folder, small=False)
    assert not failed, failed[0]
    for name in ("rm1", "rm2", "rm3"):
        shutil.copytree(folder / "out/reward_model", folder / "out" / name)
    for name in ("prompts.jsonl", "prompts_held_out.jsonl"):
        shutil.copy(folder / "out/data" / name, folder)
    return folder


def run_all(chosen: list[str], folder: Path, small: bool = True) -> list[str]:
    """Run commands one after the other in the folder -> those that failed, with the end of what they printed."""
    jobs = []
    for command in chosen:
        script, arguments, environment = script_of(command.replace(PUBLISHED, SMALL_POLICY))
        key = arguments[1] if script == "study.broken" and arguments else script
        extra = shlex.split(SMALL.get(key, "")) if small else []
        extra += ["--train_layers", "1"] if "--train_layers" in arguments and key != "tools.plan" else []
        if small and key == "sft.py" and "--init" not in arguments:
            extra += ["--n_layer", "2", "--n_embd", "32"]
        module = " -m " in command
        jobs.append((command, [*(["-m"] if module else []), script, *arguments, *extra], environment))
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    (folder / "runner.py").write_text(RUNNER, encoding="utf-8")
    environment = dict(os.environ, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="2000")
    done = subprocess.run(
        [sys.executable, "runner.py", "jobs.json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="one process imports torch for all of them, by fork")
def test_every_command_runs(scratch):
    """A command that was right when it was written. Left out: what needs a network, a person or many minutes."""
    chosen = [c for c in commands() if not any(word in c for word in (*NEEDS_MORE, *NEEDS_TIME))]
    failed = run_all(chosen, scratch)
    assert not failed, "\n\n".join(failed)
    assert len(chosen) >= 20


def test_make_targets_and_scripts_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z0-9]+)\b(?=[^\n]*[`#]|\s{2})", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"bash (\S+\.sh)", TEXT):
        assert (ROOT / script).exists(), script


def anchor(title: str) -> str:
    """GitHub's: lower case, punctuation gone, blanks to hyphens."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-")


def test_links_lead_somewhere():
    """A figure that was renamed; a section that moved."""
    anchors = {p: {anchor(title) for title in re.findall(r"^#+ (.+)$", t, re.MULTILINE)} for p, t in PAGES.items()}
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, place = target.partition("#")
            if not target.startswith("http"):
                there = (path.parent / file).resolve() if file else path
                assert there.exists(), f"{path.name}: {target}"
                assert not place or place in anchors[there], f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_can_be_found_left_and_finished(path):
    """README.md lists every page, every page links back, and none is longer than what one reads in one sitting."""
    readme, text = ROOT / "README.md", PAGES[path]
    assert len(text.splitlines()) <= (300 if path == readme else 400)
    if path != readme:
        assert f"](docs/{path.name})" in PAGES[readme]
        assert "](../README.md" in "\n".join(text.splitlines()[:8])


def test_the_table_of_metrics_is_read_whole():
    """A row that the pattern misses has no title, unit or band in the plots and the report."""
    section = PAGES[ROOT / "docs" / "tuning.md"].split("## Reading the metrics")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in section.splitlines() if line.startswith("| `")]
    assert [row[0].strip("|` ") for row in rows] == list(METRICS) and len(rows) > 30
    for row, metric in zip(rows, METRICS.values(), strict=True):
        assert row[1] == (metric.unit or "-") and row[3].removesuffix(" |") == metric.explanation
        shown = "-" if metric.low is None else f"{metric.low:g} to {metric.high:g}"
        assert row[2] == shown


def test_functions_and_tests_that_it_names_are_there():
    """The pages point at lines of code and at tests: `function` in file.py, `test_x.py`, `test_that_this_is_so`."""
    named = re.findall(r"`(\w+)` in `?([\w/]+\.py)", TEXT)
    assert len(named) >= 30
    for name, file in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:\s*(?:def|class) )?{name}\b", source, re.MULTILINE), f"{name} in {file}"
    tests = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py")}
    guarded = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    for test in set(re.findall(r"`(?:tests/)?(test_\w+\.py)\b", TEXT + guarded)):
        assert test in tests, test
    for test in set(re.findall(r"(?:`|::)(test_\w+)`", TEXT + guarded)):
        assert any(f"def {test}(" in source for source in tests.values()), test


def test_the_tables_of_the_study_are_those_of_its_results():
    """Numbers copied by hand go stale in silence. `python -m study.tables` brings them up to date."""
    results = json.loads((ROOT / "study" / "results.json").read_text(encoding="utf-8"))
    assert PAGES[ROOT / "docs" / "study.md"] == tables.document(results)
