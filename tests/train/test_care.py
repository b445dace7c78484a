"""Switches that change no result: activation checkpointing, compiled pieces, bfloat16."""

import copy
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import multimodal as mm
from multimodal.attention import Trace
from multimodal.core import compile_blocks, recompute
from multimodal.layers import Add, Concat, Gated, Replace, Sublayer
from multimodal.layers.attend import _compiled
from multimodal.masks import PREFIX_LM
from multimodal.zoo import TuringMachine
from multimodal_tokenizers import Labels, TextBytes

WRITE, CLASS = "text -> out:story", "story -> label"
TOKENIZERS = {"text": TextBytes(), "story": TextBytes(causal=True), "label": Labels(("a", "b", "c"))}
SMALL: dict[str, Any] = {"width": 16, "depth": 3, "heads": 2, "dropout": 0.2}


def core_of(*block: mm.layers.Layer, **settings: Any) -> mm.Core:
    return mm.Core(**{**SMALL, "block": block or (mm.layers.SelfAttention(), mm.layers.MLP()), **settings})


CORES: dict[str, mm.Core | mm.EncoderDecoder] = {
    "transformer": core_of(drop_path=0.3),
    "recurrent": core_of(mm.layers.Recurrent(both_ways=True), mm.layers.SelfAttention(), mm.layers.MLP(merge=Gated())),
    "LSTM": core_of(mm.layers.Recurrent(cell="lstm", merge=Replace()), depth=2),
    "convolutions": core_of(mm.zoo.TemporalConv(filters=5, merge=Concat()), mm.zoo.TemporalConv(filters=4, dilation=2)),
    "memory": core_of(
        mm.layers.SelfAttention(),
        mm.layers.PersistentMemory(slots=5, prior=mm.attention.MixingWeights(5)),
        drop_path=0.2,
    ),
    "additive": core_of(score=mm.attention.Additive(), prior=mm.attention.ALiBi() + mm.attention.RelativeBias(4)),
    "window": core_of(mask=PREFIX_LM & mm.masks.Window(3), prior=mm.attention.PredictedWindow(1.5)),
    "Gumbel": core_of(read=mm.attention.Gumbel(0.5)),
    "hard": core_of(read=mm.attention.Hard()),
    "Turing machine": core_of(TuringMachine(slots=6, slot_width=4, hidden=8, merge=Add()), depth=2),
    "two cores": mm.EncoderDecoder(
        reader=core_of(mm.layers.Recurrent(), mm.layers.MLP(), depth=2),
        writer=core_of(
            mm.layers.SelfAttention(),
            mm.layers.CrossAttention(read=mm.attention.Gumbel(1.0)),
            mm.layers.MLP(),
            drop_path=0.2,
        ),
    ),
}


def model_of(core: mm.Core | mm.EncoderDecoder) -> mm.Model:
    """Weights so large that every layer matters."""
    model = mm.Model(TOKENIZERS, core, [WRITE, CLASS])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    return model.train()


def stream_of(model: mm.Model, *texts: str) -> mm.stream.Stream:
    return model.packer(
        [
            ((WRITE, CLASS)[i % 3 == 2], {"text": text, "out": text[::-1] + "!", "story": text, "label": "abc"[i % 3]})
            for i, text in enumerate(texts)
        ]
    )


def gradients(model: mm.Model, stream: mm.stream.Stream, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model.loss(stream)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CORES)
def test_recomputing_blocks_changes_no_bit(name: str) -> None:
    model = model_of(CORES[name])
    other = copy.deepcopy(model)
    recompute(other)
    stream = stream_of(model, "abc", "hey you there", "x", "of seven", "abd")
    for seed in range(2):
        loss, grads = gradients(model, stream, seed)
        again, grads_again = gradients(other, stream, seed)
        assert torch.equal(loss, again)
        assert grads.keys() == grads_again.keys()
        assert len(grads) > 8
        for what in grads:
            assert torch.equal(grads[what], grads_again[what]), what
    for (what, buffer), (_, same) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(buffer, same), what
    assert not torch.equal(gradients(model, stream, 5)[0], loss)  # dropout is really there


def test_recomputation_does_not_change_the_generator() -> None:
    model = model_of(CORES["transformer"])
    stream = stream_of(model, "abc", "hey you")
    gradients(model, stream)
    drawn = torch.rand(4)
    recompute(model)
    gradients(model, stream)
    assert torch.equal(torch.rand(4), drawn)


def test_a_trace_is_recorded_once() -> None:
    model = model_of(CORES["hard"])
    recompute(model)
    trace = Trace()
    states = model(stream_of(model, "abc", "hey you"), trace=trace)
    before = list(trace.seen)
    assert len(before) == 3 * 2  # blocks, and samples of two lengths
    states.square().sum().backward()
    assert len(trace.seen) == len(before)
    assert all(a is b for a, b in zip(trace.seen, before, strict=True))


def saved_bytes(model: mm.Model, stream: mm.stream.Stream) -> int:
    """What is stored from forward to backward, parameters and the stream itself aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss(stream)
    total = sum(stored.values())
    loss.backward()
    return total


def test_recomputing_blocks_saves_memory() -> None:
    model = model_of(mm.Core(width=32, depth=6, heads=2))
    stream = stream_of(model, "a longer text than most", "hey you there, are you well", "so so")
    before = saved_bytes(model, stream)
    recompute(model)
    after = saved_bytes(model, stream)
    row = 4 * 32 * len(stream)  # one state of the stream, which each block keeps
    assert before > 40 * row
    # PyTorch keeps what a block computes out of sight of hooks set outside, but its input is in the caller's graph
    assert after < 16 * row
    assert after < before / 4


def test_nothing_is_recomputed_without_a_gradient_or_with_a_cache() -> None:
    model = model_of(mm.Core(width=16, depth=1, heads=2))
    recompute(model)
    calls: list[int] = []
    next(iter(model.core.blocks)).layers[0].register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    stream = stream_of(model, "abc")
    with torch.no_grad():
        model(stream)
    model.eval()
    model(stream).sum().backward()
    model.train()
    model(stream, cache=model.core.core.cache(rows=1, capacity=20)).sum().backward()
    assert len(calls) == 3
    model(stream).sum().backward()
    assert len(calls) == 5
    assert "recompute" not in str(model.core.core.config())


@pytest.fixture
def compiler() -> Iterator[None]:
    """A machine that can compile, and nothing compiled before."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


TEXTS = [("abc", "hey you there", "x"), ("q",), ("so so", "well"), ("a", "bc", "def", "ghij", "klmno", "p" * 30)]


# torch hides its own warning by a way that a filter "error" does not see
ITS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def traced(compiler: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same graphs with their gradients, run as they were traced: without the minutes that making C++ of them takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _compiled.cache_clear()
    yield
    _compiled.cache_clear()


# graphs: with dropout what is compiled of an MLP is its body alone, without it all of the layer
GRAPHS = {
    "two cores": ("traced", CORES["two cores"], 6),
    "nothing dropped": ("compiler", core_of(dropout=0.0, depth=2), 3),
}


@pytest.mark.slow
@ITS_OWN
@pytest.mark.parametrize("name", GRAPHS)
def test_compiled_pieces_agree_and_are_compiled_once(request: pytest.FixtureRequest, name: str) -> None:
    fixture, core, graphs = GRAPHS[name]
    request.getfixturevalue(fixture)
    model = model_of(core)
    other = copy.deepcopy(model)
    compile_blocks(other)
    recompute(other)
    for sublayer in (m for m in other.modules() if isinstance(m, Sublayer) and type(m.layer) is mm.layers.MLP):
        # made into C++, a draw would give other numbers
        assert (
            (sublayer.dropout > 0)
            == (sublayer._compiled_call_impl is None)
            != (sublayer.body._compiled_call_impl is None)
        )
    streams = [stream_of(model, *texts) for texts in (*TEXTS, *(("w" * n, "v" * (40 - n)) for n in range(2, 14, 2)))]
    for seed, stream in enumerate(streams):
        loss, grads = gradients(model, stream, seed)
        again, grads_again = gradients(other, stream, seed)
        torch.testing.assert_close(loss, again, atol=1e-5, rtol=0)
        for what in grads:
            torch.testing.assert_close(grads_again[what], grads[what], atol=1e-5, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert 2 <= counters["stats"]["unique_graphs"] <= graphs
    assert not counters["graph_break"]
    assert list(model.state_dict()) == list(other.state_dict())
    again = copy.deepcopy(other)  # as averaged weights are made
    torch.testing.assert_close(gradients(again, stream)[0], gradients(model, stream)[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@ITS_OWN
def test_sharded_blocks_are_recomputed_and_compiled(traced: None) -> None:
    """FSDP2 gathers a block's weights around it: with one process all numbers must be those of the plain model."""
    from torch.distributed.fsdp import fully_shard

    model = model_of(core_of(drop_path=0.3, depth=2))
    other = copy.deepcopy(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        recompute(other)
        compile_blocks(other)
        for block in other.core.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(other, mesh=mesh)
        streams = [stream_of(model, *texts) for texts in TEXTS]
        streams += [model.pack(CLASS, [{"story": "s" * 9, "label": "b"}] * n) for n in (2, 5)]
        for seed, stream in enumerate(streams):
            loss, grads = gradients(model, stream, seed)
            torch.manual_seed(seed)
            other.zero_grad(set_to_none=True)
            again = other.loss(stream)
            again.backward()
            torch.testing.assert_close(loss, again.detach(), atol=1e-5, rtol=0)
            for what, p in other.named_parameters():
                if what in grads:
                    torch.testing.assert_close(p.grad.full_tensor(), grads[what], atol=1e-5, rtol=1e-4)  # pyright: ignore
        # of an MLP, of attention, and of attention where the last row of each sample alone asks
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    finally:
        dist.destroy_process_group()


def test_bfloat16_follows_float32() -> None:
    """Some steps with the same seed: losses within 1 % of each other while they fall to less than half."""

    def losses(precision: str) -> list[float]:
        samples = [{"story": "abcd"[i % 4] * (3 + i % 5), "label": "abc"[i % 4 % 3]} for i in range(32)]
        model = mm.Model(TOKENIZERS, mm.Core(width=32, depth=2, heads=2), [CLASS])
        run = mm.fit(
            model, {CLASS: samples}, steps=30, batch=16, lr=3e-3, precision=precision, device="cpu", quiet=True
        )
        return [row["loss"] for row in run.history]

    exact, rough = losses("float32"), losses("bfloat16")
    assert exact[-1] < exact[0] / 2
    assert exact != rough
    assert max(abs(a - b) / a for a, b in zip(exact, rough, strict=True)) < 0.01
