"""Checkpoints: what is saved comes back bit for bit, what is damaged is named, and nothing is run that was not installed."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import multimodal as mm
from multimodal import checkpoint
from multimodal.attention import Cosine
from multimodal.shapes import CheckpointError
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBPE, TextBytes

MASK = mm.masks.SameSample() & (mm.masks.Causal() | mm.masks.Prefix()) & (mm.masks.Window(50) | ~mm.masks.SameSegment())
CORE = mm.Core(width=32, depth=2, heads=4, kv_heads=2, mask=MASK, score=Cosine(), rotary_split=(1, 1, 1), dropout=0.1)
TASKS = [
    mm.Task("image -> label", mm.Classify(label_smoothing=0.1), weight=0.5),
    "image text -> text",
    mm.Task("sound -> letters", mm.CTC()),
    "photo:image sound -> tags",
]
CORPUS = ["the cat sat on the mat", "grüße aus köln 🙂", "das ist der zweite satz"] * 3


def build(seed: int = 0) -> mm.Model:
    tokenizers = {
        "image": ImagePatches(patch=4, mean=(0.1, 0.2, 0.3), position="learned", grid=3, max_side=20),
        "text": TextBPE.train(CORPUS, vocab_size=280, causal=True),
        "letters": TextBytes(),
        "sound": AudioFrames(rate_hz=8000, mels=8, hop_ms=12.5, normalise="fixed"),
        "label": Labels(("cat", "dög")),
        "tags": Labels(("a", "b", "c"), several=True),
    }
    return mm.Model(tokenizers, CORE, TASKS, seed=seed)


@pytest.fixture(scope="module")
def model() -> mm.Model:
    torch.manual_seed(5)
    model = build()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1)
    return model.eval()


@pytest.fixture
def folder(model: mm.Model, tmp_path: Path) -> Path:
    return model.save(tmp_path / "größe" / "model")


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


def assert_same(one: mm.Model, other: mm.Model) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor.view(torch.int32), theirs[name].view(torch.int32)), name


# There and back


def test_everything_comes_back(model: mm.Model, folder: Path) -> None:
    loaded = mm.Model.load(folder).eval()
    assert_same(model, loaded)
    assert loaded.packer.tokenizers == model.packer.tokenizers
    assert list(loaded.packer.tokenizers) == list(model.packer.tokenizers)
    assert loaded.core.core == CORE
    assert loaded.core.core.mask == MASK
    assert loaded.tasks == model.tasks
    assert loaded.tasks["image -> label"] == mm.Task("image -> label", mm.Classify(label_smoothing=0.1), 0.5)
    assert loaded.seed == model.seed
    sample = {"image": np.linspace(0, 1, 9 * 14).reshape(9, 14), "text": "the cat 🙂", "answer": "satz", "label": "dög"}
    for task in ("image -> label", "image text -> text"):
        stream = model.pack(task, [sample])
        assert torch.equal(loaded(loaded.pack(task, [sample])), model(stream))


def test_saving_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = mm.Model.load(folder).save(str(tmp_path / "again"))
    files = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in (folder, again)]
    assert files[0] == files[1] == ["config.json", "tokenizers/text/tokenizer.json", "weights.safetensors"]
    for name in files[0]:
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_odd_numbers_come_back(tmp_path: Path) -> None:
    model = mm.Model({"text": TextBytes()}, mm.Core(width=8, depth=1, heads=2), ["text -> text"])
    with torch.no_grad():
        weight = model.embeds["text"].weight
        weight[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3.4e38])
    assert_same(model, mm.Model.load(model.save(tmp_path / "model"), finite=False))


def test_no_pickle(model: mm.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "dumps"),
        (torch, "load"),
        (torch, "save"),
    ):
        monkeypatch.setattr(module, name, lambda *_, used=name, **__: pytest.fail(f"used {used}"))
    folder = model.save(tmp_path / "model")
    mm.Model.load(folder)
    for path in folder.rglob("*.*"):
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:  # safetensors: the length of a JSON header, the header, and numbers
            data = path.read_bytes()
            assert path.suffix == ".safetensors"
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_loading_in_a_fresh_process_finds_tokenizers_by_their_entry_points(folder: Path) -> None:
    program = (
        "import sys; from multimodal import Model; assert 'multimodal_tokenizers' not in sys.modules; "
        "print(sorted(type(t).__name__ for t in Model.load(sys.argv[1]).packer.tokenizers.values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        sorted(["ImagePatches", "TextBPE", "TextBytes", "AudioFrames", "Labels", "Labels"])
    )


# Weights that do not fit


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "weights.safetensors").items()}
    change(weights)
    save_file(weights, folder / "weights.safetensors")


def test_missing_foreign_and_misshapen_tensors_are_named(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["core.norm.wait"] = weights.pop("core.norm.weight")
        weights["embeds.letters.weight"] = torch.zeros(255, 32)

    change_weights(folder, change)
    with pytest.raises(CheckpointError) as raised:
        mm.Model.load(folder)
    assert str(raised.value) == (
        f"{folder}: the weights do not fit the config: missing core.norm.weight; "
        "foreign core.norm.wait; did you mean 'core.norm.weight'?; embeds.letters.weight is (255, 32), wanted (256, 32)"
    )


def test_many_problems_are_counted(folder: Path) -> None:
    wanted = len(load_file(folder / "weights.safetensors"))
    change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights)[1:]])
    with pytest.raises(CheckpointError, match=rf"(missing [\w.]+; ){{6}}and {wanted - 1 - 6} more$"):
        mm.Model.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(folder: Path, keep: float) -> None:
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged or cut short: ."):
        mm.Model.load(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing$"):
        mm.Model.load(folder)


# Configs that do not fit


def test_no_checkpoint_here(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            CheckpointError, match=r": no config\.json here; a checkpoint is a folder that Model\.save wrote$"
        ):
            mm.Model.load(folder)


@pytest.mark.parametrize("text", [b"", b'{"format": 1', b"\xff\xfe", b"[]", b"7", b"null"])
def test_damaged_config(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json: damaged: ."):
        mm.Model.load(folder)


@pytest.mark.parametrize("number", [99, None, "1"])
def test_format_of_another_time(folder: Path, number: object) -> None:
    edit(folder, lambda config: config.update(format=number))
    with pytest.raises(
        CheckpointError, match=rf"config\.json: format {number!r}, but this version reads 1; update multimodal-str"
    ):
        mm.Model.load(folder)


@pytest.mark.parametrize("part", ["tokenizers", "core", "tasks", "seed"])
def test_missing_part(folder: Path, part: str) -> None:
    edit(folder, lambda config: config.pop(part))
    with pytest.raises(CheckpointError, match=rf"config\.json: the part '{part}' is missing$"):
        mm.Model.load(folder)


WRONG_CONFIGS = [
    (
        lambda c: c["tokenizers"]["text"].update(type="their_package:Text"),
        r": tokenizer 'text': 'their_package:Text' is not installed: install the package.*Installed are: ",
    ),
    (
        lambda c: c["tokenizers"]["image"]["config"].update(pach=4),
        r": tokenizer 'image': ImagePatches has no setting 'pach'; .*did you mean 'patch'\?",
    ),
    (
        lambda c: c["tokenizers"]["image"]["config"].update(patch=0),
        r"config.json: what it declares cannot be built: ConfigError: ImagePatches: patch=0 must",
    ),
    (lambda c: c["tokenizers"]["text"]["config"].update(more=1), r"cannot be built: TypeError: .*more"),
    (lambda c: c["tokenizers"]["image"].pop("type"), r"tokenizer 'image': the part 'type' is missing"),
    (lambda c: c.update(tokenizers=[1]), r"'tokenizers' is \[1\], wanted an object"),
    (lambda c: c["tokenizers"].pop("sound"), r"cannot be built: TaskError: task 'sound -> letters' names 'sound'"),
    (
        lambda c: c["tokenizers"].update(image=c["core"]),
        r"cannot be built: ConfigError: tokenizers\['image'\] is Core, not a Tokenizer",
    ),
    (
        lambda c: c.update(core=c["tokenizers"]["image"]),
        r"cannot be built: ConfigError: Model: core is ImagePatches; give a Core",
    ),
    (
        lambda c: c["core"]["config"].update(width=33),
        r"cannot be built: ConfigError: Core: width=33 does not give heads=4 an even width each",
    ),
    (lambda c: c["core"]["config"]["mask"].update(type="os:system"), r"'os:system' is not installed"),
    (lambda c: c["core"].update(type="multimodal.tokenizer:Tokenizer"), r"cannot be built: TypeError"),
    (lambda c: c["tasks"][0].update(head=c["core"]), r"cannot be built: AttributeError"),
    (
        lambda c: c["tasks"][0].update(pattern="image label"),
        r"cannot be built: TaskError: task 'image label' has no '->'",
    ),
    (lambda c: c["tasks"].append(c["tasks"][0]), r"cannot be built: TaskError: task 'image -> label' is given twice"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CONFIGS, ids=range(len(WRONG_CONFIGS)))
def test_wrong_config(folder: Path, change: Callable[[dict], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        mm.Model.load(folder)
    assert str(raised.value).startswith(str(folder))


# Nothing is run or read that a stranger's config asks for


@pytest.mark.parametrize("place", ["tokenizer", "core", "mask", "head"])
@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "builtins:exec", "trap:Trap"])
def test_a_config_cannot_name_code(
    folder: Path, place: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "was_run"
    (tmp_path / "trap.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Trap: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = []
    monkeypatch.setattr(os, "system", run.append)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: run.append(args))

    def change(config: dict) -> None:
        part = {
            "tokenizer": config["tokenizers"]["letters"],
            "core": config["core"],
            "mask": config["core"]["config"]["mask"],
            "head": config["tasks"][0]["head"],
        }[place]
        part["type"] = name

    edit(folder, change)
    with pytest.raises(CheckpointError, match=f"'{name}' is not installed"):
        mm.Model.load(folder)
    assert not run
    assert "trap" not in sys.modules
    assert not marker.exists()


@pytest.mark.parametrize("way", ["../../secret.json", "../text/../../../secret.json", "absolute"])
def test_files_outside_the_folder_are_refused(folder: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = folder / "secret.json" if way == "../../secret.json" else folder.parent / "secret.json"
    secret.write_text("{}", encoding="utf-8")
    name = str(secret.resolve()) if way == "absolute" else way
    assert (folder / "tokenizers" / "text" / name).is_file()
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"read {self}"))
    edit(folder, lambda config: config["tokenizers"]["text"].update(files=[name]))
    with pytest.raises(
        CheckpointError, match=r"tokenizer 'text': its file .*secret\.json' would lie outside the checkpoint; refused$"
    ):
        mm.Model.load(folder)


def test_a_tokenizer_named_as_a_path_reads_nothing_outside(folder: Path) -> None:
    (folder.parent / "tokenizer.json").write_text("{}", encoding="utf-8")
    edit(folder, lambda config: config["tokenizers"].update({"../..": config["tokenizers"].pop("text")}))
    with pytest.raises(CheckpointError, match=r"tokenizer '\.\./\.\.': its file 'tokenizer\.json' would lie outside"):
        mm.Model.load(folder)


def test_missing_and_damaged_tokenizer_files(folder: Path) -> None:
    file = folder / "tokenizers" / "text" / "tokenizer.json"
    for junk in (b"{}", b"\xff\xfe"):
        file.write_bytes(junk)
        with pytest.raises(
            CheckpointError, match=r"what it declares cannot be built: (ConfigError: TextBPE|UnicodeDecodeError)"
        ):
            mm.Model.load(folder)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"tokenizer 'text': its file tokenizers/text/tokenizer\.json is missing$"
    ):
        mm.Model.load(folder)
    edit(folder, lambda config: config["tokenizers"]["text"].update(files=[]))
    with pytest.raises(CheckpointError, match=r"tokenizer 'text': TextBPE: its file tokenizer\.json is missing$"):
        mm.Model.load(folder)


def test_files_may_be_links(folder: Path, tmp_path: Path) -> None:
    """Hubs lay checkpoints out as links into a store."""
    store = tmp_path / "blob"
    file = folder / "tokenizers" / "text" / "tokenizer.json"
    file.rename(store)
    try:
        file.symlink_to(store)
    except OSError:
        pytest.skip("this system does not let us make links")
    mm.Model.load(folder)


# Saving over what is there


def test_a_checkpoint_is_replaced_whole(model: mm.Model, folder: Path) -> None:
    assert (folder / "tokenizers" / "text").is_dir()
    other = mm.Model({"letters": TextBytes()}, mm.Core(width=8, depth=1, heads=2), ["letters -> letters"])
    other.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.safetensors"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]
    assert_same(other, mm.Model.load(folder))


def test_an_empty_folder_is_filled(model: mm.Model, tmp_path: Path) -> None:
    assert_same(model, mm.Model.load(model.save(tmp_path)))


def test_a_folder_of_other_things_is_not_replaced(model: mm.Model, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work", encoding="utf-8")
    for place in (tmp_path / "home", tmp_path / "home" / "thesis.txt"):
        with pytest.raises(
            CheckpointError, match="this is no checkpoint, and saving here would replace it; choose another folder"
        ):
            model.save(place)
    assert (tmp_path / "home" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("step", ["save_file", "os.replace at first", "os.replace at last"])
def test_a_failed_save_leaves_the_old_one(
    model: mm.Model, folder: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(source: object, target: object, *more: object) -> None:
        calls.append(target)
        if step == "save_file" or len(calls) == (1 if step.endswith("first") else 2):
            raise OSError("disk full")
        os.rename(source, target)  # type: ignore[arg-type]

    other = build(seed=3)
    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(checkpoint, "save_file", failing)
        else:
            patch.setattr(checkpoint.os, "replace", failing)
        with pytest.raises(OSError, match="disk full"):
            other.save(folder)
    assert calls
    assert (folder / "config.json").is_file()  # back in its place already, not only once it is loaded
    assert_same(model, mm.Model.load(folder))
    other.save(folder)  # what the failure left behind is in nobody's way
    assert_same(other, mm.Model.load(folder))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_what_is_called_old_is_not_ours(model: mm.Model, folder: Path) -> None:
    """Version 0.1 moved a checkpoint there for a moment; what lies there now may as well be a user's."""
    old = folder.with_name("model.old")
    folder.rename(old)
    with pytest.raises(CheckpointError, match=r"no config\.json here; .*model\.old holds one: .*, rename it"):
        mm.Model.load(folder)
    other = build(seed=3)
    other.save(folder)
    assert_same(other, mm.Model.load(folder))
    assert_same(model, mm.Model.load(old))
