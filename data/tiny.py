"""The embedded task: a seeded micro-world of instructions whose true ("gold") reward is known.

    python -m data.tiny --out_dir out/data --seed 1        # writes demonstrations and prompts as JSON Lines

Why a made-up world? On real text nobody knows the true reward, so nobody can measure whether a reward model is right or
a policy is over-optimised. Here `gold_reward` is a few readable lines, and both can be measured.

A prompt is a speaker's name and a question of one of many families ("Anna: What is the opposite of hot?"). A good
completion answers correctly, politely, to the point, in finished sentences, and does not repeat itself. The
demonstrations are of mixed quality, as scraped data is: right, wrong or evasive, polite, plain or rude, short or
rambling. So a model that imitates them (SFT) is mediocre by construction, and RLHF can show what it adds.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lib.cli import Flags, UserError, flag, run_main
from data.files import parse_ranking, read_jsonl, write_jsonl

# -------------------------------------------------------------------------------- the words of the world

OPPOSITES = "hot cold|big small|fast slow|happy sad|up down|open closed|full empty|old new|wet dry|rich poor"
OPPOSITE = {}
for one, other in map(str.split, OPPOSITES.split("|")):
    OPPOSITE[one], OPPOSITE[other] = other, one

KINDS = {
    "animal": "cat dog cow fox",
    "fruit": "apple pear plum fig",
    "color": "red blue green black",
    "tool": "hammer saw drill axe",
    "vehicle": "car bus train boat",
    "body part": "hand foot nose ear",
}
KIND = {word: kind for kind, words in KINDS.items() for word in words.split()}
NOUNS = list(KIND)


def _lookup(text: str) -> dict[str, str]:
    """ "a b|c d" -> {"a": "b", "c": "d"}"""
    return dict(pair.split() for pair in text.split("|"))


PLURAL = _lookup(
    "cat cats|dog dogs|fox foxes|bus buses|foot feet|tooth teeth|"
    "man men|child children|mouse mice|box boxes|car cars|sheep sheep"
)
PAST = _lookup(
    "go went|see saw|eat ate|run ran|take took|give gave|"
    "walk walked|play played|write wrote|sing sang|find found|make made"
)
SOUND = _lookup(
    "cat meow|dog woof|cow moo|sheep baa|pig oink|duck quack|"
    "lion roar|bee buzz|snake hiss|owl hoot|mouse squeak|frog croak"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SHORT_WORDS = [w for w in NOUNS if len(w) <= 3]

# Who asks. Every name is one token, so the question always starts at the same position.
NAMES = "Anna Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kate Leo".split()
POLITE_OPENINGS = ["Sure!", "Of course!", "Gladly!", "Happy to help!", "Good question!"]
POLITE_CLOSINGS = ["Have a nice day!", "I hope this helps.", "You are welcome!", "Let me know if you need more."]
RUDE_OPENINGS = ["Ugh.", "What a silly question.", "Not you again.", "Think for yourself!"]
RUDE_CLOSINGS = ["Now go away.", "Do not ask me again.", "Anyone knows that.", "That was a waste of time."]
ASIDES = (
    "The weather is fine today.|My aunt has a small garden.|I had soup for lunch.|Time flies.|"
    "That reminds me of a trip.|Some people like tea.|There is more to say.|I read about it once."
).split("|")
ANSWER_FORMS = ["It is {}.", "The answer is {}.", "I say {}."]
EVASIONS = ["I do not know.", "Look it up.", "Who can say?", "I would rather not say."]
STORIES = (
    "One day the {} was found near the river.|A kind man gave his {} to a child.|"
    "Every night the girl dreamed about a {}.|The {} waited in the rain for the king.|"
    "Long ago a {} was lost in the forest."
).split("|")
POLITE = {s.lower() for s in POLITE_OPENINGS + POLITE_CLOSINGS}
RUDE = {s.lower() for s in RUDE_OPENINGS + RUDE_CLOSINGS}
ASIDE = {s.lower() for s in ASIDES}


# -------------------------------------------------------------------------------- families of instructions


@dataclass(frozen=True)
class Family:
    """A family of questions."""

    phrasings: list[str]  # templates with {slots}
    draw: Callable[[random.Random], dict[str, str]]  # draws values for the slots
    solve: Callable[[dict[str, str]], str]  # values of the slots -> the right answer ("" if they make no question)


def _number(low: int, high: int) -> Callable[[random.Random], dict[str, str]]:
    return lambda rng: {"a": str(rng.randint(low, high))}


def _word(words) -> Callable[[random.Random], dict[str, str]]:
    words = list(words)
    return lambda rng: {"w": rng.choice(words)}


def _list(low: int, high: int, items=NOUNS) -> Callable[[random.Random], dict[str, str]]:
    return lambda rng: {"list": " ".join(rng.sample(items, rng.randint(low, high)))}


def _two_numbers(low: int, high: int) -> Callable[[random.Random], dict[str, str]]:
    """Two different numbers, the larger one first half of the time."""
    return lambda rng: dict(zip("ab", map(str, rng.sample(range(low, high + 1), 2)), strict=True))


def _difference(rng):
    a = rng.randint(2, 7)
    return {"a": str(a), "b": str(rng.randint(1, a - 1))}


def _sum(rng):
    return {"a": str(rng.randint(1, 5)), "b": str(rng.randint(1, 5))}


def _odd_one(rng):
    kind, other = rng.sample(list(KINDS), 2)
    words = [*rng.sample(KINDS[kind].split(), 2), rng.choice(KINDS[other].split())]
    return {"list": " ".join(rng.sample(words, 3))}


def _solve_odd_one(s):
    words = s["list"].split()
    kinds = [KIND.get(w) for w in words]
    return next((w for w, k in zip(words, kinds, strict=True) if kinds.count(k) == 1), "")


def _repeat(rng):
    return {"w": rng.choice(NOUNS), "a": rng.choice(["two", "three", "four"])}


def _numbers(s: dict[str, str]) -> list[int]:
    return [int(x) for x in s["list"].split()]


TIMES = {"two": 2, "three": 3, "four": 4}
_digits = [str(i) for i in range(1, 10)]

# fmt: off
FAMILIES: dict[str, Family] = {
    "opposite": Family(
        ["What is the opposite of {w}?", "Give the opposite of {w}.", "Name the word that is the opposite of {w}."],
        _word(OPPOSITE), lambda s: OPPOSITE.get(s["w"], "")),
    "plural": Family(
        ["What is the plural of {w}?", "Give the plural of {w}.", "One {w}, many what?"],
        _word(PLURAL), lambda s: PLURAL.get(s["w"], "")),
    "past": Family(
        ["What is the past tense of {w}?", "Give the past tense of {w}.", "Today I {w}. What is it in the past?"],
        _word(PAST), lambda s: PAST.get(s["w"], "")),
    "kind": Family(
        ["What kind of thing is {w}?", "To which group does {w} belong?", "Name the group of {w}."],
        _word(NOUNS), lambda s: KIND.get(s["w"], "")),
    "sound": Family(
        ["What sound does the {w} make?", "Name the sound of the {w}.", "What does the {w} say?"],
        _word(SOUND), lambda s: SOUND.get(s["w"], "")),
    "odd_one": Family(
        ["Which word does not belong: {list}?", "Find the odd one out: {list}.", "Name the odd one: {list}."],
        _odd_one, _solve_odd_one),
    "day_after": Family(
        ["What day comes after {w}?", "Name the day after {w}.", "Today is {w}. What day is next?"],
        _word(DAYS), lambda s: DAYS[(DAYS.index(s["w"]) + 1) % 7]),
    "sum": Family(
        ["What is {a} plus {b}?", "Add {a} and {b}.", "Find the sum of {a} and {b}."],
        _sum, lambda s: str(int(s["a"]) + int(s["b"]))),
    "difference": Family(
        ["What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."],
        _difference, lambda s: str(int(s["a"]) - int(s["b"]))),
    "next": Family(
        ["What number comes after {a}?", "Name the number after {a}.", "Add one to {a}."],
        _number(1, 10), lambda s: str(int(s["a"]) + 1)),
    "previous": Family(
        ["What number comes before {a}?", "Name the number before {a}.", "Take one from {a}."],
        _number(1, 10), lambda s: str(int(s["a"]) - 1)),
    "even": Family(
        ["Is {a} even or odd?", "Say if {a} is even or odd.", "Name {a} even or odd."],
        _number(1, 10), lambda s: "odd" if int(s["a"]) % 2 else "even"),
    "larger": Family(
        ["Which is larger, {a} or {b}?", "Name the larger one of {a} and {b}.", "Find the larger: {a} or {b}."],
        _two_numbers(1, 10), lambda s: str(max(int(s["a"]), int(s["b"])))),
    "smaller": Family(
        ["Which is smaller, {a} or {b}?", "Name the smaller one of {a} and {b}.", "Find the smaller: {a} or {b}."],
        _two_numbers(1, 10), lambda s: str(min(int(s["a"]), int(s["b"])))),
    "largest": Family(
        ["What is the largest of these: {list}?", "Find the largest number: {list}."],
        _list(3, 3, _digits), lambda s: str(max(_numbers(s)))),
    "sort": Family(
        ["Sort these numbers: {list}.", "Put in order: {list}."],
        _list(3, 3, _digits), lambda s: " ".join(map(str, sorted(_numbers(s))))),
    "count": Family(
        ["How many words are here: {list}?", "Count these words: {list}."],
        _list(1, 5), lambda s: str(len(s["list"].split()))),
    "repeat": Family(
        ["Say {w} {a} times.", "Repeat the word {w} {a} times."],
        _repeat, lambda s: " ".join([s["w"]] * TIMES.get(s["a"], 0))),
    "spell": Family(
        ["Spell the word {w}.", "How do you spell {w}?", "Name the letters of {w}."],
        _word(SHORT_WORDS), lambda s: " ".join(s["w"])),
    "first_letter": Family(
        ["What is the first letter of {w}?", "Name the first letter in {w}.", "Which letter is first in {w}?"],
        _word(NOUNS), lambda s: s["w"][0]),
    "copy": Family(
        ["Copy these words: {list}.", "Say after me: {list}."],
        _list(2, 3), lambda s: s["list"]),
    "first_word": Family(
        ["What is the first word of: {list}?", "Name the first one of: {list}."],
        _list(2, 3), lambda s: s["list"].split()[0]),
    "last_word": Family(
        ["What is the last word of: {list}?", "Name the last one of: {list}."],
        _list(2, 3), lambda s: s["list"].split()[-1]),
    "story": Family(
        ["Tell a short story with the word {w}.", "Write one line about a {w}."],
        _word(NOUNS), lambda s: s["w"]),  # the answer is any story with this word
}
# fmt: on


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[str, re.Pattern]]:
    """[(family, a phrasing as a regular expression)]: they find the family and the slots of a prompt in its text."""
    patterns = []
    for name, family in FAMILIES.items():
        for phrasing in family.phrasings:
            pieces = re.split(r"\{(\w+)\}", phrasing)  # text, slot, text, slot, ..., text
            regex = "".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>[A-Za-z0-9 ]+?)" for i, p in enumerate(pieces))
            patterns.append((name, re.compile(regex)))
    return patterns


@lru_cache(maxsize=100_000)
def parse_prompt(prompt: str) -> tuple[str, str] | None:
    """The (family, right answer) of a prompt of this world; None for any other text. For a story the answer is the word
    that it must contain."""
    speaker, _, question = prompt.partition(": ")
    if speaker not in NAMES:
        return None
    for name, pattern in _patterns():
        if match := pattern.fullmatch(question):
            try:
                answer = FAMILIES[name].solve(match.groupdict())
            except (ValueError, IndexError, KeyError, TypeError):  # the template fits, but not what stands in its slot
                return None
            return (name, answer) if answer else None
    return None


# -------------------------------------------------------------------------------- the gold reward

# The greatest sum of the parts is 3: right (+2) and polite (+1), with nothing taken off.
PARTS = ("correct", "polite", "to_the_point", "ended", "not_repeated")
CEILING = 3.0


def split_sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def is_correct(prompt: str, sentence: str) -> bool:
    """Does the sentence answer the prompt? Case and the frames of ANSWER_FORMS don't matter."""
    family, answer = parse_prompt(prompt)
    said = re.sub(r"^(the answer is|it is|i say) ", "", sentence.lower().rstrip(".!?"))
    if family == "story":  # any single sentence of 6 to 14 words that uses the required word
        words = re.findall(r"[a-z]+", said)
        return answer in words and 6 <= len(words) <= 14
    return said == answer.lower()


def gold_parts(prompt: str, completion: str) -> dict[str, float]:
    """The parts of a completion's true reward. Their sum is `gold_reward`.

    correct        +2    the first sentence that is neither a courtesy nor an aside answers the prompt
    polite         +1    a polite phrase and no rude one;  -1 with a rude one;  0 plain
    to_the_point   -0.2  for each word beyond one answer (of at most 14 words) and two courtesies, at most -3
    ended          -1    unless the text ends in . ! or ?
    not_repeated   -1    if a sentence occurs twice
    """
    if parse_prompt(prompt) is None:
        raise UserError(f"the gold reward knows only prompts of the embedded task, not {prompt!r}")
    sentences = [s.lower() for s in split_sentences(completion)]
    polite = [s for s in sentences if s in POLITE]
    rude = [s for s in sentences if s in RUDE]
    answers = [s for s in sentences if s not in POLITE and s not in RUDE and s not in ASIDE]
    useful = sum(len(s.split()) for s in (polite + rude)[:2]) + min(14, len(answers[0].split()) if answers else 0)
    surplus = len(completion.split()) - useful
    return {
        "correct": 2.0 * (bool(answers) and is_correct(prompt, answers[0])),
        "polite": -1.0 if rude else float(bool(polite)),
        "to_the_point": -min(3.0, 0.2 * surplus),
        "ended": 0.0 if sentences and sentences[-1][-1] in ".!?" else -1.0,
        "not_repeated": -1.0 if len(set(sentences)) < len(sentences) else 0.0,
    }


def gold_reward(prompts: list[str], completions: list[str]) -> list[float]:
    """The true reward of each completion, -6 to 3. A reward function, as in `ppo.py --reward
    data/tiny.py:gold_reward`."""
    return [sum(gold_parts(p, c).values()) for p, c in zip(prompts, completions, strict=True)]


def best_completion(prompt: str) -> str:
    """A completion that reaches the ceiling."""
    parsed = parse_prompt(prompt)
    if parsed is None:
        raise UserError(f"not a prompt of the embedded task: {prompt!r}")
    family, answer = parsed
    return "Sure! " + (STORIES[0] if family == "story" else "The answer is {}.").format(answer)


# -------------------------------------------------------------------------------- prompts and demonstrations


def split_of(prompt: str) -> str:
    """The split of a prompt: "train", "dev" or "test" (8 : 1 : 1), the same for every seed. It depends only on the text
    of the question, so a held-out question never occurs in training, whoever asks it. Defaults and gates are chosen on
    dev; test is only for results."""
    question = prompt.partition(": ")[2]
    # of the ten remainders these two leave questions of all 24 families in each split
    return {4: "test", 6: "dev"}.get(zlib.crc32(question.encode()) % 10, "train")


def sample_prompt(rng: random.Random, split: str) -> str:
    """A random prompt of a split."""
    while True:
        family = FAMILIES[rng.choice(list(FAMILIES))]
        prompt = f"{rng.choice(NAMES)}: {rng.choice(family.phrasings).format(**family.draw(rng))}"
        if split_of(prompt) == split:
            return prompt


def task_of(path: str | Path) -> str:
    """The task of a file's prompts: "tiny" if its first 200 are all of the embedded task, so that its true reward and
    its gates hold, whatever the vocabulary; otherwise ""."""
    rows = itertools.islice(read_jsonl(path), 200)
    return "tiny" if all(parse_prompt(str(row.get("prompt"))) for _, row in rows) else ""


def wrong_answer(family: str, answer: str, rng: random.Random) -> str:
    """A plausible wrong answer: a number that is a little off, a list in the wrong order, or another word."""
    while True:
        words = answer.split()
        if answer.isdigit():
            wrong = str(max(0, int(answer) + rng.choice([-3, -2, -1, 1, 2, 3])))
        elif family in ("sort", "spell", "copy", "repeat"):
            wrong = " ".join(rng.choice([rng.sample(words, len(words)), words[:-1], [*words, rng.choice(words)]]))
        else:
            other = FAMILIES[family]
            wrong = other.solve(other.draw(rng))
        if wrong and wrong != answer:
            return wrong


def demonstrate(prompt: str, rng: random.Random) -> str:
    """One demonstration of mixed quality. SFT imitates the rates below."""
    family, answer = parse_prompt(prompt)
    quality = rng.choices(["right", "wrong", "evasive"], [0.5, 0.2, 0.3])[0]
    right = quality == "right"
    if quality == "evasive":
        text = rng.choice(EVASIONS)
    elif family == "story":
        word = answer if right else rng.choice([w for w in NOUNS if w != answer])
        text = rng.choice(STORIES).format(word)
    else:
        text = rng.choice(ANSWER_FORMS).format(answer if right else wrong_answer(family, answer, rng))

    sentences = [text]
    manners = rng.choices(["polite", "plain", "rude"], [0.35, 0.5, 0.15])[0]
    if manners != "plain":
        where = rng.choices(["open", "close", "both"], [0.8, 0.15, 0.05])[0]
        opening = rng.choice(POLITE_OPENINGS if manners == "polite" else RUDE_OPENINGS)
        closing = rng.choice(POLITE_CLOSINGS if manners == "polite" else RUDE_CLOSINGS)
        if where != "close":
            sentences.insert(0, opening)
        if where != "open":
            sentences.append(closing)
    if rng.random() < 0.08:  # rambling: an aside, before or after the rest
        aside = [rng.choice(ASIDES)]
        sentences = aside + sentences if rng.random() < 0.2 else sentences + aside
    if rng.random() < 0.04:  # repeating itself
        sentences.append(text)
    completion = " ".join(sentences)
    if rng.random() < 0.05:  # unfinished
        words = completion.split()
        completion = " ".join(words[: rng.randint(1, len(words))]).rstrip(".!?")
    return completion


def contrasts(prompts: list[str], seed: int) -> dict[str, list[tuple[str, str, str]]]:
    """Pairs of texts that differ in one part of the gold reward: {name: [(prompt, better, worse) for every prompt]}.

    They show which parts a reward model has understood; a single accuracy hides that manners are learned long before
    facts. (A text that repeats itself is also longer, and a text that is cut mostly has no answer.)"""
    rng = random.Random(f"contrasts {seed}")
    found: dict[str, list[tuple[str, str, str]]] = {}
    for prompt in prompts:
        family, answer = parse_prompt(prompt)
        if family == "story":
            frame, wrong = rng.choice(STORIES), rng.choice([w for w in NOUNS if w != answer])
        else:
            frame, wrong = rng.choice(ANSWER_FORMS), wrong_answer(family, answer, rng)
        plain, mistaken = frame.format(answer), frame.format(wrong)
        polite, rude, aside = (rng.choice(list(x)) for x in (POLITE_OPENINGS, RUDE_OPENINGS, ASIDES))
        manners = rng.choice(["", polite + " ", rude + " "])  # the same in both texts
        words = plain.split()
        pairs = {
            "right_vs_wrong": (manners + plain, manners + mistaken),
            "right_vs_evasive": (manners + plain, manners + rng.choice(EVASIONS)),
            "polite_vs_plain": (f"{polite} {plain}", plain),
            "plain_vs_rude": (plain, f"{rude} {plain}"),
            "short_vs_rambling": (manners + plain, f"{manners}{plain} {aside}"),
            "once_vs_repeated": (manners + plain, f"{manners}{plain} {plain}"),
            "finished_vs_cut": (manners + plain, manners + " ".join(words[: rng.randint(1, len(words) - 1)])),
        }
        for name, (better, worse) in pairs.items():
            found.setdefault(name, []).append((prompt, better, worse))
    return found


# -------------------------------------------------------------------------------- simulated annotators


def annotator_ranking(rewards: list[float], temperature: float, rng: random.Random) -> list[int]:
    """Rank K completions as a noisy human does -> their indices, best first, drawn from Plackett-Luce(reward /
    temperature).

    Sorting reward / temperature plus Gumbel noise is an exact draw from that model (Yellott 1977). The marginal of each
    pair is Bradley-Terry: P(i above j) = sigmoid((r_i - r_j) / temperature).
    """
    noisy = [r / temperature - math.log(-math.log(rng.random() or 1e-300)) for r in rewards]
    return sorted(range(len(rewards)), key=lambda i: -noisy[i])


def annotators_bayes_accuracy(path: str) -> float | None:
    """How often the simulated annotators agree with the true reward, on the strict pairs of a rankings file. No model
    can expect a better accuracy on their rankings. None for rankings by humans."""
    sure = _sureness(path)
    return sum(sure) / len(sure) if sure else None


def annotators_agreement(path: str) -> float | None:
    """How often two of the simulated annotators would agree on a strict pair of the file. Among people it is about 0.73
    (Ouyang et al. 2022, section 3.4). None for rankings by humans."""
    sure = _sureness(path)
    return sum(p * p + (1 - p) * (1 - p) for p in sure) / len(sure) if sure else None


def _sureness(path: str) -> list[float]:
    """The annotators' probability of preferring the better text, for each strict pair of a rankings file."""
    sure = []
    for where, row in read_jsonl(path):
        if "gold" not in row or "annotator_temperature" not in row:
            return []
        ranks = parse_ranking(where, row).ranks
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                gap = abs(row["gold"][i] - row["gold"][j]) / row["annotator_temperature"]
                sure.append(1 / (1 + math.exp(-gap)))
    return sure


# -------------------------------------------------------------------------------- writing the files


SUFFIX = {"train": "", "dev": "_held_out", "test": "_test"}  # in the names of each split's files


@dataclass
class Config(Flags):
    out_dir: str = flag("out/data", "folder for the JSON Lines files")
    seed: int = flag(1, "seed of prompts and demonstrations", low=0)
    demonstrations: int = flag(36_000, "training demonstrations", low=1)
    held_out_demonstrations: int = flag(500, "demonstrations of held-out questions, for dev and for test each", low=1)
    prompts: int = flag(12_000, "distinct training prompts for collecting preferences and for PPO", low=1)
    held_out_prompts: int = flag(800, "distinct prompts with held-out questions, for dev and for test each", low=1)


def distinct_prompts(n: int, rng: random.Random, split: str) -> list[str]:
    """n different prompts of a split. UserError if the world has fewer."""
    prompts: dict[str, None] = {}  # a dict keeps the order of insertion
    for _ in range(200 * n):
        if len(prompts) == n:
            return list(prompts)
        prompts[sample_prompt(rng, split)] = None
    raise UserError(f"this world has no {n} distinct prompts for {split}; ask for fewer")


def run(config: Config) -> dict:
    out, golds = Path(config.out_dir), {}
    for split, suffix in SUFFIX.items():
        # each split has its own random stream, so the size of one doesn't change the others
        rng = random.Random(f"{config.seed} {split}")
        n_demonstrations, n_prompts = config.held_out_demonstrations, config.held_out_prompts
        if split == "train":
            n_demonstrations, n_prompts = config.demonstrations, config.prompts
        prompts = [sample_prompt(rng, split) for _ in range(n_demonstrations)]
        completions = [demonstrate(p, rng) for p in prompts]
        golds[split] = sum(gold_reward(prompts, completions)) / n_demonstrations
        rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
        write_jsonl(out / f"demonstrations{suffix}.jsonl", rows)
        write_jsonl(out / f"prompts{suffix}.jsonl", [{"prompt": p} for p in distinct_prompts(n_prompts, rng, split)])
    gold = golds["train"]
    print(f"{out}: {config.demonstrations:,} demonstrations of mean gold reward {gold:.2f} (ceiling {CEILING})")
    return {"demonstrations_gold": gold, "ceiling": CEILING}


if __name__ == "__main__":
    run_main(run, Config, __doc__)
