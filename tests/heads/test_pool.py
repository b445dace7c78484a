"""Pools against their formulas, sample by sample, and as part of a classifier."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multimodal as mm
from multimodal.check import verify
from multimodal.heads import Attended, First, FirstAndMean, Last, Mean, Parts, Pool, Transformed
from multimodal.norm import Norm
from multimodal_tokenizers import Labels, TextBytes

NORM = Norm(eps=1e-5, centred=True, bias=True)
POOLS: list[Pool] = [
    First(),
    First(count=2),
    Last(),
    Mean(),
    Mean(skip=1),
    Parts(),
    Parts(count=3),
    FirstAndMean(),
    Attended(heads=2, hidden=24),
    Transformed(First(), dense="tanh"),
    Transformed(FirstAndMean(), first_norm=NORM, dense="gelu", bias=False, last_norm=NORM),
    Transformed(Attended(heads=4), first_norm=NORM),
    Transformed(Mean(), dense="linear", out=6, last_norm=NORM),
]


def alone(pool: Pool, state_TD: Tensor, weights: nn.Module | None) -> Tensor:
    """The vector of one sample, written out."""
    match pool:
        case First(count):
            return state_TD[:count].mean(0)
        case Last():
            return state_TD[-1]
        case Mean(skip):
            return state_TD[skip:].mean(0)
        case Parts(count):
            return F.adaptive_avg_pool1d(state_TD.T, count).T.flatten()
        case FirstAndMean(skip):
            return torch.cat([state_TD[0], state_TD[skip:].mean(0)])
        case Attended():
            parts = dict(weights.named_parameters())  # type: ignore[union-attr]
            q = F.linear(parts["query"], parts["attention.in_proj_weight"][:16], parts["attention.in_proj_bias"][:16])
            kv = F.linear(state_TD, parts["attention.in_proj_weight"][16:], parts["attention.in_proj_bias"][16:])
            q, k, v = (x.unflatten(-1, (pool.heads, -1)).transpose(0, 1) for x in (q, *kv.chunk(2, -1)))
            weight = (q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(-1)
            read = (weight @ v).transpose(0, 1).flatten(1)
            read = F.linear(read, parts["attention.out_proj.weight"], parts["attention.out_proj.bias"])
            normed = F.layer_norm(read, (16,), parts["norm.weight"], parts["norm.bias"], pool.norm.eps)
            hidden = F.gelu(F.linear(normed, parts["up.weight"], parts["up.bias"]), approximate="tanh")
            return (read + F.linear(hidden, parts["down.weight"], parts["down.bias"]))[0]
        case Transformed(of, first, dense, _, last, _):
            x = alone(of, state_TD, weights.of)  # type: ignore[union-attr, arg-type]
            parts = dict(weights.named_parameters())  # type: ignore[union-attr]
            if first:
                x = F.layer_norm(x, x.shape, parts["first_norm.weight"], parts["first_norm.bias"], first.eps)
            if dense:
                x = F.linear(x, parts["dense.linear.weight"], parts.get("dense.linear.bias"))
                x = {"tanh": torch.tanh, "gelu": F.gelu, "linear": nn.Identity()}[dense](x)
            if last:
                x = F.layer_norm(x, x.shape, parts["last_norm.weight"], parts["last_norm.bias"], last.eps)
            return x
    raise AssertionError(pool)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: str(pool)[:40])
def test_pools_are_their_formulas_and_see_no_other_sample(pool: Pool) -> None:
    weights = pool.weights(16)
    for parameter in [] if weights is None else weights.parameters():
        nn.init.normal_(parameter, std=0.4)
    samples = [torch.randn(n, 16) for n in (5, 2, 9)]
    bounds = [pool.rows(len(x)) for x in samples]
    rows = [x[first:last] for x, (first, last) in zip(samples, bounds, strict=True)]
    found_BD = pool.pool(torch.cat(rows), [len(x) for x in rows], weights)
    wanted_BD = torch.stack([alone(pool, x, weights) for x in samples])
    assert found_BD.shape[1] == pool.width(16)
    torch.testing.assert_close(found_BD, wanted_BD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: str(pool)[:40])
def test_a_classifier_with_a_pool_learns_is_packed_and_saved(pool: Pool, tmp_path) -> None:
    task = mm.Task("text -> label", mm.Classify(pool=pool))
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, mm.Core(width=16, depth=1, heads=2), [task])
    samples = [{"text": "aaa" + "xyz" * n, "label": "a"} for n in range(4)]
    samples += [{"text": "bbb" + "zyx" * n, "label": "b"} for n in range(4)]
    together = model.predict("text -> label", samples)
    for sample, answer in zip(samples, together, strict=True):
        one = model.predict("text -> label", text=sample["text"])
        torch.testing.assert_close(one.probability["a"], answer.probability["a"], atol=1e-5, rtol=0)
    loss = model.loss(model.pack("text -> label", samples))
    loss.backward()
    assert all(p.grad is not None for p in model.readouts.parameters())
    model.save(tmp_path)
    again = mm.Model.load(tmp_path).predict("text -> label", samples)
    assert [a.probability for a in again] == [a.probability for a in together]
    assert verify(model, {"text -> label": samples[:4]}).passed


def test_parts_tell_an_order_apart_that_a_mean_does_not() -> None:
    state_TD = torch.arange(6.0)[:, None]
    forwards, backwards = (Parts(3).pool(x, [6], None) for x in (state_TD, state_TD.flip(0)))
    assert forwards.tolist() == [[0.5, 2.5, 4.5]]
    assert backwards.tolist() == [[4.5, 2.5, 0.5]]


def test_a_pool_says_what_it_cannot_do() -> None:
    with pytest.raises(mm.ConfigError, match=r"Parts: count=0"):
        Parts(0)
    with pytest.raises(mm.ConfigError, match=r"there are 2 tokens, and skip=2 leaves none"):
        Mean(skip=2).rows(2)
    with pytest.raises(mm.ConfigError, match=r"Transformed: 'tan' is no activation; there are silu"):
        Transformed(First(), dense="tan")  # type: ignore[arg-type]
    with pytest.raises(mm.ConfigError, match=r"Attended: 'linear' is no activation"):
        Attended(heads=2, activation="linear")
    with pytest.raises(
        mm.ConfigError, match=r"Transformed: out=8 is the width of a linear layer, and dense=None has none"
    ):
        Transformed(First(), out=8)
    with pytest.raises(mm.ConfigError, match=r"Classify: pool='first' is no Pool; give one such as First\(\)"):
        mm.Classify(pool="first")  # type: ignore[arg-type]
