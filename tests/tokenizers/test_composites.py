"""Composites: a value made of parts of other kinds, which passes all checks of a plain kind, read and written."""

import base64
import copy
import io
import json
import pickle
from dataclasses import dataclass

import numpy as np
import PIL.Image
import pytest
import torch

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.check.measure import sample_gradients
from multimodal.cli.arguments import value_from
from multimodal.composite import Composed, Written
from multimodal.serve.errors import ApiError
from multimodal.serve.settings import Settings
from multimodal.serve.values import encoded
from multimodal.tokenizer import Places
from multimodal_tokenizers import Features, Ids, ImagePatches, Joint, Labels, Record, Sequence, TextBPE, TextBytes

_random = np.random.default_rng(0)


def grey(rows: int, columns: int) -> np.ndarray:
    return _random.random((rows, columns), dtype=np.float32)


def page(columns: int, caption: str | None, **more):
    return {"picture": grey(8, columns), "caption": caption, **more}


PICTURE = ImagePatches(patch=4, channels=1)
PAGE = Record(picture=PICTURE, caption=TextBytes())
PAGES = [page(8, "a bird"), page(4, "two birds é"), page(8, None), {"caption": "nothing"}]
ALBUM = Sequence(of=PAGE)
ALBUMS = [PAGES[:2], PAGES[2:], [PAGES[0]] * 3]
ROW = Record(name=TextBytes(), kind=Labels(("cat", "dog")), words=Sequence(of=TextBytes()))
ROWS = [
    {"name": "tom", "kind": "cat", "words": ["grey", "quick"]},
    {"name": "", "kind": "dog", "words": []},
    {"kind": "dog", "words": ["grey", "", "q"]},
    {"words": ["gre", "yquick"], "name": "tom"},
]
NOTES = Joint(pitch=Ids(128), strength=Features(2))
PLAYED = [
    {"pitch": _random.integers(0, 128, n), "strength": _random.random((n, 2), dtype=np.float32)} for n in (5, 8, 6)
]


@dataclass(frozen=True)
class Neighbours(mm.Tokenizer):
    """Features whose embedding depends on the whole value."""

    feature_size = 2

    def encode(self, value):
        value = np.asarray(value, np.float32)
        return mm.Tokens(torch.from_numpy(value.reshape(-1, 2)).clone(), self.places(len(value)))

    def embed(self, width):
        return _Neighbours(width)


class _Neighbours(torch.nn.Module):
    reads_places = True

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(2, width)

    def forward(self, content, places):
        rows = [part + part.mean(0) for part in content.split(list(places.lengths))]
        return self.linear(torch.cat(rows))


CONVOLVED = Record(numbers=Neighbours(), again=Sequence(of=Neighbours()))
CONVOLVED_VALUES = [
    {"numbers": [[1, 2], [3, 4], [5, 6]], "again": [[[1, 1]], [[0, 2], [2, 0]]]},
    {"numbers": [[4, 2]]},
    {"again": [[[3, 2], [1, 0]]]},
]
EXPECTED = {Written: {"wrong_type_refused": "its errors name the composite, which is what users know"}}
NAMING = Record(figure=Record(name="text", kind=Labels(("u", "v"))), caption="text").bind({"text": TextBytes()})
NAMING_VALUES = [{"figure": {"name": a, "kind": b}, "caption": c} for a, b, c in (("ab", "u", "cde"), ("z", "v", "c"))]
CHECKED = [
    (PAGE, PAGES),
    (ROW, ROWS),
    (ROW.written, ROWS),
    (Sequence(of=TextBytes(), causal=True), [["ab", "c"], ["a", "bc"], ["abc"]]),
    (NOTES, PLAYED),
    (CONVOLVED, CONVOLVED_VALUES),
    (NAMING, NAMING_VALUES),
]
LONG = "nothing_lost"  # of lists it encodes many lists of 1,500 elements, for which one composite is enough


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{type(tokenizer).__name__}{i}-{check}")
        for i, (tokenizer, values) in enumerate(CHECKED)
        for check in tokenizer_checks(tokenizer, values, expected_failures=EXPECTED.get(type(tokenizer)))
        if str(check) != LONG or i in (0, 4)
    ],
)
def test_composite_passes(check):
    check()


LABEL = Labels(("x", "y"))


def perturbed(model: mm.Model) -> mm.Model:
    """With weights as large as in a trained model, so that differences show."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def named(tokens: Composed) -> list[str]:
    return [run.path for run in tokens.runs]


def test_a_composite_computes_what_its_parts_compute_as_fields_with_marks_between():
    composite = perturbed(mm.Model({"page": PAGE, "label": LABEL}, mm.Core.tiny(), ["page -> label"]))
    kinds = {"mark": Ids(2), "picture": PICTURE, "caption": TextBytes(), "label": LABEL}
    task = "a:mark picture b:mark caption -> label"
    fields = mm.Model(kinds, mm.Core.tiny(), [task]).eval()
    weights = {
        name.replace("embeds.page._marks", "embeds.mark").replace("embeds.page.", "embeds."): x
        for name, x in composite.state_dict().items()
    }
    fields.load_state_dict(weights)
    for value in PAGES:
        there = {name: value.get(name) is not None for name in ("picture", "caption")}
        sample = {
            **{name: value.get(name) for name in there},
            "a": [0] if there["picture"] else None,
            "b": [1] if there["caption"] else None,
        }
        (one,) = composite.logits(composite.pack("page -> label", [{"page": value}], answers=False)).values()
        (other,) = fields.logits(fields.pack(task, [sample], answers=False)).values()
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_runs_are_segments_with_one_number_and_the_flag_of_the_composite():
    nested = Sequence(of="page", causal=True)
    kinds = {"page": PAGE, "album": nested, "text": TextBytes(), "label": LABEL}
    model = mm.Model(kinds, mm.Core.tiny(), ["album text -> label"])
    stream = model.pack("album text -> label", [{"album": PAGES[:2], "text": "hi", "label": "x"}])
    lengths = [1, 1, 4, 1, 6, 1, 1, 2, 1, len("two birds é".encode())]
    assert named(model.packer.tokenizers["album"](PAGES[:2])) == [
        *("", "of", "of.picture", "of", "of.caption", "", "of", "of.picture", "of", "of.caption")
    ]
    info = stream.layout.info
    assert info.segment.tolist() == [0] * sum(lengths) + [1, 1, 2]
    assert info.bidirectional.tolist() == [0] * sum(lengths) + [1, 1, 0]
    # time goes on: a picture takes one step, a text one for each byte
    wanted, time = [], 0
    for i, count in enumerate(lengths):
        wanted += [time] * count if i in (2, 7) else list(range(time, time + count))
        time = wanted[-1] + 1
    assert stream.position_TA[:, 0].tolist() == [*map(float, [*wanted, time, time + 1, time + 2])]
    # "of" names the kind "page", so that its weights embed the tokens
    assert {kind: len(x) for kind, x in stream.content.items()} == {
        "album": 2,
        "page": 4,
        "page.picture": 6,
        "page.caption": 6 + lengths[-1],
        "text": 2,
        "head:label_Classify": 1,
    }


TASKS = {
    "page text -> label": [
        {"page": v, "text": t, "label": "x"} for v, t in zip(PAGES, ["a", "bc", "d", "e"], strict=True)
    ],
    "album -> text": [{"album": v, "text": t} for v, t in zip(ALBUMS, ("one", "two", ""), strict=True)],
    "text -> row": [{"text": t, "row": v} for t, v in zip(("a", "bc", "d", "e"), ROWS, strict=True)],
    "seen:row -> row": [{"seen": v, "row": v} for v in ROWS],
    "clip -> label": [{"clip": v, "label": "y"} for v in CONVOLVED_VALUES],
    "notes -> label": [{"notes": v, "label": "y"} for v in PLAYED],
}


def whole_model() -> mm.Model:
    eye = mm.Tower(PICTURE, mm.Core(width=16, depth=1, heads=2))
    kinds = {
        "page": Record(picture=eye, caption="text"),
        "album": Sequence(of="page"),
        "text": TextBytes(),
        "row": Record(name="text", kind=Labels(("cat", "dog")), words=Sequence(of="text")),
        "clip": CONVOLVED,
        "notes": NOTES,
        "label": LABEL,
    }
    return perturbed(mm.Model(kinds, mm.Core(width=32, depth=2, heads=2), list(TASKS)))


@pytest.fixture(scope="module")
def found():
    return verify(whole_model(), TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_packed_alone_cached_and_without_gradient_to_others(task, found):
    model = whole_model()
    mine = [row for row in found.rows if row.subject.startswith(task)]
    checks = {row.check for row in mine}
    assert {"packed", "mixed", "dense", "answers", "gradient"} <= checks
    assert ("cached" in checks) == model.packer.heads[task].autoregressive
    assert [str(row) for row in mine if not row.passed] == []


def test_a_gradient_reaches_every_part_of_its_own_sample():
    model = whole_model().train()
    stream = model.pack("page text -> label", TASKS["page text -> label"])
    for _, by_kind in sample_gradients(model, stream):
        assert all(others == 0 for _, others in by_kind.values())
    first = next(iter(sample_gradients(model, stream)))[1]
    assert first["page"][0] > 0
    assert first["page.picture"][0] > 0
    assert first["text"][0] > 0  # the caption, and the field


def test_a_part_that_reads_places_gets_those_of_its_own_values():
    model = mm.Model({"clip": CONVOLVED, "label": LABEL}, mm.Core.tiny(), ["clip -> label"])
    stream = model.pack("clip -> label", [{"clip": v, "label": "x"} for v in CONVOLVED_VALUES])
    assert sorted(stream.places["clip.numbers"].lengths) == [1, 3]
    assert sorted(stream.places["clip.again.of"].lengths) == [1, 2, 2]


def test_what_is_learned_is_written_again_exactly():
    kinds = {"text": TextBytes(), "row": Record(name="text", kind=Labels(("cat", "dog")), words=Sequence(of="text"))}
    model = mm.Model(kinds, mm.Core(width=32, depth=2, heads=2), ["text -> row"])
    samples = TASKS["text -> row"][:2]
    mm.fit(model, {"text -> row": samples}, steps=60, batch=2, lr=1e-2, device="cpu", precision="float32", quiet=True)
    assert mm.evaluate(model, "text -> row", samples)["exact"] == 1.0
    answer = model.predict("text -> row", text="a")
    assert answer.value == {"name": "tom", "kind": "cat", "words": ["grey", "quick"]}
    # ids of another part than the mark before them says are left out
    written = model.packer.answer_tokenizers["text -> row"]
    ids = written.ranges
    assert list(ids) == ["", "text", ".kind", ".words"]
    odd = [ids["text"][65], ids[""][0], ids[".kind"][1], ids["text"][66], ids[""][1], ids["text"][0]]
    assert written.decode(mm.Tokens(torch.tensor(odd), written.places(6))) == {"name": "B", "kind": None, "words": None}


def test_what_is_written_is_embedded_as_the_parts_are_where_they_are_read():
    model = whole_model()
    written = model.packer.answer_tokenizers["text -> row"]
    ids = torch.arange(written.vocab_size)
    tables = {"": "row._marks", "text": "text", ".kind": "row.kind", ".words": "row.words._marks"}
    wanted = torch.cat([model.embeds.get_submodule(tables[at]).weight for at in written.ranges])
    torch.testing.assert_close(model.embed("row", ids), wanted, atol=0, rtol=0)


def test_a_checkpoint_gives_each_part_its_own_files(tmp_path):
    words = ["good day", "bad night", "what?"]
    one, other = TextBPE.train(words * 5, vocab_size=270), TextBPE.train(["xyz zyx"] * 9, vocab_size=262)
    record = Record(
        a=one, d=other, more=Sequence(of=Record(b=other)), c="text", joint=Joint(pitch=Ids(9), again=Ids(4))
    )
    model = mm.Model({"rec": record, "text": one, "label": LABEL}, mm.Core.tiny(), ["rec -> label"]).eval()
    loaded = mm.Model.load(model.save(tmp_path / "model"))
    value = {
        "a": "good day",
        "d": "xyz",
        "more": [{"b": "xyz"}],
        "c": "what?",
        "joint": {"pitch": [1, 2], "again": [3, 0]},
    }
    assert loaded.packer.tokenizers == model.packer.tokenizers
    assert loaded.predict("rec -> label", rec=value) == model.predict("rec -> label", rec=value)
    assert sorted({name.split("/")[0] for name in record.files()}) == ["0", "1", "2"]
    more = loaded.extended({"album": Sequence(of="rec")}, ["album -> label"])
    assert more.predict("album -> label", album=[value]).value in ("x", "y")
    again = pickle.loads(pickle.dumps(model.packer.tokenizers["rec"]))
    assert named(again(value)) == named(model.packer.tokenizers["rec"](value))
    assert copy.deepcopy(record) == record


def test_the_embeddings_of_a_joint_token_are_summed():
    module = NOTES.embed(32)
    tokens = NOTES(PLAYED[0])
    ids, features = (part(PLAYED[0][name]).content for name, part in NOTES.entries)
    wanted = module["pitch"](ids) + module["strength"](features)
    torch.testing.assert_close(module(tokens.content), wanted, atol=0, rtol=0)
    assert not NOTES.decodes
    chord = Joint(low=Ids(9), high=Ids(128))
    back = chord.decode(chord({"low": [1, 8], "high": [127, 0]}))
    assert {name: list(x) for name, x in back.items()} == {"low": [1, 8], "high": [127, 0]}
    places = Places.of([tokens], NOTES.step)
    both = Joint(a=Neighbours(), b=Neighbours()).embed(8)
    assert both.reads_places
    assert both(torch.cat([features, features], 1), places).shape == (5, 8)


def model_of(**kinds) -> mm.Model:
    return mm.Model({"text": TextBytes(), "label": LABEL, **kinds}, mm.Core.tiny(), [f"{next(iter(kinds))} -> label"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Record(), "Record: there are no entries; give one or more, as Record(caption=TextBytes())"),
        (
            lambda: Record(a=TextBytes),
            "Record: a=TextBytes is no Tokenizer; call it; give one such as TextBytes(), or the name",
        ),
        (lambda: Record(items=TextBytes()), "Record: an entry cannot be named 'items'"),
        (lambda: Record([("a", "text"), ("a", "text")]), "Record: the entry 'a' is given twice"),
        (lambda: Sequence(of=7), "Sequence: of=7 is no Tokenizer"),
        (
            lambda: Joint(a=PAGE),
            "Joint: a=Record has tokens of several parts, which cannot be added to others; use Record",
        ),
        (lambda: Joint(a="text"), "Joint: a='text' is no Tokenizer"),
        (
            lambda: model_of(page=Record(a="texts")),
            "names the kind 'texts', which is not there; there are 'text', 'label', 'page'",
        ),
        (
            lambda: model_of(page=Record(a="page")),
            "Record: part 'a' names the kind 'page', which it is itself a part of",
        ),
        (
            lambda: model_of(page=Sequence(of="album"), album=Sequence(of="page")),
            "names the kind 'page', which it is itself a part of",
        ),
        (
            lambda: mm.Model({"page": PAGE, "text": TextBytes()}, mm.Core.tiny(), ["text -> page"]),
            "Record can be read but not written, because its part 'picture' (ImagePatches) is not discrete",
        ),
        (lambda: Record(a="text")({"a": "hi"}), "model.packer.tokenizers"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(make, said):
    with pytest.raises(mm.ConfigError) as error:
        make()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("tokenizer", "value", "said"),
    [
        (PAGE, {"caption": 7}, "Record.encode: piece 0 (caption): TextBytes.encode:"),
        (
            PAGE,
            {"captoin": "a"},
            "Record.encode: there is no entry 'captoin'; there are picture, caption; did you mean 'caption'?",
        ),
        (PAGE, {"caption": None}, "gave no tokens"),
        (PAGE, ["a"], "Record.encode: wanted a mapping of picture, caption, not list"),
        (ALBUM, "text", "Sequence.encode: wanted a list of values, not str 'text'"),
        (
            ALBUM,
            [{"caption": "a"}, {"caption": 7}],
            "Sequence.encode: piece 1 (of): Record.encode: piece 0 (caption): TextBytes.encode:",
        ),
        (NOTES, {"pitch": [1, 2], "strength": np.eye(3, 2)}, "the numbers of tokens differ: pitch 2, strength 3"),
        (NOTES, {"pitch": [1, 2]}, "Joint.encode: wanted a mapping of pitch, strength, not dict"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(tokenizer, value, said):
    with pytest.raises(mm.MediaError) as error:
        tokenizer(value)
    assert said in str(error.value)


def test_a_program_of_composites_is_refused_by_name(tmp_path):
    model = mm.Model({"page": PAGE, "label": LABEL}, mm.Core.tiny(), ["page -> label"])
    with pytest.raises(mm.ConfigError, match=r"'page' .Record. has tokens of several parts"):
        model.export("pt2", tmp_path / "out", task="page -> label")


def test_the_xray_names_tokens_by_their_parts():
    model = whole_model()
    ray = mm.look.xray(model, "page text -> label", {"page": PAGES[1], "text": "q"})
    (field, _) = ray.reads
    assert field.labels[0] == "<picture>"
    assert field.labels[3:6] == ("<caption>", "caption: t", "caption: w")
    written = mm.look.xray(model, "text -> row", {"text": "a"}, answer=ROWS[1])
    assert written.written.labels[:4] == ("<name>", "<kind>", "dog", "<words>")


def test_the_service_reads_each_part_as_a_field_of_its_kind():
    settings = Settings()
    record = whole_model().packer.tokenizers["page"]
    png = io.BytesIO()
    PIL.Image.fromarray((PAGES[0]["picture"] * 255).astype(np.uint8)).save(png, "png")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    tokens = encoded(record, "page", {"picture": url, "caption": "a bird"}, "page", settings)
    local = record({"picture": PIL.Image.open(png), "caption": "a bird"})
    assert torch.equal(tokens.content, local.content)
    with pytest.raises(ApiError, match=r"page\.picture: 'a\.png' is no data:"):
        encoded(record, "page", {"picture": "a.png", "caption": "a bird"}, "page", settings)
    with pytest.raises(ApiError, match="wanted a mapping of picture, caption"):
        encoded(record, "page", "a.png", "page", settings)


def test_the_command_line_reads_a_composite_as_json(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    text = json.dumps({"picture": str(path), "caption": "a bird"})
    assert named(PAGE(value_from(PAGE, text, "--page"))) == ["", "picture", "", "caption"]
    (tmp_path / "page.json").write_text(text)
    assert value_from(PAGE, str(tmp_path / "page.json"), "--page") == json.loads(text)
    with pytest.raises(mm.MediaError, match=r"--page: Record.encode: there is no entry 'title'"):
        value_from(PAGE, '{"title": "a"}', "--page")


@pytest.mark.parametrize(("of", "rows"), [("page.caption", [8, 9]), ("page", [1, 2, 3, 4, 5, 6, 8, 9])])
def test_rows_of_one_part_are_answered_and_marks_never(of, rows):
    model = mm.Model(
        {
            "page": Record(picture=ImagePatches(patch=4, channels=1), caption="text"),
            "text": TextBytes(),
            "tags": Labels(("a", "b")),
        },
        mm.Core.tiny(),
        [mm.Task("page -> tags", mm.EachRow(of=of))],
    )
    page = {"picture": torch.zeros(1, 8, 12), "caption": "hi"}  # a mark, 6 patches, a mark, 2 bytes
    tags = ["a", "b"] * (len(rows) // 2)
    stream = model.pack("page -> tags", [{"page": page, "tags": tags}])
    assert stream.readings["page -> tags"].row_N.tolist() == rows
    assert len(model.predict("page -> tags", page=page).value) == len(rows)
    assert verify(model).passed
