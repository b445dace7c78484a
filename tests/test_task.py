"""Task patterns: what they mean, and errors that point at the place."""

import inspect

import pytest

from multimodal.pattern import Pattern
from multimodal.shapes import ConfigError, TaskError

GOOD = [
    ("image -> label", [("image", "image")], ("label", "label"), "label"),
    ("image->label", [("image", "image")], ("label", "label"), "label"),
    ("  image\ttext  ->  label ", [("image", "image"), ("text", "text")], ("label", "label"), "label"),
    ("image text -> text", [("image", "image"), ("text", "text")], ("text", "text"), "answer"),
    ("text -> text", [("text", "text")], ("text", "text"), "answer"),
    ("-> text", [], ("text", "text"), "text"),
    ("->text", [], ("text", "text"), "text"),
    (
        "photo:image question:text -> answer:text",
        [("photo", "image"), ("question", "text")],
        ("answer", "text"),
        "answer",
    ),
    ("left:image right:image -> label", [("left", "image"), ("right", "image")], ("label", "label"), "label"),
    ("image -> title:text", [("image", "image")], ("title", "text"), "title"),
    ("answer:text -> text", [("answer", "text")], ("text", "text"), "text"),
    ("label:image -> label", [("label", "image")], ("label", "label"), "answer"),
    ("text answer:text -> target:text", [("text", "text"), ("answer", "text")], ("target", "text"), "target"),
    ("_a1 B:c_2 -> D9:_", [("_a1", "_a1"), ("B", "c_2")], ("D9", "_"), "D9"),
]


@pytest.mark.parametrize(("text", "reads", "writes", "answer"), GOOD, ids=[row[0] for row in GOOD])
def test_good_patterns(text: str, reads: list[tuple[str, str]], writes: tuple[str, str], answer: str) -> None:
    pattern = Pattern.parse(text)
    assert pattern.text == text
    assert [(field.name, field.kind) for field in pattern.reads] == reads
    assert (pattern.writes.name, pattern.writes.kind) == writes
    assert pattern.answer == answer
    for field in (*pattern.reads, pattern.writes):
        assert text[field.column :].startswith(field.name)


BAD = [
    """
    image label
               ^ has no '->'; write the fields that are read, '->', and the field that is written
    """,
    """
    image > label
                 ^ has no '->'
    """,
    """
    image -> text -> label
                  ^ has a second '->'; a task has one
    """,
    """
    image ->
            ^ writes nothing; name one field after '->'
    """,
    """
    image -> label text
                   ^ writes more than one field; write a task for each
    """,
    """
    image text image -> label
               ^ reads 'image' twice; name them apart, as in 'left:image right:image'
    """,
    """
    photo:image photo:text -> label
                ^ reads 'photo' twice; name them apart, as in 'left:text right:text'
    """,
    """
    text answer -> text
                   ^ writes 'text', but 'answer', where a sample would carry it, is read as well; name it apart, as in 'target:text'
    """,
    """
    answer -> answer
              ^ writes 'answer', but 'answer', where a sample would carry it, is read as well
    """,
    """
    image, text -> label
         ^ has ',' here; fields are words, or name:kind, with blanks between
    """,
    """
    image --> label
          ^ has '-' where a field's name was wanted (letters, digits, underscore)
    """,
    """
    image => label -> text
          ^ has '=' where a field's name was wanted
    """,
    """
    2images -> label
    ^ has '2' where a field's name was wanted
    """,
    """
    photo: -> label
          ^ has ' ' where a field's name was wanted
    """,
    """
    image -> photo:
                   ^ has nothing where a field's name was wanted
    """,
    """
    :image -> label
    ^ has ':' where a field's name was wanted
    """,
    """
    a:b:c -> label
       ^ has ':' here; fields are words, or name:kind, with blanks between
    """,
    """
    bild ä -> label
         ^ has 'ä' where a field's name was wanted
    """,
]


@pytest.mark.parametrize("drawing", BAD, ids=range(len(BAD)))
def test_errors_point_at_the_place(drawing: str) -> None:
    text, mark = inspect.cleandoc(drawing).split("\n")
    caret, problem = mark[: mark.index("^") + 1], mark[mark.index("^") + 2 :]
    with pytest.raises(TaskError) as raised:
        Pattern.parse(text)
    first, shown, pointer = str(raised.value).split("\n")
    assert first.startswith(f"task {text!r} {problem}")
    assert (shown, pointer) == ("    " + text, "    " + caret)


def test_errors_at_blank_patterns() -> None:
    with pytest.raises(TaskError, match=r"^task '' has no '->'.*\n    \n    \^$"):
        Pattern.parse("")
    with pytest.raises(TaskError, match=r"^task '->' writes nothing; .*\n    ->\n      \^$"):
        Pattern.parse("->")


@pytest.mark.parametrize(
    ("value", "came"), [(None, "NoneType None"), (7, "int 7"), (b"a -> b", "bytes b'a -> b'"), (["a"], r"list \['a'\]")]
)
def test_not_a_text(value: object, came: str) -> None:
    with pytest.raises(TaskError, match=f"^a task is a text such as 'image -> label', not {came}$"):
        Pattern.parse(value)  # type: ignore[arg-type]


def test_unknown_kinds() -> None:
    known = {"image": None, "text": None}
    Pattern.parse("photo:image image -> text").check_kinds(known)
    with pytest.raises(TaskError) as raised:
        Pattern.parse("image question:txt -> text").check_kinds(known)
    assert str(raised.value) == (
        "task 'image question:txt -> text' names 'txt', which no tokenizer reads or writes; "
        "there are 'image', 'text'; did you mean 'text'?\n"
        "    image question:txt -> text\n"
        "          ^"
    )
    with pytest.raises(TaskError) as raised:
        Pattern.parse("image -> depth_map").check_kinds(known)
    assert str(raised.value).endswith("there are 'image', 'text'\n    image -> depth_map\n             ^")
    assert issubclass(TaskError, ConfigError)


def test_samples_that_fit() -> None:
    pattern = Pattern.parse("image text -> text")
    pattern.check_sample({"image": 1, "text": 2, "answer": 3, "more": 4}, answer=True)
    pattern.check_sample({"image": 1, "text": 2}, answer=False)
    pattern.check_sample({"image": None, "text": 2}, answer=False)  # left out on purpose
    Pattern.parse("-> text").check_sample({}, answer=False)


LACKING = [
    (
        "image -> label",
        {"label": 1},
        False,
        "no field 'image'; it has 'label'; give None for a field that this sample lacks",
    ),
    (
        "image -> label",
        {"image": 1},
        True,
        "no field 'label'; it has 'image'; give None for a field that this sample lacks",
    ),
    (
        "image -> label",
        {"image": 1, "labels": 2},
        True,
        "no field 'label'; it has 'image', 'labels'; rename 'labels' to 'label'",
    ),
    (
        "text -> text",
        {"text": "a"},
        True,
        "no field 'answer'; it has 'text'; give None for a field that this sample lacks",
    ),
    ("photo:image -> label", {"image": 1}, False, "no field 'photo'; it has 'image'; give None"),
    ("image -> label", {}, False, "no field 'image'; it has none; give None"),
    ("image -> label", {0: 1}, False, "no field 'image'; it has 0; give None"),
]


@pytest.mark.parametrize(("text", "sample", "answer", "message"), LACKING, ids=range(len(LACKING)))
def test_samples_that_lack_a_field(text: str, sample: dict, answer: bool, message: str) -> None:
    with pytest.raises(TaskError) as raised:
        Pattern.parse(text).check_sample(sample, answer)
    assert str(raised.value).startswith(f"task {text!r}: the sample has {message}")


@pytest.mark.parametrize(("sample", "came"), [((1, 2), "tuple"), (None, "NoneType"), ("image", "str")])
def test_samples_that_are_no_mapping(sample: object, came: str) -> None:
    with pytest.raises(
        TaskError, match=f"^task 'image -> label': a sample is a mapping of fields, not {came}; write {{'image': ..}}$"
    ):
        Pattern.parse("image -> label").check_sample(sample, answer=False)  # type: ignore[arg-type]
