"""Scores, priors and reads: every combination against the papers' formulas in float64 loops, and each one's own identity."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import multimodal as mm
from multimodal.attention import (
    Additive,
    ALiBi,
    Bernoulli,
    BucketedBias,
    Cosine,
    DotProduct,
    Gaussian,
    General,
    Gumbel,
    Hard,
    LocationBased,
    Mechanism,
    MixingWeights,
    PredictedWindow,
    Read,
    RelativeBias,
    ScaledDotProduct,
    Score,
    Soft,
    Trace,
    mechanism,
    reweighted,
    with_column,
)
from multimodal.masks import MaskInfo, Pairs, Prior, Window, all_pairs
from multimodal.shapes import ConfigError, StreamError

H, G, K, WIDE = 4, 2, 6, 5  # query heads, key-value heads, width of a key, width of a value
PLACES = 9

Formula = Callable[[Tensor, Tensor, Any, int], Tensor]
"""(q (T, K), k (M, K), learned weights, head) -> (T, M), in float64."""


def sdpa(q_BTHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention with our axes."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BMGK, v_BMGK))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def gaussian(variance: float) -> Formula:
    return lambda q, k, w, h: -(q[:, None] - k[None]).square().sum(-1) / (2 * variance)


def cosine(sharpness: Callable[[Any, int], Any]) -> Formula:
    return lambda q, k, w, h: sharpness(w, h) * F.cosine_similarity(q[:, None], k[None], dim=-1)


def bernoulli(q: Tensor, k: Tensor, w: Any, h: int) -> Tensor:
    """The log-likelihood of bits q: each is 1 with probability sigmoid(k)."""
    p = k.sigmoid()[None]
    return (q[:, None] * p.log() + (1 - q[:, None]) * (1 - p).log()).sum(-1)


SCORES: dict[str, tuple[Score, Formula]] = {
    "scaled dot": (ScaledDotProduct(), lambda q, k, w, h: q @ k.T / math.sqrt(K)),
    "dot": (DotProduct(), lambda q, k, w, h: q @ k.T),
    "dot with a factor": (DotProduct(scale=0.3), lambda q, k, w, h: 0.3 * q @ k.T),
    "general": (General(), lambda q, k, w, h: q @ w.matrix[h] @ k.T),
    "cosine": (Cosine(sharpness=4.0), cosine(lambda w, h: 4.0)),
    "cosine, learned": (Cosine(learned=True), cosine(lambda w, h: w.log_scale[h].exp())),
    "Gaussian": (Gaussian(), gaussian(math.sqrt(K))),
    "narrow Gaussian": (Gaussian(variance=0.7), gaussian(0.7)),
    "Bernoulli": (Bernoulli(), bernoulli),
    "location": (LocationBased(PLACES), lambda q, k, w, h: (q @ w.matrix[h])[:, : len(k)]),
    "additive": (
        Additive(hidden=3),
        lambda q, k, w, h: (q @ w.query[h])[:, None].add((k @ w.key[h])[None]).tanh() @ w.vector[h],
    ),
}


@dataclass
class Where:
    """One sample's queries and keys: their numbers, and how many keys each query may look at."""

    t_T: Tensor
    m_M: Tensor
    count_T: Tensor
    q_TK: Tensor

    @property
    def distance(self) -> Tensor:
        return self.m_M[None] - self.t_T[:, None]


PriorFormula = Callable[[Where, Any, int], Tensor]


def alibi(at: Where, w: Any, h: int) -> Tensor:
    """Slopes for 4 heads as Press et al. list them: 1/4, 1/16, 1/64, 1/256."""
    return -[1 / 4, 1 / 16, 1 / 64, 1 / 256][h] * at.distance.abs().double()


def relative(reach: int) -> PriorFormula:
    """Shaw et al. 2018, clip(j - i, -k, k), one number a head."""

    def formula(at: Where, w: Any, h: int) -> Tensor:
        rows = [[w.table[h, max(-reach, min(reach, int(j - i))) + reach] for j in at.m_M] for i in at.t_T]
        return torch.stack([torch.stack(row) for row in rows])

    return formula


def bucketed(buckets: int, reach: int, directed: bool) -> PriorFormula:
    """Raffel et al. 2020: exact near the query, then ranges that grow as the logarithm, written out distance by distance."""

    def number(distance: int) -> int:
        half = buckets // 2 if directed else buckets
        far = abs(distance) if directed else max(-distance, 0)
        exact = half // 2
        if far >= exact:
            far = min(exact + int(math.log(far / exact) / math.log(reach / exact) * (half - exact)), half - 1)
        return far + (half if directed and distance > 0 else 0)

    def formula(at: Where, w: Any, h: int) -> Tensor:
        return torch.stack([torch.stack([w.table[h, number(int(j - i))] for j in at.m_M]) for i in at.t_T])

    return formula


def predicted(sigma: float) -> PriorFormula:
    """Luong et al. 2015: p = S sigmoid(v tanh(W h)), a Gaussian with standard deviation sigma around it."""

    def formula(at: Where, w: Any, h: int) -> Tensor:
        p_T = at.count_T * ((at.q_TK @ w.matrix[h]).tanh() @ w.vector[h]).sigmoid()
        return -(at.m_M[None] - p_T[:, None]).square() / (2 * sigma**2)

    return formula


def near(size: int) -> PriorFormula:
    return lambda at, w, h: torch.where(at.distance.abs() < size, 0.0, -math.inf).double()


def mixing(at: Where, w: Any, h: int) -> Tensor:
    return (w.table[h].exp() / w.table[h].exp().sum()).log()[at.m_M.long()].expand(len(at.t_T), -1)


PRIORS: dict[str, tuple[Prior | None, tuple[PriorFormula, ...]]] = {
    "none": (None, ()),
    "ALiBi": (ALiBi(), (alibi,)),
    "relative": (RelativeBias(2), (relative(2),)),
    "ranges to both sides": (BucketedBias(8, 6), (bucketed(8, 6, True),)),
    "ranges behind": (BucketedBias(6, 7, directed=False), (bucketed(6, 7, False),)),
    "local-p": (PredictedWindow(1.3), (predicted(1.3),)),
    "local-m": (Window(3), (near(3),)),
    "mixing": (MixingWeights(PLACES), (mixing,)),
    "rule + prior": (Window(4) + ALiBi(), (near(4), alibi)),
    "three": (RelativeBias(2) + PredictedWindow(2.0) + MixingWeights(PLACES), (relative(2), predicted(2.0), mixing)),
}
READS: dict[str, tuple[Read, Callable[[Tensor], Tensor]]] = {
    "soft": (Soft(), lambda joint: joint.softmax(-1)),
    "Gumbel": (Gumbel(temperature=0.6), lambda joint: (joint / 0.6).softmax(-1)),
    "straight through": (
        Gumbel(straight_through=True),
        lambda joint: one_hot(joint.argmax(-1), joint) + joint.softmax(-1) - joint.softmax(-1).detach(),
    ),
    "hard": (Hard(), lambda joint: one_hot(joint.argmax(-1), joint)),
}


def one_hot(key: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(key, like.shape[-1]).to(like.dtype)


def places(sample: Tensor, order: Tensor) -> MaskInfo:
    return MaskInfo(sample, order, torch.zeros_like(order), torch.zeros_like(order))


def cross(count: int = 3, queries: int = 4, keys: int = 7) -> Pairs:
    """Every query of a sample at every key of it, not the same number of both."""
    return Pairs(
        places(torch.arange(count)[:, None, None], torch.arange(queries)[None, :, None].expand(count, -1, -1)),
        places(torch.arange(count)[:, None, None], torch.arange(keys)[None, None].expand(count, -1, -1)),
    )


def square(count: int, total: int, allowed: Tensor | None, causal: bool = False) -> Pairs:
    at = places(torch.arange(count)[:, None], torch.arange(total).expand(count, -1))
    return Pairs(at[:, :, None], at[:, None], allowed, causal)


def pack() -> Pairs:
    """Samples of 5, 1 and 3 tokens in one row; the first reads two of its tokens freely."""
    sample = torch.tensor([0] * 5 + [1] + [2] * 3)[None]
    order = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2])[None]
    at = places(sample, order)
    q, k = at[:, :, None], at[:, None]
    free = (sample == 0) & (order < 2)
    return Pairs(q, k, (q.sample == k.sample) & ((k.order <= q.order) | (free[:, :, None] & free[:, None])))


CASES: dict[str, Callable[[], Pairs]] = {
    "cross": cross,
    "causal": lambda: square(2, 5, None, causal=True),
    "prefix": lambda: square(2, 6, torch.ones(1, 6, 6).tril().bool() | (torch.arange(6) < 3)[None, None]),
    "pack": pack,
}


def made(score: Score, prior: Prior | None, read: Read) -> Mechanism:
    """In float64, with weights that are not all alike, at rest."""
    found = Mechanism(score, prior, read, H, K).double()
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return found.eval()


def tensors(pairs: Pairs, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    """q, k, v."""
    count, total, keys = pairs.q.order.shape[0], pairs.q.order.shape[1], pairs.k.order.shape[-1]
    shapes = [(count, total, H, K), (count, keys, G, K), (count, keys, G, WIDE)]
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def by_hand(
    pairs: Pairs, qkv: list[Tensor], found: Mechanism, score: Formula, prior: tuple[PriorFormula, ...], read: Callable
) -> tuple[Tensor, Tensor]:
    """What is read and the weights, head by head and sample by sample: softmax(score + log prior) @ v."""
    q, k, v = qkv
    shape = (len(q), q.shape[1], k.shape[1])
    seen = ~pairs.closed.expand(shape) if pairs.closed is not None else torch.ones(shape, dtype=torch.bool)
    reads, weights = [], []
    for b, h in itertools.product(range(len(q)), range(H)):
        at = Where(pairs.q.order[b, :, 0], pairs.k.order[b, 0], seen[b].sum(-1), q[b, :, h])
        joint = score(q[b, :, h], k[b, :, h // (H // G)], found.score_weights, h)
        if isinstance(found.score, LocationBased):  # by the number of the key in its sample, not in the row
            joint = (q[b, :, h] @ found.score_weights.matrix[h])[:, at.m_M.long()]  # type: ignore[union-attr, index]
        for part, w in zip(prior, found.prior_weights, strict=True):
            joint = joint + part(at, w, h)
        weights.append(read(joint.masked_fill(~seen[b], -math.inf)))
        reads.append(weights[-1] @ v[b, :, h // (H // G)])
    return tuple(torch.stack(x).unflatten(0, (len(q), H)).transpose(1, 2) for x in (reads, weights))  # type: ignore[return-value]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_under_every_prior_by_every_read_is_its_formula(score, prior, read):
    """The fused kernel and the plain version, what comes out and all gradients, grouped heads, four layouts."""
    found = made(SCORES[score][0], PRIORS[prior][0], READS[read][0])
    for case in CASES.values():
        pairs = case()
        qkv = tensors(pairs)
        wanted, weight = by_hand(pairs, qkv, found, SCORES[score][1], PRIORS[prior][1], READS[read][1])
        trace = Trace()
        fused, written = found(*qkv, pairs), found(*qkv, pairs, trace)
        push = torch.randn_like(wanted)
        inputs = [*qkv, *found.parameters()]
        gradients = [
            torch.autograd.grad((out * push).sum(), inputs, allow_unused=True, materialize_grads=True)
            for out in (wanted, fused, written)
        ]
        for out, grads in zip((fused, written), gradients[1:], strict=True):
            torch.testing.assert_close(out, wanted, atol=1e-10, rtol=0)
            for ours, theirs in zip(grads, gradients[0], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
        assert all(grad.abs().max() > 0 for grad in gradients[0][2:3])
        (seen,) = trace.seen
        torch.testing.assert_close(seen.weight_BHTM.transpose(1, 2), weight, atol=1e-10, rtol=0)
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight[..., 0]), atol=1e-12, rtol=0)
        closed = pairs.closed
        if closed is not None:
            assert torch.count_nonzero(seen.weight_BHTM.masked_fill(~closed[:, None], 0.0)) == 0
            assert closed.any()


def test_the_cases_contain_what_they_are_meant_to_exercise():
    fused = {name for name, (score, _) in SCORES.items() if made(score, None, Soft()).fused}
    assert set(SCORES) - fused == {"additive"}
    assert made(DotProduct(), ALiBi(), Soft()).fused
    assert not made(DotProduct(), None, Hard()).fused
    assert G < H
    assert K != WIDE


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("score", ["general", "additive", "dot"])
def test_local_p_is_luongs_equation_10_and_its_renormalised_twin(score, renormalise):
    """exp(-(s - p)^2 / 2 sigma^2) times align(h, s) after the softmax, or inside it."""
    sigma, pairs = 1.1, cross()
    found = made(SCORES[score][0], PredictedWindow(sigma, renormalise=renormalise), Soft())
    qkv = tensors(pairs)
    align = lambda joint: joint.softmax(-1)  # noqa: E731
    _, weight = by_hand(pairs, qkv, made_like(found), SCORES[score][1], (), align)
    w: Any = found.prior_weights[0]
    p_BTH = 7 * torch.einsum("bthk,hkj->bthj", qkv[0], w.matrix).tanh().mul(w.vector).sum(-1).sigmoid()
    product = weight * (-((torch.arange(7) - p_BTH[..., None]) ** 2) / (2 * sigma**2)).exp()
    if renormalise:
        product = product / product.sum(-1, keepdim=True)
    wanted = torch.einsum("bthm,bmhk->bthk", product, qkv[2].repeat_interleave(H // G, 2))
    trace = Trace()
    torch.testing.assert_close(found(*qkv, pairs), wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(found(*qkv, pairs, trace), wanted, atol=1e-10, rtol=0)
    total = trace.seen[0].weight_BHTM.sum(-1)
    assert (total < 0.999).all() if not renormalise else (total - 1).abs().max() < 1e-12
    push = torch.randn_like(wanted)
    inputs = [*qkv, *found.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found(*qkv, pairs) * push).sum(), inputs),
        torch.autograd.grad((wanted * push).sum(), [*inputs[:3], *made_like.last, *w.parameters()]),  # type: ignore[attr-defined]
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def made_like(found: Mechanism) -> Mechanism:
    """The same score with the same weights and no prior."""
    bare = Mechanism(found.score, None, Soft(), H, K).double()
    if bare.score_weights is not None:
        bare.score_weights = found.score_weights
    made_like.last = list(bare.parameters())  # type: ignore[attr-defined]
    return bare


@pytest.mark.parametrize("read", [Hard(), Gumbel()], ids=["hard", "Gumbel"])
def test_a_factor_is_refused_where_nothing_is_averaged(read):
    with pytest.raises(ConfigError, match=r"PredictedWindow: it does not renormalise.*needs a prior"):
        Mechanism(DotProduct(), ALiBi() + PredictedWindow(1.0, renormalise=False), read, H, K)


@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_scores_are_finite_differences(score):
    found, pairs = made(SCORES[score][0], None, Soft()), cross(1, 3, 4)
    qkv = tensors(pairs)
    assert torch.autograd.gradcheck(lambda *x: found(*x[:3], pairs), (*qkv, *found.parameters()), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *x: found(*x[:3], pairs, Trace()), (*qkv, *found.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("prior", [*(p for p, _ in PRIORS.values()), PredictedWindow(1.0, renormalise=False)], ids=str)
def test_gradients_of_priors_are_finite_differences(prior):
    found, pairs = made(ScaledDotProduct(), prior, Soft()), square(1, 4, torch.ones(1, 4, 4).tril().bool())
    inputs = (*tensors(pairs), *found.parameters())
    assert torch.autograd.gradcheck(lambda *x: found(*x[:3], pairs), inputs, fast_mode=True)


@pytest.mark.parametrize("read", [Soft(), Gumbel(temperature=0.8)], ids=["soft", "Gumbel"])
def test_gradients_of_reads_are_finite_differences(read):
    """Under the same noise each time."""

    def run(joint_BHTM: Tensor, v_BMHK: Tensor) -> Tensor:
        torch.manual_seed(5)
        return read.read(joint_BHTM, v_BMHK, training=True)[0]

    inputs = [torch.randn(1, 2, 3, 4).double(), torch.randn(1, 4, 2, 3).double()]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


def test_scaled_dot_product_is_a_mixture_of_gaussians_with_this_prior():
    """SEEDS 1.1: variance sqrt(K) and log pi = |k|^2 / (2 sqrt(K)), by densities of torch.distributions."""
    pairs = cross()
    q, k, v = tensors(pairs, grad=False)
    k_BMHK = k.repeat_interleave(H // G, 2)
    normal = torch.distributions.Normal(k_BMHK[:, None], K**0.25)
    log_pi = k_BMHK.square().sum(-1) / (2 * math.sqrt(K))
    log_joint = normal.log_prob(q[:, :, None]).sum(-1) + log_pi[:, None]  # (B, T, M, H)
    r = (log_joint - log_joint.logsumexp(2, keepdim=True)).exp()
    wanted = torch.einsum("btmh,bmhk->bthk", r, v.repeat_interleave(H // G, 2))
    torch.testing.assert_close(made(ScaledDotProduct(), None, Soft())(q, k, v, pairs), wanted, atol=1e-12, rtol=0)

    class Norms(Prior):
        def log_prior(self, pairs, q_BTHK, weights):
            return log_pi.transpose(1, 2)[:, :, None]

    torch.testing.assert_close(made(Gaussian(), Norms(), Soft())(q, k, v, pairs), wanted, atol=1e-12, rtol=0)
    assert (made(Gaussian(), None, Soft())(q, k, v, pairs) - wanted).abs().max() > 0.01


def test_a_mixture_of_bernoullis_is_float64_bayes():
    """Fifty components of 40 bits in float32 on the fused kernel: p(component | bits) reads p(class | component)."""
    components, bits, classes = 50, 40, 10
    mu, pi = torch.rand(components, bits).double() * 0.9 + 0.05, torch.rand(components).double() + 0.1
    pi = pi / pi.sum()
    x = (torch.rand(30, bits) < 0.5).double()
    answer = torch.rand(components, classes).double()
    likelihood = torch.stack([(mu**row * (1 - mu) ** (1 - row)).prod(-1) for row in x])
    posterior = pi * likelihood / (pi * likelihood).sum(-1, keepdim=True)
    found = Mechanism(Bernoulli(), MixingWeights(components), Soft(), 1, bits)
    found.prior_weights[0].table.data = pi.log()[None].float()  # type: ignore[union-attr]
    args = [y[None, :, None].float() for y in (x, torch.logit(mu), answer)]
    read = found(*args, all_pairs(30, components, x.device))[0, :, 0]
    torch.testing.assert_close(read.double(), posterior @ answer, atol=1e-5, rtol=0)


def test_one_more_column_brings_a_prior_of_each_key_to_the_fused_kernel():
    q, k, v = tensors(cross(), dtype=torch.float32, grad=False)
    bias_BMG = torch.randn(k.shape[:3])
    for scale in (1.0, 0.3):
        q1, k1, same = with_column(q, k, bias_BMG, scale)
        wanted = sdpa(q, k, v, scale, bias_BMG.repeat_interleave(H // G, 2).transpose(1, 2)[:, :, None])
        torch.testing.assert_close(sdpa(q1, k1, v, same), wanted, atol=1e-6, rtol=0)
    assert (sdpa(q, k, v, 1.0) - wanted).abs().max() > 0.01


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(8, [2.0**-h for h in range(1, 9)]), (16, [2 ** (-h / 2) for h in range(1, 17)]), (1, [2.0**-8])],
)
def test_alibi_has_the_slopes_of_the_paper(heads, slopes):
    """Press et al. 2022, section 3: 1/2 .. 1/256 for 8 heads, and the means between them for 16."""
    pairs = square(1, 3, None)
    prior = ALiBi().log_prior(pairs, torch.zeros(1, 3, heads, 2), None)[0]
    for h, slope in enumerate(slopes):
        torch.testing.assert_close(prior[h, 2], torch.tensor([-2 * slope, -slope, 0.0]))
        torch.testing.assert_close(prior[h, 0], torch.tensor([0.0, -slope, -2 * slope]))


def test_mixing_weights_are_the_components_probabilities():
    """With a score that says nothing, responsibilities are the weights themselves."""
    found = made(DotProduct(), MixingWeights(7), Soft())
    q, k, v = tensors(cross(), grad=False)
    trace = Trace()
    found(q * 0, k, v, cross(), trace)
    pi = found.prior_weights[0].table.softmax(-1)  # type: ignore[union-attr, operator]
    wanted = pi[None, :, None].expand(3, -1, 4, -1)
    torch.testing.assert_close(trace.seen[0].weight_BHTM, wanted, atol=1e-12, rtol=0)
    log_pi = trace.seen[0].log_prior_BHTM
    torch.testing.assert_close(log_pi.exp().sum(-1), torch.ones_like(log_pi[..., 0]))


def test_more_components_than_declared_are_refused():
    with pytest.raises(ConfigError, match=r"there are 7 components, but size=6; declare as many"):
        made(DotProduct(), MixingWeights(6), Soft())(*tensors(cross()), cross())
    with pytest.raises(StreamError, match=r"there are 7 keys to point at, but places=6; declare more places"):
        made(LocationBased(6), None, Soft())(*tensors(cross()), cross())
    made(LocationBased(5), None, Soft())(*tensors(pack()), pack())  # nine in the row, five at most in a sample


def counted(plain: Callable[..., Tensor], calls: list[int]) -> Callable[..., Tensor]:
    """The same method, which notes how many queries came."""

    def method(self, q_BTHK: Tensor, *rest: Any) -> Tensor:
        calls.append(q_BTHK.shape[1])
        return plain(self, q_BTHK, *rest)

    return method


@pytest.mark.parametrize("prior", [None, ALiBi()], ids=["bare", "ALiBi"])
def test_a_block_of_queries_at_a_time_is_the_whole(monkeypatch, prior):
    for case in CASES.values():
        pairs = case()
        found, qkv = made(Additive(), prior, Soft()), tensors(pairs)
        inputs = [*qkv, *found.parameters()]
        push = torch.randn(*qkv[0].shape[:3], WIDE).double()
        whole = found(*qkv, pairs)
        grads = torch.autograd.grad((whole * push).sum(), inputs)
        calls: list[int] = []
        monkeypatch.setattr(Mechanism, "_written_out", counted(Mechanism._written_out, calls))
        monkeypatch.setattr(mechanism, "BLOCK", 2 * len(qkv[0]) * qkv[1].shape[1] * H * K)  # two queries at a time
        cut = found(*qkv, pairs)
        assert max(calls) == 2
        assert sum(calls) == qkv[0].shape[1]
        torch.testing.assert_close(cut, whole, atol=1e-12, rtol=0)
        for ours, theirs in zip(torch.autograd.grad((cut * push).sum(), inputs), grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        monkeypatch.undo()


@dataclass(frozen=True)
class BlindHead(Prior):
    """The second head's first query sees nothing."""

    def log_prior(self, pairs, q_BTHK, weights):
        blind = torch.zeros(1, H, q_BTHK.shape[1], 1, dtype=q_BTHK.dtype)
        blind[:, 1, 0] = -math.inf
        return blind


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("prior", ["none", "ALiBi", "local-p", "blind head"])
@pytest.mark.parametrize("score", ["scaled dot", "Gaussian", "additive"])
def test_who_sees_nothing_reads_zero_and_learns_nothing_from_it(score, prior, read):
    allowed = torch.ones(2, 5, 5).tril().bool()
    allowed[1, 3] = False
    pairs = square(2, 5, allowed)
    found = made(SCORES[score][0], BlindHead() if prior == "blind head" else PRIORS[prior][0], READS[read][0])
    for trace in (None, Trace()):
        for training in (False, True):
            found.train(training)
            qkv = tensors(pairs)
            out = found(*qkv, pairs, trace)
            assert torch.count_nonzero(out[1, 3]) == 0
            assert out.isfinite().all()
            assert torch.count_nonzero(out) == out.numel() - H * WIDE - (2 * WIDE if prior == "blind head" else 0)
            grads = torch.autograd.grad(out.square().sum(), [*qkv, *found.parameters()], allow_unused=True)
            assert all(grad is None or grad.isfinite().all() for grad in grads)
            assert grads[0] is None or torch.count_nonzero(grads[0][1, 3]) == 0


def test_a_hard_read_is_one_row_of_the_values_bit_for_bit():
    pairs = cross()
    found = Mechanism(ScaledDotProduct(), None, Hard(), H, K).eval()
    q, k, v = tensors(pairs, torch.float32, grad=False)
    trace = Trace()
    read = found(q, k, v, pairs, trace)
    choice = trace.seen[0].choice
    assert choice is not None
    score = torch.einsum("bthk,bmhk->bhtm", q, k.repeat_interleave(H // G, 2))
    assert torch.equal(choice.key_BHT, score.argmax(-1))
    for b, t, h in itertools.product(range(3), range(4), range(H)):
        assert torch.equal(read[b, t, h], v[b, choice.key_BHT[b, h, t], h // (H // G)])
    posterior = (score / math.sqrt(K)).softmax(-1)
    torch.testing.assert_close(choice.log_p_BHT, posterior.max(-1).values.log(), atol=1e-5, rtol=0)
    entropy = torch.distributions.Categorical(posterior).entropy()
    torch.testing.assert_close(choice.entropy_BHT, entropy, atol=1e-5, rtol=0)


def chosen(read: Read, joint_M: Tensor, count: int = 20000) -> Tensor:
    """How often each key was read in training."""
    joint = joint_M.expand(count, 1, 1, -1)
    v = torch.eye(len(joint_M))[None, :, None].expand(count, -1, -1, -1)
    return read.read(joint, v, training=True)[0].detach().sum((0, 1, 2))


@pytest.mark.parametrize("read", [Hard(expected=0.0), Gumbel(straight_through=True)], ids=["hard", "Gumbel"])
def test_samples_have_the_posteriors_frequencies(read):
    """Chi squared; the arg-max of a Gumbel-perturbed posterior is a sample of it whatever the temperature."""
    joint_M = torch.tensor([0.3, -1.0, 1.2, -math.inf, 0.0])
    p = joint_M.softmax(-1)
    counts = chosen(read, joint_M)
    assert counts[3] == 0
    seen = p > 0
    assert stats.chisquare(counts[seen].numpy(), (p * counts.sum())[seen].numpy()).pvalue > 1e-3
    skewed = (joint_M + torch.tensor([0.2, 0, 0, 0, 0])).softmax(-1)
    assert stats.chisquare(counts[seen].numpy(), (skewed * counts.sum())[seen].numpy()).pvalue < 1e-3


def test_some_samples_of_a_hard_read_get_the_mean():
    joint, v = torch.randn(4000, 2, 3, 5), torch.randn(4000, 5, 2, 3)
    read, weight, choice = Hard(expected=0.3).read(joint, v, training=True)
    assert choice is not None
    sampled = choice.sampled[:, 0, 0]
    assert stats.binomtest(int((~sampled).sum()), 4000, 0.3).pvalue > 1e-3
    mean = torch.einsum("bhtm,bmhk->bthk", joint.softmax(-1), v)
    torch.testing.assert_close(read[~sampled], mean[~sampled], atol=1e-6, rtol=0)
    torch.testing.assert_close(weight[~sampled], joint.softmax(-1)[~sampled], atol=1e-6, rtol=0)
    assert set(weight[sampled].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(read, torch.einsum("bhtm,bmhk->bthk", weight, v), atol=1e-5, rtol=0)


def test_a_gumbel_read_goes_from_one_value_to_their_mean_with_temperature():
    joint = torch.tensor([0.3, -1.0, 1.2, -math.inf]).expand(200, 1, 1, -1)

    def weights(temperature: float) -> Tensor:
        torch.manual_seed(1)
        return Gumbel(temperature).weigh(joint, training=True)

    cold, mild, hot = weights(1e-4), weights(1.0), weights(1e4)
    assert torch.equal(cold.argmax(-1), mild.argmax(-1))
    torch.testing.assert_close(cold.max(-1).values.median(), torch.tensor(1.0))
    torch.testing.assert_close(hot[..., :3], torch.full((200, 1, 1, 3), 1 / 3), atol=1e-3, rtol=0)
    assert torch.count_nonzero(hot[..., 3]) == 0
    torch.testing.assert_close(Gumbel(0.5).weigh(joint, training=False), (joint / 0.5).softmax(-1))
    torch.manual_seed(2)
    difference = Gumbel().weigh(torch.zeros(20000, 1, 1, 2), training=True)[:, 0, 0, 0].logit()
    found: Any = stats.kstest(difference.numpy(), "logistic")  # of two Gumbel variables
    assert found.pvalue > 1e-3


def test_straight_through_is_one_hot_forward_and_the_softmax_backward():
    joint = torch.randn(6, 2, 3, 5).double()
    push = torch.randn(6, 2, 3, 5).double()
    found = []
    for straight in (True, False):
        torch.manual_seed(3)
        x = joint.clone().requires_grad_()
        weight = Gumbel(0.7, straight_through=straight).weigh(x, training=True)
        found.append((weight.detach(), torch.autograd.grad((weight * push).sum(), x)[0]))
    (hard, grad), (soft, wanted) = found
    torch.testing.assert_close(hard, one_hot(soft.argmax(-1), soft), atol=1e-12, rtol=0)
    assert soft.max() < 0.999
    torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


def test_reweighting_is_the_turing_machines_equations():
    """Graves et al. 2014: (7) interpolate, (8) convolve around with s(i - j), (9) sharpen; each in a loop."""
    content, before = torch.rand(2, 6).double().softmax(-1), (3 * torch.rand(2, 6)).double().softmax(-1)
    gate, gamma = torch.tensor([0.3, 0.9]).double(), torch.tensor([1.0, 4.0]).double()
    shift = torch.randn(2, 3).double().softmax(-1)
    wanted = []
    for b in range(2):
        gated = [float(gate[b] * content[b, i] + (1 - gate[b]) * before[b, i]) for i in range(6)]
        s = {0: float(shift[b, 1]), 1: float(shift[b, 2]), 5: float(shift[b, 0])}  # 5 is one back, modulo 6
        moved = [sum(gated[j] * s.get((i - j) % 6, 0.0) for j in range(6)) for i in range(6)]
        sharp = [x ** float(gamma[b]) for x in moved]
        wanted.append([x / sum(sharp) for x in sharp])
    found = reweighted(content, before, gate, shift, gamma)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)
    forward = torch.tensor([[0.0, 0.0, 1.0]]).double()
    at = one_hot(torch.tensor([5]), content[:1])
    on = torch.ones(1).double()
    assert int(reweighted(at, at, on, forward, on).argmax()) == 0


def test_at_first_scaled_scores_stay_broad_and_plain_ones_do_not():
    """Vaswani et al. 2017, section 3.2.1: products of vectors of width K have variance K, which saturates a softmax."""
    width, keys = 512, 1024
    q, k, value = torch.randn(1, 8, 1, width), torch.randn(1, keys, 1, width), torch.randn(keys)
    entropy, learning = {}, {}
    for score in (ScaledDotProduct(), DotProduct()):
        joint = score.log_likelihood(q, k).requires_grad_()
        p = joint.softmax(-1)
        entropy[score] = float(torch.distributions.Categorical(p.detach()).entropy().mean())
        (grad,) = torch.autograd.grad((p @ value).sum(), joint)
        learning[score] = float(grad.abs().sum(-1).median())  # how much any score still matters
    assert entropy[ScaledDotProduct()] > 0.9 * math.log(keys)
    assert entropy[DotProduct()] < 0.1 * math.log(keys)
    assert learning[DotProduct()] < 0.1 * learning[ScaledDotProduct()]


def test_a_score_of_cosines_cannot_focus_without_its_sharpness():
    """SEEDS 6.1: over 8 keys no weight is above e^2 / (e^2 + 7); the sharpness starts where it is declared and learns."""
    q = torch.randn(1, 1, 1, K)
    k = torch.cat([q] + [-q] * 7, 1)
    weight = Cosine(sharpness=1.0).log_likelihood(q, k).softmax(-1)
    torch.testing.assert_close(weight.max(), torch.tensor(math.e**2 / (math.e**2 + 7)))
    assert Cosine().log_likelihood(q, k).softmax(-1).max() > 0.999
    found = Mechanism(Cosine(learned=True, sharpness=3.0), None, Soft(), H, K)
    scale: nn.Parameter = found.score_weights.log_scale  # type: ignore[union-attr, assignment]
    torch.testing.assert_close(scale.exp(), torch.full((H,), 3.0))
    found(*tensors(cross(), torch.float32), cross()).square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs().min() > 0


def test_the_place_a_location_based_score_points_at_does_not_depend_on_what_is_there():
    found = made(LocationBased(PLACES), None, Soft())
    q, k, v = tensors(cross(), grad=False)
    one, other = Trace(), Trace()
    found(q, k, v, cross(), one)
    found(q, torch.randn_like(k), v, cross(), other)
    assert torch.equal(one.seen[0].weight_BHTM, other.seen[0].weight_BHTM)
    found(q + 1, k, v, cross(), other)
    assert (one.seen[0].weight_BHTM - other.seen[1].weight_BHTM).abs().max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(sharpness=0.0), "Cosine: sharpness=0.0 must be above 0"),
        (lambda: Gaussian(variance=-1.0), "Gaussian: variance=-1.0 must be above 0"),
        (lambda: LocationBased(0), "LocationBased: places=0 must be above 0"),
        (lambda: RelativeBias(0), "RelativeBias: reach=0 distinguishes no distances"),
        (lambda: BucketedBias(6), "BucketedBias: buckets=6 must be a multiple of 4"),
        (lambda: BucketedBias(8, 2), "BucketedBias: reach=2 leaves no far distances; give more than 2"),
        (lambda: PredictedWindow(0.0), "PredictedWindow: sigma=0.0 must be above 0"),
        (lambda: MixingWeights(0), "MixingWeights: size=0 has no components"),
        (lambda: Hard(expected=1.5), "Hard: expected=1.5 is not in 0 to 1"),
        (lambda: Gumbel(temperature=0.0), "Gumbel: temperature=0.0 must be above 0 and finite; Hard reads one value"),
    ],
)
def test_what_cannot_be_declared_says_why(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_trace_tells_score_and_prior_apart_and_they_add_up_to_the_weights():
    pairs = pack()
    found = made(ScaledDotProduct(), ALiBi() + Window(3), Soft())
    trace = Trace()
    qkv = tensors(pairs, grad=False)
    read = found(*qkv, pairs, trace)
    (seen,) = trace.seen
    score = torch.einsum("bthk,bmhk->bhtm", qkv[0], qkv[1].repeat_interleave(H // G, 2)) / math.sqrt(K)
    torch.testing.assert_close(seen.score_BHTM, score)
    far = (pairs.distance.abs() > 2) | ~pairs.allowed[:, None]  # type: ignore[index]
    assert torch.equal(seen.log_prior_BHTM == -math.inf, far.expand(-1, H, -1, -1))
    torch.testing.assert_close(seen.weight_BHTM, seen.log_joint_BHTM.softmax(-1))
    assert torch.equal(seen.read_BTHK, read)
    assert seen.mechanism is found


@pytest.mark.parametrize("name", SCORES)
def test_declarations_of_scores_survive_json(name):
    core = mm.Core(
        width=24, depth=1, heads=4, score=SCORES[name][0], prior=Window(3) + MixingWeights(4), read=Gumbel(0.5)
    )
    again = mm.Core.from_config(core.config())
    assert again == core
    assert again != core.replace(prior=None)
