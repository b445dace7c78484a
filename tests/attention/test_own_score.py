"""A user's own score, in ten lines, goes through everything: training, packing, the cache, the trace, a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multimodal as mm
from multimodal.attention import Factored, Gaussian, Mechanism, Read, Score, Trace, with_column
from multimodal.layers import Body, Layer, Merge, Replace
from multimodal.look import xray
from multimodal.masks import Prior
from multimodal_tokenizers import TextBytes

TASK = "text -> out:text"
SAMPLES = [{"text": t, "out": t[::-1]} for t in ("abc", "hello", "hey you there", "x", "cba")]


@dataclass(frozen=True)
class Laplace(Score):
    """-|q - k|_1 / scale: independent Laplace noise around every key; it does not factor."""

    scale: float = 1.0
    turned = False

    def log_likelihood(self, q_BTHK: Tensor, k_BMHK: Tensor, weights: Any = None) -> Tensor:
        q, k = q_BTHK.transpose(1, 2), k_BMHK.transpose(1, 2)
        return -(q[:, :, :, None] - k[:, :, None]).abs().sum(-1) / self.scale


@dataclass(frozen=True)
class Precision(Factored):
    """-sum_k w_k (q_k - k_k)^2 / 2, a Gaussian with a learned precision for each number of a head."""

    def weights(self, heads: int, width: int) -> nn.Module:
        return nn.ParameterDict({"log": torch.zeros(heads, width)})

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        w = weights["log"].exp().to(q_BTHK.dtype)  # keys must have as many heads as queries
        return with_column(q_BTHK * w, k_BMGK, -(w * k_BMGK.square()).sum(-1) / 2, 1.0)


@dataclass(frozen=True)
class Recent(Prior):
    """A key that lies n tokens back is 1 / (1 + n) ** power times as likely."""

    power: float = 1.0

    def log_prior(self, pairs, q_BTHK, weights):
        return -self.power * (1 + pairs.distance.abs()).log()


@dataclass(frozen=True)
class Top(Read):
    """Only the `count` likeliest keys are averaged."""

    count: int = 2

    def weigh(self, log_joint_BHTM: Tensor, training: bool) -> Tensor:
        least = log_joint_BHTM.topk(min(self.count, log_joint_BHTM.shape[-1]), -1).values[..., -1:]
        return log_joint_BHTM.masked_fill(log_joint_BHTM < least, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class Doubled(Layer):
    """One linear map, twice."""

    merge: Merge = field(default_factory=mm.layers.Add)

    def build(self, core, width):
        return _Doubled(width)


class _Doubled(Body):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.linear = nn.Linear(width, width)

    def forward(self, stream_TD, context):
        return self.linear(self.linear(stream_TD).tanh())


L: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
CORES = {
    "does not factor": mm.Core(**L, score=Laplace(2.0)),
    "factors": mm.Core(**L, score=Precision()),
    "with a prior": mm.Core(**L, score=Laplace(2.0), prior=Recent() + mm.masks.Window(4)),
    "with a read": mm.Core(**L, score=Precision(), read=Top(3)),
    "in a layer of one's own": mm.Core(
        **L, block=(Doubled(), mm.layers.SelfAttention(score=Precision()), Doubled(Replace()))
    ),
    "across": mm.EncoderDecoder(
        reader=mm.Core(**L, score=Precision()),
        writer=mm.Core(
            **L,
            block=(
                mm.layers.SelfAttention(),
                mm.layers.CrossAttention(score=Laplace(), prior=Recent(2.0), read=Top()),
                mm.layers.MLP(),
            ),
        ),
    ),
}
every_core = pytest.mark.parametrize("name", CORES)
_trained: dict[str, tuple[mm.Model, list[float]]] = {}


def trained(name: str) -> mm.Model:
    """A few steps, once for all tests."""
    if name not in _trained:
        model = mm.Model({"text": TextBytes()}, CORES[name], [TASK])
        run = mm.fit(model, {TASK: SAMPLES}, steps=12, batch=5, lr=0.02, quiet=True, workers=0)
        _trained[name] = model.eval(), [step["loss"] for step in run.history]
    return _trained[name][0]


@every_core
def test_it_trains(name):
    model = trained(name)
    losses = _trained[name][1]
    assert losses[-1] < 0.8 * losses[0]
    start = mm.Model({"text": TextBytes()}, CORES[name], [TASK])
    for (weight, now), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert "score_weights" not in weight or not torch.equal(now, before)


@every_core
def test_packed_is_alone_is_dense(name):
    model = trained(name)
    stream = model.pack(TASK, SAMPLES)
    rows = model.rows(stream).detach().requires_grad_()
    states = model.core(rows, stream.position_TA, stream.layout)
    sample_T = stream.layout.info.sample
    (grad,) = torch.autograd.grad(states[sample_T == 2].square().sum(), rows)
    assert torch.count_nonzero(grad[sample_T != 2]) == 0
    assert torch.count_nonzero(grad) > 0
    with torch.no_grad():
        torch.testing.assert_close(model(stream, backend="dense"), states.detach(), atol=1e-5, rtol=0)
        r = stream.readings[TASK]
        parts = model.logits(stream)[TASK].split(list(r.lengths))
        for index, part in zip(r.samples, parts, strict=True):
            alone = model.logits(model.pack(TASK, [SAMPLES[index]]))[TASK]
            torch.testing.assert_close(part, alone, atol=2e-5, rtol=0)


@every_core
def test_cached_is_uncached(name):
    model = trained(name)
    for sample, answer in zip(
        SAMPLES, model.generate(TASK, [{"text": s["text"]} for s in SAMPLES], max_tokens=9), strict=True
    ):
        ids = answer.tokens.content.tolist()
        stream = model.packer([(TASK, {"text": sample["text"], "out": answer.tokens})], answers=True)
        with torch.no_grad():
            assert model.logits(stream, backend="dense")[TASK][: len(ids)].argmax(-1).tolist() == ids


@every_core
def test_it_can_be_looked_into(name):
    """The trace holds its scores, and the X-ray of a sample adds up: responsibilities are 1 in all."""
    model = trained(name)
    trace = Trace()
    with torch.no_grad():
        model(model.pack(TASK, SAMPLES[:1]), trace=trace)
    scores = {type(module.score) for module in model.modules() if isinstance(module, Mechanism)}
    assert {type(seen.mechanism.score) for seen in trace.seen} == scores  # type: ignore[union-attr]
    for seen in trace.seen:
        weight = seen.weight_BHTM.sum(-1)
        torch.testing.assert_close(weight, torch.ones_like(weight))
    picture = xray(model, TASK, {"text": "abc"}, answer="cba")
    assert len(picture.layers) == len(trace.seen)


@every_core
def test_it_is_saved_and_loaded(name, tmp_path):
    model = trained(name)
    again = mm.Model.load(model.save(tmp_path / "model"))
    assert again.core.core == CORES[name]
    stream = model.pack(TASK, SAMPLES)
    with torch.no_grad():
        assert torch.equal(again(stream), model(stream))


def test_they_are_what_they_say():
    """Against torch.distributions; a precision of 1 everywhere is our own Gaussian."""
    q, k, v = (torch.randn(2, n, 2, 4) for n in (3, 5, 5))
    log_p = torch.distributions.Laplace(k[:, None], 0.7).log_prob(q[:, :, None]).sum(-1)  # (B, T, M, H)
    posterior = log_p.softmax(2).permute(0, 3, 1, 2)
    torch.testing.assert_close(Laplace(0.7).log_likelihood(q, k).softmax(-1), posterior, atol=1e-5, rtol=0)
    ours, theirs = Precision(), Gaussian(variance=1.0)
    weights = ours.weights(2, 4)
    torch.testing.assert_close(ours.log_likelihood(q, k, weights), theirs.log_likelihood(q, k), atol=1e-5, rtol=0)
    assert v.shape == k.shape


@dataclass(frozen=True)
class Sideways(mm.attention.Score):
    """A beginner's slip: the axes of queries and heads are mixed up."""

    def log_likelihood(self, q_BTHK, k_BMHK, weights):
        return torch.einsum("bthk,bmhk->bthm", q_BTHK, k_BMHK)


@dataclass(frozen=True)
class Narrow(mm.attention.Read):
    def weigh(self, log_joint_BHTM, training):
        return log_joint_BHTM.softmax(-1)[..., 0]


@dataclass
class Thawed(mm.attention.Factored):
    def features(self, q_BTHK, k_BMGK, weights):
        return q_BTHK, k_BMGK, 1.0


class Undeclared(mm.attention.Factored):
    def features(self, q_BTHK, k_BMGK, weights):
        return q_BTHK, k_BMGK, 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": mm.attention.Cosine}, r"Core: score=Cosine is no Score; call it; give one such as Cosine\(\)"),
        ({"score": "cosine"}, r"Core: score='cosine' is no Score; give one such as Cosine\(\)"),
        ({"score": mm.attention.ALiBi()}, r"Core: score=ALiBi\(\) is no Score"),
        ({"prior": mm.attention.Cosine()}, r"Core: prior=Cosine\(.*\) is no Prior; give one such as ALiBi\(\)"),
        ({"read": mm.attention.Soft}, r"Core: read=Soft is no Read; call it"),
        ({"mask": mm.attention.ALiBi()}, r"Core: mask=ALiBi\(\) is no Rule; give one such as Window\(64\)"),
        ({"block": (mm.layers.MLP,)}, r"Core: block=MLP is no Layer; call it"),
        ({"score": Thawed()}, r"Core: score: Thawed is no frozen dataclass.* write @dataclass\(frozen=True\) above it"),
        ({"score": Undeclared()}, r"Core: score: Undeclared is no frozen dataclass"),
    ],
)
def test_what_is_no_such_part_is_refused_when_it_is_declared(settings, message):
    with pytest.raises(mm.ConfigError, match=message):
        mm.Core(width=16, depth=1, heads=2, **settings)


def test_layers_refuse_them_too():
    with pytest.raises(mm.ConfigError, match="SelfAttention: score=Cosine is no Score; call it"):
        mm.layers.SelfAttention(score=mm.attention.Cosine)  # type: ignore[arg-type]
    with pytest.raises(mm.ConfigError, match="CrossAttention: merge=Add is no Merge; call it"):
        mm.layers.CrossAttention(merge=mm.layers.Add)  # type: ignore[arg-type]
    with pytest.raises(mm.ConfigError, match="SelfAttention: heads=0 must be a whole number of at least 1"):
        mm.layers.SelfAttention(heads=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": Sideways()}, r"Sideways.log_likelihood gave \(1, 4, 2, 4\); wanted is .* = \(1, 2, 4, 4\)"),
        ({"read": Narrow()}, r"Narrow.weigh gave \(1, 2, 4\); wanted is .* = \(1, 2, 4, 4\)"),
    ],
)
def test_a_part_with_its_axes_mixed_up_says_which_were_wanted(settings, message):
    model = mm.Model({"text": TextBytes()}, mm.Core(width=16, depth=1, heads=2, **settings), ["-> text"])
    with pytest.raises(mm.ShapeError, match=message):
        model.loss(model.pack("-> text", [{"text": "abc"}]))
