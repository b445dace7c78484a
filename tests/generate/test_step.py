"""The quick way through a plain core for one new token a row, against the core itself."""

import copy

import pytest
import torch

import multimodal as mm
from multimodal.attention import Cache, Layout, Span
from multimodal.generate import step
from multimodal.generate.engine import Engine
from multimodal.generate.step import Step, is_plain
from multimodal.layers import MLP, Gated, Recurrent, SelfAttention
from multimodal.masks import MaskInfo
from multimodal.norm import product
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


@pytest.mark.parametrize("copied", [0, step.COPIED], ids=["as it lies", "copied"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 7, 4]], ids=["alike", "unlike"])
@pytest.mark.parametrize("name", CORES)
@torch.inference_mode()
def test_a_step_is_what_the_core_computes(name, lengths, copied, monkeypatch):
    monkeypatch.setattr(step, "COPIED", copied)
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
    quick = Step(core)
    lengths = list(lengths)
    for counts in ([1] * 3, [1] * 3, [1, 3, 2], [1] * 3):  # also several new tokens of a row, which guesses are
        new, place = torch.randn(sum(counts), 32, dtype=torch.float64), 5 * torch.randn(sum(counts), 3)
        some = layout(counts, lengths)
        wanted = core(new, place, some, cache=caches[0].at(range(3)))
        found = quick(new, place, some, caches[1].at(range(3)))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # turns are of float32
        lengths = [n + count for n, count in zip(lengths, counts, strict=True)]
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
    ],
    ids=["gated", "recurrent", "prior", "pairs", "read"],
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
        torch.nn.Module.half,
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


def largest_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("form", "bound"), [("int8", 0.03), ("int8-weights", 1e-5), ("bfloat16", 0.01), ("all bfloat16", 0.02)]
)
@torch.inference_mode()
def test_a_step_of_a_smaller_model_is_as_near_as_its_rounding(form, bound, rows):
    """int8 and bfloat16 round activations, so sums in another order may round to the next number."""
    torch.manual_seed(0)
    core = PLAIN.replace(kv_heads=2, qk_norm=False)
    model = mm.Model({"text": TextBytes()}, core, ["text -> text"], seed=0)
    small = copy.deepcopy(model).bfloat16() if form == "all bfloat16" else mm.quantize(model, form)
    assert is_plain(small.core)
    quick = Step(small.core)
    caches = [core.cache(rows=rows, capacity=16, dtype=dtype) for dtype in (small.dtype, small.dtype, model.dtype)]
    read, place = torch.randn(4 * rows, 32).to(small.dtype), torch.randn(4 * rows, 3)
    for module, cache in zip((small.core, small.core, model.core), caches, strict=True):
        module(
            read.to(next(module.parameters()).dtype), place, layout([4] * rows, [0] * rows), cache=cache.at(range(rows))
        )
    for t in range(4):
        new, place = torch.randn(rows, 32).to(small.dtype), torch.randn(rows, 3)
        one = layout([1] * rows, [4 + t] * rows)
        wanted = small.core(new, place, one, cache=caches[0].at(range(rows)))
        found = quick(new, place, one, caches[1].at(range(rows)))
        exact = model.core(new.float(), place, one, cache=caches[2].at(range(rows)))
        assert found.dtype == wanted.dtype
        assert largest_difference(found, wanted) < bound
        # and no further from the model that was not rounded than the core itself is
        assert largest_difference(found, exact) < 1.5 * largest_difference(wanted, exact) + 1e-5


def test_a_row_of_a_large_core_is_what_the_core_writes(monkeypatch):
    monkeypatch.setattr(step, "COPIED", 0)
    model = writer(0)
    for texts in (["abc"], ["abc", "a longer text", "b"]):
        samples = [{"text": text} for text in texts]
        engines = [Engine(model, rows=4, capacity=64, plain=plain) for plain in (False, True)]
        found = []
        for engine in engines:
            for sample in samples:
                engine.submit("text -> text", sample, max_tokens=20)
            pieces = [piece for piece in engine.run() if piece.prediction]
            found.append({piece.ticket: piece.prediction.tokens.content.tolist() for piece in pieces})
        assert engines[0]._step is not None
        assert engines[1]._step is None
        assert found[0] == found[1]


def test_under_autocast_a_core_goes_its_own_way(monkeypatch):
    model = writer(0)
    engine = Engine(model, rows=1, capacity=64)
    engine.submit("text -> text", {"text": "abc"}, max_tokens=3)
    monkeypatch.setattr(Step, "__call__", lambda *_: pytest.fail("it would round the stream from layer to layer"))
    with torch.autocast("cpu", torch.bfloat16):
        assert [piece for piece in engine.run() if piece.prediction]


@pytest.mark.parametrize("bias", [None, torch.randn(7)], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_times_a_matrix_is_a_linear_layer(rows, bias):
    x, weight = torch.randn(rows, 5), torch.randn(7, 5)
    wanted = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).float()
    with torch.inference_mode():
        torch.testing.assert_close(product(x, weight, bias), wanted)
    x.requires_grad_()
    product(x, weight, bias).sum().backward()  # in training as well
    torch.testing.assert_close(x.grad, weight.sum(0).expand(rows, -1))


@torch.no_grad()
def test_keys_and_values_of_equal_layers_are_one_buffer_by_heads():
    cache = Cache(keys=[(2, 4, 4)] * 3, batch=2, capacity=5)
    assert cache.kv is not None
    assert cache.kv.shape == (3, 2, 2, 2, 5, 4)
    for layer in range(3):
        for i, part in enumerate((cache.k, cache.v)):
            part[layer].copy_(torch.randn(2, 5, 2, 4))
            assert torch.equal(cache.kv[layer, i], part[layer].transpose(1, 2))
            assert part[layer].data_ptr() == cache.kv[layer, i].data_ptr()
    assert Cache(keys=[(2, 4, 4), (2, 4, 6)], batch=2, capacity=5).kv is None
    assert Cache(keys=[(2, 4, 6)] * 2, batch=2, capacity=5).kv is None


def test_a_cache_with_gradients_has_tensors_of_its_own_for_each_layer():
    assert Cache(keys=[(2, 4, 4)] * 2, batch=1, capacity=5).kv is None
    built = mm.Core(width=16, depth=3, heads=2).build()
    layout = Layout(
        (Span(-1, 3),), MaskInfo(*torch.tensor([[0, 0, 0], [0, 1, 2], [0, 0, 0], [0, 0, 0]], dtype=torch.int32))
    )
    x = torch.randn(3, 16, requires_grad=True)
    places = torch.arange(3.0)[:, None].expand(3, 3)
    built(x, places, layout, cache=built.core.cache(rows=1, capacity=5)).square().sum().backward()
    cached = x.grad
    x.grad = None
    built(x, places, layout).square().sum().backward()
    torch.testing.assert_close(cached, x.grad)


def test_the_device_of_a_model_is_known_without_listing_its_weights(monkeypatch):
    model = writer(0)
    first = next(model.core.parameters())

    def parameters(recurse: bool = True):
        yield first
        pytest.fail("a large model has hundreds, and each step asks")

    monkeypatch.setattr(model.core, "parameters", parameters)
    assert (model.device, model.dtype) == (first.device, first.dtype)
