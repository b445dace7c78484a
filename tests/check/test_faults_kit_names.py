"""Names, beginnings, moved classes, names of tokens, and what help() says."""

import dataclasses
import importlib.metadata
import inspect
import json
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal import declare
from multimodal.cli.commands import app, main
from multimodal_tokenizers import Codes, Features, ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class Numbers(mm.Tokenizer):
    """A list of whole numbers below 10, one token each."""

    vocab_size = 10

    def encode(self, value):
        if type(value) is not list or not value:
            raise mm.MediaError(f"Numbers.encode: {value!r} is no list of numbers")
        return mm.Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens):
        return tokens.content.tolist()


TINY = mm.Core(width=16, depth=1, heads=2)


# 37: beginnings


@pytest.fixture(scope="module")
def writer():
    draw = np.random.default_rng(0)
    pictures = [draw.random((8, 8), dtype=np.float32) for _ in range(4)]
    codes = Codes.train(ImagePatches(patch=4, channels=1, size=(8, 8)), pictures, 4, quiet=True)
    kinds = {"numbers": Numbers(), "text": TextBytes(), "codes": codes, "label": Labels(("a", "b"))}
    tasks = ["text -> numbers", "text -> codes", "text -> answer:text", "text -> label"]
    return mm.Model(kinds, TINY, tasks).eval(), pictures


def test_fault_37_every_kind_may_begin_each_sample_in_its_own_way(writer):
    model, pictures = writer
    samples = [{"text": "a"}, {"text": "b"}]
    task = "text -> numbers"
    both = model.generate(task, samples, begins=[[3, 1], None], max_tokens=3)
    alone = [
        model.generate(task, [samples[0]], begin=[3, 1], max_tokens=3)[0],
        model.generate(task, text="b", max_tokens=3),
    ]
    assert [answer.value for answer in both] == [answer.value for answer in alone]
    assert both[0].value[:2] == [3, 1]
    same = model.generate(task, samples, begin=[3, 1], max_tokens=3)  # one value, though as long as the list of samples
    assert [answer.value[:2] for answer in same] == [[3, 1], [3, 1]]
    upper = [picture[:4] for picture in pictures[:2]]
    drawn = model.generate("text -> codes", samples, begins=upper)
    codes = model.packer.tokenizers["codes"]
    assert [a.tokens.content[:2].tolist() for a in drawn] == [codes(half).content.tolist() for half in upper]
    last = {piece.ticket: piece.prediction for piece in model.stream(task, samples, begins=[[7], [8, 2]], max_tokens=2)}
    assert [last[0].value[:1], last[1].value[:2]] == [[7], [8, 2]]


def test_fault_37a_beginnings_that_do_not_fit_the_samples_are_refused(writer):
    model, _ = writer
    samples = [{"text": "a"}, {"text": "b"}]
    for begins, problem in (
        ([[1]], "begins has 1 values for 2 samples; give one for each"),
        ("ab", "begins=str 'ab' is no list"),
        ({0: [1], 1: [2]}, "begins=dict .* is no list"),
    ):
        with pytest.raises(mm.ConfigError, match=problem):
            model.generate("text -> numbers", samples, begins=begins)
    with pytest.raises(mm.ConfigError, match="give begin, for every sample, or begins"):
        model.generate("text -> numbers", samples, begin=[1], begins=[[1], [2]])
    with pytest.raises(mm.ConfigError, match="Classify answers at once, so begins has no meaning"):
        model.generate("text -> label", samples, begins=["a", "b"])
    texts = model.generate("text -> answer:text", samples, begin=["x", "y"], max_tokens=1)  # no text is a list
    assert [answer.value[0] for answer in texts] == ["x", "y"]


# 38: classes that moved


def test_fault_38_a_class_that_moved_is_found_by_the_name_that_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(declare, "_defined", dict(declare._defined))
    model = mm.Model({"numbers": Numbers()}, TINY, ["numbers -> target:numbers"])
    model.save(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    old = f"{Numbers.__module__}:Numbers"
    config.write_text(config.read_text(encoding="utf-8").replace(old, "gone.away:Numbers"), encoding="utf-8")
    with pytest.raises(mm.CheckpointError, match=r"mm\.alias\('gone\.away:Numbers', NewClass\)"):
        mm.Model.load(tmp_path / "m")
    mm.alias("gone.away:Numbers", Numbers)
    again = mm.Model.load(tmp_path / "m")
    assert again.packer.tokenizers["numbers"] == Numbers()
    again.save(tmp_path / "n")
    assert old in (tmp_path / "n" / "config.json").read_text(encoding="utf-8")
    for name, part, problem in (
        ("no colon", Numbers, "is not 'old.module:Name'"),
        ("gone:Away", int, "no tokenizer, head or other part"),
        ("gone:Away", Numbers(), "give the class itself"),
        ("multimodal.core:Core", Numbers, "which is there"),
    ):
        with pytest.raises(mm.ConfigError, match=problem):
            mm.alias(name, part)


def test_fault_38a_an_entry_point_called_by_the_old_name_does_the_same(monkeypatch):
    point = importlib.metadata.EntryPoint("gone.long:Core", "multimodal.core:Core", "multimodal.parts")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: importlib.metadata.EntryPoints([point]))
    assert declare.find("gone.long:Core") is mm.Core


MOVED = '''
from dataclasses import dataclass
import torch
import multimodal as mm

@dataclass(frozen=True)
class Halves(mm.Tokenizer):
    """Numbers in tenths."""
    vocab_size = 10

    def encode(self, value):
        if type(value) is not list or not value:
            raise mm.MediaError(f"Halves.encode: {value!r} is no list of numbers")
        return mm.Tokens(torch.tensor(value), self.places(len(value)))
'''


def test_fault_38b_a_plugin_that_defines_the_name_is_taken_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(declare, "_defined", dict(declare._defined))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "moved_halves_here.py").write_text(MOVED, encoding="utf-8")
    from multimodal.cli.loading import import_file

    kind = import_file(tmp_path / "moved_halves_here.py").Halves()
    mm.Model({"numbers": kind, "label": Labels(("a", "b"))}, TINY, ["numbers -> label"]).save(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("moved_halves_here:", "first_file:"), encoding="utf-8")
    assert main(["predict", str(tmp_path / "m"), "--numbers", "[1, 2]"]) == 2
    assert "--plugin FILE.py" in capsys.readouterr().err
    plugin = ["--plugin", str(tmp_path / "moved_halves_here.py")]
    assert main(["predict", str(tmp_path / "m"), *plugin, "--numbers", "[1, 2]", "--json"]) == 0
    shown = capsys.readouterr()
    assert "first_file:Halves is not there any more; Halves is taken from" in shown.err
    assert json.loads(shown.out)


# 39: names of kinds and fields

RESERVED = (
    "task",
    "samples",
    "batch",
    "seed",
    "begin",
    "begins",
    "prefix",
    "stop",
    "sampler",
    "beams",
    "guidance",
    "self",
)


@pytest.mark.parametrize("name", ["items", "values", "type", "keys", "training"])
def test_fault_39_a_kind_that_cannot_have_a_name_says_why(name):
    with pytest.raises(mm.ConfigError, match=f"named '{name}': its weights .* ModuleDict.*'{name}:{name}_kind"):
        mm.Model({name: TextBytes(), "label": Labels(("a", "b"))}, TINY, [f"{name} -> label"])
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, TINY, [f"{name}:text -> label"])
    assert model.predict(f"{name}:text -> label", **{name: "x"}).value in "ab"
    with pytest.raises(mm.ConfigError, match="one word of the letters a to z"):
        mm.Model({"no word": TextBytes()}, TINY, ["-> text"])


@pytest.mark.parametrize("name", RESERVED)
def test_fault_39a_every_field_can_be_given_and_no_keyword_is_taken_for_another(name):
    tasks = [f"{name}:text -> label", f"{name}:text -> answer:text"]
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, TINY, tasks).eval()
    sample = {name: "a cat"}
    answer = model.predict(tasks[0], [sample])[0]
    text = model.generate(tasks[1], [sample], max_tokens=3)[0]
    assert [*model.stream(tasks[1], [sample], max_tokens=3)][-1].prediction.value == text.value
    if name in ("samples", "batch"):
        with pytest.raises(
            mm.TaskError, match=rf"reads a field '{name}', which by keyword is an option of predict; .*\[{{'{name}'"
        ):
            model.predict(tasks[0], **{name: 1} if name == "batch" else {})
    else:
        assert model.predict(tasks[0], **sample).confidence == pytest.approx(answer.confidence)
    if name in ("task", "self"):
        assert model.generate(tasks[1], **sample, max_tokens=3).value == text.value
        assert [*model.stream(tasks[1], **sample, max_tokens=3)][-1].prediction.value == text.value
    else:
        given = {} if name in ("samples", "sampler", "prefix") else {name: 1}
        for verb in (model.generate, model.stream):
            with pytest.raises(
                mm.TaskError, match=f"by keyword is an option of {verb.__name__}; give the sample as a mapping"
            ):
                verb(tasks[1], **given)


def test_fault_39b_on_the_command_line_a_field_with_an_options_name_is_reachable(tmp_path, capsys):
    tasks = ["out:text device:text task:text -> label"]
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, TINY, tasks).eval()
    model.save(tmp_path / "m")
    fields = ["--field-out", "x", "--field-device", "y", "--field-task", "z"]
    assert main(["predict", str(tmp_path / "m"), *fields, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert model.predict(tasks[0], [{"out": "x", "device": "y", "task": "z"}])[0].value in json.dumps(found)
    assert main(["predict", str(tmp_path / "m"), "--field-out", "x"]) == 2
    assert "also reads --field-device --field-task" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "m"), *fields]) == 0
    from multimodal.cli.arguments import OPTION_NAMES

    for command in ("predict", "generate", "look", "verify"):
        options = {
            name.removeprefix("--").replace("-", "_")
            for argument in app[command].assemble_argument_collection()
            for name in argument.names
            if name.startswith("--")
        }
        assert {name for name in options if name.isidentifier()} <= OPTION_NAMES, command


# 40: names of tokens


@dataclass(frozen=True)
class Columns(mm.Tokenizer):
    """A row of a table: a token for each column, with the column's name."""

    columns: tuple[str, ...]
    feature_size = 1

    def encode(self, value):
        if type(value) is not list or len(value) != len(self.columns):
            raise mm.MediaError(f"Columns.encode: {value!r} is no list of {len(self.columns)} numbers")
        return mm.Tokens(torch.tensor(value, dtype=torch.float32)[:, None], self.places(len(value)))

    def token_names(self, tokens):
        return [self.columns[int(time)] for time in tokens.position_NA[:, 0]]


class TooFew(Columns):
    def token_names(self, tokens):
        return super().token_names(tokens)[:-1]


def test_fault_40_look_calls_a_token_by_the_name_that_its_tokenizer_gives(tmp_path):
    names = ("mean smoothness", "<b>worst</b> area", "radius")
    kinds = {"row": Columns(names), "label": Labels(("a", "b"))}
    model = mm.Model(kinds, TINY, ["row -> label"]).eval()
    from multimodal.look import xray

    seen = xray(model, "row -> label", {"row": [1.0, 2.0, 3.0]})
    assert seen.fields["row"].labels == names
    assert "row mean smoothness" in [name for layer in seen.layers for name, _ in seen.influential_keys(layer)]
    seen.page(tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "mean smoothness" in page
    assert "&lt;b&gt;worst" in page
    assert "<b>worst" not in page
    seen.draw(tmp_path / "p.png")
    broken = mm.Model({**kinds, "row": TooFew(names)}, TINY, ["row -> label"]).eval()
    with pytest.raises(mm.ConfigError, match=r"TooFew\.token_names: gave 2 names for 3 tokens"):
        xray(broken, "row -> label", {"row": [1.0, 2.0, 3.0]})


def test_fault_40a_features_with_named_frames_say_their_names():
    kind = Features(2, normalise="none", frame_names=("smoothness", "area", "radius"))
    tokens = kind(np.zeros((3, 2), np.float32))
    assert kind.token_names(tokens) == ["smoothness", "area", "radius"]
    pairs = Features(2, normalise="none", stack=2, frame_names=("a", "b", "c"))
    assert pairs.token_names(pairs(np.zeros((3, 2), np.float32))) == ["a to b", "c"]
    with pytest.raises(mm.MediaError, match="has 4 frames, but frame_names has 3"):
        kind(np.zeros((4, 2), np.float32))
    assert Features(2).token_names(Features(2)(np.eye(2, dtype=np.float32))) == ["at 0 s", "at 0.01 s"]
    assert Features.from_config(json.loads(json.dumps(kind.config()))) == kind


# 41: what help() says


def public_dataclasses():
    found = {name: getattr(mm, name) for name in mm.__all__}
    import multimodal_tokenizers

    found |= {name: getattr(multimodal_tokenizers, name) for name in multimodal_tokenizers.__all__}
    return {n: x for n, x in found.items() if isinstance(x, type) and dataclasses.is_dataclass(x)}


@pytest.mark.parametrize("name", sorted(public_dataclasses()))
def test_fault_41_every_field_of_a_public_declaration_is_explained_by_help(name):
    cls = public_dataclasses()[name]
    doc = inspect.getdoc(cls) or ""
    for field in dataclasses.fields(cls):
        if not field.name.startswith("_"):
            explained = re.search(rf"(?<![\w.]){field.name}(, \w+)*: .{{6,}}", doc)
            assert explained, f"{name}: its docstring has no line '{field.name}: ...'\n{doc}"


def test_fault_41a_help_of_a_model_begins_with_its_verbs_and_of_a_tokenizer_with_its_attributes():
    doc = inspect.getdoc(mm.Model)
    verbs = [n for n, x in vars(mm.Model).items() if not n.startswith("_") and callable(x)]
    missing = [verb for verb in verbs if not re.search(rf"\b{verb}\b", doc)]
    assert not missing
    doc = inspect.getdoc(mm.Tokenizer)
    own = [n for n in vars(mm.Tokenizer) if not n.startswith("_")]
    assert [n for n in own if not re.search(rf"\b{n}\b", doc)] == []
