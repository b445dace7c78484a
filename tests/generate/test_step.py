"""The quick way through a plain core for one new token a row, against the core itself."""

import pytest
import torch

import multimodal as mm
from multimodal.attention import Layout, Span
from multimodal.generate.engine import Engine
from multimodal.generate.step import Step, is_plain
from multimodal.layers import MLP, Gated, Recurrent, SelfAttention
from multimodal.masks import MaskInfo
from multimodal_tokenizers import TextBytes

PLAIN = mm.Core(width=32, depth=3, heads=4)
CORES = {
    "default": PLAIN,
    "grouped": PLAIN.replace(kv_heads=2),
    "no norm of queries and keys": PLAIN.replace(qk_norm=False),
    "not turned": PLAIN.replace(rotary_split=(0, 0, 0)),
    "window": PLAIN.replace(mask=mm.masks.Window(3) & mm.masks.Causal()),
    "cosine": PLAIN.replace(score=mm.attention.Cosine()),
    "general": PLAIN.replace(score=mm.attention.General()),
    "gaussian": PLAIN.replace(score=mm.attention.Gaussian()),
    "wide": PLAIN.replace(block=(SelfAttention(heads=2, key_width=10, value_width=6), MLP(hidden=20), MLP())),
}


def layout(lengths: list[int], starts: list[int]) -> Layout:
    """New causal tokens of samples that hold some already."""
    sample = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    order = torch.tensor([s + t for s, n in zip(starts, lengths, strict=True) for t in range(n)], dtype=torch.int32)
    places = MaskInfo(sample, order, torch.zeros_like(order), torch.zeros_like(order))
    return Layout(tuple(Span(0, n) for n in lengths), places)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 7, 4]], ids=["alike", "unlike"])
@pytest.mark.parametrize("name", CORES)
@torch.inference_mode()
def test_a_step_is_what_the_core_computes(name, lengths):
    torch.manual_seed(0)
    core = CORES[name].build().double().eval()
    for parameter in core.parameters():
        parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))  # norms that are not 1
    assert is_plain(core)
    caches = [CORES[name].cache(rows=4, capacity=16, dtype=torch.float64) for _ in range(2)]
    read = torch.randn(sum(lengths), 32, dtype=torch.float64)
    place = torch.randn(sum(lengths), 3)
    for cache in caches:
        core(read, place, layout(lengths, [0] * 3), cache=cache.at(range(3)))
    step = Step(core)
    for t in range(4):
        new, place = torch.randn(3, 32, dtype=torch.float64), 5 * torch.randn(3, 3)
        one = layout([1] * 3, [n + t for n in lengths])
        wanted = core(new, place, one, cache=caches[0].at(range(3)))
        found = step(new, place, one, caches[1].at(range(3)))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # turns are of float32
    for a, b in zip((*caches[0].k, *caches[0].v), (*caches[1].k, *caches[1].v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "core",
    [
        PLAIN.replace(block=(SelfAttention(merge=Gated()), MLP())),
        PLAIN.replace(block=(Recurrent(), MLP())),
        PLAIN.replace(prior=mm.attention.ALiBi()),
        PLAIN.replace(score=mm.attention.Additive()),
        PLAIN.replace(read=mm.attention.Gumbel()),
        mm.Core(width=512, depth=8, heads=4),
    ],
    ids=["gated", "recurrent", "prior", "pairs", "read", "large"],
)
def test_other_cores_are_stepped_through_as_they_are(core):
    assert not is_plain(core.build())


def watched(core):
    next(core.sublayers()).register_forward_hook(lambda *_: None)


def replaced(core):
    class Other(torch.nn.Linear):
        pass

    core.blocks[1].layers[0].body.attention.out = Other(32, 32, bias=False)


def parametrized(core):
    torch.nn.utils.parametrizations.weight_norm(core.blocks[1].layers[1].body.down)


def with_another_norm(core):
    core.blocks[0].layers[0].norm = torch.nn.LayerNorm(32)


def with_a_bias(core):
    core.blocks[0].layers[1].body.down = torch.nn.Linear(*core.blocks[0].layers[1].body.down.weight.shape[::-1])


def with_a_mixture_of_types(core):
    core.blocks[0].double()


def patched(core):
    core.forward = lambda *_: None


@pytest.mark.parametrize(
    "change",
    [
        watched,
        replaced,
        parametrized,
        with_another_norm,
        with_a_bias,
        with_a_mixture_of_types,
        patched,
        torch.nn.Module.bfloat16,
    ],
)
def test_what_was_put_into_a_core_is_not_passed_by(change):
    core = PLAIN.build()
    assert is_plain(core)
    change(core)
    assert not is_plain(core)


def writer(seed: int) -> mm.Model:
    return mm.Model({"text": TextBytes()}, PLAIN, ["text -> text"], seed=seed)


def test_a_model_that_was_trained_meanwhile_writes_by_its_new_weights():
    model, other = writer(0), writer(1)
    engine = Engine(model, rows=2, capacity=64)

    def written() -> list[int]:
        engine.submit("text -> text", {"text": "abc"}, max_tokens=12)
        return next(piece.prediction for piece in engine.run() if piece.prediction).tokens.content.tolist()

    before = written()
    model.load_state_dict(other.state_dict())
    assert written() == other.generate("text -> text", text="abc", max_tokens=12).tokens.content.tolist() != before


def test_under_autocast_a_core_goes_its_own_way(monkeypatch):
    model = writer(0)
    engine = Engine(model, rows=1, capacity=64)
    engine.submit("text -> text", {"text": "abc"}, max_tokens=3)
    monkeypatch.setattr(Step, "__call__", lambda *_: pytest.fail("it would round the stream from layer to layer"))
    with torch.autocast("cpu", torch.bfloat16):
        assert [piece for piece in engine.run() if piece.prediction]
