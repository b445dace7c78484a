"""Packed streams: what lies where, and that packing changes nothing: neither answers nor gradients."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import multimodal as mm
from multimodal.attention import Span
from multimodal.shapes import ConfigError, StreamError, TaskError
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


def test_permuting_samples_permutes_answers(model, batch):
    order = np.random.default_rng(0).permutation(len(batch)).tolist()
    straight = logits_by_sample(model, batch)
    permuted = logits_by_sample(model, [batch[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(permuted[place], straight[i], atol=1e-5, rtol=0)


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
    tensors = [*moved.content.values(), moved.order_T, moved.position_TA, *moved.layout.info.numbers]
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


def test_a_sample_whose_read_fields_are_all_none_is_refused():
    packer = mm.packer.Packer(SMALL, ["image text -> label", "text -> story"])
    nothing = {**GOOD, "image": None, "text": None}
    with pytest.raises(
        StreamError,
        match=r"sample 0 of task .*: every field that is read is None; give at least one, as Classify answers",
    ):
        packer([("image text -> label", nothing)])
    # what is written begins by itself: how guidance learns of nothing read
    stream = packer([("text -> story", nothing)])
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
