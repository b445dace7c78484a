"""Files that somebody means ill with: functions that write each into a folder, and the doors by which they come in.

Nothing here is binary or stays: `make(folder)` turns good files into bad ones, `open_it` takes them in as a user would.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import multimodal as mm
from multimodal.data import Shards
from multimodal.data.shard_writer import write_shards
from multimodal.data.tables import open_table
from multimodal.train.run_report import read_runs, table
from multimodal.train.spikes import load_spike, replay, save_spike
from multimodal.train.state import write_manifest
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBPE, TextBytes

TASK = "text -> label"
CLASSES = ("with a", "without")
DATA = [{"text": word, "label": CLASSES["a" not in word]} for word in ("ab", "cab", "bed", "face", "fed", "a")]
PLAIN: dict[str, Any] = {
    "steps": 3,
    "batch": 4,
    "precision": "float32",
    "device": "cpu",
    "quiet": True,
    "checkpoint_every": 2,
}
DEEP = "[" * 100_000 + "]" * 100_000
STRANGE: dict[str, Any] = {  # in the place of a value of a JSON file
    "nothing": None,
    "true": True,
    "minus": -1,
    "half": 0.5,
    "huge": 10**30,
    "text": "x",
    "path": "../../etc/passwd",
    "list": [],
    "lists": [[1, "a"], None],
    "object": {},
    "nan": float("nan"),
    "surrogate": "\ud800",
    "long": "x" * 100_000,
}


def make_model() -> mm.Model:
    return mm.Model({"text": TextBytes(), "label": Labels(CLASSES)}, mm.Core(width=8, depth=1, heads=2), [TASK])


def make_all(folder: Path) -> Path:
    """One of everything that is good: model/, bpe/, run/, shards/, trouble/, table.jsonl, tokenizer.json."""
    torch.manual_seed(0)
    make_model().save(folder / "model")
    bpe = TextBPE.train(["a cab", "a bed"] * 5, vocab_size=260)
    bpe.save(folder / "tokenizer.json")
    mm.Model({"text": bpe, "label": Labels(CLASSES)}, mm.Core(width=8, depth=1, heads=2), [TASK]).save(folder / "bpe")
    mm.fit(make_model(), {TASK: DATA}, folder=folder / "run", **PLAIN)
    write_shards(
        [{"text": word, "n": [1, 2], "blob": word.encode() * 9} for word in ("ab", "cab", "bed")], folder / "shards"
    )
    model = make_model()
    stream = model.pack(TASK, DATA)
    place = save_spike(folder / "job", 1, [stream], "a test", model, names=[[f"sample {i}" for i in range(len(DATA))]])
    assert place is not None
    place.rename(folder / "trouble")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    return folder


def open_model(folder: Path) -> Any:
    return mm.Model.load(folder / "model").predict(TASK, text="cab").value in CLASSES


def open_bpe(folder: Path) -> Any:
    return mm.Model.load(folder / "bpe").predict(TASK, text="aaaa" * 12).value in CLASSES


def open_run(folder: Path) -> Any:
    """Resumes the run, from the newest state that is whole."""
    return mm.fit(make_model(), {TASK: DATA}, folder=folder / "run", resume=True, **{**PLAIN, "steps": 3}).finished


def open_report(folder: Path) -> Any:
    return table(read_runs([folder / "run"]))


def open_shards(folder: Path) -> Any:
    shards = Shards(folder / "shards")
    try:
        return [shards[i] for i in range(len(shards))] and shards.check()
    finally:
        shards.close()


def open_making(folder: Path) -> Any:
    """Goes on writing shards that were begun."""
    return write_shards([{"text": "ab"}], folder / "shards", source={"samples": 3})


def open_spike(folder: Path) -> Any:
    found = load_spike(folder / "trouble")
    return replay(mm.Model.load(folder / "trouble", finite=False), found)


def open_tokenizer(folder: Path) -> Any:
    tokenizer = TextBPE.open(folder / "tokenizer.json")
    return tokenizer.decode(tokenizer("a cab " + "a" * 40))


def open_rows(folder: Path) -> Any:
    """Rows of a table, where a row that cannot be had is an exception in its place."""
    return list(open_table(str(next(folder.glob("table.*"))), None).read(0))


def open_picture(folder: Path) -> Any:
    return ImagePatches(patch=4, channels=3)(str(next(folder.glob("picture.*"))))


def open_sound(folder: Path) -> Any:
    return AudioFrames(rate_hz=8000, mels=8)(str(next(folder.glob("sound.*"))))


@dataclass(frozen=True)
class Entry:
    name: str
    door: Callable[[Path], Any]
    make: Callable[[Path], Any]


def edited(path: str, change: Callable[[Any], Any], sealed: bool = False) -> Callable[[Path], None]:
    """Change the values of a JSON file; sealed: with a manifest that fits, as whoever means ill would write it."""

    def make(folder: Path) -> None:
        file = next(iter(sorted(folder.glob(path), reverse=True)))
        data = json.loads(file.read_text(encoding="utf-8"))
        changed = change(data)
        file.write_text(json.dumps(data if changed is None else changed), encoding="utf-8")
        if sealed:
            reseal(file.parent)

    return make


def written(path: str, data: bytes | str, sealed: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = next(iter(sorted(folder.glob(path), reverse=True)), folder / path)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
        if sealed:
            reseal(file.parent)

    return make


def reseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def tensors(
    path: str, change: Callable[[dict[str, torch.Tensor]], Any], sealed: bool = False
) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = sorted(folder.glob(path))[-1]
        data = load_file(file)
        change(data)
        save_file({name: t.contiguous() for name, t in data.items()}, file)
        if sealed:
            reseal(file.parent)

    return make


def both(*makes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def put(data: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def drop(data: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        data = data[key]
    del data[path[-1]]


def paths(data: Any, most: int = 3) -> list[tuple[Any, ...]]:
    """Every place in JSON values, down to a depth."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    found: list[tuple[Any, ...]] = []
    for key, value in pairs:
        found.append((key,))
        if most > 1:
            found += [(key, *inner) for inner in paths(value, most - 1)]
    return found


def lying_header(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A safetensors file with another header."""

    def make(folder: Path) -> None:
        file = folder / "model" / "weights.safetensors"
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return make


def vocabulary(largest: int) -> Callable[[Path], None]:
    return edited("bpe/tokenizers/text/tokenizer.json", lambda data: data["model"]["vocab"].update({"zz": largest}))


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled_metadata(folder: Path) -> None:
    """A state as an earlier version shared it out; reading its pickle makes a folder `pickle_was_read`."""
    import pickle

    state = sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]
    (state / "sharded").mkdir()
    (state / "sharded" / ".metadata").write_bytes(pickle.dumps(_Bomb(folder / "pickle_was_read")))
    (state / "state.safetensors").unlink()
    reseal(state)


def outside_archive(folder: Path) -> None:
    """An index that names a file elsewhere as its archive, with offsets into its text."""
    (folder / "secret.txt").write_text("the password is swordfish" * 100)

    def change(index: Any) -> None:
        index["shards"][0]["name"] = str((folder / "secret.txt").resolve())
        index["shards"][0]["bytes"] = 2500

    edited("shards/index.json", change)(folder)


_CONFIG, _STATE = "model/config.json", "run/checkpoints/*/state.json"
_MOMENTS = "run/checkpoints/*/state.safetensors"
_QKV = "optimizer/exp_avg/core.blocks.0.layers.0.body.attention.qkv.weight"

ENTRIES = [
    Entry("config nested", open_model, written(_CONFIG, DEEP)),
    Entry(
        "config nested in a part",
        open_model,
        edited(_CONFIG, lambda c: put(c, ("core", "config", "mask"), json.loads("[" * 900 + "]" * 900))),
    ),
    Entry("config is no text", open_model, written(_CONFIG, bytes(range(256)) * 9)),
    Entry("config with a key twice", open_model, written(_CONFIG, '{"format": 1, "format": 1}')),
    Entry(
        "config of a million tasks", open_model, written(_CONFIG, '{"format": 1, "tasks": [' + "0," * 3_000_000 + "0]}")
    ),
    Entry("config of 20,000 tasks", open_model, edited(_CONFIG, lambda c: c.update(tasks=c["tasks"] * 20_000))),
    Entry("depth 100,000", open_model, edited(_CONFIG, lambda c: put(c, ("core", "config", "depth"), 100_000))),
    Entry("width 10^12", open_model, edited(_CONFIG, lambda c: put(c, ("core", "config", "width"), 8 * 10**12))),
    Entry("width 10^30", open_model, edited(_CONFIG, lambda c: put(c, ("core", "config", "width"), 8 * 10**30))),
    Entry("half a width", open_model, edited(_CONFIG, lambda c: put(c, ("core", "config", "width"), 8.5))),
    Entry(
        "300,000 labels",
        open_model,
        edited(_CONFIG, lambda c: put(c, ("tokenizers", "label", "config", "names"), [str(i) for i in range(300_000)])),
    ),
    Entry("an id of 2^26", open_bpe, vocabulary(2**26)),
    Entry("an id of 2^31", open_bpe, vocabulary(2**31)),
    Entry("an id of 2^40", open_bpe, vocabulary(2**40)),
    Entry("sha256 is a list", open_model, edited(_CONFIG, lambda c: c.update(sha256=["x"]))),
    Entry("sha256 outside, absolute", open_model, edited(_CONFIG, lambda c: c.update(sha256={"/etc/hostname": "x"}))),
    Entry("sha256 outside, above", open_model, edited(_CONFIG, lambda c: c.update(sha256={"a/../../x": "x"}))),
    Entry(
        "weights of NaN",
        open_model,
        tensors("model/weights.safetensors", lambda t: t["core.norm.weight"].fill_(float("nan"))),
    ),
    Entry(
        "weights of infinity",
        open_model,
        tensors("model/weights.safetensors", lambda t: t["core.norm.weight"].fill_(float("inf"))),
    ),
    Entry(
        "weights of whole numbers",
        open_model,
        tensors(
            "model/weights.safetensors", lambda t: t.update({"core.norm.weight": torch.ones(8, dtype=torch.int64)})
        ),
    ),
    Entry(
        "weights of truths",
        open_model,
        tensors("model/weights.safetensors", lambda t: t.update({"core.norm.weight": torch.ones(8, dtype=torch.bool)})),
    ),
    Entry(
        "weights of complex numbers",
        open_model,
        tensors(
            "model/weights.safetensors", lambda t: t.update({"core.norm.weight": torch.ones(8, dtype=torch.complex64)})
        ),
    ),
    Entry(
        "10,000 foreign weights",
        open_model,
        tensors(
            "model/weights.safetensors",
            lambda t: t.update({f"core.norm.weight{i}": torch.ones(0) for i in range(10_000)}),
        ),
    ),
    Entry(
        "a header that lies about a shape",
        open_model,
        lying_header(lambda h: h["core.norm.weight"].update(shape=[2**50])),
    ),
    Entry("a header with negative sizes", open_model, lying_header(lambda h: h["core.norm.weight"].update(shape=[-1]))),
    Entry("a header without types", open_model, lying_header(lambda h: h["core.norm.weight"].pop("dtype"))),
    Entry("a header of a list", open_model, written("model/weights.safetensors", struct.pack("<Q", 4) + b"[  ]")),
    Entry("a header of 2^60 bytes", open_model, written("model/weights.safetensors", struct.pack("<Q", 2**60) + b"{}")),
    Entry(
        "a header nested", open_model, written("model/weights.safetensors", struct.pack("<Q", 200_000) + DEEP.encode())
    ),
    Entry("weights of nothing", open_model, written("model/weights.safetensors", b"")),
    Entry("a pickle in a state", open_run, pickled_metadata),
    Entry("moments of another shape", open_run, tensors(_MOMENTS, lambda t: t.update({_QKV: torch.zeros(1)}), True)),
    Entry("moments of whole numbers", open_run, tensors(_MOMENTS, lambda t: t.update({_QKV: t[_QKV].long()}), True)),
    Entry("one moment missing", open_run, tensors(_MOMENTS, lambda t: t.pop(_QKV), True)),
    Entry(
        "all moments missing",
        open_run,
        tensors(_MOMENTS, lambda t: [t.pop(k) for k in list(t) if k.startswith("optim")], True),
    ),
    Entry(
        "moments of nobody",
        open_run,
        tensors(_MOMENTS, lambda t: t.update({"optimizer/exp_avg/nobody": torch.zeros(3)}), True),
    ),
    Entry(
        "a step count of a matrix",
        open_run,
        tensors(_MOMENTS, lambda t: t.update({_QKV.replace("exp_avg", "step"): torch.zeros(3, 3)}), True),
    ),
    Entry(
        "a state's weights of NaN",
        open_run,
        tensors(_MOMENTS, lambda t: t["model/core.norm.weight"].fill_(float("nan")), True),
    ),
    Entry("a state nested", open_run, written(_STATE, DEEP, True)),
    Entry("a state computed in load", open_run, edited(_STATE, lambda s: s.update(computed_in="load"), True)),
    Entry("a manifest nested", open_run, written("run/checkpoints/*/manifest.json", DEEP)),
    Entry(
        "a manifest that names others",
        open_run,
        edited("run/checkpoints/*/manifest.json", lambda m: m.update({"/etc/hostname": {"bytes": 1, "sha256": "x"}})),
    ),
    Entry(
        "a manifest of numbers",
        open_run,
        edited("run/checkpoints/*/manifest.json", lambda m: m.update({"state.json": 3})),
    ),
    Entry("a binary log", open_run, written("run/log.jsonl", bytes(range(256)))),
    Entry("a binary log, reported", open_report, written("run/log.jsonl", bytes(range(256)))),
    Entry("a nested log, reported", open_report, written("run/log.jsonl", DEEP)),
    Entry("a log of lists, reported", open_report, written("run/log.jsonl", "[1]\n[2]\n")),
    Entry(
        "a log of texts, reported", open_report, written("run/log.jsonl", '{"step": 1, "loss": "low"}\n{"step": 2}\n')
    ),
    Entry(
        "a log of huge numbers, reported",
        open_report,
        written("run/log.jsonl", f'{{"step": 1, "loss": {10**400}}}\n{{"step": 2}}\n'),
    ),
    Entry("a nested config, reported", open_report, written("run/config.json", DEEP)),
    Entry("a config of a list, reported", open_report, written("run/config.json", "[1]")),
    Entry(
        "a config of unknown tasks, reported",
        open_report,
        written("run/config.json", '{"recipe": [], "tasks": [{"pattern": []}, 3]}'),
    ),
    Entry("a broken row of a number", open_run, written("run/bad.jsonl", '{"step": 1, "task": 3}\n{"step": 2}\n')),
    Entry("an index nested", open_shards, written("shards/index.json", DEEP)),
    Entry("an index of another file", open_shards, outside_archive),
    Entry(
        "an index that goes up",
        open_shards,
        edited("shards/index.json", lambda i: put(i, ("shards", 0, "name"), "../run/log.jsonl")),
    ),
    Entry(
        "an index of a device",
        open_shards,
        edited("shards/index.json", lambda i: put(i, ("shards", 0, "name"), "/dev/zero")),
    ),
    Entry(
        "an index of 2^39 samples",
        open_shards,
        edited("shards/index.json", lambda i: put(i, ("shards", 0, "samples"), 2**39)),
    ),
    Entry(
        "a making nested",
        open_making,
        both(lambda f: (f / "shards/index.json").rename(f / "shards/making.json"), written("shards/making.json", DEEP)),
    ),
    Entry("a table of a shard that is cut", open_shards, written("shards/000000.index", b"{}\n1234567")),
    Entry("a spike nested", open_spike, written("trouble/trouble-0.json", DEEP)),
    Entry(
        "a spike without a number",
        open_spike,
        both(lambda f: (f / "trouble/trouble-0.json").rename(f / "trouble/trouble-x.json")),
    ),
    Entry(
        "a spike of a file elsewhere",
        open_spike,
        edited("trouble/trouble-0.json", lambda t: t.update(streams=["/etc/hostname"])),
    ),
    Entry(
        "a spike of wrong counts",
        open_spike,
        edited("trouble/trouble-0.json", lambda t: t.update(counts={TASK: "x"})),
    ),
    Entry(
        "a stream with rows beyond",
        open_spike,
        tensors("trouble/stream-*.safetensors", lambda t: t["reading 0/row_N"].add_(10_000)),
    ),
    Entry("a tokenizer nested", open_tokenizer, written("tokenizer.json", DEEP)),
    Entry("a tokenizer of nothing", open_tokenizer, written("tokenizer.json", "{}")),
    Entry("a tokenizer of bytes", open_tokenizer, written("tokenizer.json", bytes(range(256)))),
    Entry(
        "a tokenizer whose rule gives up",
        open_tokenizer,
        edited(
            "tokenizer.json",
            lambda t: t.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": r"(a+)+b"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ),
        ),
    ),
    Entry("a table of nested JSON", open_rows, written("table.jsonl", DEEP + "\n")),
    Entry("a table of bytes", open_rows, written("table.jsonl", bytes(range(256)))),
    Entry("a picture of one row", open_picture, written("picture.png", b"\x89PNG\r\n\x1a\n" + b"x" * 50)),
    Entry("a picture of 10^9 pixels", open_picture, written("picture.ppm", b"P6 40000 40000 255\n")),
    Entry("a sound of nothing", open_sound, written("sound.wav", b"RIFF\x00\x00\x00\x00WAVE")),
    Entry("a sound of bytes", open_sound, written("sound.flac", b"fLaC" + bytes(range(256)) * 8)),
]


def every_field(path: str, door: Callable[[Path], Any], good: Path, sealed: bool = False) -> list[Entry]:
    """An entry for every place of a JSON file and every unexpected value, and one where the place is not there."""
    file = sorted(good.glob(path))[-1]
    entries = []
    for place in paths(json.loads(file.read_text(encoding="utf-8"))):
        for name, value in STRANGE.items():
            change = edited(path, lambda data, place=place, value=value: put(data, place, value), sealed)
            entries.append(Entry(f"{path}: {place} is {name}", door, change))
        entries.append(
            Entry(f"{path}: {place} is gone", door, edited(path, lambda data, place=place: drop(data, place), sealed))
        )
    return entries
