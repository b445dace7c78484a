"""Promise 5: several processes give the gradients of one, whatever each of them holds, and none waits for a missing kind."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multimodal.shapes import ConfigError
from multimodal.train.processes import connected_processes

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"steps": 6, "batch": 8, "ema": 0.9, "checkpoint_every": 3}
Run = Callable[[int, Path, dict], None]


@pytest.fixture(scope="session")
def run(program) -> Run:
    """run(2, out, settings): ranks.py in so many processes."""
    return lambda count, out, settings: program("tests/programs/ranks.py", out, json.dumps(settings), ranks=count)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run: Run) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("alone") / "gradients.pt"
    run(1, out, {"gradients": 4})
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", [2, 4])
def test_each_process_holds_one_kind_and_the_gradients_are_those_of_one(tmp_path, run: Run, alone, count, parallel):
    """Of 4 micro-batches two are text, one is pictures, one is sound; each is one kind only, as the program asserts."""
    run(count, tmp_path / "gradients.pt", {"gradients": 4, "parallel": parallel})
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == alone.keys()
    assert min(float(g.abs().max()) for name, g in alone.items() if "linear.weight" in name) > 1e-3
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (4, "ddp"))]
)
def test_a_run_resumes_with_another_number_of_processes(tmp_path, run: Run, straight, before, after):
    """The same samples, the same dropout: the losses are those of a run that was never stopped, up to rounding."""
    out = tmp_path / "run"
    for (count, parallel), steps in ((before, 3), (after, 6)):
        run(count, out, {**STEPS, "stop": steps, "parallel": parallel, "accumulate": 4 // count})
    assert losses(out) == pytest.approx(losses(straight), abs=2e-5)
    one, other = (load_file(folder / "model" / "weights.safetensors") for folder in (straight, out))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        # Adam divides small roundings by small numbers
        torch.testing.assert_close(other[name], weight, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_no_process_used_in_a_step_is_left_alone_as_by_one(tmp_path, run: Run, parallel):
    """Packs so small that steps lack kinds: momentum and decay would move their weights if they had gradients of zeros."""
    settings = {"steps": 12, "tokens": 40, "packs": 2, "look_ahead": 3, "weight_decay": 0.5, "lr": 1e-2}
    run(1, tmp_path / "one", settings)
    run(2, tmp_path / "two", {**settings, "parallel": parallel})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, run: Run) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    run(1, out, {**STEPS, "accumulate": 4})
    return out


def test_half_of_the_variables_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    with (
        pytest.raises(ConfigError, match="but MASTER_ADDR are not set; start it by torchrun"),
        connected_processes(torch.device("cpu")),
    ):
        pass


@pytest.mark.slow
def test_two_nodes_start_by_one_command_each(tmp_path):
    """Two agents of torchrun on this machine stand for two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tokenizers"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "-m", "multimodal", "train"]
    command += [
        str(ROOT / "examples" / "recipe.py"),
        "--set",
        "steps=3",
        "--set",
        "device=cpu",
        "--folder",
        str(tmp_path),
    ]
    nodes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    try:
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert sum("fit: " in out for out, _ in said) == 1, said  # of all processes one speaks
    assert len(losses(tmp_path)) == 3
    assert json.loads((tmp_path / "config.json").read_text())["processes"] == 2
