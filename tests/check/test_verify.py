"""`verify` passes where the promises hold, and names the check that a planted leak breaks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import multimodal as mm
from multimodal.attention import Cache, DensePlan, plan
from multimodal.check import MODEL_CHECKS, plausible_values, verify
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBPE, TextBytes

TASKS = ["image -> label", "image -> text"]


class _Mixed(nn.Module):
    """An embedding in which every row sees the mean of all rows of the stream, in the mode `when` (or always)."""

    def __init__(self, size: int, width: int, when: str) -> None:
        super().__init__()
        self.linear, self.when = nn.Linear(size, width), when
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, content_NF: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        rows_ND = self.linear(content_NF)
        mixes = self.when == "always" or self.training
        return rows_ND + rows_ND.mean(0) if mixes else rows_ND


@dataclass(frozen=True)
class Leaky(ImagePatches):
    when: str = "always"

    def embed(self, width: int) -> nn.Module:
        return _Mixed(self.feature_size, width, self.when)


@dataclass(frozen=True)
class Odd(Tokenizer):
    """Takes nothing that anybody would guess."""

    feature_size = 2

    def encode(self, value: Any) -> Tokens:
        if value != ("odd", 3):
            raise mm.MediaError("Odd.encode: wanted ('odd', 3)")
        return Tokens(torch.zeros(3, 2), at_times(torch.arange(3.0)))


@dataclass(frozen=True)
class OddWithExamples(Odd):
    @classmethod
    def examples(cls) -> list[Any]:
        return [("odd", 3), ("even", 4)]


@pytest.fixture
def make(tokenizers, core, lively):
    def model(tasks=TASKS, core=core, **more: Tokenizer) -> mm.Model:
        return lively(mm.Model({**tokenizers, **more}, core, tasks))

    return model


def broken(result) -> set[str]:
    return {row.check for row in result.failures}


def test_passes_for_every_kind_and_head(make) -> None:
    tasks = [
        *TASKS,
        "image q:text -> label",
        "image sound -> story",
        mm.Task("sound -> words:text", mm.CTC()),
        "tags -> tags",
        "-> story",
    ]
    result = verify(make(tasks, tags=Labels(("x", "y", "z"), several=True)))
    assert result.passed, str(result)
    subjects = list(result.samples)
    assert subjects == [
        "image -> label",
        "image -> text",
        "image q:text -> label",
        "image q:text -> label (only image)",
        "image q:text -> label (only q)",
        "image sound -> story",
        "image sound -> story (only image)",
        "image sound -> story (only sound)",
        "sound -> words:text",
        "tags -> tags",
        "-> story",
    ]
    checks = {(row.subject, row.check) for row in result.rows}
    assert all((subject, check) in checks for subject in subjects for check in set(MODEL_CHECKS) - {"cached"})
    written = {"image -> text", "image sound -> story", "-> story"}
    assert {s for s, check in checks if check == "cached"} == {s for s in subjects if s.split(" (")[0] in written}


def test_single_task_needs_no_mixed_pack(make) -> None:
    assert {row.check for row in verify(make(["image -> text"])).rows} == set(MODEL_CHECKS) - {"mixed"}


def test_prints_a_line_for_each_subject_and_what_was_invented(make) -> None:
    text = str(verify(make()))
    lines = text.splitlines()
    assert lines[0].split() == ["read", "->", "written", "samples", *MODEL_CHECKS]
    assert lines[1].startswith("ok  image -> label")
    assert "invented: image (ndarray values), text (str values)" in text
    assert lines[-1] == "passed"


def test_leaves_the_model_as_it_was(make) -> None:
    model = make(image=Leaky(patch=4, channels=1))
    model.train()
    model.core.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    numbers, drawn, packer = np.random.get_state()[1], torch.get_rng_state(), model.packer
    verify(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert "embeds.image.calls" in before
    assert model.training
    assert not model.core.training
    assert model.packer is packer
    assert torch.equal(drawn, torch.get_rng_state())
    assert np.array_equal(numbers, np.random.get_state()[1])
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_but_for_the_gradient(make, core) -> None:
    assert verify(make(core=core.replace(dropout=0.5, drop_path=0.5))).passed


def test_half_precision_weights_are_measured_in_fp32(make) -> None:
    model = make().bfloat16()
    assert verify(model).passed
    assert model.device.type == "cpu"
    assert next(model.parameters()).dtype == torch.bfloat16


def test_an_embedding_that_mixes_values_fails(make) -> None:
    result = verify(make(image=Leaky(patch=4, channels=1)))
    assert not result.passed
    assert {"packed", "mixed", "gradient"} <= broken(result)
    assert "FAIL: image -> label, packed (alone, and packed with all others of its task in shuffled order)" in str(
        result
    )
    assert str(result).endswith("FAILED")


def test_a_leak_in_training_mode_alone_shows_in_the_gradient_alone(make) -> None:
    assert broken(verify(make(image=Leaky(patch=4, channels=1, when="training")))) == {"gradient"}


def test_attention_across_samples_fails(make) -> None:
    leak = mm.masks.Causal() | mm.masks.Prefix()
    result = verify(make(), backend=lambda rule, layout: DensePlan(leak, layout))
    assert {"packed", "mixed", "dense", "gradient"} <= broken(result)
    assert {row.subject for row in result.failures} == set(TASKS)


NO_LAW = mm.masks.SameSample() | ~mm.masks.SameSample()


def test_a_mask_without_same_sample_fails_against_the_oracle(make, core, monkeypatch) -> None:
    monkeypatch.setattr(plan, "LAW", NO_LAW)
    assert "dense" in broken(verify(make(core=core.replace(mask=mm.masks.Causal() | mm.masks.Prefix()))))


def test_a_cache_that_forgets_fails(make, monkeypatch) -> None:
    write = Cache.write

    def forgetful(self, layer, sample_T, order_T, k_TGK, v_TGK) -> None:
        write(self, layer, sample_T, order_T, k_TGK, v_TGK * 0.9)

    monkeypatch.setattr(Cache, "write", forgetful)
    assert "cached" in broken(verify(make()))


def test_written_tokens_that_see_the_future_fail(make, core, monkeypatch) -> None:
    monkeypatch.setattr(plan, "LAW", NO_LAW)
    assert "cached" in broken(verify(make(core=core.replace(mask=mm.masks.SameSample()))))


def test_not_a_number_fails(make) -> None:
    model = make(["image -> label"])
    with torch.no_grad():
        model.core.norm.weight[0] = torch.nan
    assert {"batch", "packed", "dense"} <= broken(verify(model))


def test_given_samples_are_used_and_counted(make, values) -> None:
    model = make()
    result = verify(model, {"image -> text": [values(i) for i in range(10)], "image -> label": [values(0)]})
    assert result.passed, str(result)
    assert result.samples == {"image -> label": 4, "image -> text": 8}
    assert result.notes[0] == "'image -> text': the first 8 of 10 samples were used"
    assert result.notes[1] == "invented: image (ndarray values, beside what was given)"


def test_a_sample_without_its_answer_gets_one(make, values) -> None:
    samples = [{"image": values(i)["image"]} for i in range(4)]
    result = verify(make(["image -> text"]), {"image -> text": samples})
    assert result.passed
    assert result.notes == ("invented: text (str values)",)


def test_bad_samples_are_refused(make) -> None:
    with pytest.raises(mm.TaskError, match=r"there is no task 'image -> txt'.*did you mean 'image -> text'\?"):
        verify(make(), {"image -> txt": []})
    with pytest.raises(mm.TaskError, match=r"the sample has no field 'image'; it has 'imge'; rename 'imge' to 'image'"):
        verify(make(), {"image -> text": [{"imge": 1}]})
    with pytest.raises(mm.MediaError, match=r"ImagePatches\.encode: there is no file 'no\.png'"):
        verify(make(), {"image -> text": [{"image": "no.png"}]})


def test_a_kind_whose_values_nobody_guesses_gets_random_tokens(make) -> None:
    result = verify(make(["odd -> label"], odd=Odd()))
    assert result.passed
    assert result.notes == ("invented: odd (random tokens, as no candidate value was accepted)",)


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (ImagePatches(patch=16), np.ndarray),
        (ImagePatches(patch=32, channels=1, edge="error"), np.ndarray),
        (AudioFrames(rate_hz=8000), tuple),
        (TextBytes(), str),
        (TextBPE.train(["to be or not to be"], vocab_size=260), str),
        (Labels(tuple("abcdefghijkl")), str),
        (Labels(("a", "b", "c"), several=True), list),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else type(x).__name__,
)
def test_plausible_values_fit_differ_and_repeat(tokenizer, kind) -> None:
    values = plausible_values(tokenizer)
    assert len(values) >= 3
    tokens = [tokenizer(value) for value in values]
    assert all(isinstance(value, kind) for value in values)
    assert len({tuple(t.content.flatten().tolist()) for t in tokens}) == len(values)
    again = [tokenizer(value) for value in plausible_values(tokenizer)]
    assert all(torch.equal(a.content, b.content) for a, b in zip(tokens, again, strict=True))
    if not tokenizer.classes:
        lengths = [len(t) for t in tokens]
        assert 1 < len(set(lengths)) < len(lengths)  # some equal, some not


def test_plausible_values_come_from_examples_first() -> None:
    assert plausible_values(OddWithExamples()) == [("odd", 3)]
    assert plausible_values(Odd()) == []


def test_written_pictures_pass_by_codes_and_by_features(lively) -> None:
    """Kinds of a fixed length, and a head that draws features: written step by step = read in one pass."""
    pictures = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    patches = ImagePatches(patch=4, channels=1, size=(8, 8))
    tokenizers = {
        "label": Labels(("a", "b")),
        "codes": Codes.train(ImagePatches(patch=4, channels=1), pictures, size=8, quiet=True),
        "picture": patches,
    }
    tasks = ["label -> codes", mm.Task("label -> picture", mm.FlowMatching(width=16, depth=1, steps=4))]
    model = lively(mm.Model(tokenizers, mm.Core(width=32, depth=2, heads=2), tasks))
    samples = [{"label": "ab"[i % 2], "codes": p, "picture": p} for i, p in enumerate(pictures)]
    result = verify(model, {"label -> codes": samples, "label -> picture": samples})
    assert result.passed, str(result)
    assert {(row.subject, row.check) for row in result.rows} >= {(t, "cached") for t in model.tasks}
