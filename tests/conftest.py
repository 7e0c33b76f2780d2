"""Puts the project's root and this folder on the import path, so that `pytest` works from any folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors here are tiny: more threads only wait for each other
for folder in (Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture
def float64():
    """Everything that is made or loaded during the test is float64, the scripts' models too. float32 rounds
    differently for another batch shape, padding or CPU, so that two ways to the same figure agree to a few
    digits only; here they must agree to 1e-9."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def person(monkeypatch):
    """Types the given lines; then ctrl-D."""

    def start(*lines):
        left = list(lines)

        def answer(_):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", answer)

    return start
