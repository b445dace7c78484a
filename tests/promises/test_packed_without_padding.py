"""Promise 2: packed by default, with no padding and no placeholders; one sample does exactly 0 to another in its pack."""

import pytest
import torch

import multimodal as mm
from multimodal.attention import Span
from multimodal_tokenizers import ImagePatches, Labels, TextBytes
from tests.test_stream import logits_by_sample


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both directions"])
def test_the_gradient_of_a_sample_with_respect_to_its_neighbours_is_zero(core, lively, values, causal, backend):
    tokenizers = {
        "image": ImagePatches(patch=4, channels=1),
        "text": TextBytes(causal=causal),
        "label": Labels(("circle", "square", "star")),
    }
    model = lively(mm.Model(tokenizers, core, ["image text -> label", "text -> text"])).train()
    batch = [("image text -> label", values(i)) for i in range(4)] + [
        ("text -> text", {"text": "abcd", "answer": "ef"})
    ]
    batch[1][1]["image"] = None  # lacks a kind
    batch[2][1]["text"] = None
    stream = model.packer(batch)
    rows = torch.cat([model.embed(kind, content) for kind, content in stream.content.items()]).detach()
    stream_TD = rows[stream.order_T].requires_grad_()
    state_TD = model.core(stream_TD, stream.position_TA, stream.layout, backend=backend)
    sample_T = stream.layout.info.sample
    for sample in range(len(batch)):
        mine = sample_T == sample
        (grad,) = torch.autograd.grad(state_TD[mine].square().sum(), stream_TD, retain_graph=True)
        assert torch.count_nonzero(grad[~mine]) == 0
        assert (grad[mine].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_longer_neighbour_is_no_padding_mask(core, lively, causal):
    """Right padding hidden by a causal mask would pass with causal text only, so both are tried, the short one first and last."""
    model = lively(mm.Model({"text": TextBytes(causal=causal), "label": Labels(("a", "b"))}, core, ["text -> label"]))
    short, long = {"text": "no", "label": "a"}, {"text": "a much longer neighbour", "label": "b"}
    alone = logits_by_sample(model, [("text -> label", short)])[0]
    for batch in ([short, long], [long, short]):
        rows = logits_by_sample(model, [("text -> label", s) for s in batch])
        torch.testing.assert_close(rows[batch.index(short)], alone, atol=1e-5, rtol=0)


def test_every_row_lands_in_its_place():
    """Each letter, pixel and label of the batch is numbered, and every row of the stream is looked up by hand."""
    packer = mm.packer.Packer(
        {
            "image": ImagePatches(patch=1, channels=1, mean=0, std=1, position="rotary"),
            "text": TextBytes(),
            "label": Labels(("a", "b")),
        },
        ["image text -> label", "text image -> text"],
    )
    pictures = [torch.arange(1, 7.0).view(2, 3) / 100, torch.arange(7, 9.0).view(2, 1) / 100]
    batch = [
        ("image text -> label", {"image": pictures[0], "text": "ABC", "label": "a"}),
        ("text image -> text", {"text": "DE", "image": pictures[1], "answer": "FG"}),
        ("image text -> label", {"image": None, "text": "H", "label": "b"}),
    ]
    stream = packer(batch)
    assert {kind: len(c) for kind, c in stream.content.items()} == {
        "image": 8, "text": 8, "head:label_Classify": 2, "head:text_NextToken": 1,
    }  # fmt: skip
    named = {
        "image": [f"p{round(float(x) * 100)}" for x in stream.content["image"][:, 0]],
        "text": [chr(x) for x in stream.content["text"]],
        "head:label_Classify": ["L", "L"],
        "head:text_NextToken": ["T"],
    }
    rows = [name for kind in stream.content for name in named[kind]]
    laid = [rows[i] for i in stream.order_T]
    expected = {
        Span(9, 10, 9): ["p1", "p2", "p3", "p4", "p5", "p6", "A", "B", "C", "L"],
        Span(4, 7, 4): ["D", "E", "p7", "p8", "T", "F", "G"],
        Span(1, 2, 1): ["H", "L"],
    }
    assert set(stream.layout.spans) == set(expected)
    assert laid == [name for span in stream.layout.spans for name in expected[span]]
    places = stream.layout.info
    totals = [span.total for span in stream.layout.spans]
    assert places.sample.tolist() == [s for s, n in enumerate(totals) for _ in range(n)]
    assert places.order.tolist() == [i for n in totals for i in range(n)]
    assert places.bidirectional.tolist() == [
        int(i < s.bidirectional) for s in stream.layout.spans for i in range(s.total)
    ]
    by_name = dict(zip(laid, places.segment.tolist(), strict=True))
    assert [by_name[n] for n in ("p1", "p6", "A", "C")] == [0, 0, 1, 1]
    assert [by_name[n] for n in ("D", "p7", "T", "F")] == [0, 1, 2, 3]

    labels, words = stream.readings["image text -> label"], stream.readings["text image -> text"]
    assert [laid[i] for i in labels.row_N] == ["L", "L"]
    assert [laid[i] for i in words.row_N] == ["T", "F", "G"]
    assert words.target.tolist() == [ord("F"), ord("G"), 256]
    answers = dict(zip(labels.samples, labels.target.tolist(), strict=True))
    assert answers == {0: 0, 2: 1}
    assert (labels.count, words.count) == (2, 3)
