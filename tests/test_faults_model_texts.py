"""Faults of texts, their tokenizers and what is measured of them, by their numbers in FAULTS.md."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import multimodal as mm
from multimodal.transcription import error_rates
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBPE, TextBytes

CORE = mm.Core(width=32, depth=1, heads=2)


def test_fault_11_a_model_learns_to_write_nothing(tmp_path: Path) -> None:
    """By NextToken and by CTC; "" comes back, is counted by the measures, and is a sample like any other in a file."""
    samples = [
        {"text": t, "out": "" if t == "quiet" else "hi", "heard": "" if t == "quiet" else "hi"}
        for t in ("quiet", "loud")
    ]
    tasks = ["text -> out:text", mm.Task("text -> heard:text", mm.CTC())]
    model = mm.Model({"text": TextBytes()}, CORE, tasks)
    mm.fit(model, dict.fromkeys(model.tasks, samples), steps=60, batch=4, lr=1e-2, quiet=True)
    for task in model.tasks:
        answers = [answer.value for answer in model.predict(task, samples)]
        assert answers == ["", "hi"]
        assert mm.evaluate(model, task, samples)["exact"] == 1.0
        assert mm.evaluate(model, task, samples[:1])["exact"] == 1.0  # not one real symbol among the targets
    assert error_rates(["", "hi"], answers) == {"wer": 0.0, "cer": 0.0}
    assert error_rates(["", "hi"], ["oh no", "hi"]) == {"wer": 2.0, "cer": 2.5}


def test_fault_11a_nothing_alone_is_nothing_packed_and_may_be_a_choice() -> None:
    model = mm.Model(
        {"text": TextBytes(), "seen": TextBytes(causal=True)},
        CORE,
        ["seen -> text", mm.Task("text -> out:text", mm.Pointer())],
    )
    samples = [{"seen": "a", "text": ""}, {"seen": "bcd", "text": "xy"}, {"seen": "ef", "text": ""}]
    model.double()
    together = model.losses(model.pack("seen -> text", samples))["seen -> text"]
    alone = [model.losses(model.pack("seen -> text", [s]))["seen -> text"] for s in samples]
    torch.testing.assert_close(together, torch.stack(alone).sum())
    pointed = model.pack("text -> out:text", [{"text": "abc", "out": ""}])
    assert pointed.readings["text -> out:text"].target_lengths == (1,)  # only the stop
    written = model.generate("seen -> text", samples, sampler=mm.generate.OneOf(("", "yes")))
    assert {answer.value for answer in written} <= {"", "yes"}


def test_fault_11b_messages_say_what_is_not_given_and_what_is_empty() -> None:
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(("a", "b")), "sound": _Nothing()},
        CORE,
        [
            "text -> out:text",
            "text -> label",
            "label -> text",
            mm.Task("text -> sound", mm.FlowMatching(width=8, depth=1)),
        ],
    )
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("text -> out:text", {"text": "a", "out": None}, r"field 'out' is None, that is not given,.*\(''  *is an answer too"),
        ("text -> out:text", {"text": "", "out": "a"}, r"field 'text': TextBytes.encode: str '' gave no tokens; .* give None"),
        ("text -> label", {"text": "a", "label": None}, r"field 'label' is None, that is not given, .*give its value, or leave"),
        ("text -> label", {"text": "a", "label": ""}, r"Labels.encode: '' is not one of the 2 classes"),
        ("text -> sound", {"text": "a", "sound": 0}, r"FlowMatching: the answer is empty, but one token at least is written"),
    ]  # fmt: skip
    for task, sample, message in refused:
        with pytest.raises(ValueError, match=message):
            model.pack(task, [sample])
    empty = mm.Tokens(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))
    with pytest.raises(mm.StreamError, match="Classify: the answer is empty, but a class is one token"):
        mm.Classify().target(empty, 1, Labels(("a", "b")))


@dataclass(frozen=True)
class _Nothing(mm.Tokenizer):
    """So many rows of one feature; of none a tensor of any shape."""

    feature_size = 1

    def encode(self, value: Any) -> mm.Tokens:
        return mm.Tokens(torch.ones(value, 1) if value else torch.tensor([]), torch.zeros(value, 3))

    def decode(self, tokens: mm.Tokens) -> int:
        return len(tokens)


@pytest.mark.parametrize("task", ["label -> codes", "label -> picture", "label -> sound"])
def test_fault_15a_pictures_and_sounds_that_are_written_are_measured(task: str) -> None:
    pictures = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    kinds = {
        "label": Labels(("a", "b")),
        "codes": Codes.train(ImagePatches(patch=4, channels=1), pictures, size=8, quiet=True),
        "picture": ImagePatches(patch=4, channels=1, size=(8, 8)),
        "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
    }
    head = None if task == "label -> codes" else mm.FlowMatching(width=8, depth=1, steps=1)
    model = mm.Model(kinds, CORE, [mm.Task(task, head)])
    sound = torch.sin(torch.arange(1000.0)) * 0.1, 8000
    samples = [{"label": "a", "codes": p, "picture": p, "sound": sound} for p in pictures]
    measures = mm.evaluate(model, task, samples)
    of_pixels = {"mean error", "root mean square error", "R2"}
    assert set(measures) == ({"loss", "exact", *of_pixels} if head is None else {"loss"})


def made(tmp_path: Path, model: Any = None, **parts: Any) -> Path:
    """A tokenizer.json of somebody else's: by default a BPE of small Latin letters without an unknown token."""
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
    hf = HFTokenizer(model or models.BPE(vocab=letters, merges=[]))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(prefix="##")
    for name, part in parts.items():
        setattr(hf, name, part)
    path = tmp_path / "tokenizer.json"
    hf.save(str(path))
    return path


def byte_level(**settings: Any) -> models.BPE:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "ab"])}, merges=[("a", "b")], **settings)


LEVEL = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}


def test_fault_15_a_tokenizer_that_loses_letters_is_refused_by_name(tmp_path: Path) -> None:
    path = made(tmp_path)
    with pytest.raises(
        mm.ConfigError, match=r"TextBPE.open: '.*tokenizer.json' changes \d+ of \d+ texts, .*it loses .*; take another"
    ):
        TextBPE.open(path)
    lossy = TextBPE.open(path, lossy=True)
    assert lossy.lossy
    assert len(lossy("hug 日本 pug")) == 6
    again = TextBPE.from_config(lossy.config(), lossy.files())
    assert again == lossy
    assert TextBPE.from_config({"causal": False}, lossy.files()).lossy  # saved before this was asked
    assert not TextBPE.from_config({"causal": False}, TextBPE.train(["abc"], vocab_size=256).files()).lossy


def test_fault_15b_what_a_text_would_lose_is_named_when_it_is_encoded(tmp_path: Path) -> None:
    strict = TextBPE(
        made(tmp_path, decoder=decoders.Fuse(), pre_tokenizer=pre_tokenizers.Split(" ", "isolated")).read_text()
    )
    assert len(strict("hugpug")) == 6
    with pytest.raises(
        mm.MediaError, match=r"TextBPE.encode: str 'hug日本pug' would lose str '日本', .*comes back as str 'hugpug'"
    ):
        strict("hug日本pug")


def test_fault_15c_held_out_measures_compare_with_what_was_given(tmp_path: Path) -> None:
    """A model that writes all that its lossy tokenizer leaves of the target has not written the target."""
    lossy = TextBPE.open(made(tmp_path), lossy=True)
    model = mm.Model({"label": Labels(("a",)), "text": lossy}, CORE, ["label -> text"])
    samples = [{"label": "a", "text": "ab 日"}]
    mm.fit(model, {"label -> text": samples}, steps=25, batch=1, lr=1e-2, quiet=True)
    assert model.predict("label -> text", label="a").value == lossy.decode(lossy("ab 日"))
    assert mm.evaluate(model, "label -> text", samples)["exact"] == 0.0


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("normaliser that drops", {"normalizer": normalizers.Replace("日", "")}, r"'hug 日本 pug' into 'hug 本 pug'; it loses 日"),
        ("accents", {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}, "changes .* into"),
        ("blank before", {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, " into \" The quick"),
        ("decoder that strips", {"decoder": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 1)])}, "before and"),
    ],
)  # fmt: skip
def test_fault_15d_other_ways_of_losing_are_found_too(
    name: str, parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(mm.ConfigError, match=message):
        TextBPE.open(made(tmp_path, byte_level(), **{**LEVEL, **parts}))


def test_fault_15e_case_and_unicode_forms_are_what_the_file_declares(tmp_path: Path) -> None:
    small = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    ours = TextBPE.open(made(tmp_path, byte_level(), **LEVEL, normalizer=small))
    assert ours.decode(ours("Straße e\u0301")) == "straße é"
    assert ours.wanted("Straße") == "straße"


def test_fault_15f_dropout_is_switched_off_and_nothing_is_cut_or_added(tmp_path: Path) -> None:
    path = made(tmp_path, byte_level(dropout=0.5), **LEVEL)
    hf = HFTokenizer.from_file(str(path))
    hf.add_special_tokens(["<s>"])
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", hf.token_to_id("<s>"))])
    hf.enable_truncation(3)
    hf.enable_padding(length=9)
    hf.save(str(path))
    assert json.loads(path.read_text())["model"]["dropout"] == 0.5
    with pytest.warns(UserWarning, match=r"'.*tokenizer.json' has a BPE dropout of 0.5; it is switched off"):
        ours = TextBPE.open(path)
    for tokenizer in (ours, TextBPE.from_config(ours.config(), ours.files())):
        assert {tuple(tokenizer("ab" * 20).content.tolist()) for _ in range(5)} == {(256,) * 20}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextBPE.open(made(tmp_path, byte_level(), **LEVEL))
