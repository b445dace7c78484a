"""Shards: what goes in comes out, from any store, in any order; damage is named; an interrupted writer ends with the same bytes."""

import io
import json
import os
import pickle
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from multimodal.data.codecs import Media, encoded
from multimodal.data.shard_writer import index_archives, write_shards
from multimodal.data.shards import Shards
from multimodal.media import read_image, read_sound
from multimodal.shapes import ConfigError, MediaError


def blobs(count: int, size: int = 3000) -> list[dict[str, object]]:
    random = np.random.default_rng(0)
    return [{"image": random.bytes(size + i % 7), "label": f"class {i % 10}", "number": i} for i in range(count)]


def plain(sample: dict) -> dict:
    return {name: value.getvalue() if isinstance(value, Media) else value for name, value in sample.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 samples in 12 shards of 9 samples, the last of 1."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    write_shards(blobs(100), folder, shard_bytes=52_000)
    assert len(Shards(folder).shards) == 12
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


WAVES = [
    np.linspace(-1, 1, 101).astype(np.float32),
    np.linspace(-1, 1, 100),
    np.stack([np.arange(-50, 50), np.arange(100)]).astype(np.int16) * 300,
    (np.arange(100) * 20_000_000).astype(np.int32),
    np.arange(101).astype(np.uint8),
]


@pytest.mark.parametrize("wave", WAVES, ids=lambda wave: f"{wave.dtype}{wave.shape}")
@pytest.mark.parametrize("form", [lambda w: (w, 8000), lambda w: {"array": w, "sampling_rate": 8000}])
def test_sound_comes_out_as_it_went_in(wave, form):
    extension, data = encoded(form(wave))
    assert extension == "wav"
    assert torch.equal(read_sound(Media(data), rate_hz=8000, who=""), read_sound((wave, 8000), rate_hz=8000, who=""))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_pictures_keep_their_pixels(mode: str):
    numbers = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = (
        Image.fromarray(numbers[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(numbers).convert(mode)
    )
    extension, data = encoded(image)
    assert extension == "png"
    pixels = [read_image(value, channels=3, max_pixels=10**6, who="") for value in (image, Media(data))]
    assert torch.equal(*pixels)


def test_a_rotated_photograph_stays_upright():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(file, "JPEG", exif=exif)
    image = Image.open(file)
    upright = read_image(Media(encoded(image)[1]), channels=1, max_pixels=100, who="")
    assert upright.shape == (1, 8, 6)
    assert torch.equal(upright, read_image(image, channels=1, max_pixels=100, who=""))


def test_every_kind_of_value_comes_back(tmp_path: Path):
    (tmp_path / "a.JPG").write_bytes(b"jpeg")
    (tmp_path / "b.txt").write_text("from a file", encoding="utf-8")
    array, tensor = np.arange(6, dtype=np.int16).reshape(2, 3), torch.arange(4.0).reshape(1, 2, 2)
    samples = [
        {"text": "ä\n\0b", "number": 3, "share": 0.1, "list": [1, [2.5, None]], "map": {"a": True}, "empty": ""},
        {"array": array, "tensor": tensor, "scalar": np.float64(0.1), "text": tmp_path / "b.txt", "none": None},
        {"image": tmp_path / "a.JPG", "bytes": b"raw", "open": Media(b"open", "x.flac")},
        {"image": {"bytes": b"hf", "path": "p.png"}, "open": {"bytes": None, "path": str(tmp_path / "a.JPG")}},
    ]
    write_shards(samples, tmp_path / "shards")
    shards = Shards(tmp_path / "shards")
    first, second, third, fourth = map(plain, shards)
    assert set(first) == set(shards.fields) == set().union(*samples) - {"none"}
    assert {name: value for name, value in first.items() if value is not None} == samples[0]
    assert second["array"].dtype == np.int16
    assert np.array_equal(second["array"], array)
    assert torch.equal(second["tensor"], tensor)
    assert (second["scalar"], second["text"], second["image"]) == (0.1, "from a file", None)
    assert [third[name] for name in ("image", "bytes", "open")] == [b"jpeg", b"raw", b"open"]
    assert [fourth[name] for name in ("image", "open")] == [b"hf", b"jpeg"]
    assert shards[2]["image"].name == "000000.tar/000000002.image.jpg"
    assert shards[2]["open"].name.endswith(".flac")


def test_any_tar_reader_finds_the_same(made: Path):
    shards, samples = Shards(made), blobs(100)
    found: dict[str, dict[str, bytes]] = {}
    for shard in shards.shards:
        with tarfile.open(made / shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")  # WebDataset's rule: the key ends at the first dot
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
    assert list(found) == [f"{i:09d}" for i in range(100)]
    for sample, members, read in zip(samples, found.values(), shards, strict=True):
        assert members == {
            "image.bin": sample["image"],
            "label.txt": str(sample["label"]).encode(),
            "number.json": str(sample["number"]).encode(),
        }
        assert plain(read) == sample


def test_archives_are_as_long_as_asked(tmp_path: Path):
    write_shards(
        [{"a": bytes([1]) * size} for size in (100, 48_000, 20_000, 20_000, 80_000, 100)],
        tmp_path / "s",
        shard_bytes=50_000,
    )
    shards = Shards(tmp_path / "s").shards
    assert [shard.samples for shard in shards] == [1, 1, 2, 1, 1]
    assert [shard.bytes <= 50_000 for shard in shards] == [True, True, True, False, True]
    assert [(tmp_path / "s" / shard.name).stat().st_size for shard in shards] == [shard.bytes for shard in shards]


def test_every_store_gives_the_same(made: Path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    bucket = f"/{made.parent.name}"  # the store is one for all tests of a process
    store.put(str(made), f"{bucket}/set", recursive=True)
    inside = f"memory:/{bucket}/set"
    try:
        for url in (inside, f"{inside}/", f"simplecache::{inside}", made.as_uri()):
            shards = Shards(url, group=2)
            assert [plain(sample) for sample in shards] == blobs(100)
            assert shards.check() == []
        store.pipe_file(f"{bucket}/set/000003.tar", store.cat_file(f"{bucket}/set/000003.tar")[:20_000])
        shards = Shards(inside)
        with pytest.raises(MediaError, match=r"000003\.tar, sample 8: the archive ends before 'image' does"):
            shards[35]
        assert shards[26]["number"] == 26
        assert len(shards.check()) == 1
    finally:
        store.rm(bucket, recursive=True)


def open_archives() -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_few_files_are_open(made: Path):
    shards, most = Shards(made, group=3), 0
    for i in np.random.default_rng(0).integers(0, 100, 300):
        assert shards[int(i)]["number"] == i
        most = max(most, open_archives())
    assert most == 3
    shards.close()
    assert open_archives() == 0
    assert shards[5]["number"] == 5
    del shards
    assert open_archives() == 0


def test_it_is_cheap_to_send_and_opens_in_the_worker(made: Path):
    shards = Shards(made)
    empty = len(pickle.dumps(shards))
    assert [shards[i]["number"] for i in range(0, 100, 9)] == list(range(0, 100, 9))
    assert len(pickle.dumps(shards)) == empty < 4000
    assert plain(pickle.loads(pickle.dumps(shards))[40]) == blobs(100)[40]
    handle = pickle.loads(pickle.dumps(shards[7]["image"]))
    assert (handle.getvalue(), handle.name) == (blobs(100)[7]["image"], "000000.tar/000000007.image.bin")
    loader = DataLoader(shards, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert [sample["number"] for sample in loader] == list(range(100))


@pytest.mark.parametrize("group", [1, 3, 5, 12, 50])
def test_an_order_is_a_permutation_that_stays_near(made: Path, group: int):
    shards = Shards(made, group=group)
    order = [shards.shuffled("7/0")(place) for place in range(100)]
    assert sorted(order) == list(range(100))
    assert order == list(map(Shards(made, group=group).shuffled("7/0"), range(100)))
    assert order != [shards.shuffled("7/1")(place) for place in range(100)]
    at = [index // 9 for index in order]
    spans = {shard: (at.index(shard), 99 - at[::-1].index(shard)) for shard in set(at)}
    live = [sum(first <= place <= last for first, last in spans.values()) for place in range(100)]
    assert max(live) == min(group, 12)  # so many shards are needed at a time, no more
    if group > 1:
        assert [b - a for a, b in pairwise(order)].count(1) < 20  # mixed within a group


def test_shards_come_in_another_order_each_round(made: Path):
    shards = Shards(made, group=1)
    firsts = [tuple(dict.fromkeys(shards.shuffled(f"0/{r}")(place) // 9 for place in range(100))) for r in range(6)]
    assert len(set(firsts)) == 6
    assert len({order[0] for order in firsts}) > 2


def test_the_order_needs_no_memory_for_samples(made: Path):
    shards = Shards(made, group=2)
    shards.shards = tuple(type(s)(**{**vars(s), "samples": 10**12}) for s in shards.shards)
    shards._starts = [i * 10**12 for i in range(13)]
    place = shards.shuffled("0/0")
    assert len({place(i) for i in range(1000)}) == 1000
    assert len({place(i) // 10**12 for i in range(1000)}) == 2


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_sample_is_named_and_the_others_are_read(copied: Path):
    with tarfile.open(copied / "000002.tar") as tar:
        offset = tar.getmember("000000020.image.bin").offset_data
    flip(copied / "000002.tar", offset + 1234)
    shards = Shards(copied)
    with pytest.raises(
        MediaError, match=r"000002\.tar/000000020\.image\.bin \(sample 2 of the shard\): 'image' has changed"
    ):
        shards[20]
    assert [plain(shards[i]) for i in range(100) if i != 20] == [s for i, s in enumerate(blobs(100)) if i != 20]
    assert shards.check() == ["000002.tar: its sha256 is not the one in index.json"]


def test_damage_outside_of_samples_is_found_by_the_check_alone(copied: Path):
    flip(copied / "000000.tar", (copied / "000000.tar").stat().st_size - 3)
    shards = Shards(copied)
    assert [plain(sample) for sample in shards] == blobs(100)
    assert shards.check() == ["000000.tar: its sha256 is not the one in index.json"]


def test_short_and_missing_archives_and_tables_are_named(copied: Path):
    short = (copied / "000001.tar").read_bytes()[:20_000]
    (copied / "000001.tar").write_bytes(short)
    (copied / "000003.tar").unlink()
    flip(copied / "000005.index", (copied / "000005.index").stat().st_size - 1)
    (copied / "000006.index").unlink()
    shards = Shards(copied)
    assert shards[9]["number"] == 9
    for index, words in [
        (17, r"000001\.tar, sample 8: the archive ends before 'image' does"),
        (27, r"000003\.tar of .* cannot be opened"),
        (45, r"000005\.index of .* is damaged"),
        (54, r"000006\.tar of .* cannot be opened"),
    ]:
        with pytest.raises(MediaError, match=words):
            shards[index]
    faults = shards.check()
    assert [fault[:10] for fault in faults] == ["000001.tar", "000003.tar", "000005.ind", "000006.tar"]
    assert faults[0] == "000001.tar: it has 20000 bytes, and " + str(shards.shards[1].bytes) + " were written"


def test_indices_are_those_of_a_list(made: Path):
    shards = Shards(made)
    assert shards[-1]["number"] == 99
    for index in (100, -101):
        with pytest.raises(IndexError, match="there are 100"):
            shards[index]
    assert repr(shards).endswith("shards': 100 samples in 12 shards, image, label, number)")


def test_what_is_no_folder_of_shards_is_refused(copied: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no index\.json; wanted a folder that `multimodal shards` made"):
        Shards(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: ValueError: Protocol not known"):
        Shards("nosuchstore://a/b")
    with pytest.raises(ConfigError, match="group=0"):
        Shards(copied, group=0)
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(ConfigError, match="has format 2; this version reads format 1"):
        Shards(copied)
    (copied / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be read: .*'shards' is missing"):
        Shards(copied)
    (copied / "index.json").unlink()
    with pytest.raises(ConfigError, match="index_archives"):
        Shards(copied)
    (copied / "making.json").write_text("{}")
    with pytest.raises(ConfigError, match="it was not finished"):
        Shards(copied)


LONG = "a/" + "deep/" * 30


@pytest.fixture
def foreign(tmp_path: Path) -> list[Path]:
    """Two archives as others make them: keys in folders, long names, extensions of their own, a field that is missing."""
    paths = []
    for number in range(2):
        path = tmp_path / f"part-{number}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(5):
                members = {
                    "JPG": b"j%d%d" % (number, i),
                    "cls": b"%d" % i,
                    "caption.txt": b"words",
                    "seg.png": b"unused",
                }
                for extension, data in members.items():
                    if (i, extension) != (3, "cls"):
                        info = tarfile.TarInfo(f"{LONG if i == 4 else ''}{number}-{i}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        paths.append(path)
    return paths


FOREIGN = {"image": ("jpg", "jpeg"), "label": "cls", "text": "caption.txt"}


def test_archives_of_others_are_read_after_their_headers(foreign: list[Path], tmp_path: Path):
    shards = index_archives(foreign, FOREIGN, tmp_path)
    wanted = [
        {"image": b"j%d%d" % (n, i), "label": None if i == 3 else str(i), "text": "words"}
        for n in range(2)
        for i in range(5)
    ]
    elsewhere = index_archives(foreign, FOREIGN, tmp_path / "elsewhere")
    for source in (shards, Shards(tmp_path, group=1), elsewhere):
        assert list(map(plain, source)) == wanted
        assert source.check() == []
    assert [shard.name for shard in shards.shards] == ["part-0.tar", "part-1.tar"]
    assert [shard.name for shard in elsewhere.shards] == list(map(str, foreign))


def test_archives_of_others_that_changed_are_found(foreign: list[Path], tmp_path: Path):
    shards = index_archives(foreign, FOREIGN, tmp_path)
    with tarfile.open(foreign[0], "w") as tar:
        info = tarfile.TarInfo("other.jpg")
        info.size = 9999
        tar.addfile(info, io.BytesIO(bytes(9999)))
    with pytest.raises(MediaError, match="has changed since the index was made"):
        shards[0]
    assert len(shards.check()) == 1
    with pytest.raises(ConfigError, match=r"has an index\.json"):
        index_archives(foreign, FOREIGN, tmp_path)
    with pytest.raises(ConfigError, match=r"no member ends in mp4; there are caption\.txt, cls, jpg, seg\.png"):
        index_archives(foreign[1:], {"video": "mp4"}, tmp_path / "other")
    foreign[1].write_bytes(foreign[1].read_bytes()[:3000])
    with pytest.raises(MediaError, match=r"part-1\.tar is no whole, uncompressed tar"):
        index_archives(foreign[1:], FOREIGN, tmp_path / "other")
