"""Values as files: one `write` for the command line, the service and the X-ray, with a format of a kind's own."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import multimodal as mm
from multimodal.cli import main
from multimodal.data.codecs import values_in
from multimodal.value_files import file_of
from multimodal_tokenizers import ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class Melody(mm.Tokenizer):
    """A list of pitches below 16, saved as lines of a .melody file, which it reads too."""

    vocab_size = 16

    def encode(self, value):
        if isinstance(value, str) and value.endswith(".melody"):
            value = list(map(int, Path(value).read_text(encoding="utf-8").split()))
        if type(value) is not list or not value:
            raise mm.MediaError(f"Melody.encode: {value!r} is no list of pitches")
        return mm.Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens):
        return tokens.content.tolist()

    def write(self, value, path):
        path = Path(path).with_suffix(".melody")
        path.write_text("\n".join(map(str, value)), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    kinds = {"text": TextBytes(), "melody": Melody(), "label": Labels(("a", "b"))}
    model = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), ["text -> melody", "text -> label"])
    return model.save(tmp_path_factory.mktemp("melodies") / "m")


def test_each_kind_of_value_is_saved_in_the_format_that_other_programs_open(tmp_path):
    text = TextBytes().write("day\n", tmp_path / "t")
    assert (text.name, text.read_bytes()) == ("t.txt", b"day\n")
    picture = torch.rand(3, 4, 8)
    png = ImagePatches(patch=4).write(picture, tmp_path / "seed 1.5")
    assert png.name == "seed 1.5.png"  # what stands behind a dot is no ending of ours
    assert np.abs(np.asarray(Image.open(png)) / 255 - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    wave = np.sin(np.arange(800) / 9).astype(np.float32)
    wav = Melody.__base__.write(Melody(), (wave, 8000), str(tmp_path / "s.WAV"))
    assert wav.name == "s.WAV"
    read, rate = soundfile.read(wav, dtype="float32")
    assert rate == 8000
    assert np.abs(read - wave).max() < 1e-4
    assert np.load(TextBytes().write(np.arange(3), tmp_path / "a")).tolist() == [0, 1, 2]
    listed = Labels(("a", "b"), several=True).write(["a", "é"], tmp_path / "l")
    assert json.loads(listed.read_text(encoding="utf-8")) == ["a", "é"]
    with pytest.raises(
        mm.MediaError, match=r"TextBytes\.write: a object is no text, .* override write, which saves it"
    ):
        TextBytes().write(object(), tmp_path / "o")


def test_a_file_is_read_as_what_write_made_of(tmp_path):
    for kind, value in ((TextBytes(), "a\r\nb\n"), (Melody(), [3, 1]), (Labels(("a", "b")), "b")):
        path = kind.write(value, tmp_path / "v")
        found = []
        for again in (*values_in(path), str(path)):
            try:
                found.append(kind(again).content.tolist())
            except ValueError:
                continue
        assert kind(value).content.tolist() in found
    (tmp_path / "b.json").write_text("{", encoding="utf-8")
    (tmp_path / "b.npy").write_bytes(b"x")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    for name, what in (("b.json", "JSON"), ("b.npy", "array"), ("b.txt", "text in UTF-8")):
        with pytest.raises(mm.MediaError, match=rf"{name} is no {what} that can be read"):
            list(values_in(tmp_path / name))


def test_generate_and_look_write_the_format_of_the_kind(checkpoint, tmp_path, capsys):
    ask = [str(checkpoint), "--task", "text -> melody", "--text", "abc"]
    assert main(["generate", *ask, "--max-tokens", "3", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown == str(tmp_path / "melody.melody")
    wanted = mm.Model.load(checkpoint).generate("text -> melody", text="abc", max_tokens=3).value
    assert list(map(int, Path(shown).read_text(encoding="utf-8").split())) == wanted
    assert main(["generate", *ask, "--max-tokens", "3", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(tmp_path / "melody-2.melody")  # nothing is overwritten
    assert main(["look", *ask, "--answer", "[3, 1]", "--out", str(tmp_path)]) == 0
    assert f"answer   {tmp_path / 'answer.melody'}" in capsys.readouterr().out
    assert (tmp_path / "answer.melody").read_text(encoding="utf-8") == "3\n1"


def test_the_service_sends_the_file_of_the_kind_with_its_name():
    pytest.importorskip("starlette")
    from multimodal.serve.answers import answer_json

    sent = answer_json(Melody(), mm.Prediction([3, 1], 1.0))["value"]
    head, _, data = sent.partition(";base64,")
    assert head == "data:application/octet-stream;name=answer.melody"
    assert base64.b64decode(data) == b"3\n1"
    assert answer_json(TextBytes(), mm.Prediction("x", 1.0))["value"] == "x"
    picture = answer_json(ImagePatches(patch=4), mm.Prediction(torch.zeros(3, 4, 4), 1.0))["value"]
    assert picture.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size == (4, 4)


class Broken(Melody):
    def write(self, value, path):
        raise RuntimeError("no disk")


class Nowhere(Melody):
    def write(self, value, path):
        return None


@pytest.mark.parametrize(("kind", "problem"), [(Broken(), "RuntimeError: no disk"), (Nowhere(), "TypeError")])
def test_a_write_that_fails_is_named(kind, problem):
    with pytest.raises(mm.MediaError, match=rf"{type(kind).__name__}\.write: {problem}"):
        file_of(kind, [1])
