"""Packed streams: what lies where, and that packing changes nothing: neither answers nor gradients."""

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import multimodal as mm
from multimodal.attention import Span
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError
from multimodal.tokenizer import Tokens, at_times
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

TASKS = (
    "image -> label",
    "text -> label",
    "sound -> label",
    "image text -> story",
    "story image sound -> text",
    "-> text",
)
quiet_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture
def model(tokenizers, core, lively) -> mm.Model:
    return lively(mm.Model(tokenizers, core, [*TASKS, mm.Task("sound -> story", mm.CTC())]))


@pytest.fixture
def batch(values) -> list[tuple[str, dict]]:
    """Every task at least once, shapes that differ, and fields left out on purpose."""
    made = [(task, {**values(i), "answer": "so"}) for i, task in enumerate(TASKS * 2)]
    made[3][1]["image"] = None
    made[10][1]["sound"] = None
    made[4][1]["story"] = made[4][1]["image"] = None
    return made


def logits_by_sample(model: mm.Model, batch: list, backend: str = "auto") -> list[torch.Tensor]:
    stream = model.packer(batch)
    found: list = [None] * len(batch)
    with torch.no_grad():
        for pattern, logits_NV in model.logits(stream, backend=backend).items():
            r = stream.readings[pattern]
            for sample, rows in zip(r.samples, logits_NV.split(r.lengths), strict=True):
                found[sample] = rows
    return found


@quiet_flex
@pytest.mark.parametrize("backend", ["dense", "runs", "flex"])
def test_packed_and_alone_give_the_same_logits(model, batch, backend):
    packed = logits_by_sample(model, batch, backend)
    for sample, together in zip(batch, packed, strict=True):
        (alone,) = logits_by_sample(model, [sample])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        assert alone.std() > 0.1  # they could differ


def test_ctc_rows_packed_and_alone(model, values):
    batch = [("sound -> story", {"sound": values(i)["sound"], "story": "ab"}) for i in range(4)]
    packed = logits_by_sample(model, batch)
    assert len({len(rows) for rows in packed}) > 1
    for sample, together in zip(batch, packed, strict=True):
        torch.testing.assert_close(together, logits_by_sample(model, [sample])[0], atol=1e-5, rtol=0)


def test_permuting_samples_permutes_answers(model, batch):
    order = np.random.default_rng(0).permutation(len(batch)).tolist()
    straight = logits_by_sample(model, batch)
    permuted = logits_by_sample(model, [batch[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(permuted[place], straight[i], atol=1e-5, rtol=0)


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
    assert len({span.bidirectional < span.total for span in stream.layout.spans}) >= 1
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


SMALL = {
    "image": ImagePatches(patch=2, channels=1, position="rotary"),
    "text": TextBytes(),
    "story": TextBytes(causal=True),
    "sound": AudioFrames(rate_hz=8000, mels=4, stack=2),
    "label": Labels(("a", "b", "c")),
}


@st.composite
def mixes(draw) -> list[tuple[str, dict]]:
    """Batches of any tasks, in any order, with fields of any length and fields left out."""
    batch = []
    for _ in range(draw(st.integers(1, 5))):
        sample = {
            "image": np.full(draw(st.tuples(st.integers(2, 7), st.integers(2, 7))), draw(st.floats(0, 1)), np.float32),
            "text": draw(st.text("abé", min_size=1, max_size=6)),
            "story": draw(st.text("xyz", min_size=1, max_size=6)),
            "sound": (np.linspace(-1, 1, draw(st.integers(100, 600)), dtype=np.float32), 8000),
            "label": draw(st.sampled_from("abc")),
            "answer": draw(st.text("pq", min_size=1, max_size=3)),
        }
        task = draw(st.sampled_from(TASKS))
        reads = task.partition("->")[0].split()
        for name in reads[1:]:
            if draw(st.booleans()):
                sample[name] = None
        batch.append((task, sample))
    return batch


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=mixes())
def test_any_mix_packed_is_any_mix_alone(batch, core, lively):
    model = lively(mm.Model(SMALL, core, TASKS))
    stream = model.packer(batch)
    assert len(stream) == sum(len(model.packer([sample])) for sample in batch)
    assert sorted(s for r in stream.readings.values() for s in r.samples) == list(range(len(batch)))
    for sample, together in zip(batch, logits_by_sample(model, batch), strict=True):
        torch.testing.assert_close(together, logits_by_sample(model, [sample])[0], atol=1e-5, rtol=0)


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


def test_without_answers_nothing_is_written(tokenizers, values):
    packer = mm.packer.Packer(tokenizers, ["image text -> story", "text -> label"])
    sample = values(3)
    stream = packer([("image text -> story", sample), ("text -> label", sample)], answers=False)
    assert "story" not in stream.content
    assert all(r.target is None and r.target_lengths == () and r.lengths == (1,) for r in stream.readings.values())
    assert len(stream) == len(packer([("image text -> story", sample), ("text -> label", sample)])) - len(
        sample["story"]
    )


def test_places_run_on_from_field_to_field(tokenizers, values):
    packer = mm.packer.Packer(tokenizers, ["sound text image story -> text"])
    sample = {**values(5), "answer": "xyz"}
    stream = packer([("sound text image story -> text", sample)])
    expected, offset = [], 0.0
    for kind, value in [
        *((k, sample[k]) for k in ("sound", "text", "image", "story")),
        ("query", None),
        ("text", "xyz"),
    ]:
        if kind == "query":
            tokens, step = Tokens(torch.zeros(1), at_times(torch.zeros(1))), (1.0, 1.0, 1.0)
        else:
            tokens, step = tokenizers[kind](value), tokenizers[kind].step
        place_NA = tokens.position_NA.double() / torch.tensor(step, dtype=torch.float64)
        expected.append(place_NA + torch.tensor([offset, 0, 0], dtype=torch.float64))
        offset = round(float(expected[-1][:, 0].max()), 3) + 1
    torch.testing.assert_close(stream.position_TA.double(), torch.cat(expected), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("stack", [1, 2, 3, 4])
@pytest.mark.parametrize("hop_ms", [10.0, 16.0, 12.5])
def test_what_follows_a_sound_starts_one_step_after_it_for_every_length(stack, hop_ms):
    """Seconds divided by a step are seldom whole in float32: 14.999999 cut to 14 laid two tokens on one place."""
    sound = AudioFrames(rate_hz=8000, mels=1, hop_ms=hop_ms, stack=stack)

    class Given(mm.Tokenizer):
        """Sounds of so many tokens, without making them."""

        feature_size = 1
        step = sound.step

        def encode(self, value: int) -> Tokens:
            return Tokens(torch.zeros(value, 1), at_times(torch.arange(value) * self.step[0]))

    packer = mm.packer.Packer({"sound": Given(), "label": Labels(("a", "b"))}, ["sound -> label"])
    lengths = range(1, 200)
    stream = packer([("sound -> label", {"sound": n, "label": "a"}) for n in lengths])
    queries = stream.position_TA[stream.readings["sound -> label"].row_N, 0]
    torch.testing.assert_close(queries, torch.tensor([float(n) for n in lengths]), atol=1e-3, rtol=0)


def test_each_kind_is_embedded_once(model, batch):
    calls: dict[str, int] = {}
    for kind, module in model.embeds.items():
        module.register_forward_hook(lambda *_, kind=kind: calls.__setitem__(kind, calls.get(kind, 0) + 1))
    with torch.no_grad():
        model(model.packer(batch))
    assert calls == {"image": 1, "text": 1, "story": 1, "sound": 1}


def test_an_embed_that_loses_rows_is_named(model, batch):
    model.embeds["sound"].register_forward_hook(lambda module, content, rows: rows[1:])
    with pytest.raises(StreamError, match=r"embedded (\d+) tokens of \d+; an embed must give one row a token"):
        model(model.packer(batch))


def test_to_moves_everything_and_changes_nothing(model, batch):
    stream = model.packer(batch)
    moved = stream.to("meta")
    tensors = [*moved.content.values(), moved.order_T, moved.position_TA, *vars(moved.layout.info).values()]
    tensors += [t for r in moved.readings.values() for t in (r.row_N, r.target)]
    assert all(t.device.type == "meta" for t in tensors)
    same = stream.to("cpu")
    assert same.layout.spans == stream.layout.spans == moved.layout.spans
    assert torch.equal(same.position_TA, stream.position_TA)
    assert torch.equal(same.order_T, stream.order_T)
    for pattern, r in same.readings.items():
        assert (r.samples, r.lengths) == (stream.readings[pattern].samples, stream.readings[pattern].lengths)
        assert torch.equal(r.target, stream.readings[pattern].target)


def test_equal_shapes_lie_side_by_side(model):
    """So that they run as one batch of the fused kernel."""
    texts = ["a", "bbb", "c", "ddd", "e", "fff"]
    stream = model.packer([("text -> label", {"text": t, "label": "star"}) for t in texts])
    assert stream.layout.spans == (Span(1, 2, 1),) * 3 + (Span(3, 4, 3),) * 3
    assert stream.readings["text -> label"].samples == (0, 2, 4, 1, 3, 5)


def test_a_sample_may_go_through_a_worker(model, batch):
    import pickle

    packer = pickle.loads(pickle.dumps(model.packer))
    a, b = packer(batch), model.packer(batch)
    assert torch.equal(a.position_TA, b.position_TA)
    assert all(torch.equal(a.content[k], b.content[k]) for k in b.content)


GOOD = {
    "text": "abc",
    "label": "a",
    "image": torch.zeros(4, 4),
    "answer": "x",
    "sound": (torch.zeros(300), 8000),
    "story": "s",
}


@pytest.mark.parametrize(
    ("error", "task", "change", "message"),
    [
        (StreamError, "text -> ctc:story", {"text": "ab", "ctc": "aaab"},
         "{sample}: CTC: 4 symbols need at least 6 rows (one each, one more between equal neighbours), but the context has 2"),
        (StreamError, "text -> ctc:story", {"text": None, "ctc": "a"}, "{sample}: every field that is read is None; give at"),
        (TaskError, "image text -> label", {"image": "-"}, "task 'image text -> label': the sample has no field 'image'"),
        (TaskError, "text -> label", {"label": "-"}, "the sample has no field 'label'"),
        (TaskError, "image -> lable", {}, "there is no task 'image -> lable'"),
        (MediaError, "text -> label", {"text": 3}, "{sample}, field 'text': TextBytes.encode: wanted text (str), not int 3"),
        (MediaError, "text -> label", {"text": ""}, "{sample}, field 'text': TextBytes.encode: str '' gave no tokens"),
        (MediaError, "text -> label", {"label": "d"}, "{sample}, field 'label': Labels.encode: 'd' is not one of"),
        (StreamError, "text -> text", {"answer": None}, "{sample}: field 'answer' is None, that is not given"),
    ],
    ids=["long target", "all None, CTC", "no image", "no label", "no task", "not text", "no text", "no class", "no answer"],
)  # fmt: skip
def test_a_bad_sample_is_named(error, task, change, message):
    packer = mm.packer.Packer(
        SMALL, [*TASKS, "image text -> label", "text -> text", mm.Task("text -> ctc:story", mm.CTC())]
    )
    sample = {k: v for k, v in {**GOOD, **change}.items() if not isinstance(v, str) or v != "-"}
    with pytest.raises(error, match=re.escape(message.replace("{sample}", f"sample 1 of task {task!r}"))):
        packer([("text -> label", GOOD), (task, sample)])


def test_a_sample_whose_read_fields_are_all_none_is_refused():
    packer = mm.packer.Packer(SMALL, ["image text -> label", "text -> story"])
    nothing = {**GOOD, "image": None, "text": None}
    with pytest.raises(
        StreamError,
        match=r"sample 0 of task .*: every field that is read is None; give at least one, as Classify answers",
    ):
        packer([("image text -> label", nothing)])
    stream = packer(
        [("text -> story", nothing)]
    )  # what is written begins by itself: how guidance learns of nothing read
    assert stream.layout.spans == (Span(0, 1 + len(nothing["story"].encode()), 0),)


def test_an_empty_batch_is_refused():
    with pytest.raises(StreamError, match="Packer: the batch is empty"):
        mm.packer.Packer(SMALL, ["text -> label"])([])


@pytest.mark.parametrize(
    ("error", "tokenizers", "tasks", "message"),
    [
        (
            ConfigError,
            {"text": TextBytes},
            ["text -> text"],
            r"tokenizers\['text'\] is ABCMeta, not a Tokenizer made by its",
        ),
        (TaskError, SMALL, ["text -> label", "text -> label"], "task 'text -> label' is given twice"),
        (TaskError, SMALL, ["words -> label"], "names 'words', which no tokenizer reads or writes"),
        (TaskError, SMALL, [mm.Task("-> text", mm.CTC())], "reads nothing, and CTC answers only from what was read"),
        (ConfigError, SMALL, ["text -> image"], "ImagePatches is continuous and declares no classes"),
        (
            ConfigError,
            SMALL,
            [mm.Task("text -> image", mm.NextToken())],
            "NextToken writes symbol after symbol, which ImagePatches is not: it has no vocabulary",
        ),
    ],
    ids=["class", "twice", "unknown kind", "CTC from nothing", "no head", "wrong head"],
)
def test_a_bad_declaration_is_named(error, tokenizers, tasks, message):
    with pytest.raises(error, match=message):
        mm.packer.Packer(tokenizers, tasks)
