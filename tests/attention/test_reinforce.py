"""The score-function gradient of hard reads against the exact gradient of the expected loss, by going through all choices."""

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.attention import Hard, Layout, Mechanism, ScaledDotProduct, Soft, Span, Trace
from multimodal.attention.reinforce import reward_loss
from multimodal.masks import PREFIX_LM, MaskInfo, Pairs
from multimodal_tokenizers import Labels, TextBytes

HEADS, KEYS, WIDTH, STEPS = 2, 3, 2, 2


def stream_of(samples: int, before: int = 1) -> Any:
    """So many samples of `before` rows that answer nothing, and then STEPS that do."""
    return SimpleNamespace(
        layout=Layout(
            (Span(before, before + STEPS, before),) * samples,
            MaskInfo(*[torch.tensor(([0] * before + [1] * STEPS) * samples)] * 4),  # only fields are asked for
        )
    )


def pairs_of(samples: int) -> Pairs:
    at = lambda count: MaskInfo(  # noqa: E731
        torch.arange(samples)[:, None].expand(-1, count),
        torch.arange(count).expand(samples, -1),
        *[torch.ones(samples, count, dtype=torch.long)] * 2,
    )
    return Pairs(at(STEPS)[:, :, None], at(KEYS)[:, None])


def losses(read_BTHK: Tensor) -> Tensor:
    """(B, T): what the first row costs, and what the second costs, which depends on both reads. Never 0."""
    first, second = read_BTHK.flatten(2).unbind(1)
    return torch.stack([3 + first.sin().sum(-1), 2 + (first * second).sum(-1).square() + second[:, 0]], 1)


def inputs_of(samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(STEPS, HEADS, WIDTH), (KEYS, HEADS, WIDTH), (KEYS, HEADS, WIDTH)]
    return [
        torch.randn(shape, generator=generator).double().expand(samples, *shape).clone().requires_grad_()
        for shape in shapes
    ]


CHOICES = list(itertools.product(range(KEYS), repeat=HEADS * STEPS))


def all_choices(qkv: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(probability of each combination of choices, its losses (B, T)), from the formula of the posterior."""
    q, k, v = (x[:1] for x in qkv)
    log_p = (torch.einsum("bthk,bmhk->bthm", q, k) / math.sqrt(WIDTH)).log_softmax(-1)[0]
    chosen = torch.tensor(CHOICES).view(-1, STEPS, HEADS)
    steps, heads = torch.arange(STEPS)[:, None], torch.arange(HEADS)
    p = log_p[steps, heads, chosen].sum((1, 2)).exp()
    return p, losses(v[0][chosen, heads])


def exact(qkv: list[Tensor], entropy: float = 0.0, expected: float = 0.0) -> list[Tensor]:
    """Gradients of the expected loss, less the entropies, with a share of the samples reading the mean."""
    q, k, v = (x[:1] for x in qkv)
    log_p = (torch.einsum("bthk,bmhk->bthm", q, k) / math.sqrt(WIDTH)).log_softmax(-1)
    p, nll = all_choices(qkv)
    value = (1 - expected) * (p * nll.sum(1)).sum() + entropy * (log_p.exp() * log_p).sum()
    value = value + expected * losses(torch.einsum("bthm,bmhk->bthk", log_p.exp(), v)).sum()
    return [grad[0] for grad in torch.autograd.grad(value, qkv)]


def mechanism_of(read: Hard, baseline: float = 0.0) -> Mechanism:
    found = Mechanism(ScaledDotProduct(), None, read, HEADS, WIDTH).double().train()
    found.read_weights.mean.fill_(baseline)  # type: ignore[union-attr, operator]
    return found


def estimate(qkv: list[Tensor], found: Mechanism, before: int = 1) -> list[Tensor]:
    """The gradient that each sample of a batch gives."""
    samples = len(qkv[0])
    trace = Trace()
    nll_BT = losses(found(*qkv, pairs_of(samples), trace))
    nll_T = torch.cat([nll_BT.new_zeros(samples, before), nll_BT], 1).flatten()
    total = nll_T.sum() + reward_loss(trace, stream_of(samples, before).layout, nll_T)
    return list(torch.autograd.grad(total, qkv))


def everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample i of a batch makes choice i."""

    def choose(log_joint_BHTM: Tensor, training: bool) -> Tensor:
        return torch.tensor(CHOICES).view(-1, STEPS, HEADS).transpose(1, 2)

    monkeypatch.setattr(Hard, "_choose", staticmethod(choose))


@pytest.mark.parametrize("baseline", [0.0, -2.5, 4.0])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_its_expectation_is_the_gradient_of_the_expected_loss(monkeypatch, entropy, baseline):
    """Over all choices, weighed by their probabilities; whatever the baseline, which does not bias it."""
    everything_once(monkeypatch)
    qkv = inputs_of(len(CHOICES))
    grads = estimate(qkv, mechanism_of(Hard(expected=0.0, entropy=entropy), baseline))
    p, _ = all_choices(qkv)
    for ours, wanted in zip(grads, exact(qkv, entropy), strict=True):
        torch.testing.assert_close(torch.einsum("b,b...->...", p, ours), wanted, atol=1e-10, rtol=0)
        assert wanted.abs().max() > 0.01


def test_a_baseline_near_the_mean_reward_takes_the_noise_out(monkeypatch):
    everything_once(monkeypatch)
    qkv = inputs_of(len(CHOICES))
    p, nll = all_choices(qkv)
    mean = float(-(p * nll.sum(1)).sum().detach() / STEPS)

    def noise(baseline: float) -> float:
        grad = estimate(qkv, mechanism_of(Hard(expected=0.0, entropy=0.0), baseline))[0]
        return float(torch.einsum("b,bthk->", p, (grad - torch.einsum("b,bthk->thk", p, grad)).square()).detach())

    assert noise(mean) < 0.5 * noise(0.0)
    assert noise(-mean) > noise(0.0)


@pytest.mark.parametrize("expected", [0.0, 0.5])
def test_samples_average_to_the_exact_gradient(expected):
    """Twenty thousand draws: within five standard errors, and standard errors that mean something."""
    qkv = inputs_of(20000)
    grads = estimate(qkv, mechanism_of(Hard(expected=expected, entropy=0.1), -3.0))
    for ours, wanted in zip(grads, exact(qkv, 0.1, expected), strict=True):
        error = ours.std(0) / math.sqrt(len(ours))
        assert ((ours.mean(0) - wanted).abs() < 5 * error + 1e-12).all()
        assert error.max() < 0.05
    other = exact(qkv, 0.1, 0.5 - expected)[0]
    assert ((grads[0].mean(0) - other).abs() > 5 * grads[0].std(0) / math.sqrt(len(grads[0]))).any()


def test_who_reads_the_mean_learns_from_its_gradient_alone():
    """Not from a reward: nothing that it read was chosen. (To reward it would only add noise, which no average shows.)"""
    qkv = inputs_of(8)
    for ours, wanted in zip(
        estimate(qkv, mechanism_of(Hard(expected=1.0, entropy=0.2), -3.0)), exact(qkv, 0.2, 1.0), strict=True
    ):
        torch.testing.assert_close(ours, wanted.expand_as(ours), atol=1e-10, rtol=0)


def test_the_sampled_objective_is_below_the_likelihood():
    """Jensen: L_s = sum_s p(s) log p(y | s) <= log sum_s p(s) p(y | s), Xu et al. 2015, equation 10."""
    for scale in (0.1, 1.0, 5.0, 200.0):
        qkv = inputs_of(1)
        with torch.no_grad():
            qkv[0] *= scale
            p, nll = all_choices(qkv)
        bound, marginal = float(-(p * nll.sum(1)).sum()), float((p.log() - nll.sum(1)).logsumexp(0))
        assert bound <= marginal + 1e-12
        assert (marginal - bound > 1e-3) == (scale < 100)


@pytest.mark.parametrize("ahead", [None, 1, 2])
def test_a_choice_is_paid_by_its_own_sample_from_its_row_on(ahead):
    """Other samples of the pack, rows of the same sample before it, and those further than it looks ahead do not pay."""
    qkv = inputs_of(3)
    found = mechanism_of(Hard(expected=0.0, entropy=0.0, ahead=ahead))
    for row in range(3 * (1 + STEPS)):
        nll_T = torch.zeros(3 * (1 + STEPS)).double()
        nll_T[row] = 1.0
        trace = Trace()
        found.read_weights.mean.zero_()  # type: ignore[union-attr, operator]
        found(*qkv, pairs_of(3), trace)
        (grad,) = torch.autograd.grad(reward_loss(trace, stream_of(3).layout, nll_T), [qkv[0]])
        sample, step = row // (1 + STEPS), row % (1 + STEPS) - 1
        paid = {(b, t) for b in range(3) for t in range(STEPS) if torch.count_nonzero(grad[b, t])}
        assert paid == {(sample, t) for t in range(max(0, step + 1 - (ahead or STEPS)), step + 1)}


def test_the_rewards_weight_multiplies_its_gradient_and_nothing_else():
    qkv = inputs_of(2)
    nll_T = torch.rand(2 * (1 + STEPS)).double() + 0.1
    grads = {}
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        found, trace = mechanism_of(Hard(expected=0.0, entropy=0.0, weight=weight), -1.0), Trace()
        found(*qkv, pairs_of(2), trace)
        (grads[weight],) = torch.autograd.grad(reward_loss(trace, stream_of(2).layout, nll_T), [qkv[0]])
    assert grads[1.0].abs().max() > 0.01
    torch.testing.assert_close(grads[0.25], 0.25 * grads[1.0])


def test_the_baseline_is_a_moving_average_of_the_reward_of_one_row():
    """b <- 0.9 b + 0.1 log p (Xu et al. 2015, section 4.1), here of one row."""
    qkv = inputs_of(2)
    found = mechanism_of(Hard(), baseline=-1.0)
    trace = Trace()
    nll_BT = losses(found(*qkv, pairs_of(2), trace)).detach()
    reward_loss(trace, stream_of(2, before=0).layout, nll_BT.flatten())
    torch.testing.assert_close(found.read_weights.mean, -0.9 - 0.1 * nll_BT.mean())  # type: ignore[union-attr]
    reward_loss(trace, stream_of(2, before=0).layout, 0 * nll_BT.flatten())
    torch.testing.assert_close(found.read_weights.mean, -0.9 - 0.1 * nll_BT.mean())  # type: ignore[union-attr]


def small(core: mm.Core, head: Any = None) -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("a", "b", "c"))}
    model = mm.Model(tokenizers, core, [mm.Task("text -> label", head) if head else "text -> label"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.8, generator=generator)
    return model.train()


def _choices(sizes: list[int]) -> Iterator[Tensor]:
    yield from (torch.tensor(c) for c in itertools.product(*(range(n) for n in sizes)))


def test_in_a_model_its_expectation_is_the_gradient_of_the_expected_loss(monkeypatch):
    """Two layers, so that the first one's choices decide what the second one sees; all are gone through in one pack."""
    block = (mm.layers.SelfAttention(),)
    core = mm.Core(width=4, depth=2, heads=1, block=block, mask=PREFIX_LM & mm.masks.Window(2), read=Hard(0.0, 0.2))
    model = small(core)
    sample = {"text": "x", "label": "b"}
    probe = model.pack("text -> label", [sample])
    count = len(probe)
    sizes = [int(n) for n in (core.mask.allows(probe.layout.info[:, None], probe.layout.info[None])).sum(-1)] * 2
    choices = torch.stack(list(_choices(sizes)))
    stream = model.pack("text -> label", [sample] * len(choices))
    visible = core.mask.allows(probe.layout.info[:, None], probe.layout.info[None])
    which = [visible[t].nonzero()[:, 0] for t in range(count)]
    layer = itertools.count()

    def choose(log_joint_BHTM: Tensor, training: bool) -> Tensor:
        mine = choices[:, next(layer) % 2 * count :][:, :count]
        return torch.stack([which[t][mine[:, t]] for t in range(count)], 1)[:, None]

    monkeypatch.setattr(Hard, "_choose", staticmethod(choose))
    trace = Trace()
    state = model(stream, trace=trace)
    r = stream.readings["text -> label"]
    logits = model.packer.head("text -> label").logits(model.readout("text -> label"), state[r.row_N], r.lengths)
    order = torch.argsort(torch.tensor(r.samples))
    nll_B = -logits.log_softmax(-1)[order, 1]
    log_p_B = sum(seen.choice.log_p_BHT.sum((1, 2)) for seen in trace.seen)  # type: ignore[union-attr]
    p_B = log_p_B.exp()  # type: ignore[union-attr]
    torch.testing.assert_close(p_B.sum(), torch.tensor(1.0), atol=1e-5, rtol=0)
    entropy = sum(seen.choice.entropy_BHT.sum((1, 2)) for seen in trace.seen)  # type: ignore[union-attr]
    weights = [weight for name, weight in model.named_parameters() if "core.blocks" in name]
    wanted = torch.autograd.grad((p_B * nll_B).sum(), weights, retain_graph=True, allow_unused=True)
    bonus = torch.autograd.grad((p_B.detach() * entropy).sum(), weights, allow_unused=True)

    # what the model itself learns from, each sample weighed by its probability through the rows of its loss
    layer = itertools.count()
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.read_weights.mean.fill_(-0.7)  # type: ignore[union-attr, operator]
    trace = Trace()
    states = model(stream, trace=trace)
    logits = model.packer.head("text -> label").logits(model.readout("text -> label"), states[r.row_N], r.lengths)
    nll_T = torch.zeros(len(stream))
    assert r.target is not None
    nll_T[r.row_N] = model.packer.head("text -> label").row_losses(logits, r.target).detach()
    for seen in trace.seen:  # weigh the samples: log p enters the loss times p
        seen.choice.log_p_BHT.register_hook(lambda grad: grad * p_B.detach()[:, None, None])  # type: ignore[union-attr]
        seen.choice.entropy_BHT.register_hook(lambda grad: grad * p_B.detach()[:, None, None])  # type: ignore[union-attr]
    nll = -logits.log_softmax(-1)[order, 1]
    total = (p_B.detach() * nll).sum() + reward_loss(trace, stream.layout, nll_T)
    found = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    assert max(float(grad.abs().max()) for grad in wanted if grad is not None) > 0.01
    for ours, theirs, extra in zip(found, wanted, bonus, strict=True):
        exact_grad = sum(g for g in (theirs, None if extra is None else -0.2 * extra) if g is not None)
        torch.testing.assert_close(ours, torch.as_tensor(exact_grad).expand_as(ours), atol=2e-5, rtol=1e-3)


def test_a_model_learns_from_choices_and_reports_the_plain_loss():
    """`losses` carries the gradient of the choices and the value of the cross-entropy alone."""
    model = small(mm.Core(width=8, depth=1, heads=2, read=Hard(expected=0.0)))
    stream = model.pack("text -> label", [{"text": "abc", "label": "c"}, {"text": "de", "label": "a"}])
    torch.manual_seed(7)
    total = model.losses(stream)["text -> label"]
    torch.manual_seed(7)
    with torch.no_grad():
        r = stream.readings["text -> label"]
        trace = Trace()
        state = model(stream, trace=trace)
        logits = model.packer.head("text -> label").logits(model.readout("text -> label"), state[r.row_N], r.lengths)
    assert r.target is not None
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(logits, r.target, reduction="sum"))
    total.backward()
    (qkv,) = (w for name, w in model.named_parameters() if name.endswith("qkv.weight"))
    assert qkv.grad is not None
    assert qkv.grad[:16].abs().max() > 0  # queries and keys: only choices teach them


LONG = {"text": TextBytes(), "story": TextBytes(causal=True)}
MEMORY = (mm.layers.PersistentMemory(slots=3, read=Hard(0.0, 0.0)),)
HARD = {"width": 8, "depth": 1, "heads": 2, "read": Hard(0.0, 0.0), "block": (mm.layers.SelfAttention(),)}
SOFT = {**HARD, "read": Soft()}
PLACED = {
    "runs": mm.Core(**HARD),
    "blocks": mm.Core(**HARD, mask=PREFIX_LM & mm.masks.Window(3)),
    "memory": mm.Core(**{**HARD, "block": MEMORY}),
    "reader": mm.EncoderDecoder(reader=mm.Core(**HARD), writer=mm.Core(**SOFT)),
    "writer": mm.EncoderDecoder(reader=mm.Core(**SOFT), writer=mm.Core(**HARD)),
}


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("core", PLACED)
def test_every_plan_and_core_pays_the_rows_it_should(core, backend):
    """Of two samples: the nth row's reward reaches exactly those choices of its sample that were made at it or before it."""
    model = mm.Model(LONG, PLACED[core], ["text -> out:story"]).train()
    samples = [{"text": "ab", "out": "cdefghijklmnopqrstu"}, {"text": "xyz", "out": "w"}]
    stream = model.pack("text -> out:story", samples)
    trace = Trace()
    model(stream, trace=trace, backend=backend)
    chosen = [seen for seen in trace.seen if seen.choice is not None]
    assert chosen
    spans = stream.layout.spans
    for n in range(len(stream)):
        for seen in chosen:
            seen.mechanism.read_weights.mean.zero_()  # type: ignore[union-attr, operator]
        nll_T = torch.zeros(len(stream))
        nll_T[n] = 1.0
        grads = torch.autograd.grad(
            reward_loss(trace, stream.layout, nll_T),
            [seen.choice.log_p_BHT for seen in chosen],  # type: ignore[union-attr]
            retain_graph=True,
        )
        sample = int(n >= spans[0].total)
        order = n - sample * spans[0].total
        half = {"reader": (0, spans[sample].read), "writer": (spans[sample].read, spans[sample].total)}
        start, stop = half.get(core, (0, spans[sample].total))
        paid = sum(int(torch.count_nonzero(grad)) for grad in grads)
        assert paid == 2 * len(range(start, min(order + 1, stop))) * (2 if core == "writer" else 1), (n, order)
        for seen, grad in zip(chosen, grads, strict=True):
            of = seen.pairs.q.sample[..., 0].expand(len(grad), -1)
            assert torch.count_nonzero(grad.transpose(1, 2)[of != sample]) == 0


def test_what_cannot_learn_from_choices_says_so():
    def model(read: Any) -> mm.Model:
        return mm.Model(
            LONG, mm.Core(width=8, depth=1, heads=2, read=read), [mm.Task("text -> story", mm.CTC())]
        ).train()

    sample = {"text": "abcde", "story": "c"}
    with pytest.raises(mm.ConfigError, match=r"CTC: a Hard read is learned from the loss of each row"):
        model(Hard()).losses(model(Hard()).pack("text -> story", [sample]))
    model(Soft()).losses(model(Soft()).pack("text -> story", [sample]))
