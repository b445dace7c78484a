"""EachRow: losses against sums written out by hand, rows against a list, and the checks every head must pass."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.check import check_head, verify
from multimodal.heads.each_row import EachRow, last_rows
from multimodal.heads.pool import First, Mean, Transformed
from multimodal.norm import Norm
from multimodal.shapes import ConfigError, StreamError
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal_tokenizers import Labels, TextBytes


@dataclass(frozen=True)
class Bits(Tokenizer):
    """Rows of three bits."""

    feature_size = 3

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.tensor(value, dtype=torch.float32).reshape(-1, 3), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> list[list[int]]:
        return tokens.content.int().tolist()


def test_the_answer_belongs_to_the_last_rows():
    lengths, counts = [5, 1, 3, 4], [2, 1, 0, 4]
    rows = [[f"{i}{j}" for j in range(n)] for i, n in enumerate(lengths)]
    flat = [row for sample in rows for row in sample]
    wanted = [row for sample, count in zip(rows, counts, strict=True) for row in sample[len(sample) - count :]]
    assert [flat[i] for i in last_rows(lengths, counts)] == wanted == ["03", "04", "10", "30", "31", "32", "33"]


def test_ids_cost_their_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 4), torch.tensor([3, 0, 1])
    got = EachRow().loss(logits, [4, 2], target, [2, 1])
    log_p = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in logits.double().tolist()]
    assert float(got) == pytest.approx(-(log_p[2][3] + log_p[3][0] + log_p[5][1]), rel=1e-6)


def test_bits_cost_the_mean_of_their_binary_cross_entropies():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]])
    got = EachRow().loss(logits, [3, 2], target, [1, 2])
    wanted = 0.0
    for row, bits in zip((2, 3, 4), target.tolist(), strict=True):
        p = [1 / (1 + math.exp(-x)) for x in logits[row].double().tolist()]
        wanted -= sum(math.log(q if bit else 1 - q) for q, bit in zip(p, bits, strict=True)) / 3
    assert float(got) == pytest.approx(wanted, rel=1e-6)


def test_rows_go_through_a_transform_and_the_table_of_the_tokens(core, lively):
    norm = Norm(eps=1e-5, centred=True, bias=True)
    head = EachRow(transform=Transformed(First(), dense="gelu", last_norm=norm), tied=True)
    model = lively(mm.Model({"text": TextBytes()}, core, [Task("text -> text", head)]))
    samples = [{"text": text, "answer": text.upper()} for text in ("one", "seventeen", "x")]
    stream = model.pack("text -> text", samples)
    with torch.inference_mode():
        state_TD, parts = model(stream), dict(model.readout("text -> text").named_parameters())
        x = F.gelu(F.linear(state_TD, parts["pool.dense.linear.weight"], parts["pool.dense.linear.bias"]))
        x = F.layer_norm(x, x.shape[-1:], parts["pool.last_norm.weight"], parts["pool.last_norm.bias"], 1e-5)
        wanted = F.linear(x, model.get_parameter("embeds.text.weight"), parts["linear.bias"])
        found = model.logits(stream)["text -> text"]
    torch.testing.assert_close(found, wanted[stream.readings["text -> text"].row_N], atol=1e-5, rtol=1e-5)
    assert "linear.weight" not in parts
    model.loss(stream).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert verify(model, {"text -> text": samples}).passed
    with pytest.raises(
        ConfigError, match=r"EachRow: transform=.* pools rows, but each has an answer; make it Transfor"
    ):
        EachRow(transform=Transformed(Mean()))
    with pytest.raises(ConfigError, match=r"EachRow: tied=True needs an embedding that is a table"):
        mm.Model({"text": TextBytes(), "bits": Bits()}, core, [Task("text -> bits", EachRow(tied=True))])


def test_answers_are_values_and_their_likelihood():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    names = Labels(("a", "b", "c"))
    both = EachRow().answer(logits, [2, 1], names)
    assert [answer.value for answer in both] == [["b", "a"], ["c"]]
    e = math.exp
    wanted = e(3) / (1 + e(3) + e(1)) * e(2) / (e(2) + 2)
    assert both[0].confidence == pytest.approx(wanted, rel=1e-6)
    assert [answer.value for answer in EachRow(last=1).answer(logits, [2, 1], names)] == [["a"], ["c"]]
    (bits,) = EachRow().answer(torch.tensor([[-1.0, 2.0, 0.5]]), [1], Bits())
    assert bits.value == [[0, 1, 1]]
    assert bits.confidence == pytest.approx(math.prod(1 / (1 + e(-x)) for x in (1, 2, 0.5)), rel=1e-6)
    (several,) = EachRow().answer(
        torch.tensor([[-1.0, 2.0, 0.5], [1, -1, -1]]), [2], Labels(("a", "b", "c"), several=True)
    )
    assert several.value == [["b", "c"], ["a"]]
    (text,) = EachRow().answer(torch.eye(256)[list(b"hey")] * 9, [3], TextBytes())
    assert text.value == "hey"


@pytest.mark.parametrize(
    ("head", "kind", "values"),
    [
        (EachRow(), TextBytes(), ["ab", "c", "abcd", "ba"]),
        (EachRow(last=2), TextBytes(), ["ab", "cd", "ef", "ba"]),
        (EachRow(), Bits(), [[[0, 1, 1]], [[1, 0, 0], [1, 1, 1]], [[0, 0, 0]], [[1, 1, 0]]]),
        (EachRow(), Labels(("a", "b", "c")), ["a", "c", "b", "a"]),
    ],
)  # fmt: skip
def test_it_keeps_every_promise_of_a_head(head: EachRow, kind: Tokenizer, values: list):
    report = check_head(head, kind, values)
    print(report)


def test_what_cannot_be_answered_is_refused():
    head, kind = EachRow(), TextBytes()
    with pytest.raises(ConfigError, match="EachRow: last=0 answers nothing; use 1 or more, or None for every row"):
        EachRow(last=0)
    with pytest.raises(StreamError, match="EachRow: the answer has 4 tokens, but the context only 3 rows to answer in"):
        head.target(kind("abcd"), 3, kind)
    with pytest.raises(StreamError, match="EachRow: the answer has 4 tokens, but last=2 rows are answered"):
        EachRow(last=2).target(kind("abcd"), 9, kind)
    with pytest.raises(
        StreamError, match="EachRow: Bits gave features outside 0 to 1, but features are answered as bits"
    ):
        head.target(Bits()([[0, 2, 1]]), 3, Bits())


def test_a_model_learns_to_answer_each_row_of_a_sequence():
    samples = [{"text": f"{a}{b}{c}", "upper": f"{a}{b}{c}".upper()} for a in "ab" for b in "ab" for c in "abc"]
    kinds = {"text": TextBytes(), "upper": TextBytes()}
    model = mm.Model(kinds, mm.Core(width=16, depth=1, heads=1), [Task("text -> upper", EachRow())])
    mm.fit(model, {"text -> upper": samples}, steps=80, batch=12, lr=2e-2, quiet=True)
    assert mm.evaluate(model, "text -> upper", samples)["exact"] == 1.0
    assert np.isclose(model.predict("text -> upper", text="bac").confidence, 1, atol=0.1)
