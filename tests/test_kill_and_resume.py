"""Runs that are killed and resumed end as the unbroken run does: `kill_and_resume.py`, three kills for each stage."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

if sys.platform == "win32":
    pytest.skip("needs fork and SIGKILL", allow_module_level=True)

import kill_and_resume


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder with the unbroken runs, and the seconds each stage took."""
    work = tmp_path_factory.mktemp("kill_and_resume")
    return work, kill_and_resume.prepare(work)


@pytest.mark.parametrize("stage", kill_and_resume.STAGES)
def test_three_kills(prepared, stage):
    work, seconds = prepared
    wrong, kills = kill_and_resume.check_stage(stage, work, seconds[stage], kills=3, seed=1)
    assert not wrong, "\n".join(wrong)
    assert kills["before"] + kills["during"] + kills["after"] >= 3


def test_differences_are_found(prepared, tmp_path):
    """The comparison itself: the smallest change of one weight, a lost log line, lost gates; not the clock."""
    unbroken = prepared[0] / "unbroken" / "sft"
    folder = tmp_path / "sft"

    def found() -> list[str]:
        return [text.split(":")[0] for text in kill_and_resume.differences("sft", folder, unbroken)]

    shutil.copytree(unbroken, folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "results.json").write_text(json.dumps({**results, "seconds": 1e6}), encoding="utf-8")
    assert found() == []

    model = torch.load(folder / "model.pt", weights_only=True)
    weight = next(iter(model["weights"].values())).view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    torch.save(model, folder / "model.pt")
    assert found() == ["model.pt"]

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({**results, "gates": []}), encoding="utf-8")
    assert found() == ["model.pt", "metrics.jsonl", "results.json"]
    (folder / "results.json").unlink()
    assert found() == ["results.json"]

    (tmp_path / "collect").mkdir()
    (tmp_path / "collect" / "rankings.jsonl").write_bytes(b"{}\n")
    assert kill_and_resume.differences("collect", tmp_path / "collect", prepared[0] / "unbroken" / "collect")
