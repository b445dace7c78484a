"""States on disk: complete or absent, the newest ones stay, checked when read, readable one version later."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import multimodal as mm
from multimodal.files import part_path
from multimodal.saving import LOCK, MARK, PLACE
from multimodal.shapes import CheckpointError
from multimodal.train.optimizer import rate
from multimodal.train.processes import Processes
from multimodal.train.state import Checkpoints, check_manifest, write_manifest
from multimodal_tokenizers import Labels, TextBytes

TASK = "text -> label"
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in WORDS]
PLAIN = {"steps": 12, "batch": 6, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True, "ema": 0.9}
# made by version 0.1.0: the same job, ended by Ctrl-C after step 4 of 8
OLD = Path(__file__).parents[1] / "fixtures" / "run_v1"


def make(width: int = 8) -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("with a", "without"))}
    return mm.Model(tokenizers, mm.Core(width=width, depth=1, heads=2), [TASK])


def train(folder: Path, **settings) -> mm.Model:
    model = make()
    mm.fit(model, {TASK: DATA}, folder=folder, **{**PLAIN, "checkpoint_every": 3, **settings})
    return model


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(("keep", "steps"), [(1, [12]), (2, [9, 12]), (9, [3, 6, 9, 12])])
def test_the_last_states_stay(tmp_path, keep, steps):
    train(tmp_path, keep=keep)
    assert states(tmp_path) == [f"step-{step:08d}" for step in steps]


def test_the_best_model_is_saved(tmp_path):
    held_out = {TASK: DATA[:5]}
    name = f"{TASK} loss"
    model = make()
    run = mm.fit(
        model,
        {TASK: DATA},
        folder=tmp_path,
        evaluation=held_out,
        evaluate_every=2,
        best=name,
        **{**PLAIN, "lr": 0.3, "ema": 0.0},
    )
    measured = {row["step"]: row[name] for row in run.history if name in row}
    assert min(measured, key=lambda step: measured[step]) not in (2, 12)  # else first or last would do as well
    best = mm.Model.load(tmp_path / "best")
    assert mm.train.evaluate(best, TASK, DATA[:5])["loss"] == pytest.approx(min(measured.values()), abs=1e-6)
    state = json.loads((tmp_path / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["best"] == min(measured[step] for step in measured if step < 12)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (flip, "state.safetensors", r"state\.safetensors is damaged: its checksum is not the one it was saved with"),
        (cut, "state.safetensors", r"state\.safetensors has \d+ bytes, wanted \d+"),
        (Path.unlink, "state.json", r"state\.json is missing"),
        (flip, "state.json", r"state\.json is damaged"),
        (Path.unlink, "manifest.json", r"manifest\.json cannot be read"),
    ],
)
def test_a_damaged_state_is_noticed_and_the_one_before_is_used(tmp_path, damage, file, message):
    straight = train(tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step-00000012" / file)
    with pytest.warns(UserWarning, match=message):
        again = train(tmp_path / "run", resume=True)  # from step 9
    assert (tmp_path / "run" / "checkpoints" / "step-00000012.damaged").is_dir()
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), again.state_dict().values(), strict=True)
    )
    check_manifest(tmp_path / "run" / "checkpoints" / "step-00000012")


def test_damaged_states_never_push_out_the_good_ones(tmp_path):
    """With keep=1: the state of step 12 is damaged, training goes on from step 9, is stopped at 10, and that one is there."""
    train(tmp_path, keep=2)
    flip(tmp_path / "checkpoints" / "step-00000012" / "state.json")
    with pytest.warns(UserWarning, match="is renamed"):
        mm.fit(make(), {TASK: DATA}, folder=tmp_path, resume=True, keep=1, trackers=[press_at(10)], **PLAIN)
    assert states(tmp_path) == ["step-00000010", "step-00000012.damaged"]


def press_at(step: int):
    return lambda row: row["step"] == step and signal.raise_signal(signal.SIGTERM)


def test_where_every_state_is_damaged_nothing_begins_anew(tmp_path):
    train(tmp_path, keep=1)
    log = (tmp_path / "log.jsonl").read_text()
    flip(tmp_path / "checkpoints" / "step-00000012" / "state.json")
    with pytest.raises(CheckpointError, match="every state is damaged"), pytest.warns(UserWarning, match="is damaged"):
        train(tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_finished_run_is_not_written_again(tmp_path):
    train(tmp_path, keep=1)
    before = (tmp_path / "checkpoints" / "step-00000012" / "manifest.json").stat().st_mtime_ns
    train(tmp_path, keep=1, resume=True)
    assert (tmp_path / "checkpoints" / "step-00000012" / "manifest.json").stat().st_mtime_ns == before


def test_what_goes_wrong_in_the_writing_thread_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("multimodal.train.state.write_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)


def test_the_result_is_copied_even_if_the_last_state_cannot_be_saved(tmp_path, monkeypatch):
    straight = train(tmp_path / "straight")
    monkeypatch.setattr("multimodal.train.state.write_manifest", full)
    model = make()
    with pytest.raises(OSError, match="could not be saved"):
        mm.fit(model, {TASK: DATA}, folder=tmp_path / "run", **PLAIN)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert not model.training


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def test_what_a_killed_process_left_is_removed_and_nothing_that_is_called_alike(tmp_path):
    others = [tmp_path / name for name in ("model.1234567.123.writing", "model.safetensors.writing", "model.old")]
    for folder in others:
        folder.mkdir()
    left = tmp_path / "model" / PLACE
    left.mkdir(parents=True)
    (left / LOCK).write_text(MARK)
    (left / part_path(left)).write_bytes(b"half a file")
    make().save(tmp_path / "model")
    assert all(folder.is_dir() for folder in others)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "weights.safetensors"]


def test_a_state_that_was_being_written_is_no_state(tmp_path):
    mm.fit(make(), {TASK: DATA}, folder=tmp_path, trackers=[press_at(10)], **PLAIN)
    half = tmp_path / "checkpoints" / "step-00000015.writing"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000010", half)
    assert Checkpoints(tmp_path, 2, Processes()).latest() == tmp_path / "checkpoints" / "step-00000010"
    train(tmp_path, resume=True)
    assert not half.exists()


@pytest.mark.slow
def test_a_full_disk_damages_no_saved_state(tmp_path):
    """The limit on file sizes stands for a full disk: the write fails half-way."""
    program = f"""
import resource, signal, sys, warnings
sys.dont_write_bytecode = True  # cut off at the limit, it would fail later processes
import multimodal as mm
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_state import DATA, PLAIN, TASK, make
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(row):
    if row["step"] in (6, 9):
        resource.setrlimit(resource.RLIMIT_FSIZE, (600 if row["step"] == 6 else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    mm.fit(make(), {{TASK: DATA}}, folder=sys.argv[1], trackers=[full], keep=9, checkpoint_every=3, **PLAIN)
print([str(w.message) for w in caught if "could not be saved" in str(w.message)])
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tokenizers"))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "could not be saved" in done.stdout
    assert "training goes on" in done.stdout
    assert states(tmp_path) == [f"step-{step:08d}" for step in (3, 9, 12)]
    for folder in (tmp_path / "checkpoints").iterdir():
        check_manifest(folder)
    mm.Model.load(tmp_path / "model")


def test_a_last_state_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("multimodal.train.state.write_tensors", full)
    with pytest.raises(OSError, match=r"state after step 12 could not be saved .*No space left"):
        train(tmp_path, checkpoint_every=0)
    assert states(tmp_path) == []


def test_what_is_written_beside_training_is_what_was_there(tmp_path, monkeypatch):
    """The writing thread waits until two more steps have changed the weights."""
    monkeypatch.setattr(
        "multimodal.train.state.write_manifest",
        lambda folder, real=write_manifest: (time.sleep(0.3), real(folder)),
    )
    train(tmp_path / "run", keep=9)
    for step in (3, 6):
        saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
        short = make()
        seen = {}

        def remember(row, step=step, short=short, seen=seen):
            if row["step"] == step:
                seen.update({name: t.clone() for name, t in short.state_dict().items()})

        mm.fit(short, {TASK: DATA}, trackers=[remember], **PLAIN)
        assert all(torch.equal(saved[f"model/{name}"], t) for name, t in seen.items())


def test_a_run_of_the_version_before_is_resumed(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path / "run")
    old = mm.Model.load(tmp_path / "run")
    assert old.predict(TASK, text="cab").value in ("with a", "without")
    model = make()
    run = mm.fit(model, {TASK: DATA}, folder=tmp_path / "run", resume=True, **{**PLAIN, "steps": 8})
    assert [row["step"] for row in run.history] == list(range(1, 9))
    assert run.finished

    def before(step):  # version 0.1 made the first four steps: half a cosine over eight
        least = 0.01 * PLAIN["lr"]
        return least + 0.5 * (PLAIN["lr"] - least) * (1 + math.cos(math.pi * step / 8))

    module = importlib.import_module("multimodal.train.loop")
    monkeypatch.setattr(module, "rate", lambda r, step: before(step) if step < 4 else rate(r, step))
    straight = make()  # without dropout, what came after is the same then and now
    mm.fit(straight, {TASK: DATA}, **{**PLAIN, "steps": 8})
    for a, b in zip(straight.state_dict().values(), model.state_dict().values(), strict=True):
        # version 0.1 decayed embeddings and start tokens too: by .05 times the four rates, which add to .0105
        torch.testing.assert_close(a, b, atol=1e-5, rtol=7e-4)
    assert not (tmp_path / "run" / "state").exists()
    assert states(tmp_path / "run") == ["step-00000008"]


def test_a_state_of_the_future_is_refused(tmp_path):
    train(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000012" / "state.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "format": 3}))
    (path.parent / "manifest.json").unlink()
    write_manifest(path.parent)
    with pytest.raises(CheckpointError, match="format 3, but this version reads 1 and 2; update"):
        train(tmp_path, resume=True)


def test_a_damaged_model_is_noticed(tmp_path):
    folder = make().save(tmp_path / "model")
    flip(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged: its checksum"):
        mm.Model.load(folder)
