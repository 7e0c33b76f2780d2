"""The bugs that mutate.py puts in, one at a time: how they are written, and where each fits into the code.

Each text file in this folder belongs to one source file, lib/run.txt to lib/run.py; its first line names that file.

    ppo.py

    # shaped_rewards
    - last = torch.where(mask, slots, -1).amax(1)
    + last = torch.full_like(mask[:, 0], mask.size(1) - 1)
    ! the score lands on filler, where only the longest row notices it
    ? test_ppo_math.py::test_the_score_lands_on_the_last_action_only

`#`  where the bug is: a function, Class.method, Class (what is in it outside of its methods), or `module` (what is
     outside of all functions and classes). It holds until the next `#`. Files other than Python have none.
`-`  the code as it is: a part of a line, or several lines. It must stand in that function once.
`+`  the bug in its place. Without it, the lines in which the piece stands are left out.
`!`  what the bug would do to a training run, in one line
`?`  a test that should notice. Several are run in this order until one fails.

How far a function is indented doesn't matter: of the indentation only the differences between the lines of a mutation
count. An empty line ends a mutation.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Mutation:
    place: str  # where it is written, such as tests/mutations/ppo.txt:4
    file: str  # the file that it changes
    function: str
    right: list[str]  # the lines of the piece
    wrong: list[str]  # those of the bug
    effect: str
    tests: list[str]


def read_mutations(root: Path) -> list[Mutation]:
    """All mutations of the project in `root`, file by file. ValueError names the first line that is wrong."""
    folder, found = root / "tests" / "mutations", []
    for path in sorted(folder.rglob("*.txt")):
        name = path.relative_to(root).as_posix()
        file, *lines = path.read_text(encoding="utf-8").split("\n")
        if path != (folder / file).with_suffix(".txt"):
            raise ValueError(f"{name}:1: the mutations of {file!r} belong into {Path(file).with_suffix('.txt')}")
        function, block = "", []  # the lines of a mutation so far
        for n, line in enumerate([*lines, ""], start=2):
            if re.match("[-+!?]( |$)", line):
                block.append(line)
                continue
            if block:  # it is complete
                if not re.fullmatch(r"-+\+*!\?+", "".join(entry[0] for entry in block)):
                    raise ValueError(f"{name}:{n - 1}: the lines of a mutation are - + ! ? in this order")
                right, wrong, [effect], tests = ([b[2:] for b in block if b[0] == sign] for sign in "-+!?")
                found.append(Mutation(f"{name}:{n - len(block)}", file, function, right, wrong, effect, tests))
                block = []
            if line.startswith("# "):
                function = line[2:]
            elif line.strip():
                raise ValueError(f"{name}:{n}: a line begins with # - + ! or ? and a space, not with {line[:40]!r}")
    return found


def definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The functions and classes of a module, class or function, without those inside of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
        else:  # an `if`, for example
            yield from definitions(child)


@functools.cache
def lines_of(function: str, source: str) -> set[int]:
    """The numbers of the lines that belong to it, the first being 0; none if there is no such function."""

    def lines(node: ast.AST) -> set[int]:
        if isinstance(node, ast.Module):
            return set(range(source.count("\n") + 1))
        first = min(part.lineno for part in (node, *node.decorator_list))
        return set(range(first - 1, node.end_lineno))

    nodes = [ast.parse(source)]
    for name in function.split(".") if function != "module" else []:
        nodes = [d for node in nodes for d in definitions(node) if d.name == name]
    found = set()
    for node in nodes:  # several if a property can be read and set
        found |= lines(node)
        if isinstance(node, (ast.Module, ast.ClassDef)):
            found = found.difference(*map(lines, definitions(node)))
    return found


def indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def shifted(lines: list[str], by: int) -> str:
    """The lines, each `by` places further to the right."""
    return "\n".join(" " * (indent(line) + by) + line.lstrip(" ") if line else "" for line in lines)


def sources_with_bug(mutation: Mutation, source: str) -> list[str]:
    """The source with the bug in it, once for each place in the function where the piece stands."""
    lines, found = source.split("\n"), []
    scope = lines_of(mutation.function, source) if mutation.file.endswith(".py") else set(range(len(lines)))
    for first in sorted(scope):
        end = first + len(mutation.right)
        if not scope.issuperset(range(first, end)):
            continue
        # as they would be indented if the piece began in this line
        by = indent(lines[first]) - indent(mutation.right[0])
        right, wrong = shifted(mutation.right, by).lstrip(" "), shifted(mutation.wrong, by)
        text = "\n".join(lines[first:end])
        for match in re.finditer(re.escape(right), text):
            before, after = text[: match.start()], text[match.end() :]
            bug = before + wrong.lstrip(" ") if before.strip() else wrong
            found.append("\n".join(lines[:first] + ([bug + after] if mutation.wrong else []) + lines[end:]))
    return found


def broken_source(mutation: Mutation, root: Path) -> str:
    """The file's text with the bug in it. ValueError says in one line why there is none."""

    def stop(why: str, kind: str = "STALE"):
        where = f"{mutation.file} {mutation.function}".rstrip()
        raise ValueError(f"{kind} {where}: {why} ({mutation.place})")

    path = root / mutation.file
    if not path.exists():
        stop("there is no such file")
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py" and not lines_of(mutation.function, source):
        stop("there is no such function")
    texts, piece = sources_with_bug(mutation, source), repr(" ".join(mutation.right)[:60])
    if not texts:
        stop(f"{piece} isn't there")
    if len(texts) > 1:
        stop(f"{piece} stands there {len(texts)} times")
    if texts[0] == source:
        stop("it changes nothing", "BROKEN")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        file = root / "tests" / file
        if not file.exists() or f"def {name.partition('[')[0]}" not in file.read_text(encoding="utf-8"):
            stop(f"there is no test {test}")
    if path.suffix == ".py":
        try:
            compile(texts[0], mutation.file, "exec", dont_inherit=True)
        except SyntaxError as error:
            stop(f"it doesn't compile ({error})", "BROKEN")
    return texts[0]
