"""Faults of writing and of transcribing, by their numbers in FAULTS.md: settings without effect, searches that never begin."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.transcription import Beam, transcribe
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBytes

TASK, NOTHING, DRAWN, POINTED, CLASS = (
    "text -> out:text",
    "-> text",
    "label -> codes",
    "seen -> to:seen",
    "text -> label",
)


@pytest.fixture(scope="module")
def model() -> mm.Model:
    pictures = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    kinds = {
        "text": TextBytes(),
        "seen": TextBytes(),
        "label": Labels(("a", "b")),
        "codes": Codes.train(ImagePatches(patch=4, channels=1), pictures, size=8, quiet=True),
        "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
    }
    tasks = [TASK, NOTHING, DRAWN, mm.Task(POINTED, mm.Pointer()), CLASS, "sound -> text"]
    return mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), tasks).eval()


GIVEN = {TASK: {"text": "ab"}, NOTHING: {}, DRAWN: {"label": "a"}, POINTED: {"seen": "abc"}, CLASS: {"text": "ab"}}
IDLE: list[tuple[str, dict[str, Any], str]] = [
    (
        TASK,
        {"beams": 2, "sampler": mm.generate.Repetition(2.0)},
        "beams=2 rank by the model's own log-prob.*Repetition.* does not change",
    ),
    (TASK, {"beams": 2, "sampler": mm.NoRepeat(2) | mm.generate.Repetition(2.0)}, "Repetition.* does not change"),
    (TASK, {"beams": 2, "sampler": mm.generate.Greedy()}, "beams=2 with Greedy.*, which leaves each of them one way on"),
    (TASK, {"length_penalty": 0.5}, "length_penalty=0.5 ranks beams, and there is one only"),
    (DRAWN, {"beams": 2, "length_penalty": 0.5}, "every 'codes' has 4 tokens, so length_penalty=0.5 ranks nothing"),
    (DRAWN, {"sampler": mm.generate.AtLeast(2)}, "every 'codes' has 4 tokens, so AtLeast.* changes nothing"),
    (NOTHING, {"guidance": 2.0}, "guidance=2.0 pushes away .*, but this task reads nothing"),
    (
        POINTED,
        {"sampler": mm.generate.OneOf(("ab", "c"))},
        "Pointer chooses among the tokens that were read by their number, which OneOf",
    ),
    (POINTED, {"sampler": mm.generate.Only(("ab",)) | mm.TopK(2)}, "by their number, which Only"),
    (CLASS, {"temperature": 0.5}, "Classify answers at once, so temperature has no meaning there"),
    (CLASS, {"temperature": 1.0}, "Classify answers at once, so temperature has no meaning there"),
    (CLASS, {"begin": 1}, "Classify answers at once, so begin has no meaning there"),
    (CLASS, {"length_penalty": 2.0}, "Classify answers at once, so length_penalty has no meaning there"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "options", "message"), IDLE, ids=str)
def test_fault_17_settings_that_would_do_nothing_are_refused(model, task, options, message) -> None:
    with pytest.raises(mm.ConfigError, match=message):
        model.generate(task, [GIVEN[task]], max_tokens=4, **options)


@pytest.mark.parametrize(
    ("first", "second", "idle"),
    [
        (mm.Temperature(0.8), mm.generate.Greedy(), "Temperature"),
        (mm.generate.Greedy(), mm.Temperature(0.8), "Temperature"),
        (mm.generate.Greedy(), mm.NoRepeat(2), "NoRepeat"),
        (mm.Temperature(0.0), mm.TopP(0.9), "TopP"),
        (mm.TopK(5) | mm.NoRepeat(2), mm.generate.Greedy(), "TopK"),
    ],
    ids=str,
)
def test_fault_17a_rules_beside_the_likeliest_alone_are_refused(
    first: mm.generate.Sampler, second: mm.generate.Sampler, idle: str
) -> None:
    with pytest.raises(mm.ConfigError, match=f"leaves the likeliest token only, so {idle}.* would do nothing"):
        first | second
    # a rule says what is done at the end
    assert (mm.NoRepeat(2) | mm.generate.Repetition() | mm.generate.Greedy()).parts()[-1] == mm.generate.Greedy()


@dataclass(frozen=True)
class Liked(mm.generate.Sampler):
    """A rule of one's own that makes one token likelier, or rules it out; then what is left sums to 1 again."""

    nats: float

    def __call__(self, logits_BV: Tensor, written: Any) -> Tensor:
        logits_BV = logits_BV.clone()
        logits_BV[:, 97] += self.nats
        return logits_BV.log_softmax(-1)


def test_fault_17b_a_rule_of_ones_own_that_beams_would_not_heed_is_named(model: mm.Model) -> None:
    with pytest.raises(mm.StreamError, match=r"Liked.* changes probabilities, but beams rank by the model's own"):
        model.generate(TASK, text="ab", max_tokens=3, beams=2, sampler=Liked(9.0))
    kept = model.generate(TASK, text="ab", max_tokens=3, beams=2, sampler=Liked(-torch.inf))
    assert "a" not in kept.value


def test_fault_17c_an_overlap_that_no_window_has_is_refused(model: mm.Model) -> None:
    with pytest.raises(
        mm.ConfigError, match=r"reads windows that end at quiet places and share nothing; leave overlap_s=1\.0 out"
    ):
        transcribe(model, "sound -> text", [(torch.zeros(8000), 8000)], overlap_s=1.0)


def test_fault_85_searches_that_would_never_begin_are_refused(model: mm.Model) -> None:
    with pytest.raises(
        mm.ConfigError, match="generate: beams=100000 are more than 1000, each of which is a row of memory"
    ):
        model.generate(TASK, text="ab", beams=100_000)
    with pytest.raises(mm.ConfigError, match="Beam: width=1000000 is more than 10000 prefixes"):
        Beam(width=1_000_000)
    assert len(model.generate(TASK, text="ab", beams=100, max_tokens=1).others) == 99
