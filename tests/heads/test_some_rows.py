"""EachRow over some rows of the context: words of a text, nodes of a graph, answers that are not known."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.check import verify
from multimodal.check.values import Encoded
from multimodal.heads import EachRow
from multimodal.heads.base import EncodedSample, Reading, Segment
from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal_tokenizers import ClassTokens, Labels, TextBytes

BLANK = ord(" ")


@dataclass(frozen=True)
class Words(Tokenizer):
    """Text as bytes; the first byte of each word is answered."""

    vocab_size = 256
    text = True

    def encode(self, value: str) -> Tokens:
        content = torch.tensor(list(value.encode()), dtype=torch.long)
        return Tokens(content, self.places(len(content)))

    def answered(self, tokens: Tokens) -> Tensor:
        before = torch.cat([torch.tensor([BLANK]), tokens.content[:-1]])
        return (tokens.content != BLANK) & (before == BLANK)


@dataclass(frozen=True)
class Graph(Tokenizer):
    """{"nodes": [kind of each], "edges": [(a, b), ..]}: a token for each node, then one for each edge."""

    feature_size = 6

    def encode(self, value: Any) -> Tokens:
        nodes = [[1, kind, i, 0, 0, 0] for i, kind in enumerate(value["nodes"])]
        edges = [[0, 0, 0, 1, a, b] for a, b in value["edges"]]
        content = torch.tensor(nodes + edges, dtype=torch.float32)
        return Tokens(content, at_times(torch.arange(len(content))))

    def answered(self, tokens: Tokens) -> Tensor:
        return tokens.content[:, 0] == 1


TAG = "words -> tags:tag"
NODE = "hint:words graph -> classes:class_"


def tagger() -> mm.Model:
    """Tags of the words of a text, and classes of the nodes of a graph that stands behind a text."""
    kinds = {"words": Words(), "graph": Graph(), "tag": Labels(("long", "short")), "class_": Labels(("a", "b", "c"))}
    core = mm.Core(width=24, depth=1, heads=2)
    return mm.Model(kinds, core, [Task(TAG, EachRow()), Task(NODE, EachRow(of="graph"))])


def tagged(text: str) -> dict[str, Any]:
    return {"words": text, "tags": ["long" if len(word) > 2 else "short" for word in text.split()]}


TEXTS = [f"{a} {b} {c}" for a in ("ho", "cat") for b in ("fine", "we", "o") for c in ("x", "top")]
GRAPHS = [
    {"hint": "hi", "graph": {"nodes": [0, 1, 2], "edges": [(0, 1)]}, "classes": ["a", None, "c"]},
    {"hint": None, "graph": {"nodes": [2, 1], "edges": [(0, 1), (1, 0)]}, "classes": ["c", "b"]},
    {"hint": "o", "graph": {"nodes": [1, 1, 0, 2], "edges": []}, "classes": [None, "b", "a", None]},
]


def test_the_rows_are_those_that_the_kind_says_and_whose_answer_is_known():
    model = tagger()
    texts = [{"words": "ab  c", "tags": ["short", None]}, {"words": " xyz", "tags": ["long"]}]
    stream = model.packer([(TAG, texts[0]), (NODE, GRAPHS[0]), (TAG, texts[1]), (NODE, GRAPHS[2])])
    start_of, at = {}, 0
    for i, span in enumerate(stream.layout.spans):
        start_of[i], at = at, at + span.total
    for task, wanted in ((TAG, {0: [0], 2: [1]}), (NODE, {1: [2, 4], 3: [2, 3]})):
        reading = stream.readings[task]
        rows = reading.row_N.split(list(reading.lengths))
        found = {}
        for sample, row_N in zip(reading.samples, rows, strict=True):
            start = start_of[int(stream.layout.info.sample[row_N[0]])]
            found[sample] = (row_N - start).tolist()
        assert found == wanted
        assert reading.target_lengths == reading.lengths
    target = stream.readings[NODE].target
    assert target is not None
    by_sample = dict(zip(stream.readings[NODE].samples, target.split(2), strict=True))
    assert {sample: ids.tolist() for sample, ids in by_sample.items()} == {1: [0, 2], 3: [1, 0]}
    # without answers every node and every word has one
    asked = model.packer([(TAG, texts[0]), (NODE, GRAPHS[2])], answers=False)
    assert asked.readings[TAG].lengths == (2,)
    assert asked.readings[NODE].lengths == (4,)


def test_the_loss_is_that_of_the_known_rows_alone(lively):
    model = lively(tagger())
    stream = model.pack(NODE, GRAPHS)
    wanted, count = 0.0, 0
    for sample in GRAPHS:
        alone = model.pack(NODE, [sample], answers=False)
        logits = model.logits(alone)[NODE].double().tolist()
        for row, name in zip(logits, sample["classes"], strict=True):
            if name is not None:
                wanted += math.log(sum(math.exp(x) for x in row)) - row["abc".index(name)]
                count += 1
    assert stream.readings[NODE].count == count == 6
    assert model.losses(stream)[NODE].item() == pytest.approx(wanted, rel=1e-5)


def test_measures_leave_out_what_is_not_known(lively):
    model = lively(tagger())
    said = [model.predict(NODE, [sample])[0].value for sample in GRAPHS]
    other = {"a": "b", "b": "c", "c": "a"}
    half = [  # the first sample is right where it is known, the second wrong in its second node, the third is right
        [said[0][0], None, said[0][2]],
        [said[1][0], other[said[1][1]]],
        [None, said[2][1], None, None],
    ]
    samples = [{**sample, "classes": names} for sample, names in zip(GRAPHS, half, strict=True)]
    found = mm.evaluate(model, NODE, samples)
    assert found["exact"] == pytest.approx(2 / 3)
    assert found["rows"] == pytest.approx(4 / 5)


def test_packed_is_alone_and_what_is_saved_answers_alike(lively, tmp_path):
    model = lively(tagger())
    report = verify(model, {TAG: [tagged(text) for text in TEXTS[:4]], NODE: GRAPHS})
    assert report.passed, str(report)
    model.save(tmp_path / "model")
    loaded = mm.Model.load(tmp_path / "model")
    assert loaded.packer.heads[NODE] == EachRow(of="graph")
    assert loaded.predict(NODE, GRAPHS) == model.predict(NODE, GRAPHS)


def test_a_model_learns_to_tag_words_and_nodes():
    """The tag of a word is a fact of all its letters; of some nodes and words nothing is known."""
    model = tagger()
    texts = [tagged(text) for text in TEXTS]
    for i, sample in enumerate(texts[:6]):
        sample["tags"][i % 3] = None
    draw = np.random.default_rng(0)
    graphs = []
    for i in range(24):
        nodes = draw.integers(3, size=2 + i % 3).tolist()
        edges = [(0, 1)] * (i % 2)
        graphs.append({"hint": None, "graph": {"nodes": nodes, "edges": edges}, "classes": ["abc"[n] for n in nodes]})
    graphs[0]["classes"][0] = None
    mm.fit(model, {TAG: texts, NODE: graphs}, steps=60, batch=12, lr=2e-2, quiet=True)
    for task, samples in ((TAG, texts), (NODE, graphs)):
        found = mm.evaluate(model, task, samples)
        assert found["exact"] == found["rows"] == 1.0, (task, found)
    assert model.predict(TAG, words="cat fine o").value == ["long", "long", "short"]


def test_a_part_of_a_field_is_answered():
    """Kinds of parts are named "page.words"; the other parts and the other fields are not answered."""

    class Parts:
        """A kind made of two others."""

        def at(self, part: str) -> Tokenizer:
            return {"picture": TextBytes(), "words": Words()}[part]

    class Page(EncodedSample):
        def read(self, fields=None) -> list[Segment]:
            segments = []
            for field in self.pattern.reads if fields is None else fields:
                names = ("page.picture", "page.words") if field.kind == "page" else (field.kind,)
                segments += [Segment(name, Words()("ab c"), (1.0, 1.0, 1.0), True) for name in names]
            return segments

    head = EachRow(of="sheet.words")
    pattern = head.bind(Pattern.parse("text sheet:page -> tags:tag"))
    kinds: dict[str, Any] = {"text": TextBytes(), "page": Parts(), "tag": Labels(("x", "y"))}
    tokens = {"text": Words()("ab c"), "sheet": Words()("ab c")}
    sample = Page(
        "sample 0", pattern, kinds, {"tags": ["x", "y"]}, tokens, kinds["tag"], head.start("", "", kinds["tag"]), True
    )
    (part,) = head.lay_out(sample)
    assert part.row_N is not None
    assert part.row_N.tolist() == [8 + 0, 8 + 3]
    assert part.target is not None
    assert part.target.tolist() == [0, 1]
    (part,) = EachRow(of="sheet").lay_out(replace(sample, learn=False))
    assert part.row_N is not None
    assert part.row_N.tolist() == [4, 5, 6, 7, 8, 11]  # the bytes of the picture, all of them, and the words


@dataclass(frozen=True)
class Ids(Tokenizer):
    """A list of numbers."""

    vocab_size = 9

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.tensor(value), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()


def rows_and_target(reading: Reading) -> tuple[list[int], list[Any]]:
    assert reading.target is not None
    return reading.row_N.tolist(), reading.target.tolist()


def test_lists_of_other_kinds_may_have_gaps_too():
    sets = Labels(("a", "b", "c"), several=True)
    kinds = {"words": Words(), "ids": Ids(), "sets": sets}
    tasks = [Task(f"words -> {kind}", EachRow()) for kind in ("ids", "sets")]
    model = mm.Model(kinds, mm.Core(width=8, depth=1, heads=1), tasks)
    reading = model.pack("words -> ids", [{"words": "a b c", "ids": [4, None, 7]}]).readings["words -> ids"]
    assert rows_and_target(reading) == ([0, 4], [4, 7])
    reading = model.pack("words -> sets", [{"words": "a b", "sets": [None, ["a", "c"]]}]).readings["words -> sets"]
    assert rows_and_target(reading) == ([2], [[1, 0, 1]])
    one = model.pack("words -> sets", [{"words": "a b", "sets": ["a", "c"]}]).readings["words -> sets"]
    assert rows_and_target(one) == ([2], [[1, 0, 1]])  # one set, for the last row, as it was


def test_an_empty_answer_has_no_target():
    model = mm.Model({"words": Words(), "text": TextBytes()}, mm.Core.tiny(), [Task("words -> text", EachRow())])
    stream = model.pack("words -> text", [{"words": "a b", "text": ""}, {"words": "a b", "text": "x"}])
    assert stream.readings["words -> text"].target_lengths == (0, 1)
    assert model.losses(stream)["words -> text"].item() > 0


def test_what_cannot_be_answered_is_refused():
    with pytest.raises(
        ConfigError, match=r"EachRow: of='graph' answers all rows of this field, and last=2 some at the"
    ):
        EachRow(of="graph", last=2)
    with pytest.raises(
        TaskError, match=r"EachRow\(of='grap'\) answers the rows of 'grap', which is not read; .* did you"
    ):
        mm.Model({"graph": Graph(), "tag": Ids()}, mm.Core.tiny(), [Task("graph -> tag", EachRow(of="grap"))])
    model, graph = tagger(), GRAPHS[0]
    with pytest.raises(
        StreamError, match=r"sample 0 .* the answer has 2 tokens, but 'graph' has 3 rows to answer in; give"
    ):
        model.pack(NODE, [{**graph, "classes": ["a", None]}])
    with pytest.raises(StreamError, match="field 'classes': no answer of its 3 rows is known; leave this sample out"):
        model.pack(NODE, [{**graph, "classes": [None] * 3}])
    with pytest.raises(
        StreamError, match="EachRow: no token of 'graph' has an answer of its own in this sample: it is None"
    ):
        model.pack(NODE, [{**graph, "graph": None}])
    with pytest.raises(MediaError, match=r"field 'classes\[2\]': Labels.encode: 'd' is not one of the 3 classes"):
        model.pack(NODE, [{**graph, "classes": ["a", None, "d"]}])

    @dataclass(frozen=True)
    class Broken(Words):
        def answered(self, tokens: Tokens) -> Tensor:
            return tokens.content != BLANK if len(tokens) < 3 else tokens.content

    broken = mm.Model({"words": Broken(), "tag": Labels(("a",))}, mm.Core.tiny(), [Task("words -> tag", EachRow())])
    with pytest.raises(
        MediaError, match=r"Broken.answered gave torch.int64 \(3,\), wanted bool \(3,\): one for each tok"
    ):
        broken.pack("words -> tag", [{"words": "abc", "tag": ["a"]}])

    @dataclass(frozen=True)
    class Halved(Ids):
        def encode(self, value: Any) -> Tokens:
            return super().encode(value[::2])

    halved = mm.Model({"words": Words(), "ids": Halved()}, mm.Core.tiny(), [Task("words -> ids", EachRow())])
    with pytest.raises(
        StreamError, match="3 known elements of field 'ids' gave 2 tokens, so None cannot stand for one"
    ):
        halved.pack("words -> ids", [{"words": "a b c d", "ids": [1, 2, None, 3]}])


def test_tokenizers_around_others_answer_as_those_do():
    words = Words()
    assert words.answered(words("ab c")).tolist() == [True, False, False, True]
    around = ClassTokens(words, count=2)
    assert around.answered(around("ab c")).tolist() == [False, False, True, False, False, True]
    assert Encoded(words).answered(words("ab c")).tolist() == [True, False, False, True]
    assert TextBytes().answered(TextBytes()("ab")).tolist() == [True, True]
