"""Tensor, context and data parallel in processes of gloo beside a single process: losses, gradients, states, pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import multimodal as mm
from multimodal.count import Work, rank_memory, stream_of_length
from multimodal.layers import CrossAttention, PersistentMemory, Recurrent, SelfAttention
from multimodal.shapes import ConfigError
from multimodal.train.processes import Processes
from multimodal.train.split import RowOrder, check_split
from multimodal_tokenizers import Labels, TextBytes
from tests.programs import layouts

Run = Callable[[int, Path, dict], None]
FSDP: dict[str, Any] = {"parallel": "fsdp"}


@pytest.fixture(scope="session")
def run(program) -> Run:
    """run(2, out, settings): layouts.py in so many processes."""
    return lambda count, out, settings: program("tests/programs/layouts.py", out, json.dumps(settings), ranks=count)


@pytest.fixture(scope="session")
def alone(tmp_path_factory, run: Run) -> Callable[[dict], dict[str, torch.Tensor]]:
    """alone(settings): what one process finds, once for each settings."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def find(settings: dict) -> dict[str, torch.Tensor]:
        key = json.dumps(settings)
        if key not in known:
            out = tmp_path_factory.mktemp("alone") / "gradients.pt"
            run(1, out, {"gradients": True, **settings})
            known[key] = torch.load(out)
        return known[key]

    return find


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name not in ("lacks", "own"):
            torch.testing.assert_close(
                found[name], wanted[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "tensor", "context", "again", "parts"),
    [
        (2, 2, 1, False, 4),
        (2, 1, 2, True, 4),
        (4, 1, 4, False, 12),
        (4, 2, 1, True, 12),
        (4, 2, 2, False, 4),
        pytest.param(8, 2, 2, True, 12, marks=pytest.mark.training),
        pytest.param(8, 4, 1, False, 4, marks=pytest.mark.training),
    ],
)
def test_layouts_give_the_loss_and_the_gradients_of_one(
    tmp_path, run: Run, alone, count, tensor, context, again, parts
):
    """Of 12 micro-batches each is one sample of one kind, and some have fewer tokens than there are processes.

    In some layouts with activation checkpointing, which changes nothing.
    """
    settings = {"batch": 12, "parts": parts}
    layout = {**FSDP, "tensor_parallel": tensor, "context_parallel": context, "again": again}
    run(count, tmp_path / "found.pt", {"gradients": True, **settings, **layout})
    wanted = alone(settings)
    assert min(float(g.abs().max()) for name, g in wanted.items() if name.startswith("core")) > 1e-4
    found = torch.load(tmp_path / "found.pt")
    compare(found, wanted)
    # what the plan counts, but for rows that are not divisible
    work = Work(tokens=64, processes=count, parallel="fsdp", tensor=tensor, context=context)
    planned = rank_memory(layouts.make(), stream_of_length(layouts.make(), 32), work).parts["weights"]
    assert planned / 4 == pytest.approx(int(found["own"]), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "parts", "layout"),
    [
        (2, 1, {"parallel": "ddp"}),
        (2, 2, FSDP),
        (4, 2, {**FSDP, "tensor_parallel": 2}),
        pytest.param(8, 1, {"parallel": "ddp"}, marks=pytest.mark.training),
    ],
)
def test_pairs_are_told_from_those_of_all_processes(tmp_path, run: Run, alone, count, parts, layout):
    """Both forms, and a task of another sort; some of 8 processes hold no pair of a task at all."""
    settings = {"batch": 12 if count == 8 else 24, "parts": parts, "pairs": True}
    run(count, tmp_path / "found.pt", {"gradients": True, **settings, **layout})
    found = torch.load(tmp_path / "found.pt")
    compare(found, alone(settings))
    assert bool(found["lacks"].any()) == (count == 8)


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "weights.safetensors")


LAYOUTS = {
    "one": (1, {}),
    "sharded": (2, FSDP),
    "divided": (2, {**FSDP, "tensor_parallel": 2}),
    "both": (4, {**FSDP, "tensor_parallel": 2}),
    "streams": (2, {**FSDP, "context_parallel": 2}),
}


def train(run: Run, out: Path, layout: str, **settings) -> None:
    """With 4 micro-batches a step."""
    count, more = LAYOUTS[layout]
    copies = more.get("tensor_parallel", 1) * more.get("context_parallel", 1)
    run(count, out, {**more, "accumulate": 4 * copies // count, **settings})


@pytest.mark.training
def test_a_run_goes_on_from_layout_to_layout(tmp_path, run: Run):
    """Weights, moments and averages: the losses and the model are those of a run in one process that was never stopped."""
    train(run, tmp_path / "straight", "one", steps=12)
    for stop, layout in zip(
        (2, 4, 6, 8, 10, None), ("both", "one", "divided", "streams", "both", "sharded"), strict=True
    ):
        train(run, tmp_path / "run", layout, steps=12, stop=stop)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), abs=5e-5)
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        # Adam divides small roundings by small numbers
        torch.testing.assert_close(other[name], weight, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["both", "streams"])
def test_a_stopped_run_ends_with_the_same_bits_in_its_layout(tmp_path, run: Run, layout):
    train(run, tmp_path / "whole", layout)
    train(run, tmp_path / "stopped", layout, stop=3)
    train(run, tmp_path / "stopped", layout)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_lie_in_memory_process_after_process():
    """Queries 0 to 7, keys 8 to 11, values 12 to 15, for two processes."""
    order = RowOrder(2, {"qkv.weight": [8, 4, 4]})
    whole = torch.arange(16)[:, None].expand(16, 2)
    lain = order.ordered("model/qkv.weight", whole)
    assert lain[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert torch.equal(order.restored("optimizer/exp_avg/qkv.weight", lain), whole)
    found = list(order.boxes("qkv.weight", [(3, 9), (0, 2)]))
    assert [(inside[0], box[0]) for inside, box in found] == [
        (slice(0, 1), (3, 4)),
        (slice(1, 3), (8, 10)),
        (slice(3, 5), (12, 14)),
        (slice(5, 6), (4, 5)),
    ]
    assert torch.equal(order.ordered("other", whole), whole)


def test_processes_are_numbered_tensor_first():
    two = [Processes(rank, 8, tensor=2, context=2) for rank in range(8)]
    assert [p.data_rank for p in two] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [p.leads for p in two] == [True, False, False, False] * 2
    assert two[0].groups("stream") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert two[0].groups("samples") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def model(**core) -> mm.Model:
    settings = {"width": 48, "depth": 2, "heads": 6, "kv_heads": 3, "mlp_width": 48, **core}
    return mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, mm.Core(**settings), ["text -> label"])


@pytest.mark.parametrize(
    ("core", "settings", "count", "said"),
    [
        ({}, {"tensor_parallel": 2}, 3, "tensor_parallel=2 need a multiple of 2 processes, and there are 3"),
        ({}, {"tensor_parallel": 2}, 2, "2 processes do not divide its kv_heads=3"),
        ({}, {"context_parallel": 4}, 4, "4 processes do not divide its heads=6"),
        ({"mlp_width": 50}, {"tensor_parallel": 3}, 3, "does not divide its hidden width 50; set mlp_width=51"),
        ({"dropout": 0.1}, {"context_parallel": 3}, 3, "dropout=0.1 of the core would draw other numbers"),
        ({"prior": mm.attention.ALiBi()}, {"tensor_parallel": 3}, 3, "ALiBi"),
        ({"score": mm.attention.General()}, {"context_parallel": 3}, 3, "General"),
        ({"read": mm.attention.Hard()}, {"tensor_parallel": 3}, 3, "Hard"),
        (
            {"block": (SelfAttention(), Recurrent())},
            {"context_parallel": 3},
            3,
            "Recurrent of block 1 reads the stream",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(monkeypatch, core, settings, count, said):
    """Before the processes are connected: nobody answers at this address."""
    for name, value in {"WORLD_SIZE": count, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    samples = [{"text": "a", "label": "a"}] * 4
    with pytest.raises(ConfigError, match=said):
        mm.fit(model(**core), {"text -> label": samples}, parallel="fsdp", steps=1, batch=4, quiet=True, **settings)


def test_other_cores_and_adapters_are_refused():
    recipe = mm.Recipe(**FSDP, tensor_parallel=2)
    reader = mm.Core(width=16, depth=1, heads=2)
    writer = reader.replace(block=(SelfAttention(), CrossAttention()))
    two = mm.Model({"text": TextBytes()}, mm.EncoderDecoder(reader=reader, writer=writer), ["text -> text"])
    with pytest.raises(ConfigError, match="an EncoderDecoder cannot be divided"):
        check_split(two, recipe, 2)
    check_split(two, mm.Recipe(), 1)


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="tensor_parallel=2 goes with parallel='fsdp', not 'ddp'"):
        mm.Recipe(tensor_parallel=2)
    with pytest.raises(ConfigError, match="context_parallel=2 is not tried with compile"):
        mm.Recipe(**FSDP, context_parallel=2, compile=True)
    with pytest.raises(ConfigError, match="context_parallel"):
        mm.Recipe(**FSDP, context_parallel=0)


def test_learned_slots_are_computed_by_every_process():
    core = {"block": (SelfAttention(), PersistentMemory(slots=4))}
    check_split(model(**core), mm.Recipe(**FSDP, tensor_parallel=3), 3)
    check_split(model(**core), mm.Recipe(**FSDP, context_parallel=3), 3)
