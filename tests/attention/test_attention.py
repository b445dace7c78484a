"""Every way to attend a stream against a softmax written as a loop in float64, and the layer against PyTorch's own."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import (
    ALiBi,
    Cache,
    Cosine,
    Factored,
    Layout,
    Mechanism,
    ScaledDotProduct,
    Soft,
    plan_attention,
)
from multimodal.attention.gpu import VarlenPlan
from multimodal.layers import Attention
from multimodal.masks import LAW, PREFIX_LM, Causal, Chunked, MaskInfo, Prefix, Rule, SameSample, SameSegment, Window
from multimodal.norm import RMSNorm, _RMSNormCPU
from multimodal.positions import rotary_frequencies, rotations
from multimodal.shapes import ConfigError, StreamError

PREFIX_FIRST = {  # layouts that the variable-length kernel can run: what is read freely stands first
    "all free": [[(5, True)], [(3, True)], [(3, True)]],
    "all causal": [[(4, False)], [(4, False)], [(7, False)]],
    "prefix": [[(2, True), (3, False)], [(4, True), (2, False)], [(4, True), (2, False)]],
    "unequal, some without context or target": [
        [(3, False)],
        [(5, True)],
        [(1, True), (6, False)],
        [(6, True), (1, False)],
    ],
    "one token": [[(1, True)], [(1, False)], [(1, True)], [(2, False)]],
}
LAYOUTS = {
    **PREFIX_FIRST,
    "causal then free": [[(3, False), (4, True)], [(3, False), (4, True)], [(2, True), (2, False)]],
    "free around causal": [[(2, True), (3, False), (3, True), (2, False)], [(1, False)]],
}
RULES = {
    "default": PREFIX_LM,
    "window": PREFIX_LM & Window(3),
    "fields apart": SameSample() & (SameSegment() | Causal()),
    "free only": SameSample() & (Prefix() | Window(1)),
}
HERE = pytest.mark.parametrize("backend", ["dense", "runs", "flex"])
quiet_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@dataclass(frozen=True)
class ScaledBy(Factored):
    """A product with a scale of our own."""

    scale: float

    def features(self, q_BTHK, k_BMGK, weights):
        return q_BTHK, k_BMGK, self.scale


def scaled(scale: float) -> Mechanism:
    return Mechanism(ScaledBy(scale), None, Soft(), 4, 8)


def by_loop(rule: Rule, places: MaskInfo, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float) -> Tensor:
    """Softmax attention of each head and query alone, in float64."""
    q, k, v = (x.double() for x in (q_THK, k_TGK, v_TGK))
    share = q.shape[1] // k.shape[1]  # query heads that read the same keys
    rows = []
    for t in range(len(q)):
        seen = [m for m in range(len(k)) if bool((LAW & rule).allows(places[t], places[m]))]
        heads = []
        for h in range(q.shape[1]):
            score = torch.stack([(q[t, h] * k[m, h // share]).sum() * scale for m in seen])
            weight = (score - score.max()).exp()
            heads.append((weight[:, None] * v[seen, h // share]).sum(0) / weight.sum())
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def qkv(count: int, heads: int, kv_heads: int, width: int = 8, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(count, n, width, **kwargs) for n in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def size(layout: Layout) -> int:
    return len(layout.info.sample)


@quiet_flex
@HERE
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_plan_is_the_loop(lay, case, rule, backend):
    layout = lay(LAYOUTS[case])
    q, k, v = qkv(size(layout), 4, 2)
    read = plan_attention(RULES[rule], layout, backend=backend).attend(q, k, v, scaled(0.4), 0)
    expected = by_loop(RULES[rule], layout.info, q, k, v, 0.4)
    torch.testing.assert_close(read.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("rule", ["default", "window"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_gradients_are_those_of_the_loop(lay, case, rule, heads, kv_heads, backend):
    layout = lay(LAYOUTS[case])
    ours = [x.requires_grad_() for x in qkv(size(layout), heads, kv_heads)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    push = torch.randn(size(layout), heads, 8)
    plan_attention(RULES[rule], layout, backend=backend).attend(*ours, scaled(0.4), 0).backward(push)
    by_loop(RULES[rule], layout.info, *theirs, 0.4).backward(push.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_no_gradient_crosses_from_sample_to_sample(lay, case, backend):
    layout = lay(LAYOUTS[case])
    inputs = [x.requires_grad_() for x in qkv(size(layout), 4, 2)]
    read = plan_attention(PREFIX_LM, layout, backend=backend).attend(*inputs, scaled(0.4), 0)
    sample_T = layout.info.sample
    for sample in range(len(layout.spans)):
        grads = torch.autograd.grad(read[sample_T == sample].square().sum(), inputs, retain_graph=True)
        for grad in grads:
            assert torch.count_nonzero(grad[sample_T != sample]) == 0
        assert torch.count_nonzero(grads[2][sample_T == sample]) > 0


def loop_over_bounds(q, k, v, call, scale):
    """What the CUDA kernel does: sequence by sequence, 0 where a sequence has no keys."""
    bounds = [x.tolist() for x in call[:2]]
    assert [x[-1] for x in bounds] == [len(q), len(k)]
    for each, most in zip(bounds, call[2:4], strict=True):
        sizes = [b - a for a, b in pairwise(each)]
        assert (min(sizes) >= 0, max(sizes)) == (True, most)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = []
    for (a, b), (c, d) in zip(*map(pairwise, bounds), strict=True):
        # aligned bottom-right: the last query is at the last key
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        before, after = (math.inf if reach < 0 else reach for reach in call.window)
        mask = (distance <= before) & (distance >= -after)
        score = torch.einsum("qhk,mhk->hqm", q[a:b], k[c:d]) * scale
        out.append(torch.einsum("hqm,mhk->qhk", score.masked_fill(~mask, -math.inf).softmax(-1), v[c:d]))
    return torch.cat(out)


@pytest.mark.parametrize("rule", [PREFIX_LM, PREFIX_LM & Window(3), Window(1) & PREFIX_LM], ids=["all", "3", "1"])
@pytest.mark.parametrize("case", PREFIX_FIRST)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_the_variable_length_plan_keeps_its_books(lay, monkeypatch, case, heads, kv_heads, rule):
    """Its bounds and alignment, with the CUDA kernel replaced by a loop over the bounds."""
    monkeypatch.setattr(VarlenPlan, "_call", staticmethod(loop_over_bounds))
    layout = lay(PREFIX_FIRST[case])
    q, k, v = (x.requires_grad_() for x in qkv(size(layout), heads, kv_heads))
    read = plan_attention(rule, layout, backend="varlen").attend(q, k, v, scaled(0.4), 0)
    expected = by_loop(rule, layout.info, q, k, v, 0.4)
    torch.testing.assert_close(read.double(), expected, atol=2e-6, rtol=1e-5)
    mine, other = (torch.autograd.grad(x.double().square().sum(), (q, k, v)) for x in (read, expected))
    for ours, theirs in zip(mine, other, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_variable_length_plan_pads_widths_to_eights(lay, monkeypatch):
    def call(q, k, v, call, scale):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16
        return loop_over_bounds(q, k, v, call, scale)

    monkeypatch.setattr(VarlenPlan, "_call", staticmethod(call))
    layout = lay(PREFIX_FIRST["prefix"])
    q, k, v = qkv(size(layout), 4, 2, 10)
    read = plan_attention(PREFIX_LM, layout, backend="varlen").attend(q, k, v, scaled(0.4), 0)
    torch.testing.assert_close(read.double(), by_loop(PREFIX_LM, layout.info, q, k, v, 0.4), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        (PREFIX_LM & Chunked(3), "prefix"),
        (PREFIX_LM, "causal then free"),
        (PREFIX_LM & Window(3), "causal then free"),
    ],
    ids=["rule", "layout", "layout in a window"],
)
def test_the_variable_length_plan_refuses_what_it_cannot_run(lay, rule, case):
    with pytest.raises(ConfigError, match=r"'varlen' runs only the default rule.*use 'flex'"):
        plan_attention(rule, lay(LAYOUTS[case]), backend="varlen")


def test_an_unknown_backend_is_named(lay):
    with pytest.raises(ConfigError, match=r"attention backend 'dens' is unknown.*did you mean 'dense'"):
        plan_attention(PREFIX_LM, lay([[(2, True)]]), backend="dens")


@pytest.mark.parametrize("rule", ["default", "window"])
@pytest.mark.parametrize("backend", ["dense", "runs"])
def test_one_cached_token_at_a_time_is_the_whole_pass(lay, backend, rule):
    """Prompts of unequal length, one with a free part in its middle; then three tokens written to each."""
    prompts = [[(3, True), (1, False)], [(2, False)], [(2, False), (3, True), (1, False)]]
    whole = lay([[*fields, (3, False)] for fields in prompts])
    q, k, v = qkv(size(whole), 4, 2)
    expected = by_loop(RULES[rule], whole.info, q, k, v, 0.4)
    lengths = [sum(n for n, _ in fields) for fields in prompts]
    starts = [0, lengths[0] + 3, lengths[0] + lengths[1] + 6]

    cache = Cache(keys=[(2, 8, 8)], batch=3, capacity=9)
    rows = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    plan = plan_attention(RULES[rule], lay(prompts), backend=backend, cache=cache)
    torch.testing.assert_close(
        plan.attend(q[rows], k[rows], v[rows], scaled(0.4), 0).double(), expected[rows], atol=2e-6, rtol=1e-5
    )
    assert cache.length == lengths
    for step in range(3):
        rows = torch.tensor([s + n + step for s, n in zip(starts, lengths, strict=True)])
        layout = Layout(lay([[(1, False)]] * 3).spans, whole.info[rows])
        layout = Layout(
            layout.spans,
            MaskInfo(torch.arange(3), *(getattr(layout.info, n) for n in ("order", "bidirectional", "segment"))),
        )
        plan = plan_attention(RULES[rule], layout, backend=backend, cache=cache)
        read = plan.attend(q[rows], k[rows], v[rows], scaled(0.4), 0)
        torch.testing.assert_close(read.double(), expected[rows], atol=2e-6, rtol=1e-5)


def test_a_full_cache_says_so():
    cache = Cache(keys=[(1, 2, 2)], batch=2, capacity=3)
    cache.reserve([3, 1])
    with pytest.raises(StreamError, match=r"sample 0 needs 4 tokens, but capacity=3"):
        cache.reserve([1, 1])
    assert cache.length == [3, 1]


def test_scaled_dot_product_is_pytorch_default_scale():
    q, k, v = (x.transpose(0, 1)[None] for x in qkv(6, 2, 2))
    features_q, features_k, scale = ScaledDotProduct().features(q, k)
    mine = (features_q @ features_k.mT * scale).softmax(-1) @ v
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v))


def test_cosine_score_is_the_cosine_of_each_pair():
    q_THK, k_TGK, _ = qkv(4, 2, 2)
    q, k, scale = Cosine(sharpness=7.0).features(q_THK, k_TGK)
    for t in range(4):
        for m in range(4):
            for h in range(2):
                a, b = q_THK[t, h].double(), k_TGK[m, h].double()
                expected = 7.0 * float(a @ b / (a.norm() * b.norm()))
                assert float(q[t, h] @ k[m, h]) * scale == pytest.approx(expected, abs=1e-5)
    longer, *_ = Cosine(sharpness=7.0).features(5 * q_THK, k_TGK)
    torch.testing.assert_close(longer, q)


def layer_and_mha(rule: Rule, layout: Layout, backend: str) -> tuple[Tensor, Tensor]:
    width, heads = 24, 4
    ours = Attention(width, heads, heads, Mechanism(ScaledDotProduct(), None, Soft(), heads, width // heads), norm=None)
    theirs = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    with torch.no_grad():
        ours.qkv.weight.copy_(theirs.in_proj_weight)
        ours.out.weight.copy_(theirs.out_proj.weight)
    stream_TD = torch.randn(size(layout), width)
    turns = rotations(torch.zeros(size(layout), 3), *rotary_frequencies(6, (2, 1, 1), (1e4, 1e2, 1e2)))
    plan = plan_attention(rule, layout, backend=backend)
    mine = ours.out(plan.attend(*ours(stream_TD, turns), ours.mechanism, 0).flatten(1))
    places = layout.info
    hidden = torch.tensor(
        [[not bool(rule.allows(places[t], places[m])) for m in range(size(layout))] for t in range(size(layout))]
    )
    other, _ = theirs(*[stream_TD[None]] * 3, attn_mask=hidden, need_weights=False)
    return mine, other[0]


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layer_is_pytorch_multihead_attention(lay, case, backend):
    mine, other = layer_and_mha(PREFIX_LM, lay(LAYOUTS[case]), backend)
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 5), (3, 4, 2, 8), (1, 1)])
def test_rmsnorm_and_its_cpu_backward_are_pytorch_own(shape):
    norm = RMSNorm(shape[-1])
    nn.init.normal_(norm.weight)
    x, push = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mine = norm(x)
    assert "_RMSNormCPU" in type(mine.grad_fn).__name__  # the case really runs our backward
    mine.backward(push)
    other_x, other_weight = x.detach().clone().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    other = F.rms_norm(other_x, shape[-1:], other_weight, norm.eps)
    other.backward(push)
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(x.grad, other_x.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.weight.grad, other_weight.grad, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), other)


def test_rmsnorm_gradient_in_float64():
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: _RMSNormCPU.apply(a, b, 1e-6), (x, weight))


def test_rmsnorm_of_nearly_nothing_is_kept_finite_by_eps():
    x = torch.zeros(2, 4, requires_grad=True)
    out = RMSNorm(4)(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4))
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))  # 1 / sqrt(eps)


def test_rmsnorm_refuses_a_second_derivative_instead_of_giving_a_wrong_one():
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(RMSNorm(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rmsnorm_takes_bfloat16_beside_float32_weights_without_a_warning():
    norm, x = RMSNorm(8), torch.randn(5, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    torch.testing.assert_close(out, F.rms_norm(x.float(), (8,), eps=1e-6))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("prior", [None, ALiBi()], ids=["bare", "with a prior"])
def test_long_samples_are_read_in_two_calls_without_a_mask(lay, monkeypatch, prior, kv_heads):
    monkeypatch.setattr("multimodal.attention.plan.LONG", 12)
    parts = ((0, 13), (3, 9), (3, 9), (8, 4), (9, 3), (5, 25), (2, 2))
    layout = lay([[(free, True), (rest, False)] if free else [(rest, False)] for free, rest in parts])
    masked = []
    rows = [size(layout), 4, 8]
    torch.manual_seed(0)
    mechanism = Mechanism(ScaledDotProduct(), prior, Soft(), 4, 8)
    q = torch.randn(*rows, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(rows[0], kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for backend in ("runs", "dense"):
        plan = plan_attention(PREFIX_LM, layout, backend=backend)
        read = plan.attend(q, k, v, mechanism, 0)
        found.append((read, *torch.autograd.grad((read * torch.arange(1.0, 9.0)).sum(), (q, k, v))))
        if backend == "runs":
            masked = [pairs.allowed is not None for _, pairs, _ in plan.runs]
    assert masked == [False, False, False, True, False, True]  # of 9 in 12 a mask is the cheaper way
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
