"""The campaign of mutations itself, on a project of two functions: what counts as killed, and what is refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from textwrap import indent

import mutate
import mutations
import pytest
from mutate import Mutation

SOURCE = '''\
LIMIT = 4


def double(x):
    """Two of them."""
    return 2 * x


class Half:
    limit = 4

    @staticmethod
    def half(x):
        """One of two."""
        if x % 2:
            raise ValueError(x)
        return x // 2  # of the whole
'''
TESTS = """\
import pytest
import source


def test_double():
    assert source.double(3) == 6


@pytest.mark.slow
def test_half():
    assert source.Half.half(4) == 2
"""
T = "test_source.py"
KILLED = f"""
# double
- 2 * x
+ 3 * x
! triples
? {T}
"""
SURVIVES = f"""
# Half.half
- x // 2
+ x // 4
! halves twice
? {T}::test_double
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests" / "mutations").mkdir(parents=True)
    (tmp_path / "source.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "tests" / T).write_text(TESTS, encoding="utf-8")
    return tmp_path


def write(project: Path, text: str, file: str = "source.py") -> list[Mutation]:
    path = (project / "tests" / "mutations" / file).with_suffix(".txt")
    path.write_text(f"{file}\n{text}", encoding="utf-8")
    return mutations.read_mutations(project)


def bug(right: str, wrong: str | None, function: str = "double") -> str:
    """A mutation as it is written."""
    lines = [f"- {line}" for line in right.split("\n")]
    lines += [f"+ {line}" for line in wrong.split("\n")] if wrong is not None else []
    return "\n".join([f"# {function}", *lines, "! effect", f"? {T}", ""])


@pytest.mark.slow
def test_all_killed_is_status_0_and_a_survivor_status_1(project, capsys):
    """A test that is marked slow counts as well as the others, even if the project's settings leave it out."""
    (project / "pytest.ini").write_text("[pytest]\naddopts = -m 'not slow'\nmarkers = slow\n", encoding="utf-8")
    write(project, KILLED + SURVIVES.replace("double", "half"))
    assert mutate.main([], project) == 0
    out = capsys.readouterr().out
    assert "killed by test_source.py::test_double" in out and "killed by test_source.py::test_half" in out
    assert "2 of 2 mutations killed" in out and "2 of 2 done, about 0.0 min left" in out

    write(project, KILLED + SURVIVES)
    assert mutate.main([], project) == 1
    out = capsys.readouterr().out
    assert "1 of 2 mutations killed" in out
    assert "NOT KILLED: 2 source.py Half.half: 'x // 2' -> 'x // 4': SURVIVED (tests/mutations/source.txt:10)" in out
    assert (project / "source.py").read_text(encoding="utf-8") == SOURCE  # only copies are changed


def test_a_red_baseline_is_refused(project, capsys):
    """With a test that is red anyway, everything would count as killed."""
    tests = project / "tests" / T
    tests.write_text(TESTS + "\n\ndef test_red():\n    assert source.double(2) == 5\n", encoding="utf-8")
    write(project, KILLED)
    assert mutate.main([], project) == 2
    out = capsys.readouterr().out
    assert f"RED: {T}: test_source.py::test_red" in out and "Not started" in out and "killed" not in out

    write(project, KILLED.replace(T, f"{T}::test_double"))  # does not run the red one
    assert mutate.main([], project) == 0


STALE = {
    "there is no such function": bug("x", "y", "triple"),
    "'5 * x' isn't there": bug("5 * x", "3 * x"),
    "'x' stands there 2 times": bug("x", "y"),  # as often as in the function, not in the file
    "'x % 2 return' isn't there": bug("x % 2\nreturn", "0", "Half.half"),
    "there is no test test_source.py::test_gone": KILLED.replace(T, f"{T}::test_gone"),
    "there is no test test_gone.py": KILLED.replace(T, "test_gone.py"),
    "it changes nothing": bug("2 * x", "2 * x"),
    "it doesn't compile (": bug("2 * x", "2 *"),
}


@pytest.mark.parametrize("why", STALE)
def test_what_does_not_fit_is_one_line(project, capsys, why):
    """Where it is written, and why it does not fit; the other mutations say nothing."""
    write(project, KILLED + "\n" + STALE[why].lstrip())
    assert mutate.main(["--check"], project) == 1
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith(("STALE source.py ", "BROKEN source.py ")) and line.endswith(
        "(tests/mutations/source.txt:10)"
    )
    assert why in line and summary == "1 of 2 mutations fit the code"


def test_what_proves_nothing_is_no_kill(project, capsys):
    """A bug that can't be imported, and one whose file is gone."""
    write(project, bug("LIMIT = 4", "LIMIT = 1 / 0", "module"))
    write(project, KILLED, "gone.py")
    assert mutate.main([], project) == 1
    out = capsys.readouterr().out
    assert "STALE gone.py double: there is no such file (tests/mutations/gone.txt:4)" in out
    assert "BROKEN: pytest ended with 2" in out and "0 of 2 mutations killed" in out


@pytest.mark.parametrize(
    "text, line",
    [
        ("- x\n+ y\n? test\n", 4),
        ("- x\n+ y\n! effect\n", 4),
        ("+ y\n- x\n! effect\n? test\n", 5),
        ("- x\n\n+ y\n! effect\n? test\n", 2),
        ("- x\n+ y\n! effect\n! effect\n? test\n", 6),
        ("double\n- x\n+ y\n! effect\n? test\n", 2),
        ("-x\n+ y\n! effect\n? test\n", 2),
    ],
)
def test_what_can_not_be_read_is_located(project, capsys, text, line):
    (project / "tests" / "mutations" / "source.txt").write_text(f"source.py\n{text}", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        mutate.main(["--check"], project)
    assert end.value.code == 2 and f"tests/mutations/source.txt:{line}: " in capsys.readouterr().err


def test_a_file_bears_the_name_of_its_source(project):
    (project / "tests" / "mutations" / "other.txt").write_text("source.py\n" + KILLED, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.txt:1: .*'source\.py'"):
        mutations.read_mutations(project)


PLACES = [
    ("module", "4", "5", "LIMIT = 4", "LIMIT = 5"),
    ("Half", "4", "5", "limit = 4", "limit = 5"),
    ("double", "2 * x", "3 * x", "2 * x", "3 * x"),
    ("Half.half", "@staticmethod\ndef half(x", "def half(self, x", "@staticmethod\n    def half(x", "def half(self, x"),
    ("Half.half", "    (x)\nreturn", "    ()\nreturn -", "(x)\n        return", "()\n        return -"),
    ("Half.half", "return x", "y = x\nreturn y", "return x", "y = x\n        return y"),
    ("Half.half", "if x % 2:\n    raise", "raise", "if x % 2:\n            raise", "raise"),
    ("Half.half", "return x", None, "        return x // 2  # of the whole\n", ""),
]


@pytest.mark.parametrize("function, right, wrong, old, new", PLACES)
def test_the_bug_stands_where_the_piece_stood(project, function, right, wrong, old, new):
    """A piece is found in its function, whatever is new there or stands elsewhere, and however far it is indented."""

    def grown(text: str) -> str:
        text = text.replace("Two of them.", "Twice.").replace('two."""', 'two."""\n        assert x')
        return f"if True:\n{indent(text, '    ')}\n\nclass Other:\n{indent(SOURCE, '    ')}"

    [mutation] = write(project, bug(right, wrong, function))
    for change in (str, grown):
        (project / "source.py").write_text(change(SOURCE), encoding="utf-8")
        assert SOURCE.count(old) == 1
        assert mutate.broken_source(mutation, project) == change(SOURCE.replace(old, new))


def test_a_file_of_another_language_has_no_functions(project):
    (project / "page.html").write_text("<p>\n  <b>left</b>\n</p>\n", encoding="utf-8")
    [mutation] = write(project, bug("<b>left", "<b>right").partition("\n")[2], "page.html")
    assert mutate.broken_source(mutation, project) == "<p>\n  <b>right</b>\n</p>\n"


def test_an_endless_loop_is_killed_by_time(project, capsys):
    write(project, bug("return 2 * x", "while True:\n    pass"))
    assert mutate.main(["--limit", "1"], project) == 0
    assert "killed by time" in capsys.readouterr().out


def test_without_fork(project, capsys, monkeypatch):
    """Where the system can't fork, the children start anew: the same verdicts."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    write(project, KILLED + SURVIVES)
    assert mutate.main([], project) == 1
    assert "killed by test_source.py::test_double" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["-h"], ["--list"], ["--check"], ["--unknown"], ["--jobs", "0"], ["999999"], ["nowhere-to-be-found"]],
)
def test_nothing_starts_unless_asked(argv, monkeypatch, capsys):
    """--check is also the test that every mutation fits the code."""
    monkeypatch.setattr(mutate, "run_all", lambda *args, **kwargs: pytest.fail("something was started"))
    if argv in (["--list"], ["--check"]):
        status, out = mutate.main(argv), capsys.readouterr().out
        assert status == 0, out
        assert len(out.splitlines()) == (len(mutations.read_mutations(mutate.ROOT)) if argv == ["--list"] else 1)
        return
    with pytest.raises(SystemExit) as end:
        mutate.main(argv)
    assert end.value.code == (0 if argv[0] in ("--help", "-h") else 2)


def test_numbers_files_and_words_choose():
    """A number, a range, a file, words in any field and in any case; together they add up, in the order of the list."""
    texts = ["KL sign", "advantages", "kl direction", "Gae"]
    found = [Mutation("", f"f{i}.py", "f", ["right"], [f"wrong{i}"], text, [T]) for i, text in enumerate(texts)]
    found[3].effect += " of f1.py"
    for words, numbers in (
        ([], [1, 2, 3, 4]),
        (["2"], [2]),
        (["2-3"], [2, 3]),
        (["kl"], [1, 3]),
        (["GAE", "1"], [1, 4]),
        (["f1.py"], [2]),
        (["wrong2", "kl", "f1.py"], [1, 2, 3]),
    ):
        assert [i + 1 for i in mutate.choose(words, found)] == numbers, words
    for wrong in ("0", "5", "3-2", "2-9", "nowhere"):
        with pytest.raises(ValueError, match=wrong):
            mutate.choose([wrong], found)
