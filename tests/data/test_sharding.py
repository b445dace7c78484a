"""Making shards: killed anywhere and started again, from every sort of source, on the command line, and larger than memory."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal.data.shard_writer import write_shards
from multimodal.data.shards import Shards
from multimodal.data.tables import open_table
from multimodal.shapes import ConfigError, MediaError

pytest.importorskip("cyclopts")  # GPU machines may lack it, and run the tests marked cuda alone

from multimodal.cli import main

ROOT = Path(__file__).resolve().parents[2]
KILLED = '''
"""A writer that kills itself in its n-th step, for every n: at each sample, before each new name, after each new name."""
import json, os, signal, sys
from pathlib import Path
from multimodal.data.shard_writer import write_shards

real = os.replace

class Samples:
    """40 of 3000 bytes; every 7th is broken."""
    def __init__(self, stop): self.left = stop
    def step(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def __len__(self): return 40
    def __getitem__(self, i):
        self.step()
        if i % 7 == 5:
            raise ValueError(f"{i} is broken")
        return {"a": bytes([i]) * (40_000 if i == 18 else 3000), "b": i}  # longer than an archive, before a broken one

os.fsync = lambda file: None  # a killed process loses nothing that it has written; a machine without power would

def write(folder, stop):
    samples = Samples(stop)
    def replace(a, b):
        samples.step()
        real(a, b)
        samples.step()
    os.replace = replace
    write_shards(samples, folder, shard_bytes=30_000, max_bad=6)

def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

root, rng = Path(sys.argv[1]), __import__("random").Random(0)
write(root / "whole", 0)
wanted, kills, same = content(root / "whole"), 0, 0
steps = list(range(1, 70, 3))
for n in steps:
    folder, stop, times = root / str(n), n, 0
    while (child := os.fork()) == 0 or os.waitpid(child, 0)[1] == signal.SIGKILL:
        if child == 0:
            write(folder, stop)
            os._exit(0)
        times, stop = times + 1, rng.randrange(1, 30) if times < 3 else 0
    kills += times
    same += content(folder) == wanted
print(json.dumps([kills, same, len(steps), sorted(wanted)]))
'''


def in_new_python(code: str, *arguments: object, **options) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its own forks")
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(tmp_path: Path):
    kills, same, tried, files = json.loads(in_new_python(KILLED, tmp_path))
    assert files == sorted(
        [f"{i:06d}.{kind}" for i in range(7) for kind in ("tar", "index")] + ["bad.jsonl", "index.json"]
    )
    assert same == tried
    assert kills > 1.5 * tried


def rows(count: int) -> list[dict[str, object]]:
    return [{"a": bytes([i]) * 3000, "n": i} for i in range(count)]


def test_other_settings_and_other_data_are_refused(tmp_path: Path):
    made = write_shards(rows(10), tmp_path / "s", shard_bytes=20_000)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    again = write_shards(rows(10), tmp_path / "s", shard_bytes=20_000)
    assert (made.already, again.already) == (False, True)
    assert (again.samples, again.shards, again.bytes, again.fields) == (10, made.shards, made.bytes, ("a", "n"))
    with pytest.raises(ConfigError, match="was made with shard_bytes 20000, and now it is 30000"):
        write_shards(rows(10), tmp_path / "s", shard_bytes=30_000)
    with pytest.raises(ConfigError, match="was made with source"):
        write_shards(rows(11), tmp_path / "s", shard_bytes=20_000)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds other things; give a new folder"):
        write_shards(rows(10), tmp_path / "mine")


def interrupted(count: int, broken: int = -1):
    for row in rows(count):
        yield {} if row["n"] == broken else row
    raise RuntimeError("stopped")


def test_unfinished_work_is_checked_before_it_is_resumed(tmp_path: Path):
    class Once:
        def __iter__(self):
            return interrupted(9)

    with pytest.raises(MediaError, match=r"failed at row .*RuntimeError: stopped"):
        write_shards(Once(), tmp_path / "s", shard_bytes=20_000)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        *("000000.index", "000000.tar", "000001.index", "000001.tar", "making.json")
    ]
    with pytest.raises(ConfigError, match="was made with shard_bytes 20000, and now it is 25000"):
        write_shards(Once(), tmp_path / "s", shard_bytes=25_000)
    with pytest.raises(ConfigError, match="it was not finished: give the same command again"):
        Shards(tmp_path / "s")
    (tmp_path / "s" / "000001.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"000001\.tar was changed since it was written; delete"):
        write_shards(Once(), tmp_path / "s", shard_bytes=20_000)


def test_broken_rows_are_named_counted_and_bounded(tmp_path: Path):
    samples = [
        {"a": 1},
        {"a": tmp_path / "gone.jpg"},
        {"a": None},
        {"a": b""},
        {"a": float("nan")},
        {"a": object()},
        {"a": {1: 2}},
        {"a": (np.zeros((3, 3, 3)), 8000)},
        {"a": np.array([object()])},
    ]
    with pytest.raises(MediaError, match=r"broken rows: 1, and max_bad=0; .*\n  row 1: a: .*No such file.*gone\.jpg"):
        write_shards(samples, tmp_path / "s")
    with pytest.raises(MediaError, match=r"broken rows: 8(.|\n)*row 5: (.|\n)*and 3 more"):
        write_shards(samples, tmp_path / "s", max_bad=7)
    made = write_shards(samples, tmp_path / "s", max_bad=8)  # a higher bound goes on where the lower one stopped
    assert (made.samples, [row for row, _ in made.bad]) == (1, list(range(1, 9)))
    listed = [json.loads(line) for line in (tmp_path / "s" / "bad.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["error"]) for entry in listed] == list(made.bad)
    for row, words in [
        (2, "it has no value"),
        (3, "is empty"),
        (4, "JSON"),
        (6, "keys that are not texts"),
        (7, "no sound"),
    ]:
        assert words in dict(made.bad)[row]
    with pytest.raises(MediaError, match=r"failed at row .*RuntimeError: stopped"):
        write_shards(interrupted(15, broken=2), tmp_path / "t", shard_bytes=20_000, max_bad=1)
    with pytest.raises(MediaError, match=r"broken rows: 1, and max_bad=0; (.|\n)*row 2: it has no value"):
        write_shards(rows(15), tmp_path / "t", shard_bytes=20_000, source={"samples": None})
    with pytest.raises(MediaError, match="there is no sample to write"):
        write_shards([], tmp_path / "none")


def test_what_is_no_mapping_or_no_name_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Fields\(samples, 'image', 'label'\) names the parts of a tuple"):
        write_shards([(1, 2)], tmp_path / "a", max_bad=9)
    with pytest.raises(ConfigError, match=r"field 'a\.b' must be a name of letters"):
        write_shards([{"a.b": 1}], tmp_path / "b", max_bad=9)
    with pytest.raises(ConfigError, match="shard_bytes=9"):
        write_shards([{"a": 1}], tmp_path / "c", shard_bytes=9)


def picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)
    return path


def test_a_folder_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i, name in enumerate(("cat/1.png", "cat/deep/2.PNG", "dog/3.png", "4.png")):
        picture(tmp_path / "photos" / name, i)
    (tmp_path / "photos" / "dog" / "bark.WAV").write_bytes(b"RIFF")
    (tmp_path / "photos" / "dog" / "notes.md").write_text("x")
    out = tmp_path / "out"
    assert main(["shards", str(tmp_path / "photos"), str(out)]) == 0
    output = capsys.readouterr()
    assert output.out == f"samples  5\nfields   image, label, audio\nshards   1, 0.0 MB\nfolder   {out}\n"
    assert output.err == "saw 6 entries: 5 are used, 1 left out\n  of another format (.md): 1 (dog/notes.md)\n"
    read = [{k: v if k == "label" else v and v.getvalue() for k, v in sample.items()} for sample in Shards(out)]
    folder = tmp_path / "photos"
    assert read == [
        {"image": (folder / "4.png").read_bytes(), "label": None, "audio": None},
        {"image": (folder / "cat/1.png").read_bytes(), "label": "cat", "audio": None},
        {"image": (folder / "cat/deep/2.PNG").read_bytes(), "label": "cat", "audio": None},
        {"image": (folder / "dog/3.png").read_bytes(), "label": "dog", "audio": None},
        {"image": None, "label": "dog", "audio": b"RIFF"},
    ]
    assert main(["shards", str(folder), str(out)]) == 0
    assert "it was complete already" in capsys.readouterr().out
    picture(folder / "dog/5.png", 5)
    assert main(["shards", str(folder), str(out)]) == 2
    assert "was made with source" in capsys.readouterr().err
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no picture or sound"):
        open_table(str(folder / "empty"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_of_files(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]):
    picture(tmp_path / "a.png", 1)
    table, out = tmp_path / f"table{suffix}", tmp_path / "out"
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerows([["file name", "words", "n"], ["a.png", 'two "lines",\nä', "7"], ["gone.png", "x", ""]])
        file.write("\n")
        writer.writerows([["short"], ["", "no picture", "1"]])
    command = [
        "shards",
        str(table),
        str(out),
        "--quotes",
        "--fields",
        "image=file name",
        "--fields",
        "words",
        "--files",
        "image",
    ]
    assert main(command) == 2
    assert "row 1: image: [Errno 2] No such file" in capsys.readouterr().err
    assert main([*command, "--max-bad", "2"]) == 0
    output = capsys.readouterr()
    assert "row 2: line 6: it has 1 columns, and the first line names 3" in output.err
    assert "broken rows that were left out: 2; they are listed in" in output.err
    first, second = Shards(out)
    assert (first["image"].getvalue(), first["words"]) == ((tmp_path / "a.png").read_bytes(), 'two "lines",\nä')
    assert second == {"image": None, "words": "no picture"}
    assert main([*command[:3], "--fields", "image=filename"]) == 2
    assert (
        "--fields: there is no 'filename'; there are file name, words, n; did you mean 'file name'?"
        in capsys.readouterr().err
    )
    assert main([*command[:3], "--files", "image"]) == 2
    assert "--files: there is no 'image'" in capsys.readouterr().err


def test_broken_lines_of_a_table(tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_bytes(b'a,b\n1,2\n"x"y,3\n\xff,4\n5,6\n')
    made = write_shards(open_table(str(table)), tmp_path / "out", max_bad=2)
    assert [row for row, _ in made.bad] == [1, 2]
    assert "line 3: ',' expected after '\"'" in made.bad[0][1]
    assert list(Shards(tmp_path / "out")) == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    table.write_text("a,a\n1,2\n")
    with pytest.raises(ConfigError, match="wanted a first line that names the columns, each once"):
        open_table(str(table))


def test_json_lines_keep_their_types(tmp_path: Path):
    picture(tmp_path / "a.png", 1)
    lines = [
        '{"file": "a.png", "n": 1, "list": [1.5, null], "text": "t"}',
        "",
        "{broken",
        "[1]",
        '{"n": 2, "file": 3}',
        '{"n": 4}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    made = write_shards(open_table(str(tmp_path / "t.jsonl")).select({}, ["file"]), tmp_path / "out", max_bad=3)
    assert [row for row, _ in made.bad] == [1, 2, 3]
    first, last = Shards(tmp_path / "out")
    assert first.pop("file").getvalue() == (tmp_path / "a.png").read_bytes()
    assert first == {"n": 1, "list": [1.5, None], "text": "t"}
    assert last == {"n": 4, "list": None, "text": None, "file": None}


def test_parquet(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [
        {"n": i, "image": {"bytes": bytes([i % 256]) * 9, "path": f"{i}.jpg"}, "v": [i / 2] * 2 if i % 3 else None}
        for i in range(1000)
    ]
    parquet.write_table(pa.Table.from_pylist(data), tmp_path / "t.parquet", row_group_size=300)
    table = open_table(str(tmp_path / "t.parquet"))
    for start in (0, 1, 299, 300, 301, 650, 999, 1000):
        assert [row["n"] for row in table.rows(start)] == list(range(start, 1000))
    assert table.total == 1000
    write_shards(table, tmp_path / "out", shard_bytes=500_000)
    shards = Shards(tmp_path / "out")
    assert [sample["v"] for sample in shards] == [row["v"] for row in data]
    assert shards[7]["image"].getvalue() == bytes([7]) * 9
    assert shards[7]["image"].name.endswith("000000007.image.jpg")


def test_a_data_set_of_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets")
    paths = [str(picture(tmp_path / f"{i}.png", i)) for i in range(4)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), text=datasets.Value("string")
    )
    data = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, -1, 1], "text": list("abcd")}, features=features)
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "saved"))
    command = ["shards", str(tmp_path / "saved"), str(tmp_path / "out")]
    assert main(command) == 2
    assert "saved has the splits train, test; choose one with --split" in capsys.readouterr().err
    assert main([*command, "--split", "train"]) == 0
    shards = Shards(tmp_path / "out")
    assert [sample["label"] for sample in shards] == ["cat", "dog", None, "dog"]
    assert [sample["image"].getvalue() for sample in shards] == [Path(path).read_bytes() for path in paths]
    assert main([*command, "--split", "train"]) == 0
    assert "it was complete already" in capsys.readouterr().out
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((names, split)) or data)
    for name in ("hf:a/pets", "hf:a/pets:small"):
        assert [row["label"] for row in open_table(name, "train").rows(1)] == ["dog", None, "dog"]
    assert asked == [(("a/pets", None), "train"), (("a/pets", "small"), "train")]


def test_what_is_no_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data.csv").write_text("a\n1\n")
    (tmp_path / "data.xls").touch()
    with pytest.raises(ConfigError, match=r"there is no file or folder .*; did you mean 'data\.csv'\?"):
        open_table(str(tmp_path / "daat.csv"))
    with pytest.raises(ConfigError, match=r"wanted a folder or a file that ends in \.csv, "):
        open_table(str(tmp_path / "data.xls"))
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (str(tmp_path / "t.parquet"), "hf:mnist"):
        with pytest.raises(ConfigError, match=r"install it: pip install 'multimodal-stream\[data\]'"):
            open_table(name)


def test_verify_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_shards(rows(10), tmp_path / "s", shard_bytes=20_000)
    assert main(["shards", str(tmp_path / "s"), "--verify"]) == 0
    count = len(Shards(tmp_path / "s").shards)
    assert capsys.readouterr().out == f"{count} of {count} shards are as they were written\n"
    archive = tmp_path / "s" / "000001.tar"
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    assert main(["shards", str(tmp_path / "s"), "--verify"]) == 1
    output = capsys.readouterr()
    assert output.out == f"{count - 1} of {count} shards are as they were written\n"
    assert output.err == "000001.tar: its sha256 is not the one in index.json\n"
    assert main(["shards", str(tmp_path / "s")]) == 2


RECORDS = '''
import sys
import numpy as np
from multimodal.data.shard_writer import write_shards

class Records:
    """3.5 KB of noise each, behind one byte that says which."""
    noise = np.random.default_rng(0).bytes(2**20)
    def __len__(self): return 100_000
    def __getitem__(self, i):
        at = i * 7919 % (2**20 - 4000)
        return {"reading": bytes([i % 256]) + self.noise[at : at + 3499]}

print(write_shards(Records(), sys.argv[1], shard_bytes=10_000_000).bytes)
'''
BOUNDED = """
import json, resource, sys, time
from collections import Counter
from dataclasses import dataclass
import torch
import multimodal as mm
from multimodal.data import Batches
from multimodal.data.shards import Shards

torch.set_num_threads(1)

@dataclass(frozen=True)
class FirstByte(mm.Tokenizer):
    vocab_size: int = 256
    discrete = True
    def encode(self, value):
        return mm.Tokens(torch.tensor([value.getvalue()[0]]), torch.zeros(1, 3))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

samples = Shards(sys.argv[1], group=4)
batches = Batches(mm.packer.Packer({"reading": FirstByte()}, ["-> reading"]), {"-> reading": samples}, batch=1000)
next(iter(batches.loader(0, 1, 0)))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
held = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
before, began, met, names = peak(), time.process_time(), Counter(), set()
try:
    if sys.argv[3] == "all":
        list(samples)
    for batch in batches.loader(0, 100, 0):
        met.update(batch.streams[0].content["reading"].tolist())
        names.update(int(name.split()[1]) for name in batch.names[0])
    error = None
except MemoryError:
    error = "MemoryError"
print(json.dumps([error, len(names), sum(met.values()), peak() - before, time.process_time() - began]))
"""


@pytest.mark.training
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="bounds memory as Linux does")
def test_a_stream_of_100_000_samples_that_is_larger_than_the_memory_it_may_have(tmp_path: Path):
    """40 s of CPU here. RLIMIT_DATA bounds what a process allocates (heap and private maps), not the libraries it maps."""
    allowed = 100_000_000  # bytes above what is held once everything is imported and one batch was made
    assert int(in_new_python(RECORDS, tmp_path / "s")) > 4 * allowed
    error, different, count, growth, cpu_s = json.loads(in_new_python(BOUNDED, tmp_path / "s", allowed, "stream"))
    print(f"peak memory grew by {growth / 1e6:.1f} MB over 100,000 samples of {cpu_s:.1f} s of CPU")
    assert (error, different, count) == (None, 100_000, 100_000)
    assert growth < allowed
    assert json.loads(in_new_python(BOUNDED, tmp_path / "s", allowed, "all"))[0] == "MemoryError"
