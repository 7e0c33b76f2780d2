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
from helpers import make_gpt, make_scalar  # noqa: E402


@pytest.fixture
def tiny_gpt():
    """The factory `make_gpt(seed=0, vocab=23, block_size=48, n_layer=2, n_head=4, n_embd=32, ...)`."""
    return make_gpt


@pytest.fixture
def tiny_scalar():
    """The factory `make_scalar(seed=0, ...)` of reward and value models."""
    return make_scalar
