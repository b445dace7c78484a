"""Faults of the model's own numerics, by their numbers in FAULTS.md: each of these tests failed before its fault was mended."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import multimodal as mm
from multimodal.masks import PREFIX_LM, InTurn, Places, Prior, Rule
from multimodal_tokenizers import TextBytes


@dataclass(frozen=True)
class FirstSample(Rule):
    """A rule of one's own that asks which sample of the pack a token is of."""

    def allows(self, q: Places, k: Places) -> Tensor:
        return (q.sample == 0) & (k.order <= q.order + 2)


@dataclass(frozen=True)
class Numbered(Prior):
    """A prior of one's own that grows with the number of the sample."""

    def log_prior(self, pairs: Any, q_BTHK: Tensor, weights: Any) -> Tensor:
        return (-0.3 * (pairs.q.sample - pairs.k.sample).abs() - 0.1 * pairs.k.order.float() * pairs.q.sample)[:, None]


RULES = [
    mm.SameSample(),
    mm.SameSegment(),
    mm.Causal(),
    mm.Prefix(),
    InTurn(),
    mm.Window(2),
    mm.Chunked(2),
    ~mm.SameSample(),
    FirstSample(),
]
SLOTS = 4


def _rule(draw: random.Random) -> Rule:
    a, b = draw.choice(RULES), draw.choice(RULES)
    return draw.choice([a, a & b, a | b, ~a, ~(a & b) | b])


def _prior(draw: random.Random, *more: Prior) -> Prior | None:
    """One prior or the sum of two, or none."""
    parts = [mm.ALiBi(), mm.RelativeBias(2), mm.PredictedWindow(1.5), Numbered(), *more]
    one, two = (draw.choice([*parts, _rule(draw), _rule(draw)]) for _ in range(2))
    return draw.choice([None, one, one + two, _rule(draw)])


def _core(draw: random.Random, *cross: mm.CrossAttention) -> mm.Core:
    memory = mm.PersistentMemory(slots=SLOTS, prior=_prior(draw, mm.MixingWeights(SLOTS)))
    block = (mm.SelfAttention(prior=_prior(draw)), *cross, memory)
    return mm.Core(width=16, depth=1, heads=2, block=block, mask=draw.choice([_rule(draw), PREFIX_LM]))


def _varied(model: mm.Model) -> mm.Model:
    """In float64, with weights so large that every difference shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.double().parameters():
            if weight.dim():
                weight.normal_(std=0.4, generator=generator)
    return model.eval()


TEXTS = ["ab", "b", "cdefg", "bcd"]


def _apart(model: mm.Model, backend: str = "auto") -> float:
    """The largest difference of a logit between a sample alone and the same sample in a pack."""
    task = "story note -> out:text"
    samples = [
        {"story": t, "note": None if i % 2 else t[::-1] + "xy", "out": t[: 1 + i % 2]} for i, t in enumerate(TEXTS)
    ]
    with torch.no_grad():
        packed = model.pack(task, samples)
        together = model.logits(packed, backend=backend)[task].split(packed.readings[task].lengths)
        alone = [model.logits(model.pack(task, [samples[i]]), backend=backend)[task] for i in range(len(samples))]
    assert len({float(x.abs().sum()) for x in alone}) == len(alone)
    order = packed.readings[task].samples
    return max(float((alone[i] - part).abs().max()) for i, part in zip(order, together, strict=True))


KINDS = {"story": TextBytes(), "note": TextBytes(causal=True), "text": TextBytes()}


def test_fault_66_a_memory_under_any_rule_answers_packed_samples_as_it_answers_them_alone() -> None:
    """Of 24 random models, plain and of two cores, each with rules that ask of samples, fields, order and what is free."""
    for number in range(24):
        draw = random.Random(number)
        core: mm.Core | mm.EncoderDecoder = _core(draw)
        if number % 2:
            core = mm.EncoderDecoder(reader=_core(draw), writer=_core(draw, mm.CrossAttention(prior=_prior(draw))))
        model = _varied(mm.Model(KINDS, core, ["story note -> out:text"]))
        assert _apart(model) < 1e-9, core
        assert _apart(model, "dense") < 1e-9, core


def test_fault_66a_slots_are_of_every_sample_under_same_sample() -> None:
    """A memory under SameSample is a memory without a rule, in the first sample of a pack and in the last."""
    blocks = [(mm.PersistentMemory(slots=SLOTS, prior=prior),) for prior in (None, mm.SameSample(), ~mm.SameSample())]
    found = []
    for block in blocks:
        model = _varied(mm.Model(KINDS, mm.Core(width=16, depth=1, heads=2, block=block), ["story -> text"]))
        stream = model.pack("story -> text", [{"story": t, "text": t} for t in TEXTS])
        with torch.no_grad():
            found.append(model.logits(stream)["story -> text"])
    torch.testing.assert_close(found[1], found[0])
    assert all((found[2] - found[0]).abs().amax(1) > 1e-3)  # and nobody sees them where no sample is one's own
