"""Readers account for what they saw: tables, folders, archives, data sets of others, streams."""

import io
import json
import os
import random
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal as mm
from multimodal.data.codecs import Media, decoded, encoded
from multimodal.data.shard_writer import index_archives, write_shards
from multimodal.data.shards import Shards
from multimodal.data.tables import open_table
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

ROOT = Path(__file__).resolve().parents[2]


def table(folder: Path, name: str, text: str | bytes) -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def rows_of(source) -> list:
    return [str(row) if isinstance(row, Exception) else row for row in source.rows(0)]


def picture(path: Path, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), len(path.name), np.uint8)).save(path, "PNG")
    return path


def adds_up(account) -> bool:
    return account.saw == account.yields + sum(out.count for out in account.left_out.values())


def left(account) -> dict[str, int]:
    return {reason: out.count for reason, out in account.left_out.items()}


# tables


def test_fault_05_a_tsv_has_no_quotes_and_loses_no_row(tmp_path: Path):
    lines = ["id\ttext", "1\tone", '2\t"two', "3\tthree", "4\tfour", '5\tfive"', "6\tsix"]
    source = open_table(table(tmp_path, "speech.tsv", "\n".join(lines) + "\n"))
    assert rows_of(source) == [dict(zip(("id", "text"), line.split("\t"), strict=True)) for line in lines[1:]]
    account = source.account()
    assert (account.saw, account.yields, account.left_out) == (6, 6, {})
    assert "1 rows have cells that begin with a quotation mark" in str(account)
    quoted = open_table(table(tmp_path, "sheet.tsv", 'a\tb\n"x ""y"""\t"1\n2"\n'), quotes=True)
    assert rows_of(quoted) == [{"a": 'x "y"', "b": "1\n2"}]


def test_fault_05_a_quote_that_never_closes_is_an_error_that_max_bad_does_not_pass(tmp_path: Path):
    source = open_table(table(tmp_path, "t.csv", "a,b\n1,2\n" + '3,"4\n' + "5,6\n" * 100))
    with pytest.raises(MediaError, match=r"t\.csv: a quotation mark opens in line 3 and is never closed"):
        write_shards(source, tmp_path / "out", max_bad=50)
    plain = open_table(str(tmp_path / "t.csv"), quotes=False)
    assert rows_of(plain)[1] == {"a": "3", "b": '"4'}
    across = open_table(table(tmp_path, "u.csv", 'a,b\n1,"2\n3,4\n5"\n6,7\n'))
    assert "1 rows run over several lines, held together by quotation marks: 2 to 4" in str(across.account())


def test_fault_05_every_line_is_a_row_or_is_named(tmp_path: Path):
    text = b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3\r\n4,5,6\r\n\xe9,7\r\n8,\0\r\n9,\r\n\r\n"
    source = open_table(table(tmp_path, "t.csv", text))
    found = rows_of(source)
    assert [row for row in found if isinstance(row, dict)] == [{"a": "1", "b": "2"}, {"a": "9", "b": None}]
    named = [row for row in found if isinstance(row, str)]
    for line, why in zip(
        named,
        ("line 4: it has 1 columns", "line 5: it has 3 columns", "line 6: it is not utf-8", "line 7: it holds a NUL"),
        strict=True,
    ):
        assert line.startswith(why)
    assert "--encoding latin-1" in named[2]
    account = source.account()
    assert (account.saw, account.yields, left(account)) == (8, 2, {"empty lines": 2, "broken rows": 4})
    assert account.left_out["empty lines"].names == ("line 3", "line 9")
    assert rows_of(open_table(str(tmp_path / "t.csv"), encoding="latin-1"))[3]["b"] == "7"


def test_fault_05_columns_and_encodings_that_cannot_be_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"each once, not a, b, a; a comes twice"):
        open_table(table(tmp_path, "t.csv", "a,b,a\n1,2,3\n"))
    with pytest.raises(ConfigError, match="each once, not nothing"):
        open_table(table(tmp_path, "empty.csv", ""))
    with pytest.raises(ConfigError, match=r"the first line, .*, is no text: it holds a NUL byte.*--encoding utf-16"):
        open_table(table(tmp_path, "u.csv", "a,b\n1,2\n".encode("utf-16-le")))
    with pytest.raises(ConfigError, match="--encoding: Python knows no 'latin-99'"):
        open_table(str(tmp_path / "t.csv"), encoding="latin-99")
    marked = open_table(table(tmp_path, "m.tsv", "a\tb\nä\t2\n".encode("utf-16")))  # as spreadsheets write it
    assert rows_of(marked) == [{"a": "ä", "b": "2"}]
    cut = open_table(table(tmp_path, "c.tsv", "a\tb\nä\t2\n".encode("utf-16")[:-1]))
    with pytest.raises(MediaError, match="is not text in utf-16"):
        rows_of(cut)


def test_fault_05a_json_lines_name_their_line_and_hide_no_key(tmp_path: Path):
    lines = ['{"a": 1}', "", '{"a": 1, "a": 2}', '{"b": {"c": 1, "c": 1}}', "[" * 100_000, '{"a": "\xe9"}', '{"a": 3}']
    source = open_table(table(tmp_path, "t.jsonl", "\n".join(lines).encode("latin-1")))
    found = rows_of(source)
    assert [found[0], found[-1]] == [{"a": 1}, {"a": 3}]
    wanted = (
        "line 3: the key 'a' comes twice",
        "line 4: the key 'c' comes twice",
        "line 5: ",
        "line 6: ",
    )
    assert all(row.startswith(words) for row, words in zip(found[1:-1], wanted, strict=True))
    account = source.account()
    assert (account.saw, account.yields, left(account)) == (7, 2, {"empty lines": 1, "broken rows": 4})
    assert rows_of(open_table(str(tmp_path / "t.jsonl"), encoding="latin-1"))[-2] == {"a": "é"}


def test_fault_12_what_is_stored_of_a_broken_row_is_short(tmp_path: Path):
    long = "QUJD" * 500_000
    rows = [{"image": Path(long), "n": 1}, {"image": None, "n": 2}]
    made = write_shards(rows, tmp_path / "out", max_bad=1)
    assert len(made.bad[0][1]) < 400
    assert made.bad[0][1].startswith("image: ")
    assert "..." in made.bad[0][1]
    assert made.bad[0][1].endswith("QUJD'")
    assert (tmp_path / "out" / "bad.jsonl").stat().st_size < 600
    assert (tmp_path / "out" / "index.json").stat().st_size < 3000
    assert len(str(made.account)) < 400
    with pytest.raises(MediaError, match=r"QUJDQUJD.*\.\.\..*QUJD' is not one of the 2 classes") as caught:
        Labels(("a", "b"))(long)
    assert len(str(caught.value)) < 400
    with pytest.raises(ConfigError, match="--files: there is no 'z'; there are c0, c1") as caught:
        open_table(table(tmp_path, "wide.csv", ",".join(f"c{i}" for i in range(100_000)) + "\n")).select({}, ["z"])
    assert len(str(caught.value)) < 300

    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i:
                raise ValueError(long)
            return {"text": "a", "label": "a"}

    model = mm.Model(
        {"text": TextBytes(), "label": Labels(tuple("ab"))}, mm.Core(width=8, depth=1, heads=1), ["text -> label"]
    )
    run = mm.fit(model, {"text -> label": Broken()}, steps=2, batch=2, max_bad=3, quiet=True, folder=tmp_path / "run")
    assert all(len(bad.error) < 700 for bad in run.bad)
    assert (tmp_path / "run" / "bad.jsonl").stat().st_size < 4000


# folders of classes


def junk(root: Path) -> dict[str, int]:
    """Two classes of pictures, and what else lies about in such folders."""
    for name in ("cat/1.png", "cat/2.png", "dog/deep/3.png", "outside/4.png"):
        picture(root.parent / name if name.startswith("outside") else root / name)
    hidden = ("cat/.ipynb_checkpoints/1-checkpoint.png", "@eaDir/x.png", "__MACOSX/cat/._1.png", "cat/._1.png")
    for name in (*hidden, ".git/x.png"):
        picture(root / name)
    (root / "Thumbs.db").touch()
    (root / "cat/.DS_Store").touch()
    (root / "cat/notes.txt").touch()
    (root / "empty").mkdir()
    (root / "cow").symlink_to(root.parent / "outside", target_is_directory=True)
    (root / "cat/all").symlink_to(root, target_is_directory=True)
    (root / "dog/gone.png").symlink_to(root / "nowhere.png")
    (root / "dog/self").symlink_to(root / "dog/self")
    return {"hidden or of the system": 7, "of another format (.txt)": 1, "an empty folder": 1} | {
        "a link to a folder that is read already": 1,
        "no file (a device, or a link that leads nowhere)": 2,
    }


def test_fault_06_a_folder_of_classes_has_no_others_and_says_what_it_left_out(tmp_path: Path):
    wanted = junk(tmp_path / "photos")
    source = open_table(str(tmp_path / "photos"))
    found = {(row["image"].relative_to(tmp_path / "photos").as_posix(), row["label"]) for row in rows_of(source)}
    assert found == {
        *(("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog/deep/3.png", "dog")),
        ("cow/4.png", "cow"),  # of a linked folder
    }
    account = source.account()
    assert (account.saw, account.yields, left(account)) == (4 + sum(wanted.values()), 4, wanted)
    assert "a link to a folder that is read already: 1 (cat/all)" in str(account)


def test_fault_06_parts_of_a_data_set_are_never_classes(tmp_path: Path):
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "labels/4.png"):
        picture(tmp_path / "set" / name)
    with pytest.raises(ConfigError, match=r"set has the splits train, val; choose one, as in --split train, or"):
        open_table(str(tmp_path / "set"))
    source = open_table(str(tmp_path / "set"), "train")
    assert [(row["image"].name, row["label"]) for row in rows_of(source)] == [("1.png", "cat"), ("2.png", "dog")]
    assert left(source.account()) == {"of no split": 1, "of the split val": 1}
    with pytest.raises(ConfigError, match=r"choose one.*not 'vall'; did you mean 'val'|not 'vall'; did you mean 'val'"):
        open_table(str(tmp_path / "set"), "vall")
    for name in ("cat/train/1.png", "cat/test/2.png", "dog/train/3.png"):
        picture(tmp_path / "inner" / name)
    with pytest.raises(ConfigError, match="has the splits test, train in its class folders"):
        open_table(str(tmp_path / "inner"))
    assert [row["label"] for row in rows_of(open_table(str(tmp_path / "inner"), "train"))] == ["cat", "dog"]
    for name in ("train/1.png", "bus/2.png"):  # one class may be called so
        picture(tmp_path / "vehicles" / name)
    assert [row["label"] for row in rows_of(open_table(str(tmp_path / "vehicles")))] == ["bus", "train"]
    with pytest.raises(ConfigError, match="there is no split 'val', as its folders are classes"):
        open_table(str(tmp_path / "vehicles"), "val")


def test_fault_06_the_example_reads_folders_as_the_command_does(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import image_sets

    junk(tmp_path / "photos")
    for name in ("dog/5.png", "cow/6.png", "7.png"):
        picture(tmp_path / "photos" / name)
    found = image_sets.folder(tmp_path / "photos", 0)
    assert found.names == ("cat", "cow", "dog")
    assert len(found.train) + len(found.test) == 6
    assert "in no class folder: 1 (7.png)" in capsys.readouterr().out
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/.x/4.png", "test/b/5.png", "labels/6.png"):
        picture(tmp_path / "split" / name)
    split = image_sets.folder(tmp_path / "split", 0)
    assert (split.names, len(split.train), len(split.test)) == (("a", "b"), 2, 2)
    picture(tmp_path / "split/test/c/7.png")
    with pytest.raises(ConfigError, match="c are classes of test/ that train/ does not have"):
        image_sets.folder(tmp_path / "split", 0)


def test_fault_06a_links_that_lead_round_and_round_end(tmp_path: Path):
    for name in "abcdef":
        picture(tmp_path / "real" / name / f"{name}.png")
    for one in "abcdef":
        for other in "abcdef":
            (tmp_path / "real" / one / f"to_{other}").symlink_to(tmp_path / "real" / other, target_is_directory=True)
    (tmp_path / "set").mkdir()
    for name in "abc":
        (tmp_path / "set" / name).symlink_to(tmp_path / "real" / name, target_is_directory=True)
    account = open_table(str(tmp_path / "set")).account()
    assert account.yields == 6  # three by their classes; d, e and f as found through them
    assert left(account) == {"a link to a folder that is read already": 36 - 3}


def test_fault_06b_names_that_are_no_text(tmp_path: Path):
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system has text for names only")
    picture(tmp_path / "dog" / os.fsdecode(b"\xff.png"))
    assert [row["label"] for row in rows_of(open_table(str(tmp_path)))] == ["dog"]
    made = write_shards(open_table(str(tmp_path)), tmp_path / "out")
    assert made.samples == 1
    str(made.account).encode()
    picture(tmp_path / os.fsdecode(b"caf\xe9") / "1.png")
    with pytest.raises(
        ConfigError, match=r"the class folder 'caf\\udce9' has a name that is not UTF-8; rename it"
    ) as caught:
        open_table(str(tmp_path))
    str(caught.value).encode()
    assert int(Labels(("dog", "caf\udce9"))("caf\udce9").content) == 1  # a model keeps such names, see fault 58


# 71: values and their members


def test_fault_71b_a_list_of_an_array_and_a_number_is_no_sound():
    wave = np.array([0.0, 0.5, -0.5], np.float32)
    kind, data = encoded([wave, 5])
    assert kind == "list.tar"
    array, number = decoded(kind, data, "v")
    assert np.array_equal(array, wave)
    assert number == 5
    kind, data = encoded([[wave, 5], "x"])
    (inner, text) = decoded(kind, data, "v")
    assert np.array_equal(inner[0], wave)
    assert (inner[1], text) == (5, "x")
    assert encoded((wave, 5))[0] == "wav"


@pytest.mark.parametrize(
    "value",
    [
        {"array": [0.5, 1.5], "sampling_rate": 8000},
        {"array": "x", "sampling_rate": None, "path": None},
        {"array": [0.5], "sampling_rate": 8000, "speaker": "Ann"},
    ],
)
def test_fault_71c_a_mapping_that_is_no_sound_stays_a_mapping(value):
    for one in (value, [value], {"inner": value}):
        kind, data = encoded(one)
        assert kind == "json"
        assert decoded(kind, data, "v") == one
    wave = np.zeros(3, np.float32)
    with pytest.raises(TypeError, match="ndarray"):  # nothing of it is dropped in silence
        encoded({"array": wave, "sampling_rate": 8000, "speaker": "Ann"})
    for path in ({}, {"path": None}, {"path": "a.wav"}):
        assert encoded({"array": wave, "sampling_rate": 8000, **path})[0] == "wav"


@pytest.mark.parametrize("extension", ["npy", "tensor.npy", "mask.npy"])
def test_fault_71d_a_zip_that_is_called_npy_is_refused(extension):
    data = io.BytesIO()
    np.savez(data, x=np.zeros(3))
    for wrong in (data.getvalue(), data.getvalue()[:40], b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b""):
        with pytest.raises(ValueError, match=r"it is no \.npy file"):
            decoded(extension, wrong, "v")
    data = io.BytesIO()
    np.save(data, np.arange(3))
    assert decoded(extension, data.getvalue(), "v").tolist() == [0, 1, 2]


# archives


def archive(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], end: bool = True) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, body in members.items() if isinstance(members, dict) else members:
            header = tarfile.TarInfo(name)
            header.size = len(body)
            tar.addfile(header, io.BytesIO(body))
        stop = tar.offset
    path.write_bytes(data.getvalue() if end else data.getvalue()[:stop])
    return path


FIELDS = {"image": "jpg", "label": "cls"}


def test_fault_07_members_that_are_in_no_sample_are_counted_with_the_reason(tmp_path: Path, caplog):
    names = ["a.jpg", "a.cls", "b.1.jpg", "b.1.cls", "c.v2.jpg", "c.v2.cls", "d.jpg", "d.cls", "d.json", "._d.jpg"]
    shards = index_archives(archive(tmp_path / "a.tar", [(n, n.encode()) for n in names]), FIELDS, tmp_path / "out")
    account = shards.account
    dotted = "with a dot in the key, which ends at the first one (as in WebDataset)"
    assert (len(shards), account.saw, account.yields, account.samples) == (2, 10, 4, 2)
    assert left(account) == {dotted: 4, "of another extension (json)": 1, "hidden or of the system": 1}
    assert "b.1.jpg" in caplog.text
    both = index_archives(
        tmp_path / "a.tar", {"image": (".JPG", "1.jpg"), "label": ("cls", "1.cls")}, tmp_path / "more"
    )
    assert [sample["label"] for sample in both] == ["a.cls", "b.1.cls", "d.cls"]
    with pytest.raises(ConfigError, match="jpg is the extension of 'image' and of 'photo'"):
        index_archives(tmp_path / "a.tar", {"image": "jpg", "photo": "jpg"}, tmp_path / "two")


def test_fault_07_a_key_that_comes_twice_hides_nothing(tmp_path: Path, caplog):
    twice = [("a.jpg", b"1"), ("a.cls", b"x"), ("a.jpg", b"2"), ("a.cls", b"y"), ("b.jpg", b"3"), ("a.jpg", b"4")]
    shards = index_archives(archive(tmp_path / "a.tar", twice), FIELDS, tmp_path / "out")
    assert [(s["image"].getvalue(), s["label"]) for s in shards] == [
        (b"1", "x"),
        (b"2", "y"),
        (b"3", None),
        (b"4", None),
    ]
    assert "2 keys come again, each time as another sample" in str(shards.account)
    assert "keys come again" in caplog.text
    apart = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"x"), ("b.cls", b"y")]
    with pytest.raises(MediaError, match=r"the members of '/a' in .*a2\.tar do not lie side by side.*--sort=name"):
        index_archives(archive(tmp_path / "a2.tar", apart), FIELDS, tmp_path / "apart")


def test_fault_72_a_damaged_header_is_an_error_with_its_place(tmp_path: Path, caplog):
    members = {f"{i}.jpg": b"x" * 100 for i in range(9)}
    path = archive(tmp_path / "a.tar", members)
    data = bytearray(path.read_bytes())
    data[4 * 1024 + 150] ^= 1  # the checksum of the fifth header
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.tar is damaged: there is no header at byte 4096 of 10240"):
        index_archives(path, FIELDS, tmp_path / "out")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(archive(tmp_path / "b.tar", members).read_bytes() * 2)
    with pytest.raises(MediaError, match=r"joined\.tar ends at byte 9216 of 20480, and there is more at byte 10240"):
        index_archives(joined, FIELDS, tmp_path / "out")
    open_end = index_archives(archive(tmp_path / "c.tar", members, end=False), FIELDS, tmp_path / "open")
    assert len(open_end) == 9
    assert "1 archives have no mark at their end and may be cut short" in caplog.text
    (tmp_path / "empty.tar").touch()
    with pytest.raises(MediaError, match=r"empty\.tar is no whole, uncompressed tar: it is empty"):
        index_archives(tmp_path / "empty.tar", FIELDS, tmp_path / "none")


def test_fault_07a_links_and_sparse_members_are_counted(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "a.jpg"
            tar.addfile(header, io.BytesIO())
        folder = tarfile.TarInfo("x.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    account = index_archives(tmp_path / "a.tar", FIELDS, tmp_path / "out").account
    assert (account.saw, account.yields, left(account)) == (4, 1, {"links to other members": 2, "folders": 1})


# tables that carry more than texts


def test_fault_10_class_names_of_parquet_arrive_at_any_depth(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        label=kind, tags=datasets.Sequence(kind), box={"kind": kind, "x": datasets.Value("int64")}
    )
    rows = {"label": [1, 0, -1], "tags": [[0, 1], [], [1]], "box": [{"kind": 1, "x": 7}, {"kind": 0, "x": 8}, None]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "t.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    wanted = [
        {"label": "dog", "tags": ["cat", "dog"], "box": {"kind": "dog", "x": 7}},
        {"label": "cat", "tags": [], "box": {"kind": "cat", "x": 8}},
        {"label": None, "tags": ["dog"], "box": {"kind": None, "x": None}},
    ]
    for source in (str(tmp_path / "t.parquet"), str(tmp_path / "saved")):
        found = rows_of(open_table(source))
        assert found[:2] == wanted[:2]
        assert found[2]["box"] in (None, wanted[2]["box"])
        assert (found[2]["label"], found[2]["tags"]) == (None, ["dog"])
    in_memory = mm.data.as_samples(data.data.table)
    assert [in_memory[i]["label"] for i in range(3)] == ["dog", "cat", None]


def test_fault_10_lists_of_pictures_are_values(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    files = [picture(tmp_path / f"{i}.png", 4 + i).read_bytes() for i in range(3)]
    features = datasets.Features(pages=datasets.Sequence(datasets.Image()), n=datasets.Value("int64"))
    rows = {"pages": [[{"bytes": f, "path": None} for f in files], []], "n": [1, 2]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "t.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    for number, source in enumerate((str(tmp_path / "t.parquet"), str(tmp_path / "saved"))):
        write_shards(open_table(source), tmp_path / f"out{number}")
        first, second = Shards(tmp_path / f"out{number}")
        assert [page.getvalue() for page in first["pages"]] == files
        assert second["pages"] == []
    mixed = [Media(b"a", "a.flac"), "text", None, 2, [b"b"], np.arange(3)]
    write_shards([{"x": mixed, "y": [np.zeros(2), np.ones(2)]}], tmp_path / "mixed")
    sample = Shards(tmp_path / "mixed")[0]
    assert [sample["x"][0].getvalue(), *sample["x"][1:4], sample["x"][4][0].getvalue()] == [b"a", "text", None, 2, b"b"]
    assert np.array_equal(sample["x"][5], np.arange(3))
    assert np.array_equal(np.stack(sample["y"]), [[0, 0], [1, 1]])
    extension, data = encoded([b"a", b"b", b"c"])
    for damage in (
        data[:1600],
        data[:1200],
        bytes([data[0] ^ 1]) + data[1:],
        data[:2048] + b"\1" + data[2049:],
        b"x" * 600,
    ):
        with pytest.raises(ValueError, match="the list is damaged"):
            decoded(extension, damage, "x")


class Polars:
    """A stand-in with the methods that are used of a polars.DataFrame."""

    columns = ("text", "label")

    def __len__(self):
        return 4

    def row(self, index, named):
        return {"text": ("a", "b", "c", None)[index], "label": float("nan") if index == 2 else "xyzx"[index]}


Polars.__module__, Polars.__qualname__, Polars.__name__ = "polars.dataframe.frame", "DataFrame", "DataFrame"


def test_fault_10_data_frames_are_data(tmp_path: Path):
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"text": ["a", "b", "c", None], "label": ["x", "y", None, "x"], "n": [1.0, None, 2, 3]})
    frame = frame[frame.index != 1].reset_index(drop=False).set_index("index")  # places are not the index
    wanted = [
        {"text": "a", "label": "x", "n": 1.0},
        {"text": "c", "label": None, "n": 2.0},
        {"text": None, "label": "x", "n": 3.0},
    ]
    learned = frame[frame.text.notna() & frame.label.notna()]
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(tuple("xy"))}, mm.Core(width=8, depth=1, heads=1), ["text -> label"]
    )
    mm.fit(model, {"text -> label": learned}, steps=2, batch=2, quiet=True, evaluation={"text -> label": learned})
    assert mm.evaluate(model, "text -> label", learned)["exact"] in (0.0, 1.0)
    table = arrow.Table.from_pandas(frame, preserve_index=False)
    for source in (frame, table, table.to_batches()[0], mm.data.Mixed(frame), mm.Fields(frame)):
        samples = mm.data.as_samples(source)
        assert [samples[i] for i in range(len(samples))] == wanted
    polars = mm.data.as_samples(Polars())
    assert [polars[i] for i in (0, 2, -1)] == [
        {"text": "a", "label": "x"},
        {"text": "c", "label": None},
        {"text": None, "label": "x"},
    ]
    write_shards(frame, tmp_path / "out")
    assert list(Shards(tmp_path / "out")) == wanted
    with pytest.raises(ConfigError, match="several columns of one name: a"):
        mm.data.as_samples(pandas.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(ConfigError, match="columns without a name: 0, 1"):
        write_shards(pandas.DataFrame([[1, 2]]), tmp_path / "no")


def test_fault_81_a_class_is_a_whole_number(tmp_path: Path):
    named = mm.Fields([(v,) for v in (1, 1.0, np.int64(1), torch.tensor(1), [0, 1])], "label", names={"label": "xyz"})
    assert [named[i]["label"] for i in range(5)] == ["y", "y", "y", "y", ["x", "y"]]
    for value in (1.7, True, "1", float("nan"), float("inf"), np.bool_(True), [0, 1.5], np.array([0.5])):
        with pytest.raises(MediaError, match=r"which is no number of a class; wanted 0, 1, 2"):
            mm.Fields([(value,)], "label", names={"label": "xyz"})[0]
    account = mm.Fields([(1, 2, 3)], "a", None, "b").account()
    assert (account.saw, account.yields, left(account)) == (3, 2, {"named None": 1})
    assert left(mm.Fields([{"a": 1, "b": 2}], "a").account()) == {"not among the fields": 1}


def test_fault_82_damaged_parquet_is_named_and_its_rows_are_counted(tmp_path: Path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    data = arrow.table({"n": list(range(900)), "text": [f"text {i}" for i in range(900)]})
    parquet.write_table(data, path, row_group_size=300, compression="snappy", use_dictionary=False)
    whole = path.read_bytes()
    with parquet.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(1)
        at = chunk.data_page_offset
    broken = bytearray(whole)
    broken[at : at + 200] = bytes(200)
    path.write_bytes(broken)
    source = open_table(str(path))
    found = rows_of(source)
    assert [row["n"] for row in found if isinstance(row, dict)] == [*range(300), *range(600, 900)]
    assert sum(isinstance(row, str) and row.startswith("row group 1 of ") for row in found) == 300
    assert (source.account().saw, source.account().yields) == (900, 600)
    with pytest.raises(MediaError, match="broken rows: 251, and max_bad=250"):
        write_shards(source, tmp_path / "out", max_bad=250)
    for damage in (whole[:-100], b"", b"PAR1" * 100, b"x" * 5000):
        path.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"t\.parquet cannot be read as Parquet"):
            open_table(str(path))
    schema = arrow.schema([("n", arrow.int64())], metadata={"huggingface": "{damaged"})
    parquet.write_table(arrow.table({"n": [1]}, schema=schema), path)
    with pytest.raises(ConfigError, match="description by Hugging Face datasets cannot be read"):
        open_table(str(path))


def test_fault_82a_one_text_that_is_none_costs_one_row(tmp_path: Path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = arrow.array([b"a", b"\xff\xfe", b"c"]).cast(arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "t.parquet")
    found = rows_of(open_table(str(tmp_path / "t.parquet")))
    assert [found[0], found[2]] == [{"text": "a"}, {"text": "c"}]
    assert "utf-8" in found[1]


# streams


class Noisy(torch.utils.data.IterableDataset):
    """Draws from every global generator while it is iterated, and shuffles at each beginning."""

    def __iter__(self):
        order = list(range(20))
        random.shuffle(order)
        for i in order:
            drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
            yield {"text": "abcdefghijklmnopqrst"[i] + "".join(chr(65 + int(x * 26)) for x in drawn), "label": "x"}


class Measured(Noisy):
    def __len__(self):
        return 20


def packs(source, packs: int = 2, **settings):
    packer = mm.packer.Packer({"text": TextBytes(), "label": Labels(tuple("xy"))}, ["text -> label"])
    return mm.data.Packs(packer, {"text -> label": source}, tokens=24, packs=packs, look_ahead=4, **settings)


def content(batches) -> list[list[int]]:
    return [stream.content["text"].tolist() for batch in batches for stream in batch.streams]


def test_fault_67_what_an_iterated_source_draws_is_a_function_of_the_seed(tmp_path: Path):
    def run(seed: int, stirred: int, steps: int = 6) -> list[list[int]]:
        random.seed(stirred), np.random.seed(stirred), torch.manual_seed(stirred)
        return content(packs(Noisy(), seed=seed).loader(0, steps, 0))

    first = run(3, 0)
    assert run(3, 1) == first
    assert run(4, 0) != first
    feed = packs(Noisy(), seed=3)
    list(feed.loader(0, 2, 0))
    state = json.loads(json.dumps(feed.state()))
    resumed = packs(Noisy(), seed=3)
    resumed.restore(state)
    torch.manual_seed(9)
    before = random.getstate(), torch.get_rng_state()
    assert content(resumed.loader(2, 6, 0)) == first[4:]
    assert random.getstate() == before[0]  # and the user's generators are as they were
    assert torch.equal(torch.get_rng_state(), before[1])
    letters = {chr(token) for stream in first for token in stream if token >= 97}
    assert len(letters) > 10  # several samples were met


def test_fault_67a_an_iterable_dataset_with_a_length_is_iterated():
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(tuple("xy"))}, mm.Core(width=8, depth=1, heads=1), ["text -> label"]
    )
    with pytest.raises(ConfigError, match="what can only be iterated is packed to a token budget"):
        mm.fit(model, {"text -> label": Measured()}, steps=1, batch=2, quiet=True)
    assert mm.fit(model, {"text -> label": Measured()}, steps=1, tokens=64, look_ahead=4, quiet=True).finished


class Fails:
    def __iter__(self):
        for i in range(7):
            yield {"text": f"text {i}", "label": "x"}
        raise OSError("the connection was reset")


@pytest.mark.parametrize("workers", [0, 1])
def test_fault_82_a_stream_that_fails_names_its_task_and_place(tmp_path: Path, workers: int):
    with pytest.raises(
        MediaError,
        match=r"task 'text -> label': sample 7 of its stream .*OSError: the connection was reset; an iterator ends",
    ):
        list(packs(Fails(), packs=1, max_bad=50).loader(0, 9, workers))
    if not workers:
        with pytest.raises(
            MediaError, match="write_shards: the source failed at row 7: OSError: the connection was reset"
        ):
            write_shards(Fails(), tmp_path / "out", max_bad=50)


# declarations, files, platforms


def test_fault_16_no_declaration_is_made_from_a_set(tmp_path: Path):
    for make in (
        lambda: Labels({"cat", "dog"}),
        lambda: Labels(names=frozenset({"cat", "dog"})),
        lambda: mm.Fields([(0,)], "label", names={"label": {"cat", "dog"}}),
        lambda: mm.Model(
            {"label": Labels(tuple("ab")), "text": TextBytes()}, mm.Core.tiny(), {"text -> label", "label -> text"}
        ),
        lambda: ImagePatches(patch=4, mean={0.4, 0.5, 0.6}),
        lambda: ImagePatches(patch=4, size={32, 64}),
    ):
        with pytest.raises(
            ConfigError, match=r"is a set, whose order differs from one process to the next; give a tuple"
        ):
            make()
    assert Labels({"cat": 0, "dog": 1}.keys()).names == ("cat", "dog")  # the keys of a dictionary have an order
    assert Labels(sorted({"dog", "cat"})).names == ("cat", "dog")


def test_fault_16a_declarations_of_strangers_are_asked_too():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Flags(mm.Tokenizer):
        names: tuple = ()
        more: object = None
        vocab_size = 2

        def encode(self, value):
            raise NotImplementedError

    for flags in (lambda: Flags({"a"}), lambda: Flags(more={"x": [{1, 2}]}), lambda: mm.override(Flags(), names={"b"})):
        with pytest.raises(ConfigError, match=r"Flags: (names|more\['x'\]) is a set"):
            flags()
    assert Flags(("a",), more={"x": [1]}).names == ("a",)


def test_fault_79_shards_are_read_without_pread_and_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards([{"a": bytes([i]) * 3000, "n": i} for i in range(60)], tmp_path / "s", shard_bytes=40_000)
    monkeypatch.delattr(os, "pread", raising=False)
    shards, wrong = Shards(tmp_path / "s", group=60), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 60, 150).tolist():
            try:
                sample = shards[i]
                if (sample["n"], sample["a"].getvalue()) != (i, bytes([i]) * 3000):
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    try:
        assert shards[7]["n"] == 7
        for number in range(len(shards.shards)):
            shards._opened(number)
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "pread"), reason="has no os.pread")
def test_fault_79a_a_read_that_gives_less_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards([{"a": bytes([i]) * 3000} for i in range(5)], tmp_path / "s")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: real(file, min(count, 700), at))  # as of more than 2 GiB
    assert [sample["a"].getvalue() for sample in Shards(tmp_path / "s")] == [bytes([i]) * 3000 for i in range(5)]


def test_fault_82b_every_reader_with_what_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        folder = tmp_path / f"folder.{suffix}"
        folder.mkdir()
        with pytest.raises(ConfigError, match="holds no picture or sound"):
            open_table(str(folder))
        empty = table(tmp_path, f"empty.{suffix}", "")
        if suffix == "jsonl":
            with pytest.raises(MediaError, match="there is no sample to write"):
                write_shards(open_table(empty), tmp_path / "out")
        else:
            with pytest.raises(ConfigError, match=rf"empty\.{suffix}"):
                open_table(empty)
        with pytest.raises(ConfigError, match="has no split 'train'"):
            open_table(empty, "train")
    with pytest.raises(ConfigError, match=r"cannot be read: .*File name too long"):
        open_table("x" * 5000 + ".csv")
    huge = open_table(table(tmp_path, "huge.csv", "a,b\n1," + "x" * 3_000_000 + "\n"))
    assert len(rows_of(huge)[0]["b"]) == 3_000_000
    wide = open_table(
        table(tmp_path, "wide.csv", ",".join(f"c{i}" for i in range(100_000)) + "\n" + "1," * 99_999 + "1\n1\n")
    )
    found = rows_of(wide)
    assert len(found[0]) == 100_000
    assert found[1].startswith("line 3: it has 1 columns, and the first line names 100000")
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "t"))
    )
    with pytest.raises(ConfigError, match=r"huge\.csv cannot be read: .*Permission denied"):
        open_table(str(tmp_path / "huge.csv"))
    monkeypatch.setattr("builtins.open", real)
    for samples in ({"a": [1]}, "text", 5, None):
        with pytest.raises(ConfigError, match=r"write_shards: the samples are (dict|str|int|NoneType); wanted a list"):
            write_shards(samples, tmp_path / "refused")
    with pytest.raises(ConfigError, match="field 1 must be a name of letters"):
        write_shards([{1: 2}], tmp_path / "numbers", max_bad=3)


def test_fault_71_nested_keys_that_are_no_texts_are_refused(tmp_path: Path):
    for value in ({"a": {1: 2}}, [{"a": 1}, {2: 3}], {"a": [{"b": {(1, 2): 3}}]}):
        with pytest.raises(MediaError, match="keys that are not texts"):
            write_shards([{"x": value}], tmp_path / "out")
    write_shards([{"x": {"a": {"1": [2]}}}], tmp_path / "fine")
    assert Shards(tmp_path / "fine")[0]["x"] == {"a": {"1": [2]}}


def test_fault_06c_the_command_says_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("cyclopts")
    from multimodal.cli import main

    junk(tmp_path / "photos")
    assert main(["shards", str(tmp_path / "photos"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("saw 16 entries: 4 are used, 12 left out\n  ")
    assert "  hidden or of the system: 7 (.git/x.png, @eaDir/x.png, Thumbs.db, ...)\n" in told.err
    for name in ("train/1.png", "val/2.png"):
        picture(tmp_path / "parts" / name)
    assert main(["shards", str(tmp_path / "parts"), str(tmp_path / "more")]) == 2
    assert "has the splits train, val; choose one, as in --split train" in capsys.readouterr().err
    assert main(["shards", str(tmp_path / "parts"), str(tmp_path / "more"), "--split", "val"]) == 0
    (tmp_path / "t.csv").write_bytes("a,b\n\xe9,1\n".encode("latin-1"))
    assert main(["shards", str(tmp_path / "t.csv"), str(tmp_path / "t"), "--encoding", "latin-1", "--no-quotes"]) == 0
    assert Shards(tmp_path / "t")[0]["a"] == "é"
