"""Data sets of torchvision, torchaudio and Hugging Face as samples, down to the tokens."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal as mm
from multimodal.data.adapters import Fields
from multimodal.data.codecs import Media
from multimodal.data.shard_writer import write_shards
from multimodal.data.shards import Shards
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes


def tokens_alike(first: mm.Tokens, second: mm.Tokens) -> bool:
    return torch.equal(first.content, second.content) and torch.equal(first.position_NA, second.position_NA)


def test_torchvision_in_one_line():
    datasets = pytest.importorskip("torchvision.datasets")
    pictures = datasets.FakeData(size=12, image_size=(3, 8, 12), num_classes=3)
    samples = Fields(pictures, "image", "label", names={"label": ("cat", "dog", "cow")})
    assert len(samples) == 12
    read = ImagePatches(patch=4)
    for i in range(12):
        image, label = pictures[i]
        assert isinstance(image, Image.Image)
        assert samples[i]["label"] == ("cat", "dog", "cow")[int(label)]
        array = np.asarray(image).astype(np.float32) / 255
        assert tokens_alike(read.encode(samples[i]["image"]), read.encode(array))
    model = mm.Model({"image": read, "label": Labels(("cat", "dog", "cow"))}, mm.Core.tiny(), ["image -> label"])
    assert len(model.packer([("image -> label", samples[i]) for i in range(4)])) > 4


class Speech(torch.utils.data.Dataset):
    """As torchaudio's LIBRISPEECH gives it: (wave (channels, S), rate in Hz, transcript, speaker, chapter, utterance)."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple:
        if i >= len(self):
            raise IndexError(i)
        wave_CS = torch.sin(torch.arange(4000.0) * (i + 1) / 10)[None]
        return wave_CS, 8000, f"utterance {i}", 1, 2, i


def test_torchaudio_in_one_line():
    samples = Fields(Speech(), "audio", "audio", "text", None, None, "number")
    assert set(samples[2]) == {"audio", "text", "number"}
    assert (samples[2]["text"], samples[2]["number"]) == ("utterance 2", 2)
    hear = AudioFrames(rate_hz=8000, mels=8)
    assert tokens_alike(hear.encode(samples[2]["audio"]), hear.encode((Speech()[2][0].numpy(), 8000)))
    model = mm.Model({"audio": hear, "text": TextBytes()}, mm.Core.tiny(), ["audio -> text"])
    assert len(model.packer([("audio -> text", samples[i]) for i in range(2)])) > 20


def test_tuples_become_shards_and_come_back(tmp_path: Path):
    samples = Fields(Speech(), "audio", "audio", "text", None, None, None)
    write_shards(samples, tmp_path / "s")
    hear = AudioFrames(rate_hz=8000, mels=8)
    for sample, read in zip(samples, Shards(tmp_path / "s"), strict=True):
        assert tokens_alike(hear.encode(read["audio"]), hear.encode(sample["audio"]))
        assert read["text"] == sample["text"]


@pytest.fixture
def saved(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(paths[-1])
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), text=datasets.Value("string")
    )
    return datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 1, 0], "text": list("abcd")}, features=features)


def test_hugging_face_as_it_is(saved):
    read = ImagePatches(patch=4, channels=1)
    model = mm.Model({"image": read, "text": TextBytes()}, mm.Core.tiny(), ["image -> text"])
    assert len(model.packer([("image -> text", saved[i]) for i in range(4)])) > 16
    named = Fields(saved, names={"label": saved.features["label"].names})
    assert [named[i]["label"] for i in range(4)] == ["cat", "dog", "dog", "cat"]
    assert set(named[0]) == {"image", "label", "text"}
    assert set(Fields(saved, "text")[0]) == {"text"}


def test_hugging_face_undecoded(saved):
    datasets = pytest.importorskip("datasets")
    read = ImagePatches(patch=4, channels=1)
    raw = saved.cast_column("image", datasets.Image(decode=False))
    packed = [
        dict(raw[i], image={"bytes": Path(raw[i]["image"]["path"]).read_bytes(), "path": "x.png"}) for i in range(4)
    ]
    for source in (raw, packed):
        assert set(source[1]["image"]) == {"bytes", "path"}
        samples = Fields(source, "image", "label", names={"label": ["cat", "dog"]})
        assert tokens_alike(read.encode(samples[1]["image"]), read.encode(saved[1]["image"]))
    assert isinstance(samples[1]["image"], Media)
    assert samples[1]["image"].name == "x.png"


def test_labels_of_several_classes_and_of_none():
    samples = Fields(
        [([0, 2], 1), ([], None), ([1], 3), ([1], -1)], "tags", "label", names={"tags": "abc", "label": "xyz"}
    )
    assert samples[0] == {"tags": ["a", "c"], "label": "y"}
    assert samples[1] == {"tags": [], "label": None}
    for i, number in ((2, 3), (3, -1)):
        with pytest.raises(MediaError, match=f"label is class {number}, and there are names for 3"):
            samples[i]
    assert Fields([np.int64(1)], "label", names={"label": "xyz"})[0] == {"label": "y"}


def test_other_parts_than_were_named_are_refused():
    with pytest.raises(
        ConfigError, match=r"2 names are given, .* and a sample has 3 parts: .*None for what is left out"
    ):
        Fields([(1, 2, 3)], "a", "b")[0]
    with pytest.raises(ConfigError, match="a sample has no b; it has a"):
        Fields([{"a": 1}], "a", "b")[0]
    with pytest.raises(ConfigError, match="names are given for label, which is none of"):
        Fields([(1, 2)], "a", "b", names={"label": "xyz"})
    with pytest.raises(ConfigError, match=r"is no data set with a length and \[index\]"):
        Fields(iter([(1,)]), "a")


def test_the_order_of_shards_is_kept_and_it_can_be_sent(tmp_path: Path):
    write_shards([{"label": i % 3} for i in range(30)], tmp_path / "s", shard_bytes=10_000)
    shards = Shards(tmp_path / "s", group=1)
    samples = Fields(shards, names={"label": "abc"})
    assert [samples.shuffled("x")(i) for i in range(30)] == [shards.shuffled("x")(i) for i in range(30)]
    sent = pickle.loads(pickle.dumps(samples))
    assert [sent[sent.shuffled("x")(i)] for i in range(30)] == [samples[shards.shuffled("x")(i)] for i in range(30)]
    assert not hasattr(Fields([{"a": 1}]), "shuffled")
