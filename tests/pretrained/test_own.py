"""A text model that was trained here, as a folder that transformers loads."""

from pathlib import Path
from typing import Any

import pytest
import torch

import multimodal as mm
from multimodal_tokenizers import Ids, TextBPE, TextBytes
from tests.pretrained.compared import TOLERANCE, largest, logits_by_sample

LINES = ["to be, or not to be", "that is the question: ü", "whether 'tis nobler"]


def model_of(text: Any, pattern: str = "-> text", **core: Any) -> mm.Model:
    settings = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "rotary_split": (1, 0, 0), **core}
    model = mm.Model({"text": text}, mm.Core(**settings), [mm.Task(pattern, mm.NextToken(bias=False))])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def bpe() -> TextBPE:
    return TextBPE.train(LINES * 3, vocab_size=280, causal=True)


@pytest.mark.parametrize(
    "text", [TextBytes(causal=True), bpe(), TextBytes(causal=True, scale=3.0)], ids=["bytes", "BPE", "scaled"]
)
def test_transformers_computes_and_writes_the_same(text: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of(text)
    folder = model.export("hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start, vocab = theirs.config.bos_token_id, text.vocab_size
    wanted = []
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False).input_ids
        assert ids == text(line).content.tolist()
        with torch.inference_mode():
            wanted.append(theirs(torch.tensor([[start, *ids]])).logits[0, :, : vocab + 1])
    assert largest(logits_by_sample(model, "-> text", [{"text": line} for line in LINES]), wanted) < TOLERANCE
    written = theirs.generate(torch.tensor([[start]]), max_new_tokens=12, do_sample=False, pad_token_id=vocab)[0, 1:]
    ours = model.generate("-> text", max_tokens=12).tokens.content.tolist()
    assert written.tolist()[: len(ours)] == ours
    assert len(set(ours)) > 2


def bytes_of(ids: list[int]) -> mm.Tokens:
    return mm.Tokens(torch.tensor(ids), TextBytes(causal=True).places(len(ids)))


def test_it_comes_back_as_a_model_of_ours(tmp_path: Path) -> None:
    model = model_of(TextBytes(causal=True), "text -> text")
    again = mm.Model.from_pretrained(model.export("hf", tmp_path / "out"))
    before, after = (m.core.state_dict() for m in (model, again))
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines = [[5, 9, 200], [60, 3, 7, 7, 31]]
    wanted = logits_by_sample(
        model, "text -> text", [{"text": bytes_of(x[:2]), "answer": bytes_of(x[2:])} for x in lines]
    )
    # what was a learned start is the last token that is read
    given = [{"text": bytes_of([*x[:2], 257]), "answer": bytes_of(x[2:])} for x in lines]
    found = logits_by_sample(again, "text -> text", given)
    assert largest([x[:, :257] for x in found], wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            lambda: model_of(TextBytes(), rotary_split=(2, 1, 1)),
            r"cannot hold this core's rotary_split; train one with rotary_split=\(1, 0, 0\)",
        ),
        (lambda: model_of(TextBytes(), qk_norm=False), r"cannot hold this core's qk_norm; train one with qk_norm=True"),
        (lambda: model_of(TextBytes(), "text -> text"), r"reads causally; make the tokenizer with causal=True"),
        (lambda: mm.Model({"text": TextBytes()}, mm.Core.tiny(), ["-> text"]), r"train with NextToken\(bias=False\)"),
        (
            lambda: mm.Model({"a": Ids(9), "text": TextBytes()}, mm.Core.tiny(), ["a -> text"]),
            r"holds a model with one task, '-> text'",
        ),
    ],
    ids=["rotary", "norm", "causal", "bias", "kinds"],
)
def test_what_the_layout_cannot_hold_is_refused(model: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(mm.ConfigError, match=problem):
        model().export("hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
