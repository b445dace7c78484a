"""Promise 4: a run that is killed anywhere and started again ends with the same losses and weights, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"steps": 48, "checkpoint_every": 9, "ema": 0.9}
JOBS = {
    "batches, 2 workers": {"batch": 8, "accumulate": 2, "workers": 2},
    "packs, 2 workers": {"tokens": 96, "packs": 2, "look_ahead": 24, "workers": 2, "optimizer": "muon", "steps": 120},
    "packs, 2 processes": {"tokens": 96, "packs": 2, "look_ahead": 24, "processes": 2},
    "batches, 2 processes, shared out": {"batch": 8, "parallel": "fsdp", "processes": 2},
}
MINUTES = ("packs, 2 workers", "batches, 2 processes, shared out")


def in_a_new_python(job: list[str]) -> str:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tokenizers")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *job], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.training) if n in MINUTES else n for n in JOBS])
def test_five_kills_leave_no_trace(tmp_path, program, name):
    settings = {**COMMON, **JOBS[name]}
    job = {"processes": settings.pop("processes", 1), "settings": settings, "seed": 3}

    def kill(folder: Path, kills: int) -> list[str]:
        return ["tests/programs/killing.py", str(folder), json.dumps({**job, "kills": kills})]

    program(*kill(tmp_path / "straight", 0))
    if name == "packs, 2 workers":  # once in a Python that hashes strings otherwise than the one it is compared with
        killed = in_a_new_python(kill(tmp_path / "killed", 5))
    else:
        killed = program(*kill(tmp_path / "killed", 5))
    assert killed.count("killed at step") == 5
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert len(rows(tmp_path / "straight")) == settings["steps"]
    one, other = (load_file(tmp_path / way / "model" / "weights.safetensors") for way in ("straight", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
