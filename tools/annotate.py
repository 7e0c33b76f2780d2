"""People rank completions, in the terminal or in the browser. And how far they agree: with each other, and each with
herself when she ranks the same completions twice.

    python -m tools.annotate anna.jsonl ben.jsonl                       # agreement
    python -m tools.annotate anna.jsonl ben.jsonl --out merged.jsonl    # and one file of all their rankings

collect.py samples the completions and asks the person (`--annotator human` or `--annotator web`). Her answers are in
two files. An answer is one line, and it is on the disk before the next item is shown:

    anna.jsonl          rankings as every stage reads them (data/files.py), with three fields more: "annotator", her
                        name; "answer": N for her N-th answer; "shown", each completion's place on the screen
    anna.jsonl.aside    what no stage may learn from: {"repeat": row} for an item that was shown a second time,
                        {"skip": row} and {"repeat_skip": row} for one that was skipped (the row ties everything)

These files and the samples determine what is asked next. So a killed program goes on where it was, "undo" removes the
line of the last answer, and removing both files starts anew.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from lib.cli import Flags, UserError, check, flag, run_main
from data.files import mend_last_line, nest_ties, parse_ranking, prompt_json, read_jsonl, replacing, turns_of
from data.files import write_jsonl

GAP = 10  # least number of rankings between the two times that an item is shown
GAP_AT_THE_END = 3  # the same when nothing else is left to show; the very last items are not shown again
AHEAD = 2  # the next items are sampled when so many are left on the page, so nobody waits for them


class Sample(NamedTuple):
    text: str
    ended: bool  # False: cut by --max_new_tokens


class Item(NamedTuple):
    """A prompt and the samples to rank. Equal samples are shown once and tie: a text can't be better than itself."""

    prompt: str
    samples: list[Sample]
    again: bool = False  # it is shown for the second time

    @property
    def shown(self) -> list[Sample]:
        return list(dict.fromkeys(self.samples))


class Answer(NamedTuple):
    kind: str  # ranking, skip, repeat or repeat_skip
    number: int
    item: Item
    ranks: list[int]  # of item.shown; 0 is best, equal ranks tie


# -------------------------------------------------------------------------------- the two files


def aside_of(path: Path) -> Path:
    return path.with_name(path.name + ".aside")


def row_of(item: Item, ranks: list[int], number: int, annotator: str) -> dict:
    """An answer as a line of a rankings file. ranks: of item.shown."""
    shown = item.shown
    rank_of = dict(zip(shown, ranks, strict=True))
    best_first = sorted(item.samples, key=lambda s: rank_of[s])
    row = {"prompt": prompt_json(item.prompt)}
    row["completions"] = nest_ties([s.text for s in best_first], [rank_of[s] for s in best_first])
    row["ended"] = [s.ended for s in best_first]
    row["shown"] = [shown.index(s) + 1 for s in best_first]
    return {**row, **({"annotator": annotator} if annotator else {}), "answer": number}


def answer_of(where: str, kind: str, row: dict) -> Answer:
    """The answer in a line. The inverse of row_of."""
    ranking, places, number = parse_ranking(where, row), row.get("shown"), row.get("answer")
    k = len(ranking.ranks)
    sound = isinstance(places, list) and len(places) == k and all(type(p) is int for p in places)
    check(sound, f'{where}: "shown" must be a list of {k} places on the screen')
    check(type(number) is int, f'{where}: "answer" must be a whole number')
    samples = [Sample(*s) for s in zip(ranking.completions, ranking.ended, strict=True)]
    on_screen = [s for _, s in sorted(zip(places, samples, strict=True), key=lambda pair: pair[0])]
    item = Item(ranking.prompt, on_screen, again=kind.startswith("repeat"))
    rank_of = dict(zip(samples, ranking.ranks, strict=True))
    return Answer(kind, number, item, [rank_of[s] for s in item.shown])


def read_answers(path: Path, annotator: str | None = None) -> tuple[list[Answer], set[str]]:
    """-> (a person's answers in the order in which they were given, all prompts that are ranked in the file).

    A row without "answer", of another tool or of simulated annotators, is no answer, but its prompt is ranked.
    UserError if the file is another person's than the annotator's (None: anybody's)."""
    answers, prompts = [], set()
    for where, row in read_jsonl(path) if path.exists() else ():
        prompts.add(parse_ranking(where, row).prompt)
        if "answer" not in row:
            continue
        by = row.get("annotator", "")
        whose = f"with --annotator_name {by}" if by else "without --annotator_name"
        check(annotator in (None, by), f"{where}: ranked {whose}; go on so, or name a file of your own with --out")
        answers.append(answer_of(where, "ranking", row))
    aside = aside_of(path)
    for where, row in read_jsonl(aside) if aside.exists() else ():
        kind = next(iter(row), None)
        check(
            kind in ("repeat", "skip", "repeat_skip") and isinstance(row[kind], dict), f"{where}: no answer put aside"
        )
        answers.append(answer_of(where, kind, row[kind]))
    return sorted(answers, key=lambda a: a.number), prompts


def append_line(path: Path, row: dict) -> None:
    """Append a line to the file, so that it is on the disk. If that fails: nothing is written, and UserError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise UserError(f"{path}: the answer can't be saved ({error.strerror})") from None


def remove_answer(path: Path, number: int) -> None:
    """Remove the line of a person's N-th answer. At any moment the disk holds the file with it or the file without."""

    def is_the_answer(line: bytes) -> bool:
        row = json.loads(line) if line.strip() else {}
        row = next(iter(row.values())) if len(row) == 1 else row  # the file aside: {kind: row}
        return row.get("answer") == number

    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(line for line in path.read_bytes().splitlines(keepends=True) if not is_the_answer(line))
        file.flush()
        os.fsync(file.fileno())


# -------------------------------------------------------------------------------- what is asked


def comes_again(k: int, share: float) -> bool:
    """Is a person's k-th ranking (from 1) one that is shown a second time? The share of all rankings, evenly spread."""
    return math.floor(k * share + 0.5) > math.floor((k - 1) * share + 0.5)


def in_another_order(item: Item) -> Item:
    """The item for its second time: the same samples in another order."""
    before, now, rng = item.shown, item.shown, random.Random(item.prompt)
    while now == before and len(now) > 1:
        rng.shuffle(now)
    return Item(item.prompt, sorted(item.samples, key=now.index), again=True)


class Session:
    """One person's answers, and the item to ask next. `add` the items as they are sampled and set `complete` after the
    last; `answer` the `current` item, or `undo` the last answer.

    path: the rankings file. prompts: all prompts that will be sampled, for the progress. repeat: the share of the
    rankings to ask a second time. Raises UserError if a file is another person's, or damaged."""

    def __init__(self, path: str | Path, prompts: Iterable[str], annotator: str = "", repeat: float = 0.0) -> None:
        self.path, self.aside = Path(path), aside_of(Path(path))
        self.annotator, self.repeat = annotator, repeat
        for file in (self.path, self.aside):
            mend_last_line(file)
        self.answers, self.done = read_answers(self.path, annotator)
        self.done |= {a.item.prompt for a in self.answers}  # also those that were skipped
        self.prompts = list(dict.fromkeys(prompts))
        self.queue: list[Item] = []
        self.complete = False
        self.rankings_at_start = len(self.of_kind("ranking"))
        self.sizes = self.sizes_now()

    def of_kind(self, *kinds: str) -> list[Answer]:
        """The answers of these kinds."""
        return [a for a in self.answers if a.kind in kinds]

    @property
    def written(self) -> int:
        """Number of rankings that this run has added to the file."""
        return len(self.of_kind("ranking")) - self.rankings_at_start

    def sizes_now(self) -> list[int]:
        return [file.stat().st_size if file.exists() else 0 for file in (self.path, self.aside)]

    def add(self, items: Iterable[tuple[str, list[Sample]]]) -> None:
        """Add (prompt, samples) to what is to be ranked."""
        for item in itertools.starmap(Item, items):
            if len(item.shown) == 1:  # all samples are the same: nothing to rank
                self.done.add(item.prompt)
            self.queue.append(item)

    def left(self) -> list[Item]:
        """The items that wait for their first answer."""
        return [item for item in self.queue if item.prompt not in self.done]

    def current(self) -> Item | None:
        """The item to show. None: all items that were added are answered."""
        left = self.left()
        rankings = self.of_kind("ranking")
        repeated = {a.item.prompt for a in self.of_kind("repeat", "repeat_skip")}
        gap = GAP_AT_THE_END if self.complete and not left else GAP
        for k, first in enumerate(rankings[: max(0, len(rankings) - gap)], start=1):
            if comes_again(k, self.repeat) and first.item.prompt not in repeated:
                return in_another_order(first.item)
        return left[0] if left else None

    def progress(self) -> tuple[int, int]:
        """(5, 20): the fifth of 20 items is current. Second times count like the others, so that they stay unmarked."""
        left = sum(p not in self.done for p in self.prompts)
        last = len(self.of_kind("ranking")) + left - GAP_AT_THE_END  # the last ranking that may come again
        repeats = sum(comes_again(k, self.repeat) for k in range(1, last + 1))
        waiting = max(0, repeats - len(self.of_kind("repeat", "repeat_skip")))
        return len(self.answers) + 1, len(self.answers) + left + waiting

    def answer(self, ranks: list[int] | None) -> None:
        """Save the ranks of current().shown (None: it was skipped) and go on to the next item."""
        self.check_untouched()
        item = self.current()
        assert item is not None
        kind = "ranking" if ranks is not None else "skip"
        if item.again:
            kind = "repeat" if ranks is not None else "repeat_skip"
        ranks = ranks if ranks is not None else [0] * len(item.shown)
        number = self.answers[-1].number + 1 if self.answers else 1
        row = row_of(item, ranks, number, self.annotator)
        append_line(*((self.path, row) if kind == "ranking" else (self.aside, {kind: row})))
        self.answers.append(Answer(kind, number, item, ranks))
        self.done.add(item.prompt)
        self.sizes = self.sizes_now()

    def undo(self) -> bool:
        """Take the last answer back, so that its item is current again. False: there is none."""
        if not self.answers:
            return False
        self.check_untouched()
        last = self.answers[-1]
        remove_answer(self.path if last.kind == "ranking" else self.aside, last.number)
        self.answers.pop()
        if not last.item.again:
            self.done.discard(last.item.prompt)
            # to the front of the queue, where it may be missing: finished chunks are not sampled again after a restart
            self.queue = [last.item, *(i for i in self.queue if i.prompt != last.item.prompt)]
        self.sizes = self.sizes_now()
        return True

    def check_untouched(self) -> None:
        """UserError if another program has written to the files."""
        unchanged = self.sizes_now() == self.sizes
        check(unchanged, f"{self.path} has been changed by another program; end that and start again")

    def report(self) -> str:
        """One line: the number of answers, and the person's agreement with herself."""
        count = {kind: len(self.of_kind(kind)) for kind in ("ranking", "skip", "repeat")}
        done = f"{count['ranking']} ranked, {count['skip']} skipped, {count['repeat']} ranked twice"
        return f"{done}; {describe(self_agreement(self.answers), 'ranked alike both times')}"


# -------------------------------------------------------------------------------- agreement

Ranks = dict[Sample, int]  # ranks of different completions of one prompt


class Agreement(NamedTuple):
    share: float  # share of the pairs of completions that both rankings order alike; a tie is like a tie only
    error: float  # standard error of the share
    pairs: int  # number of pairs of completions
    items: int  # number of items


def pairs_alike(a: Ranks, b: Ranks) -> tuple[int, int]:
    """-> (number of pairs of completions that both rankings order alike, number of pairs)"""
    pairs = list(itertools.combinations(a, 2))
    return sum(sign(a[x] - a[y]) == sign(b[x] - b[y]) for x, y in pairs), len(pairs)


def sign(x: int) -> int:
    """-1, 0 or 1."""
    return (x > 0) - (x < 0)


def agreement(items: Iterable[list[tuple[Ranks, Ranks]]]) -> Agreement:
    """How far rankings agree. items: for each item the pairs of rankings to compare.

    The pairs of completions of one item depend on each other. So the standard error is that of a ratio of sums over
    items, where each item is a cluster: Cochran (1977), Sampling Techniques, 3rd edition, section 3.12. NaN for a
    single item."""
    counts = []  # (pairs alike, pairs) of each item
    for item in items:
        both = [pairs_alike(a, b) for a, b in item]
        counts.append((sum(alike for alike, _ in both), sum(m for _, m in both)))
    counts = [(alike, m) for alike, m in counts if m]
    n, pairs = len(counts), sum(m for _, m in counts)
    if not n:
        return Agreement(math.nan, math.nan, 0, 0)
    share = sum(alike for alike, _ in counts) / pairs
    squares = sum((alike - share * m) ** 2 for alike, m in counts)
    error = math.sqrt(n / (n - 1) * squares) / pairs if n > 1 else math.nan
    return Agreement(share, error, pairs, n)


def self_agreement(answers: list[Answer]) -> Agreement:
    """A person's agreement with herself, on the items that she ranked twice."""
    rankings = {a.item.prompt: a for a in answers if a.kind == "ranking"}
    items = []
    for second in (a for a in answers if a.kind == "repeat"):
        first = rankings.get(second.item.prompt)
        if first and set(first.item.shown) == set(second.item.shown):
            ranks = [dict(zip(a.item.shown, a.ranks, strict=True)) for a in (first, second)]
            items.append([(ranks[0], ranks[1])])
    return agreement(items)


def describe(found: Agreement, what: str) -> str:
    """An agreement in words. what: "ranked alike", or the like."""
    if not found.items:
        return "nothing to compare yet"
    error = "" if math.isnan(found.error) else f" +- {found.error:.1%}"
    items = f"{found.items} item{'s' * (found.items > 1)}"
    return f"{found.share:.1%}{error} of {found.pairs} pairs of completions {what} ({items})"


# -------------------------------------------------------------------------------- in the terminal

HELP = """  2 1=3 4   the second is best, then the first and the third alike, the fourth is worst (also 21=34)
  s         skip this prompt: it won't be asked again
  u         undo: take the previous answer back, then the one before, ...
  q         quit; every answer is saved already, and the same command goes on here"""


def parse_order(answer: str, k: int) -> list[int] | None:
    """A typed order -> the rank of each of k completions: `2 1=3` -> [1, 0, 1]. None unless it names each number
    once."""
    if k < 10:  # every number is one digit, so spaces may be left out
        answer = " ".join(answer.replace(" ", ""))
    groups = [group.split("=") for group in answer.replace(" =", "=").replace("= ", "=").split()]
    flat = [number for group in groups for number in group]
    if sorted(flat) != sorted(str(i) for i in range(1, k + 1)):
        return None
    rank_of = {number: rank for rank, group in enumerate(groups) for number in group}
    return [rank_of[str(i)] for i in range(1, k + 1)]


def printable(text: str) -> str:
    """The text with its control characters written out: a model's text can't move the cursor or colour the screen."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


def show(session: Session, item: Item) -> None:
    """Print the item: its prompt, and its samples with their numbers."""
    print("\nitem {} of {}\n{}".format(*session.progress(), printable(item.prompt)))
    for number, sample in enumerate(item.shown, start=1):
        text = printable(sample.text).replace("\n", "\n     ")
        print(f"  {number}: {text}" + ("" if sample.ended else "   [cut]"))


def in_terminal(session: Session, chunks: Iterator[list[tuple[str, list[Sample]]]]) -> None:
    """Ask in the terminal until every item is answered, or `q`. chunks: the items, as they are sampled."""
    shown = None
    while True:
        item = session.current()
        if item is None and not session.complete:
            items = next(chunks, None)
            session.complete = items is None
            session.add(items or [])
            continue
        if item is None and not session.answers:
            return
        if item and item != shown:
            show(session, item)
        shown = item
        question = "best first, = for ties, ? for help > " if item else "that was the last: Enter ends, u undoes it > "
        try:
            typed = input(question).strip().lower()
        except (EOFError, KeyboardInterrupt):
            typed = "q"
        if typed == "q" or (item is None and typed == ""):
            return
        if typed == "u":
            print("  taken back" if session.undo() else "  there is nothing to undo")
            shown = None
        elif item is None or typed == "?":
            print(HELP)
        elif typed == "s":
            session.answer(None)
        else:
            ranks = parse_order(typed, len(item.shown))
            if ranks is not None:
                session.answer(ranks)
            else:
                example = " ".join(map(str, range(len(item.shown), 0, -1)))
                print(f"  name each of 1..{len(item.shown)} once, for example: {example}")


# -------------------------------------------------------------------------------- in the browser

PAGE = Path(__file__).with_name("annotate.html")
LONGEST_POST = 100_000  # bytes


def page_state(session: Session) -> dict:
    """The JSON object that the page shows. "id" stands for this question: an answer with another id is refused."""
    number, total = session.progress()
    item = session.current()
    state = {"number": number, "total": total, "annotator": session.annotator, "can_undo": bool(session.answers)}
    state["prompt"] = [{"role": role, "text": text} for role, text in turns_of(item.prompt)] if item else None
    state["answers"] = [s._asdict() for s in item.shown] if item else None
    # neither an item nor a report: the next items are being sampled
    state["report"] = session.report() if item is None and session.complete else None
    digest = hashlib.sha256(json.dumps([len(session.answers), state["prompt"], state["answers"]]).encode())
    return {**state, "id": digest.hexdigest()[:16]}


def handle_post(session: Session, action: str, body: bytes) -> tuple[int, str]:
    """Do what the page asks for -> (HTTP status, message to the person)."""
    try:
        sent = json.loads(body)
        given, ranks = sent["id"], sent.get("ranks")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 400, "This is not a request of the page."
    if given != page_state(session)["id"]:
        return 409, "This was answered already, perhaps in another tab. Here is what is to be ranked now."
    if action == "/undo":
        return (200, "Taken back.") if session.undo() else (409, "There is nothing to undo.")
    item = session.current()
    if item is None:
        return 409, "There is nothing to rank now."
    if action == "/skip":
        session.answer(None)
        return 200, ""
    sound = isinstance(ranks, list) and len(ranks) == len(item.shown) and all(type(r) is int for r in ranks)
    if not sound or set(ranks) != set(range(len(set(ranks)))):
        return 400, f"Each of the {len(item.shown)} answers needs a rank 0, 1, ..., the best 0."
    session.answer(ranks)
    return 200, ""


def page_headers(page: bytes) -> dict[str, str]:
    """Headers of every answer. The browser runs only the page's own script and style, known by their hashes, and sends
    requests only to this server, whatever a model's text says."""

    def hash_of(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"

    policy = f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; connect-src 'self'"
    return {
        "Content-Security-Policy": policy + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def make_server(session: Session, turn: threading.Condition, port: int) -> ThreadingHTTPServer:
    """A server of one page on 127.0.0.1. Only the thread that holds `turn` may use the session.

        GET /          the page                         GET /state     page_state; changes nothing
        POST /rank     {"id", "ranks": [...]}           POST /skip, /undo     {"id"}
        a POST returns {"state", "message"}; 409: the id is not that of the state, nothing was done

    Other sites can make a browser send requests to this server. A post of theirs has their Origin. A name of theirs
    that points to 127.0.0.1 (DNS rebinding) is in the Host header. Both get 403."""
    page = PAGE.read_bytes().replace(b"\r\n", b"\n")
    headers = page_headers(page)

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds that a silent connection is kept

        def do_GET(self) -> None:
            if self.is_foreign():
                self.reply(403, {"message": "Open the page under the address that the program printed."})
            elif self.path == "/":
                self.reply(200, page, "text/html; charset=utf-8")
            elif self.path == "/state":
                with turn:
                    state = page_state(session)
                self.reply(200, {"state": state, "message": ""})
            else:
                self.reply(404, {"message": "There is nothing here."})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > LONGEST_POST:
                return self.reply(413, {"message": f"At most {LONGEST_POST} bytes, and their number."})
            body = self.rfile.read(int(length))  # even if it will be refused: unread bytes would reset the connection
            if self.is_foreign():
                return self.reply(403, {"message": "This request comes from another site."})
            if self.path not in ("/rank", "/skip", "/undo"):
                return self.reply(404, {"message": "There is nothing here."})
            with turn:
                try:
                    status, message = handle_post(session, self.path, body)
                except UserError as error:  # the disk is full, or another program writes to the file: nothing was done
                    status, message = 500, str(error)
                state = page_state(session)
                turn.notify_all()
            self.reply(status, {"state": state, "message": message})

        def is_foreign(self) -> bool:
            hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
            origins = [None, *(f"http://{host}" for host in hosts)]  # None: not a browser
            return self.headers.get_all("Host") not in [[host] for host in hosts] or (
                self.command == "POST" and self.headers.get("Origin") not in origins
            )

        def reply(self, status: int, content: bytes | dict, kind: str = "application/json") -> None:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port {port} can't be used ({error.strerror}); choose another") from None


def in_browser(session: Session, chunks: Iterator[list[tuple[str, list[Sample]]]], port: int) -> None:
    """Serve the page until Ctrl-C. chunks: the items; they are sampled in this thread, while the server's threads
    answer."""
    turn = threading.Condition()
    server = make_server(session, turn, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"open {address} in a browser; Ctrl-C here ends, what was sent is saved", flush=True)
    try:
        for items in chunks:
            with turn:
                session.add(items)
                while len(session.left()) > AHEAD:
                    turn.wait(0.5)  # seconds; a wait without end can't be interrupted on Windows
        with turn:
            session.complete = True
            while True:
                turn.wait(0.5)
    except KeyboardInterrupt:
        print()
    finally:
        server.shutdown()
        server.server_close()
        turn.acquire(timeout=5)  # let an answer that has just come in be written


# -------------------------------------------------------------------------------- several people


def read_people(paths: list[Path]) -> tuple[dict[str, dict], list[dict]]:
    """-> ({person: {(prompt, completions): Ranks}}, all rows with the person's name in them).

    A person without a name in the rows gets the file's name. UserError if a person ranks the same completions twice."""
    people: dict[str, dict] = {}
    rows, seen = [], {}
    for path in paths:
        for where, row in read_jsonl(path):
            ranking = parse_ranking(where, row)
            samples = [Sample(*s) for s in zip(ranking.completions, ranking.ended, strict=True)]
            name = str(row.get("annotator") or path)
            key = (ranking.prompt, frozenset(samples))
            first = seen.setdefault((name, key), where)
            check(first == where, f"{where}: {name} has ranked these completions at {first} already")
            people.setdefault(name, {})[key] = dict(zip(samples, ranking.ranks, strict=True))
            rows.append({**row, "annotator": name})
    return people, rows


def compare_people(paths: list[Path], people: dict[str, dict]) -> list[str]:
    """Lines to print: the agreement of each person with herself, of each two people, and of all."""
    lines = [f"{name}: {len(ranked)} rankings" for name, ranked in people.items()]
    for path in paths:
        if aside_of(path).exists():
            answers, _ = read_answers(path)
            lines.append(f"{path} with itself: {describe(self_agreement(answers), 'ranked alike both times')}")
    together: dict = {}
    for one, other in itertools.combinations(people, 2):
        shared = {key: [(people[one][key], people[other][key])] for key in people[one] if key in people[other]}
        lines.append(f"{one} and {other}: {describe(agreement(shared.values()), 'ranked alike')}")
        for key, pair in shared.items():
            together.setdefault(key, []).extend(pair)
    if len(people) > 2:
        lines.append(f"overall: {describe(agreement(together.values()), 'ranked alike')}")
    return lines


@dataclass
class Config(Flags):
    files: list[str] = flag([], "rankings, a file for each person", positional=True)
    out: str = flag("", "file for the rankings of all of them (empty: none)")


def run(config: Config) -> dict:
    paths, out = list(map(Path, config.files)), Path(config.out)
    people, rows = read_people(paths)
    lines = compare_people(paths, people)
    if config.out:
        overwritten = any(out.exists() and out.samefile(path) for path in paths)
        check(not overwritten, f"--out {out} is one of the files to read")
        write_jsonl(out, rows)
        lines.append(f"wrote {len(rows)} rankings to {out}")
    print("\n".join(lines))
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
