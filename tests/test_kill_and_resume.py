"""Runs that are killed and resumed end as the unbroken run does: `kill_and_resume.py`, a few kills for each stage."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

if sys.platform == "win32":
    pytest.skip("needs fork and SIGKILL", allow_module_level=True)

from kill_and_resume import NAMES, check_stage, differences
from stages import run


@pytest.mark.slow
@pytest.mark.parametrize("stage", NAMES)
def test_three_kills(tmp_path, stage):
    wrong, kills = check_stage(stage, tmp_path, kills=3, seed=1)
    assert not wrong, "\n".join(wrong)
    assert sum(kills.values()) >= 3


def test_differences_are_found(tmp_path):
    """The comparison itself: the smallest change of one weight, a lost log line, lost gates; not the clock."""
    results = run("sft", tmp_path, epochs=2).results
    unbroken, folder = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    (folder / "results.json").write_text(json.dumps({**results, "seconds": 1e6}), encoding="utf-8")
    assert differences(folder, unbroken) == []

    model = torch.load(folder / "model.pt", weights_only=True)
    weight = next(iter(model["weights"].values())).view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    torch.save(model, folder / "model.pt")
    assert differences(folder, unbroken) == ["model.pt"]

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({**results, "gates": [1]}), encoding="utf-8")
    assert differences(folder, unbroken) == ["metrics.jsonl", "model.pt", "results.json"]
    (folder / "results.json").unlink()
    assert differences(folder, unbroken) == ["the files are config.json, metrics.jsonl, model.pt, state.pt"]
