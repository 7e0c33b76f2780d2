"""The campaign of mutations itself, on a project of two functions: what counts as killed, and what is refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import mutate
import pytest
from mutate import Mutation

SOURCE = """\
def double(x):
    return 2 * x


def half(x):
    assert x % 2 == 0
    return x // 2
"""
TESTS = """\
import pytest
import source


def test_double():
    assert source.double(3) == 6


@pytest.mark.slow
def test_half():
    assert source.half(4) == 2
"""
T = "tests/test_source.py"
KILLED = Mutation("source.py", "2 * x", "3 * x", "triples", T)
HALF = ("source.py", "x // 2", "x // 4", "halves twice")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "source.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / T).write_text(TESTS, encoding="utf-8")
    return tmp_path


def test_all_killed_is_status_0_and_a_survivor_status_1(project, capsys):
    """The same bug survives where only quick tests run, and is killed where the mutation asks for the slow ones."""
    slow = Mutation(*HALF, T, slow=True)
    assert mutate.main([], project, [KILLED, slow]) == 0
    out = capsys.readouterr().out
    assert "killed by test_source.py::test_double" in out and "killed by test_source.py::test_half" in out
    assert "2 of 2 mutations killed" in out and "2 of 2 done, about 0.0 min left" in out

    assert mutate.main([], project, [KILLED, Mutation(*HALF, T)]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 mutations killed" in out and "NOT KILLED: 2 source.py: 'x // 2' -> 'x // 4': SURVIVED" in out
    assert (project / "source.py").read_text(encoding="utf-8") == SOURCE  # only copies are changed


def test_a_red_baseline_is_refused(project, capsys):
    """With a test that is red anyway, everything would count as killed. A test that doesn't exist is as bad."""
    (project / T).write_text(TESTS + "\n\ndef test_red():\n    assert source.double(2) == 5\n", encoding="utf-8")
    assert mutate.main([], project, [KILLED]) == 2
    out = capsys.readouterr().out
    assert f"RED: {T}: test_source.py::test_red" in out and "Not started" in out and "killed" not in out

    only = Mutation("source.py", "2 * x", "3 * x", "triples", f"{T}::test_double")  # does not run the red one
    assert mutate.main([], project, [only]) == 0
    nowhere = Mutation("source.py", "2 * x", "3 * x", "triples", f"{T}::test_nowhere")
    assert mutate.main([], project, [nowhere]) == 2
    assert f"RED: {T}::test_nowhere" in capsys.readouterr().out


def test_what_proves_nothing_is_no_kill(project, capsys):
    """A line that is gone, one that stands there twice, a bug that doesn't compile or can't be imported."""
    bad = [
        Mutation("source.py", "5 * x", "3 * x", "", T),
        Mutation("gone.py", "2 * x", "3 * x", "", T),
        Mutation("source.py", "return", "print", "", T),
        Mutation("source.py", "2 * x", "2 *", "", T),
        Mutation("source.py", "def double", "1 / 0\ndef double", "", T),
    ]
    assert mutate.main([], project, bad) == 1
    out = capsys.readouterr().out
    assert "STALE: the line it changes is no longer there" in out and "STALE: the file it changes" in out
    assert (
        "stands there 2 times" in out and "BROKEN: it doesn't compile" in out and "BROKEN: pytest ended with 2" in out
    )
    assert "0 of 5 mutations killed" in out


def test_which_of_several_places(project):
    first, second, third = (Mutation("source.py", "return", "yield", "", T, which=n) for n in (1, 2, 3))
    assert mutate.broken_source(first, project) == SOURCE.replace("return 2", "yield 2")
    assert mutate.broken_source(second, project) == SOURCE.replace("return x", "yield x")
    with pytest.raises(ValueError, match=r"STALE.*2 times.*number 3"):
        mutate.broken_source(third, project)


def test_an_endless_loop_is_killed_by_time(project, capsys):
    endless = Mutation("source.py", "    return 2 * x", "    while True:\n        pass", "never ends", T)
    assert mutate.main(["--limit", "1"], project, [endless]) == 0
    assert "killed by time" in capsys.readouterr().out


def test_without_fork(project, capsys, monkeypatch):
    """Where the system can't fork, the children start anew: the same verdicts."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert mutate.main([], project, [KILLED, Mutation(*HALF, T)]) == 1
    assert "killed by test_source.py::test_double" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["--list"], ["--unknown"], ["--jobs", "0"], ["999"], ["nowhere-to-be-found"]]
)
def test_nothing_starts_unless_asked(argv, monkeypatch, capsys):
    monkeypatch.setattr(mutate, "run_all", lambda *args, **kwargs: pytest.fail("something was started"))
    if argv == ["--list"]:
        assert mutate.main(argv) == 0
        assert len(capsys.readouterr().out.splitlines()) == len(mutate.MUTATIONS)
        return
    with pytest.raises(SystemExit) as end:
        mutate.main(argv)
    assert end.value.code == (0 if argv[0] in ("--help", "-h") else 2)


def test_numbers_and_words_choose():
    """A number, a range, words in any field and in any case; together they add up, in the order of the list."""
    texts = ["KL sign", "advantages", "kl direction", "Gae"]
    mutations = [Mutation(f"f{i}.py", "right", f"wrong{i}", text, T) for i, text in enumerate(texts)]
    for words, numbers in (
        ([], [1, 2, 3, 4]),
        (["2"], [2]),
        (["2-3"], [2, 3]),
        (["kl"], [1, 3]),
        (["GAE", "1"], [1, 4]),
        (["wrong2", "kl", "f1.py"], [1, 2, 3]),
    ):
        assert [i + 1 for i in mutate.choose(words, mutations)] == numbers, words
    for wrong in ("0", "5", "3-2", "2-9", "nowhere"):
        with pytest.raises(ValueError, match=wrong):
            mutate.choose([wrong], mutations)
