"""Saving never destroys: only what a save or a run wrote is replaced, and at any moment one whole model is there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal import checkpoint, files
from multimodal.cli.commands import main
from multimodal.data.shard_writer import index_archives, write_shards
from multimodal.files import write_atomic
from multimodal.look import drawing
from multimodal.look.lens import lens
from multimodal.saving import MARK, PLACE
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.train import run_folder, run_report
from multimodal.train.spikes import save_spike
from multimodal.train.state import remove_state
from multimodal_tokenizers import ImagePatches, Labels, TextBPE, TextBytes

ROOT = Path(__file__).resolve().parents[1]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its own forks")
OLD = ROOT / "tests" / "fixtures" / "run_v1"  # of version 0.1
TASK = "text -> label"
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in WORDS]
PLAIN = {"steps": 12, "batch": 6, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True, "ema": 0.9}
NOT_OURS = {
    "web": {"config.json": '{"name": "shop"}', "index.html": "<html>", "src/app.js": "let x", "tokenizers/a.txt": "a"},
    "transformers": {"config.json": '{"model_type": "bert"}', "model.safetensors": "w", "tokenizer.json": "{}"},
    "run": {"config.json": '{"recipe": {}, "core": {}}', "log.jsonl": "", "model/notes": "n"},
    "damaged": {"config.json": "{", "weights.safetensors": "years of work"},
    "notes": {"thesis.txt": "years of work"},
}


def make() -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("with a", "without"))}
    return mm.Model(tokenizers, mm.Core(width=8, depth=1, heads=2), [TASK])


def press_at(step: int) -> Callable[[Mapping[str, object]], object]:
    return lambda row: row["step"] == step and signal.raise_signal(signal.SIGTERM)


def written(text: bool = False, seed: int = 0) -> mm.Model:
    """A model whose text tokenizer has a file of its own, or has not."""
    kind = TextBytes() if text else TextBPE.train(["the cat sat", "on the mat"] * 3, vocab_size=260)
    tokenizers = {"text": kind, "label": Labels(("with a", "without"))}
    return mm.Model(tokenizers, mm.Core(width=8, depth=1, heads=2), [TASK], seed=seed)


def same(a: mm.Model, b: mm.Model) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def umask() -> int:
    """Of this process; asking sets it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def lay(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def seen(folder: Path, *but: str) -> dict[str, bytes | str]:
    """Everything below a folder, byte by byte, but for names that begin so."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not (but and name.startswith(but)):
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
    return found


@pytest.mark.parametrize("name", NOT_OURS)
def test_fault_01_a_folder_that_no_save_wrote_is_refused_by_name_and_left_as_it_is(tmp_path, name):
    lay(tmp_path / "x", NOT_OURS[name])
    before = seen(tmp_path)
    with pytest.raises(CheckpointError, match=r"x \(.*\): this is no checkpoint, .*; choose another folder"):
        make().save(tmp_path / "x")
    assert seen(tmp_path) == before


def test_fault_01a_what_a_user_keeps_in_a_checkpoint_stays(tmp_path):
    written().save(tmp_path / "shapes")
    mine = {
        "notes.txt": "good one",
        "sub/deep/a": "a",
        "model/config.json": "{}",
        "tokenizers/text/mine": "m",
        "old.json": "{",
    }
    lay(tmp_path / "shapes", mine)
    (tmp_path / "shapes" / "link").symlink_to("nowhere")
    ours = ("config.json", "weights.safetensors", "tokenizers/text/tokenizer.json")
    before = seen(tmp_path, *(f"shapes/{name}" for name in ours))
    other = written(text=True)
    other.save(tmp_path / "shapes")
    assert seen(tmp_path, *(f"shapes/{name}" for name in ours)) == before
    assert not (tmp_path / "shapes" / ours[2]).exists()  # of the old model, and listed in its config.json
    assert same(mm.Model.load(tmp_path / "shapes"), other)


def test_fault_01b_files_that_a_user_changed_are_copied_first(tmp_path):
    written().save(tmp_path / "m")
    for name in ("config.json", "tokenizers/text/tokenizer.json"):
        path = tmp_path / "m" / name
        path.write_text(path.read_text(encoding="utf-8").replace("{", "{ ", 1).replace('"seed": 0', '"seed": 7'))
    changed = seen(tmp_path / "m")
    with pytest.warns(
        UserWarning, match=r"was changed since it was saved; what was in it is now in (config|tokenizer)\.json\.1"
    ):
        written(seed=3).save(tmp_path / "m")
    now = seen(tmp_path / "m")
    for name in ("config.json", "tokenizers/text/tokenizer.json"):
        assert now[f"{name}.1"] == changed[name] != now[name]
    assert "weights.safetensors.1" not in now
    assert same(mm.Model.load(tmp_path / "m"), written(seed=3))


def test_fault_01c_a_file_of_a_users_under_a_name_of_ours_is_refused(tmp_path):
    written(text=True).save(tmp_path / "m")
    lay(tmp_path / "m", {"tokenizers/text/tokenizer.json": "mine"})
    before = seen(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is in the way: .*; move it away"):
        written().save(tmp_path / "m")
    assert seen(tmp_path) == before
    shutil.rmtree(tmp_path / "m" / "tokenizers")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m" / "tokenizers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tokenizers is in the way: saving needs a folder there, and no link"):
        written().save(tmp_path / "m")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_fault_01d_links_to_checkpoints_stay_links(tmp_path):
    """Of the folder, also where it is not there yet, and of a file, whose target may be another's."""
    written().save(tmp_path / "big" / "m")
    lay(tmp_path / "big" / "m", {"notes": "n"})
    for name, target in (("m", "big/m"), ("new", "big/new")):
        (tmp_path / name).symlink_to(target)
        written(seed=2).save(tmp_path / name)
        assert os.readlink(tmp_path / name) == target
        assert same(mm.Model.load(tmp_path / target), written(seed=2))
    assert (tmp_path / "big" / "m" / "notes").read_text() == "n"
    weights = tmp_path / "m" / "weights.safetensors"
    blob = (tmp_path / "blob").absolute()
    weights.rename(blob)
    weights.symlink_to(blob)
    before = blob.read_bytes()
    written(seed=3).save(tmp_path / "m")
    assert blob.read_bytes() == before
    assert same(mm.Model.load(tmp_path / "m"), written(seed=3))


def test_fault_01e_a_config_that_lists_foreign_files_deletes_none(tmp_path):
    """A checkpoint that was handed over says that files elsewhere, with their right checksums, are its own."""
    written().save(tmp_path / "m")
    lay(tmp_path, {"secret": "s", "m/notes": "n", "elsewhere/mine": "e"})
    (tmp_path / "m" / "tokenizers" / "link").symlink_to(tmp_path / "elsewhere")
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    names = ("../secret", "notes", "tokenizers/../../secret", str(tmp_path / "secret"), "tokenizers/link/mine")
    config["sha256"] |= {name: files.file_hash(tmp_path / "m" / name) for name in names}
    config["tokenizers"]["text"]["files"] += ["../../../secret", "../../notes", "../link/mine"]
    config["tokenizers"] |= {"link": {**config["tokenizers"]["label"], "files": ["mine"]}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was changed
        written(text=True).save(tmp_path / "m")
    assert [(tmp_path / name).read_text() for name in ("secret", "m/notes", "elsewhere/mine")] == ["s", "n", "e"]


def test_fault_01f_what_is_only_called_like_a_save_in_progress_is_left_alone(tmp_path):
    written().save(tmp_path / "m")
    lay(tmp_path / "m", {".multimodal-saving/plan.json": "mine", ".multimodal-saving/lock": "mine"})
    before = seen(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"\.multimodal-saving is in the way: it is not what a save made; move it"
    ):
        written(seed=2).save(tmp_path / "m")
    assert seen(tmp_path) == before


def test_fault_01g_a_place_where_nothing_can_be_written_is_said_and_nothing_is_lost(tmp_path, monkeypatch):
    written().save(tmp_path / "m")
    before = seen(tmp_path)

    def read_only(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("mkdir", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, read_only)
            with pytest.raises(PermissionError, match=r"m: the model cannot be saved here: .*Permission denied"):
                written(seed=2).save(tmp_path / "m")
        assert {name: x for name, x in seen(tmp_path).items() if ".multimodal" not in name} == before
        assert same(mm.Model.load(tmp_path / "m"), written())
    written(seed=2).save(tmp_path / "m")
    assert seen(tmp_path).keys() == before.keys()


def test_fault_02_what_is_called_old_is_neither_deleted_nor_loaded(tmp_path):
    written().save(tmp_path / "shapes")
    (tmp_path / "shapes").rename(tmp_path / "shapes.old")
    for name in ("shapes.1.2.writing", "shapes.999999.1.writing", "shapes.writing"):
        lay(tmp_path / name, {"mine": "m"})
    before = seen(tmp_path)
    with pytest.raises(CheckpointError, match=r"shapes: no config\.json here.*shapes\.old holds one"):
        mm.Model.load(tmp_path / "shapes")
    written(seed=2).save(tmp_path / "shapes")
    written(seed=3).save(tmp_path / "shapes")
    assert seen(tmp_path, "shapes/") == {**before, "shapes": ""}
    shutil.copytree(tmp_path / "shapes", tmp_path / "run" / "model.old")
    with pytest.raises(CheckpointError, match=r"run: no config\.json here"):
        mm.Model.load(tmp_path / "run")


def test_fault_53_a_run_takes_no_folder_that_no_run_wrote(tmp_path):
    written().save(tmp_path / "saved")
    others = {
        **{f"x {name}": content for name, content in NOT_OURS.items() if name != "notes"},
        "project": {"checkpoints/ours.pt": "w", "notes.md": "n"},
        "logs": {"log.jsonl": "{}"},
        "alike": {"state/state.json": '{"step": 3}', "best/x": "x"},
        "half": {"model/config.json": "{}", "trouble/x": "x"},
    }
    for name, content in others.items():
        lay(tmp_path / name, content)
    (tmp_path / "file").write_text("f")
    before = seen(tmp_path)
    for resume in (False, True):
        with pytest.raises(
            ConfigError, match=r"fit: .*saved holds a saved model, and a run would write over its config"
        ):
            mm.fit(make(), {TASK: DATA}, folder=tmp_path / "saved", resume=resume, **PLAIN)
        with pytest.raises(ConfigError, match=r"fit: .*x web holds config\.json, which no run wrote"):
            mm.fit(make(), {TASK: DATA}, folder=tmp_path / "x web", resume=resume, **PLAIN)
    for name in others:
        with pytest.raises(ConfigError, match=rf"fit: .*{name} holds .*, which no run wrote"):
            run_folder.check_folder(tmp_path / name)
    with pytest.raises(ConfigError, match=r"fit: .*file is a file"):
        run_folder.check_folder(tmp_path / "file")
    assert seen(tmp_path) == before


def test_fault_54_a_new_run_moves_only_what_the_run_before_wrote(tmp_path, monkeypatch):
    """Also in the current folder, and through a link: the folder itself, and what a user keeps in it, stay where they are."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    lay(tmp_path, {"here/notes": "n", "here/below/x": "x", "here.1/mine": "m"})
    monkeypatch.chdir(tmp_path / "here")
    for number, folder in enumerate((".", ".", tmp_path / "link")):
        before = seen(tmp_path / "here")
        mm.fit(make(), {TASK: DATA}, folder=folder, **{**PLAIN, "steps": 1, "seed": number})
        assert (os.getcwd(), os.readlink(tmp_path / "link")) == (str(tmp_path / "here"), "here")
        if number:
            moved = {name: x for name, x in before.items() if name not in (".lock", "notes", "below", "below/x")}
            assert seen(tmp_path / f"here.{number + 1}") == moved
        assert seen(tmp_path / "here").keys() >= {"notes", "below/x", "model/weights.safetensors"}
        # safetensors gives nobody else rights
        mode = (tmp_path / "here" / "model" / "weights.safetensors").stat().st_mode
        assert mode & 0o777 == 0o666 & ~umask()
    assert (tmp_path / "here.1" / "mine").read_text() == "m"


def test_fault_55_folders_of_a_users_in_a_run_folder_stay(tmp_path):
    mm.fit(make(), {TASK: DATA}, folder=tmp_path, checkpoint_every=1, trackers=[press_at(2)], **PLAIN)
    lay(tmp_path, {"state/state.json": '{"step": 9}', "state/photo.jpg": "j", "checkpoints/mine.writing/x": "x"})
    lay(tmp_path, {"checkpoints/step-00000001/notes": "n", "checkpoints/step-7-good/state.json": "{}", "model/n": "n"})
    lay(tmp_path, {"checkpoints/step-00000009.writing/notes": "n", "trouble/step-0000001/stream-0-notes.txt": "n"})
    mine = (
        "state/",
        "checkpoints/mine",
        "checkpoints/step-7",
        "model/n",
        "trouble",
        "checkpoints/step-00000009.writing",
    )
    before = {name: x for name, x in seen(tmp_path).items() if name.startswith(mine) or name.endswith("notes")}
    mm.fit(make(), {TASK: DATA}, folder=tmp_path, resume=True, checkpoint_every=1, keep=1, **PLAIN)
    after = seen(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert "checkpoints/step-00000001/state.safetensors" not in after
    # the state of version 0.1 goes, once there is a newer one; what is beside it stays
    shutil.copytree(OLD, tmp_path / "old")
    lay(tmp_path / "old" / "state", {"notes": "n"})
    mm.fit(make(), {TASK: DATA}, folder=tmp_path / "old", resume=True, **{**PLAIN, "steps": 8})
    assert [path.name for path in (tmp_path / "old" / "state").iterdir()] == ["notes"]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_fault_56_a_model_for_which_the_disk_had_no_room_is_written_when_there_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="the model after step 12 could not be saved"):
            mm.fit(make(), {TASK: DATA}, folder=tmp_path, **PLAIN)
    assert not (tmp_path / "model").exists()
    model = make()
    run = mm.fit(model, {TASK: DATA}, folder=tmp_path, resume=True, **PLAIN)
    assert run.finished
    assert same(mm.Model.load(tmp_path / "model"), model)


@pytest.mark.parametrize("left", ["older", "damaged"])
def test_fault_57_a_run_that_was_killed_before_its_model_was_written_writes_it(tmp_path, left):
    """Also where the model of an earlier step is there, or half a file."""
    model = make()
    mm.fit(model, {TASK: DATA}, folder=tmp_path, **PLAIN)
    if left == "older":
        make().save(tmp_path / "model")
    else:
        os.truncate(tmp_path / "model" / "weights.safetensors", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights were changed, and are kept
        mm.fit(make(), {TASK: DATA}, folder=tmp_path, resume=True, **PLAIN)
    assert same(mm.Model.load(tmp_path / "model"), model)


def test_fault_57a_a_best_model_that_could_not_be_saved_does_not_count_as_the_best(tmp_path, monkeypatch):
    save, tried = checkpoint.save, []

    def once_full(model: mm.Model, folder: Path, weights: object = None) -> Path:
        tried.append(folder.name)
        if folder.name == "best" and tried.count("best") == 1:
            full()
        return save(model, folder, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", once_full)
    name = f"{TASK} loss"
    settings = {**PLAIN, "evaluation": {TASK: DATA[:5]}, "evaluate_every": 4, "best": name, "lr": 0.3, "ema": 0.0}
    with pytest.warns(UserWarning, match="the best model, of step 4, could not be saved"):
        run = mm.fit(make(), {TASK: DATA}, folder=tmp_path, **settings)
    kept = mm.train.evaluate(mm.Model.load(tmp_path / "best"), TASK, DATA[:5])["loss"]
    assert kept == pytest.approx(min(row[name] for row in run.history[4:] if name in row), abs=1e-6)


def test_fault_58_a_class_that_is_called_as_no_text_can_be_is_saved_without_loss(tmp_path):
    """Names of files on Linux are bytes; what is no UTF-8 among them comes as lone surrogates."""
    name = os.fsdecode(b"caf\xe9 \xff")
    data = [{**sample, "label": name if sample["label"] == "without" else sample["label"]} for sample in DATA]
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(("with a", name))}, mm.Core(width=8, depth=1, heads=2), [TASK]
    )
    mm.fit(model, {TASK: data}, folder=tmp_path / "run", **PLAIN)
    for folder in (tmp_path / "run", model.save(tmp_path / "m")):
        loaded = mm.Model.load(folder)
        assert loaded.packer.tokenizers["label"].names == ("with a", name)  # type: ignore[attr-defined]
    assert name in model.predict(TASK, text="x").probability
    mm.fit(model, {TASK: data}, folder=tmp_path / "run", resume=True, **PLAIN)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_fault_65_a_disk_without_locks_is_said_at_once_and_training_goes_on(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", without)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=rf"cannot be locked on this disk \({os.strerror(number)}\)"):
        run = mm.fit(make(), {TASK: DATA}, folder=tmp_path, **{**PLAIN, "steps": 1})
    assert run.finished
    assert time.monotonic() - start < 10


def test_fault_70_a_model_that_is_saved_while_it_is_loaded_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    """A save between any two things that a load reads."""
    models = [written(seed=seed) for seed in (1, 2)]
    folder = models[0].save(tmp_path / "m")
    assert not same(*models)
    for name in ("read_config", "read_tensors", "rebuild"):
        for before in (True, False):
            saves, real = [models[1], models[0]], getattr(checkpoint, name)

            def between(*given, before=before, real=real, saves=saves):
                found = None if before else real(*given)
                if saves:
                    saves.pop().save(folder)
                return real(*given) if before else found

            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, name, between)
                loaded = mm.Model.load(folder)
            assert any(same(loaded, model) for model in models)
            assert not saves


@FORKS
def test_fault_70a_two_that_save_and_one_that_loads_are_not_in_each_others_way(tmp_path):
    models = [written(seed=1), written(text=True, seed=2)]
    folder = models[0].save(tmp_path / "m")
    children = []
    for model in models:
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            for _ in range(6):
                model.save(folder)
            code = 0
        finally:
            os._exit(code)
    running = set(children)
    while running:
        loaded = mm.Model.load(folder)
        assert any(same(loaded, model) for model in models)
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.discard(child)
                assert os.waitstatus_to_exitcode(status) == 0


def test_fault_70b_threads_of_one_process_save_in_turn(tmp_path):
    models, failed = [written(seed=seed) for seed in range(3)], []

    def save(model: mm.Model) -> None:
        try:
            for _ in range(3):
                model.save(tmp_path / "m")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert any(same(mm.Model.load(tmp_path / "m"), model) for model in models)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "tokenizers",
        "weights.safetensors",
    ]


def test_fault_70c_the_folders_that_a_save_makes_before_its_index_hinder_no_other_save(tmp_path):
    """Another thread, or a killed process, may have made them; a file in them is somebody's."""
    folder = tmp_path / "m"
    (folder / "tokenizers" / "text").mkdir(parents=True)
    written(seed=1).save(folder)
    assert same(mm.Model.load(folder), written(seed=1))
    other = tmp_path / "other"
    (other / "tokenizers" / "text").mkdir(parents=True)
    (other / "tokenizers" / "text" / "words.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="this is no checkpoint"):
        written(seed=1).save(other)
    assert (other / "tokenizers" / "text" / "words.txt").read_text() == "mine"


def test_fault_77_the_current_folder_is_a_folder_as_any(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for seed in (1, 2):
        written(seed=seed).save(".")
        assert same(mm.Model.load("."), written(seed=seed))
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        mm.Model.load("..")


def audited(folder: Path) -> Callable[[Callable[[], object] | None, int], int]:
    """watch(act, n): from now on `act` is called before the n-th change of a file below the folder; returns how many there were."""
    facts: dict[str, object] = {"act": None, "at": 0, "count": 0}
    inside = os.fspath(folder)

    def hook(event: str, arguments: tuple) -> None:
        act = facts["act"]
        if act is None or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(inside) for a in arguments[:2]):
            return
        facts["count"] = count = int(facts["count"]) + 1  # type: ignore[call-overload]
        if count == facts["at"]:
            act()  # type: ignore[operator]

    sys.addaudithook(hook)

    def watch(act: Callable[[], object] | None, at: int) -> int:
        count = int(facts["count"])  # type: ignore[call-overload]
        facts.update(act=act, at=at, count=0)
        return count

    return watch


@pytest.mark.slow
@FORKS
@pytest.mark.parametrize("way", ["killed", "failing"])
def test_fault_01h_a_save_that_ends_before_any_of_its_operations_leaves_one_whole_model(tmp_path, way):
    """At each operation on a file, one after the other; also a first save, and one that ends what another had begun."""
    watch = audited(tmp_path)
    models = [written(seed=1), written(text=True, seed=2)]
    place = tmp_path / "m"
    lay(tmp_path, {"m/notes": "n", "m/tokenizers/x": "x", "m.old/a": "a"})
    (place / "link").symlink_to("notes")
    before = seen(tmp_path)
    shutil.rmtree(place)
    watch(lambda: None, 0)
    models[0].save(place)
    lay(tmp_path, {name: x.decode() for name, x in before.items() if isinstance(x, bytes) and name != "m/link"})
    (place / "link").symlink_to("notes")
    models[1].save(place)
    count = watch(None, 0)
    assert count > 20
    ours, now = ("m/config.json", "m/weights", "m/.multimodal-saving", "m/tokenizers/text"), 1
    for at in range(1, count):
        other = models[1 - now]
        if way == "killed":
            if not (child := os.fork()):
                watch(lambda: os._exit(9), at)
                other.save(place)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
        else:
            watch(full, at)
            try:
                other.save(place)
            except OSError:
                pass
            finally:
                watch(None, 0)
        loaded = mm.Model.load(place)
        found = [same(loaded, model) for model in models]
        assert any(found), f"no whole model before operation {at}"
        assert seen(tmp_path, *ours) == before
        now = found.index(True)
    models[0].save(place)
    assert not (place / ".multimodal-saving").exists()


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("what", ["save", "fit"])
def test_fault_01i_saves_that_are_killed_at_random_moments(tmp_path, program, what):
    kills = {"save": 14, "fit": 6}[what]
    met = json.loads(
        program("tests/programs/killed_saves.py", tmp_path, json.dumps({"what": what, "kills": kills, "seed": 0}))
    )
    assert met["kills"] == kills


def test_fault_46_commands_write_into_the_run_and_not_into_the_current_folder(tmp_path, monkeypatch, capsys):
    tokenizers = {
        "image": ImagePatches(patch=2, channels=1, size=(4, 4)),
        "text": TextBytes(),
        "label": Labels(("a", "b")),
    }
    draws, says = "text -> image", "image -> label"
    model = mm.Model(
        tokenizers, mm.Core(width=16, depth=1, heads=2), [mm.Task(draws, mm.FlowMatching(steps=1)), mm.Task(says)]
    )
    data = [{"image": np.full((4, 4), i / 4, np.float32), "text": "a", "label": "a"} for i in range(4)]
    settings = {**PLAIN, "steps": 1, "ema": 0.0}
    mm.fit(model, {draws: data, says: data}, folder=tmp_path / "runs" / "a", **settings)
    np.save(tmp_path / "p.npy", data[1]["image"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "runs" / "a"
    for folder, name in ((run, "image.png"), (run / "model", "image-2.png")):
        assert main(["generate", str(folder), "--text", "a", "--max-tokens", "4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out).get("file", str(run / name)) == str(run / name)
    monkeypatch.setattr(drawing, "draw", lambda ray, file: file.write(b"a picture"))  # which take seconds
    monkeypatch.setattr("multimodal.look.page.page", lambda ray: "a page")
    monkeypatch.setattr(run_report, "draw", lambda records, file: file.write(b"curves"))
    assert main(["look", str(run), "--image", str(tmp_path / "p.npy")]) == 0
    assert (run / "xray.png").is_file()
    lay(run, {"report.png": "mine"})
    for out, written_ in ((["--out", str(run / "report.png")], "report-2.png"), ([], "report-3.png")):
        assert main(["report", str(run), *out]) == 0
        assert f"picture  {run / written_}" in capsys.readouterr().out
    assert (run / "report.png").read_text() == "mine"
    assert list((tmp_path / "here").iterdir()) == []


def rows(count: int = 40) -> list[dict[str, str]]:
    return [{"text": "x" * 700 + str(i)} for i in range(count)]


def test_fault_46a_shards_are_written_over_nothing(tmp_path):
    lay(tmp_path / "web", {"index.json": '{"pages": []}', "making.json": "mine"})
    lay(tmp_path / "alike", {"thesis.writing": "t", "000000.tar.writing": "t"})
    lay(tmp_path / "making", {"making.json": '["mine"]', "000000.tar": "t"})
    before = seen(tmp_path)
    for name in ("web", "alike", "making"):
        with pytest.raises(ConfigError, match="holds other things; give a new folder"):
            write_shards(rows(), tmp_path / name, shard_bytes=20_000)
    assert seen(tmp_path) == before

    class Failing(list):
        def __getitem__(self, i):
            if i == 30:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    for name in ("000001.tar", "000001.index", "bad.jsonl"):
        out = tmp_path / f"out {name}"
        with pytest.raises(KeyboardInterrupt):
            write_shards(Failing(rows()), out, shard_bytes=20_000, source="s")
        table = out / "000001.index"
        table.unlink(missing_ok=True)
        lay(out, {name: "mine"})
        source = [*rows(), {"text": object()}]
        with pytest.raises(ConfigError, match=r"is there already|is not of shards"):
            write_shards(source if name == "bad.jsonl" else rows(), out, shard_bytes=20_000, max_bad=1, source="s")
        assert (out / name).read_text() == "mine"


def test_fault_46b_an_index_of_archives_is_written_over_nothing(tmp_path):
    write_shards(rows(10), tmp_path / "s")
    (tmp_path / "a").mkdir()
    shutil.copy(tmp_path / "s" / "000000.tar", tmp_path / "a")
    lay(tmp_path / "a", {"000000.index": "of another tool"})
    with pytest.raises(
        ConfigError, match=r"000000\.index is there already, and is not what would be written; move it away"
    ):
        index_archives([tmp_path / "a" / "000000.tar"], {"text": "text.txt"}, tmp_path / "a")
    assert (tmp_path / "a" / "000000.index").read_text() == "of another tool"


def test_fault_46c_files_beside_those_that_are_written_are_nobodys_scratch_space(tmp_path):
    """The names under which files are written until they are whole; and names that are taken by links to nowhere."""
    lay(tmp_path, {"a.json": "old", "a.json.writing": "mine"})
    write_atomic(tmp_path / "a.json", "new")
    assert seen(tmp_path) == {"a.json": b"new", "a.json.writing": b"mine"}
    (tmp_path / "link.json").symlink_to("a.json")
    write_atomic(tmp_path / "link.json", "newer")
    assert (os.readlink(tmp_path / "link.json"), (tmp_path / "a.json").read_text()) == ("a.json", "newer")
    (tmp_path / "run").symlink_to("gone")
    assert files.unused_path(tmp_path / "run") == tmp_path / "run.1"


def test_fault_46d_the_files_of_a_step_that_went_wrong_replace_only_such_files(tmp_path):
    model = make()
    stream = model.pack(TASK, DATA[:2])
    mine = {"trouble/step-0000005/stream-0-notes.txt": "n", "trouble/step-0000005/stream-0-a.safetensors": "s"}
    lay(tmp_path, mine)
    for _ in range(2):
        save_spike(tmp_path, 5, [stream], "too large", model)
    assert [(tmp_path / name).read_text() for name in mine] == ["n", "s"]


def test_fault_46e_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    (tmp_path / "p.png").write_bytes(b"before")

    def failing(self: Figure, file, **_: object) -> None:
        with open(file, "wb") if isinstance(file, (str, Path)) else file as half:
            half.write(b"half")
        full()

    monkeypatch.setattr(Figure, "savefig", failing)
    sample = {"text": "abba", "label": "with a"}
    with pytest.raises(OSError, match="No space"):
        lens(make(), TASK, sample).draw(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == b"before"


def test_fault_02a_a_checkpoint_of_version_0_1_is_replaced_and_what_is_beside_it_stays(tmp_path):
    shutil.copytree(OLD / "model", tmp_path / "m")
    lay(tmp_path / "m", {"notes": "n", "tokenizers/text/mine": "m"})
    model = written()
    model.save(tmp_path / "m")
    assert same(mm.Model.load(tmp_path / "m"), model)
    found = seen(tmp_path / "m")
    assert (found["notes"], found["tokenizers/text/mine"]) == (b"n", b"m")


def test_fault_01j_saving_does_not_need_the_current_folder_nor_another_program(tmp_path):
    """A save that was killed right after its config counted is ended by the next one, in another process."""
    models = [written(seed=1), written(seed=2)]
    folder = models[0].save(tmp_path / "m")
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_faults_save import written
replace = os.replace
def killed(source, target):
    replace(source, target)
    if str(target).endswith("config.json"):
        os._exit(9)
os.replace = killed
written(seed=2).save(sys.argv[1])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tokenizers"))), "OMP_NUM_THREADS": "1"}
    assert (
        subprocess.run([sys.executable, "-c", program, str(folder)], env=env, timeout=120, check=False).returncode == 9
    )
    assert same(mm.Model.load(folder), models[1])  # though the weights of the old one are still in their place
    weights = files.file_hash(folder / "weights.safetensors")
    moved = shutil.copytree(folder, tmp_path / "copy")
    assert same(mm.Model.load(moved), models[1])
    with (folder / "weights.safetensors").open("ab") as file:  # changed after the kill: a copy is kept, nothing is lost
        file.write(b"mine")
    with pytest.warns(UserWarning, match=r"what was in it is now in weights\.safetensors\.1"):
        models[0].save(folder)
    assert (folder / "weights.safetensors.1").read_bytes().endswith(b"mine")
    assert files.file_hash(moved / "weights.safetensors") == weights
    assert same(mm.Model.load(folder), models[0])


def test_fault_55a_all_files_of_a_shared_out_state_are_removed_and_no_others(tmp_path):
    state = tmp_path / "step-00000001"
    lay(state, {"pieces/index.json": "i", "pieces/00000.safetensors": "a", "pieces/00001.safetensors": "b"})
    lay(state, {"state.json": "{}", "manifest.json": "{}"})
    remove_state(state)
    assert not state.exists()
    lay(state, {"pieces/index.json": "i", "pieces/mine.safetensors": "m", "state.json": "{}"})
    remove_state(state)
    assert [path.name for path in state.rglob("*") if path.is_file()] == ["mine.safetensors"]


def test_fault_83a_the_plan_of_a_save_that_somebody_else_made_reaches_no_file_outside(tmp_path):
    model = make()
    model.save(tmp_path / "m")
    lay(tmp_path, {"diary.txt": "mine"})
    config = json.loads((tmp_path / "m/config.json").read_text(encoding="utf-8"))
    for name in ("../diary.txt", str(tmp_path / "diary.txt")):
        plan = json.dumps({"before": {name: None}, "after": config["sha256"]})
        lay(tmp_path / "m" / PLACE, {"lock": MARK, "plan.json": plan})
        model.save(tmp_path / "m")
        assert (tmp_path / "diary.txt").read_text(encoding="utf-8") == "mine"
        assert not (tmp_path / "m" / PLACE).exists()
