"""Fields that take a list of values: "image* text -> label"."""

from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch

import multimodal as mm
from multimodal.check import verify
from multimodal.cli.arguments import samples_from
from multimodal.composite import Several
from multimodal.pattern import Pattern
from multimodal.serve.chat import _fits
from multimodal.serve.tasks import task_views
from multimodal_tokenizers import ImagePatches, Labels, Record, TextBytes

_random = np.random.default_rng(0)
PICTURES = [_random.random((8, 4 * n), dtype=np.float32) for n in (1, 2, 3)]
TASK = "image* text -> label"
TASKS = {
    TASK: [
        {"image": PICTURES[:n], "text": t, "label": "x"} for n, t in ((0, "none"), (1, "one"), (2, "two"), (3, "three"))
    ],
    "text* -> text": [{"text": t, "answer": "b"} for t in (["ab", "c"], ["a", "bc"], ["abc"], ["a", "b", "c"])],
    "page* -> label": [
        {"page": [{"picture": PICTURES[i], "caption": c} for i, c in enumerate(captions)], "label": "y"}
        for captions in (("a",), ("a", "b"), ("ab", None, "c"))
    ],
    "left:image* <-> text": [{"left": PICTURES[:n], "text": "a" * n} for n in (1, 2, 3)],
}
KINDS = {
    "image": ImagePatches(patch=4, channels=1),
    "text": TextBytes(),
    "page": Record(picture="image", caption="text"),
    "label": Labels(("x", "y")),
}


@pytest.fixture(scope="module")
def model():
    model = mm.Model(KINDS, mm.Core(width=32, depth=2, heads=2), list(TASKS))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def test_a_star_is_part_of_the_pattern():
    found = Pattern.parse("photos:image* text -> label")
    assert [(field.name, field.kind, field.many) for field in found.fields] == [
        ("photos", "image", True),
        ("text", "text", False),
        ("label", "label", False),
    ]


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("image* -> label*", 15, "writes a list, but an answer is one value"),
        ("image** -> label", 6, "has '*' here; fields are words, or name:kind, and a star behind it for a list"),
        ("image*text -> label", 6, "has 't' here; fields are words, or name:kind, and a star behind it for a list"),
        ("image *text -> label", 6, "a star stands directly behind a field, as in 'image*'"),
        ("image*:text -> label", 6, "has ':' here"),
        ("image* image -> label", 7, "reads 'image' twice"),
    ],
)
def test_a_misplaced_star_is_marked(text, column, said):
    with pytest.raises(mm.TaskError) as error:
        Pattern.parse(text)
    message, shown, mark = str(error.value).splitlines()
    assert said in message
    assert shown.strip() == text
    assert len(mark) - len("    ^") == column


def test_values_of_a_list_are_fields_with_one_step_of_time_between_them(model):
    stream = model.pack(TASK, [TASKS[TASK][2]])
    assert stream.layout.info.segment.tolist() == [0] * 2 + [1] * 4 + [2] * 3 + [3]
    # a picture takes one step, a step is left free, and the text begins at the next one
    assert stream.position_TA[:, 0].tolist() == [0.0] * 2 + [2.0] * 4 + [3.0, 4.0, 5.0, 6.0]
    empty = model.pack(TASK, [TASKS[TASK][0]])
    absent = model.pack(TASK, [{**TASKS[TASK][0], "image": None}])
    assert torch.equal(empty.position_TA, absent.position_TA)
    assert "image" not in empty.content


def test_one_value_is_what_a_field_of_one_value_is(model):
    plain = mm.Model(KINDS, mm.Core(width=32, depth=2, heads=2), ["image text -> label"]).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    sample = {"image": PICTURES[1], "text": "one"}
    ours = model.predict(TASK, [{**sample, "image": [PICTURES[1]]}])[0]
    assert ours == plain.predict("image text -> label", [sample])[0]


def test_where_one_value_ends_is_seen(model):
    logits = [
        model.generate("text* -> text", [{"text": x}], max_tokens=1)[0].confidence for x in (["ab", "c"], ["a", "bc"])
    ]
    assert abs(logits[0] - logits[1]) > 1e-4


@pytest.fixture(scope="module")
def found(model):
    return verify(model, TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_packed_alone_cached_and_without_gradient_to_others(task, found):
    mine = [row for row in found.rows if row.subject.startswith(task)]
    assert {"packed", "mixed", "dense", "gradient"} <= {row.check for row in mine}
    assert [str(row) for row in mine if not row.passed] == []


def test_samples_are_invented_for_lists_too(model):
    found = verify(model)
    assert found.passed, str(found)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (
            {"image": "a.png", "text": "a"},
            "field 'image': 'image*' takes a list of values, also an empty one, not str 'a.png'",
        ),
        ({"image": PICTURES[0], "text": "a"}, "takes a list of values, also an empty one, not ndarray (8, 4) float32"),
        ({"image": [PICTURES[0], "no.png"], "text": "a"}, "field 'image[1]': ImagePatches"),
    ],
)
def test_what_is_no_list_is_refused(model, sample, said):
    with pytest.raises(mm.MediaError) as error:
        model.predict(TASK, [sample])
    assert said in str(error.value)


def test_a_list_with_nothing_else_needs_a_value(model):
    with pytest.raises(mm.StreamError, match="every field that is read is None or an empty list"):
        model.predict("page* -> label", page=[])
    with pytest.raises(mm.TaskError, match="hides parts of one value"):
        mm.Model(KINDS, mm.Core.tiny(), [mm.Task("image* -> image", mm.Masked(0.5))])
    with pytest.raises(mm.ConfigError, match="'image' takes a list of any number of values"):
        model.export("pt2", "nowhere", task=TASK)


def test_it_trains_and_predicts_by_keywords(model):
    import copy

    mine = copy.deepcopy(model)
    before = float(mine.loss(mine.pack(TASK, TASKS[TASK])).detach())
    mm.fit(mine, {TASK: TASKS[TASK]}, steps=10, batch=4, lr=3e-3, device="cpu", precision="float32", quiet=True)
    assert float(mine.loss(mine.pack(TASK, TASKS[TASK])).detach()) < before
    assert mine.predict(TASK, image=PICTURES, text="a") == mine.predict(TASK, [{"image": PICTURES, "text": "a"}])[0]
    prefix = mine.packer.encoded(TASK, TASKS[TASK][3], "sample").tokens["image"]
    assert isinstance(prefix, Several)
    assert mine.predict(TASK, image=prefix, text="a") == mine.predict(TASK, image=PICTURES, text="a")


def test_the_command_line_takes_several_values_as_one_list(model, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    assert samples_from(model, TASK, {"image": paths, "text": ["a", "b"]}) == [
        {"image": paths, "text": "a"},
        {"image": paths, "text": "b"},
    ]
    assert samples_from(model, TASK, {"text": ["a"]}, ["image"]) == [{"text": "a", "image": None}]


def test_the_chat_of_the_service_gives_a_list_the_rest_of_its_form():
    views = task_views(
        mm.Model(KINDS, mm.Core.tiny(), ["first:image image* text -> answer:text", "image* last:image -> text"])
    )
    one, other = views.values()
    for images, fits in ((0, False), (1, True), (3, True)):
        assert _fits(one, Counter(picture=images, text=1)) is fits
    assert not _fits(one, Counter(picture=2, text=2))
    assert not _fits(other, Counter(picture=2))  # nobody can say which picture is the last
    assert one.reads[1].json()["list"] is True


def test_the_xray_shows_each_value(model, tmp_path):
    ray = mm.look.xray(model, TASK, {"image": PICTURES[:2], "text": "a"})
    assert [field.name for field in ray.reads] == ["image[0]", "image[1]", "text"]
    ray.page(tmp_path / "page.html")
    states = mm.look.states(model, TASK, TASKS[TASK]) if hasattr(mm.look, "states") else None
    if states is not None:
        counts = Counter(states.field_T.tolist())
        assert counts[0] == 2 + (2 + 4) + (2 + 4 + 6)
