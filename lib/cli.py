"""The command line of every script, without torch. The flags are the fields of a dataclass, each with its range. A
user's mistake ends in an error of one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A mistake of the user's: a bad flag, file or line. Scripts print it as one line, without a traceback."""


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_line(error: Exception) -> str:
    """An error's kind and message in one line. (torch puts the useful part of a message on its second line.)"""
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


# -------------------------------------------------------------------------------- flags


def flag(
    default, help: str, *, choices: tuple | None = None, low=None, high=None, above=None, below=None, positional=False
):
    """A Config field that becomes a command-line flag of the same name.

    Its range is low <= value <= high and above < value < below; of a list, every value must lie in it. positional: the
    field is a list and takes the words that belong to no flag, one or more."""
    limits = {"choices": choices, "low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "positional": positional, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DTYPES = ("float32", "bfloat16")


@dataclass
class Flags:
    """The base of every script's Config. UserError if a value is out of its flag's range."""

    def __post_init__(self):
        check_ranges(self)


@dataclass
class TrainConfig(Flags):
    """The flags that the training scripts share. Each script's Config adds its own."""

    train_layers: int = flag(0, "train only the last N blocks, the final LayerNorm and a scalar head (0: all)", low=0)
    grad_clip: float = flag(1.0, "largest gradient norm (0: no limit)", low=0)
    save_every: int = flag(0, "steps between states to resume from (0: none by their number)", low=0)
    save_minutes: float = flag(5.0, "minutes between states to resume from (0: none by the clock)", low=0)
    resume: bool = flag(False, "go on from out_dir/state.pt")
    overwrite: bool = flag(False, "start anew where an unfinished run was saved")
    strict: bool = flag(False, "exit with status 1 if a gate fails")
    seed: int = flag(1, "seed of everything random", low=0, high=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("float32", "of the matrix products", choices=DTYPES)
    compile: bool = flag(False, "compile the blocks with torch.compile")
    recompute: bool = flag(False, "keep no activations inside blocks, compute them again for the backward pass")


def check_ranges(config) -> None:
    """Raise UserError for the first flag that is out of its range, not a number, or none of its choices."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        for v in value if isinstance(value, list) else [value]:
            limits = {k: limit for k, limit in f.metadata.items() if k not in ("help", "positional")}
            check_value(f"--{f.name}", v, **limits)


def check_value(name: str, value, choices=None, low=None, high=None, above=None, below=None) -> None:
    """Raise UserError if the value of the flag `name` breaks one of its limits. None: there is no such limit."""
    if isinstance(value, float):
        check(math.isfinite(value), f"{name} must be a finite number, not {value}")
    known = ", ".join(map(str, choices or ()))
    check(choices is None or value in choices, f"{name} must be one of {known}, not {value}")
    check(low is None or value >= low, f"{name} must be at least {low}, not {value}")
    check(high is None or value <= high, f"{name} must be at most {high}, not {value}")
    check(above is None or value > above, f"{name} must be above {above}, not {value}")
    check(below is None or value < below, f"{name} must be below {below}, not {value}")


# The groups of --help. A flag that stands in none of them is of the script's own subject.
GROUPS = {
    "data": "files data held_out_data prompts n_prompts skip limit demonstrations held_out_demonstrations "
    "held_out_prompts rankings loss_data ptx_data held_out prefix_words",
    "model": "init tokenizer template policy policies compare n_layer n_head n_embd block block_size rope_base dropout "
    "expectation train_layers size sizes",
    "reward": "reward reward_weights reward_combine gold eos_penalty normalise_samples",
    "sampling": "rollouts max_new_tokens temperature temperatures top_k top_p samples completions best_of",
    "optimisation": "epochs iterations ppo_epochs batch_size minibatch micro_batch lr value_lr warmup weight_decay "
    "grad_clip",
    "run": "out_dir out json seed resume overwrite save_every save_minutes log_every eval_every show trace strict "
    "device dtype compile recompute",
}


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, too, and names the flag that was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = (unknown.split() or ["''"])[0].partition("=")[0]
            message = f"{word}: no such flag" if word.startswith("-") else f"{word} belongs to no flag"
            names = {known.lstrip("-"): known for known in self._option_string_actions if known.startswith("--")}
            name = word.lstrip("-\u2013\u2014\u2212").lower()  # word processors make other dashes of it
            near = [known for known in names if name and known.startswith(name)]  # an abbreviation
            near = near or (difflib.get_close_matches(name, names, n=1) if word[:1] != name[:1] else [])
            message += f"; did you mean {names[near[0]]}?" if near else "; --help lists them all"
        self.exit(2, f"{Path(self.prog).name}: error: {message.removeprefix('argument ')}\n")


def parse_config(config_class, description: str, argv: list[str] | None = None):
    """The command line as a config_class: `--field value` or `--field=value`; a boolean is `--field` or `--no-field`.

    argv: the words of the command line (None: those of this program). The program ends where they are wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s [--flag value ...]"  # argparse's own is a page of all flags
    parser = Parser(description=description, formatter_class=raw, allow_abbrev=False, usage=usage)
    hints = get_type_hints(config_class)
    group_of = {name: title for title, names in GROUPS.items() for name in names.split()}
    own = Path(parser.prog).stem
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(["data", "model", own, *GROUPS])}
    for f in dataclasses.fields(config_class):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = "none" if shown in (None, "") else shown
        kwargs = {"default": default, "help": f"{f.metadata['help'].replace('%', '%%')} (default: {shown})"}
        kind, choices = hints[f.name], f.metadata["choices"]
        group = groups[group_of.get(f.name, own)]
        if f.metadata["positional"]:
            group.add_argument(f.name, nargs="+", type=get_args(kind)[0], help=f.metadata["help"])
        elif kind is bool:
            switch = group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **kwargs)
            switch.help = kwargs["help"]  # Python 3.10 would add the default once more
        elif get_origin(kind) is list:
            group.add_argument(f"--{f.name}", nargs="*", type=get_args(kind)[0], metavar=f.name.upper(), **kwargs)
        else:
            metavar = None if choices else kind.__name__.upper()
            group.add_argument(f"--{f.name}", type=kind, choices=choices, metavar=metavar, **kwargs)
    return config_class(**vars(parser.parse_args(argv)))


def run_main(run: Callable, config_class, description: str) -> None:
    """The main() of every script: parse the flags and call run(config).

    A UserError becomes one line and exit status 2, a failed gate under --strict exit status 1. Where a run was stopped,
    the last line says what was saved (RunFolder)."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console may lack letters that we print
        with contextlib.suppress(AttributeError):
            stream.reconfigure(encoding="utf-8", errors="replace")
    script = Path(sys.argv[0]).name
    try:
        config = parse_config(config_class, description)
        results = run(config)
    except BaseException as error:
        if isinstance(error, UserError):
            status = 2
            print(f"{script}: error: {error}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):  # Ctrl-C, or the second signal of RunFolder.interrupt
            status = error.args[0] if error.args else 130
            print(f"{script}: interrupted", file=sys.stderr)
        elif isinstance(error, SystemExit):  # argparse, or a signal
            status = error.code
        elif hasattr(error, "last_words"):
            status = 1
            traceback.print_exc()
        else:
            raise
        if hasattr(error, "last_words"):
            print(f"{script}: {error.last_words}", file=sys.stderr)
        sys.exit(status)
    failed = [g["name"] for g in results.get("gates", []) if not g["ok"]]
    if failed and getattr(config, "strict", False):
        print(f"{script}: error: gate failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
