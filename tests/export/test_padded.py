"""Padded programs compute what the packed model does: every head, pool, rule, score, prior, read, layer and merge, both cores."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import multimodal as mm
from multimodal.export.compare import largest_difference
from multimodal.export.programs import programs_of
from multimodal.heads import Attended, First, FirstAndMean, Last, Mean, Parts, Transformed
from multimodal.layers import MLP, Attention, LayerScale, PersistentMemory, PostNorm, SelfAttention
from multimodal.norm import Norm
from multimodal.positions import Rotary

CLOSE = 1e-5
CORE = mm.Core(width=32, depth=2, heads=4, kv_heads=2)
POOLED = Transformed(Attended(4), first_norm=Norm(), dense="tanh", last_norm=Norm())
A, M = mm.attention, mm.masks


@pytest.fixture
def difference(tokenizers, lively):
    """Of the programs of a task, run as modules."""

    def measure(core: mm.Core | mm.EncoderDecoder, task: str | mm.Task) -> float:
        model = lively(mm.Model(tokenizers, core, [task]))
        (pattern,) = model.tasks
        made = {program.name: program for program in programs_of(model, pattern)}
        with torch.no_grad():
            return largest_difference(model, pattern, list(made.values()), lambda name, inputs: made[name](inputs))

    return measure


TASKS = {
    "classes": "image story -> label",
    "transcripts": mm.Task("sound -> text", mm.CTC()),
    "transcripts of two fields": mm.Task("sound story -> text", mm.CTC()),
    "vectors": "image <-> text",
    "vectors of pools": mm.Task("image text <-> story", mm.Contrast(pool=(Mean(), Last()), form="sigmoid")),
    "texts": "image story -> text",
    "texts from nothing": "-> text",
    "texts that go on": mm.Task("image story -> other:story", mm.NextToken(start_ids=())),
    "texts from ids": mm.Task(
        "image -> text", mm.NextToken(start_ids=(3, 4), tied=True, stop_id=0, cap=9.0, scale=0.5)
    ),
    **{
        f"classes by {type(pool).__name__}": mm.Task("text sound -> label", mm.Classify(pool=pool))
        for pool in (First(), First(3), Last(), Mean(), Mean(2), Parts(3), FirstAndMean(2), Attended(4), POOLED)
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_every_head_and_pool(difference, name):
    assert difference(CORE, TASKS[name]) <= CLOSE


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("name", ["classes", "transcripts", "vectors", "texts"])
def test_encoder_and_decoder(difference, name, last):
    writer = CORE.replace(learned_times=40, learned_fields=3)
    assert difference(mm.EncoderDecoder(reader=CORE, writer=writer, last=last), TASKS[name]) <= CLOSE


@dataclass(frozen=True)
class Even(M.Rule):
    """A rule of one's own: every second token, and nobody sees the first one, which sees nothing."""

    def allows(self, q, k):
        return ((q.order - k.order) % 2 == 0) & (k.order > 0)


RULES = {
    "prefix": M.PREFIX_LM,
    "causal": M.SameSample() & M.Causal(),
    "window": M.SameSample() & M.Window(3),
    "chunks": M.SameSample() & M.Chunked(4),
    "segments": M.SameSegment() & M.Prefix() | M.SameSegment() & M.Causal(),
    "not": M.SameSample() & ~M.Window(2),
    "own": Even(),
}
SCORES = {
    type(score).__name__: score
    for score in (
        *(A.ScaledDotProduct(), A.DotProduct(0.3), A.General(), A.Cosine(learned=True), A.Gaussian(), A.Bernoulli()),
        *(A.LocationBased(64), A.Additive()),
    )
}
PRIORS = {
    "alibi": A.ALiBi(),
    "relative": A.RelativeBias(3),
    "buckets": A.BucketedBias(8, 16),
    "predicted": A.PredictedWindow(2.0) + A.ALiBi(),
    "factor": A.PredictedWindow(2.0, renormalise=False),
    "mixing": A.MixingWeights(64),
    "rule": M.Window(3),
}
PARTS: dict[str, dict[str, Any]] = {
    **{f"rule {name}": {"mask": rule} for name, rule in RULES.items()},
    **{f"score {name}": {"score": score} for name, score in SCORES.items()},
    **{f"prior {name}": {"prior": prior} for name, prior in PRIORS.items()},
    "score and prior": {"score": A.Gaussian(), "prior": A.ALiBi() + A.RelativeBias(3), "mask": RULES["window"]},
    "hard": {"read": A.Hard()},
    "gumbel": {"read": A.Gumbel(0.5)},
    "tables": {"learned_times": 64, "learned_fields": 2, "rotary_split": (0, 0, 0)},
    "layers": {
        "block": (
            SelfAttention(
                mask=M.Window(4), rotary=Rotary(fraction=0.5), bias=("query", "value"), merge=LayerScale(0.5)
            ),
            PersistentMemory(slots=5, prior=A.MixingWeights(5)),
            MLP(gated=False, activation="gelu", bias=True, merge=PostNorm()),
        )
    },
}


@pytest.mark.parametrize("name", PARTS)
def test_every_rule_score_prior_read_and_layer(difference, name):
    core = CORE.replace(**PARTS[name])
    assert difference(core, "image story -> text") <= CLOSE
    if name.startswith("rule"):
        assert difference(core, "image story -> label") <= CLOSE


def test_the_attention_layers_are_those_of_the_model(tokenizers):
    model = mm.Model(tokenizers, CORE, ["image -> label", "image -> text"])
    (program,) = programs_of(model, "image -> label")
    assert {id(m) for m in program.modules() if isinstance(m, Attention)} == {
        id(m) for m in model.modules() if isinstance(m, Attention)
    }
    held = {name for name, _ in program.named_parameters()}
    assert "model.embeds.image.linear.weight" in held
    assert not any("text" in name or "sound" in name for name in held)  # nothing of other tasks and kinds
