"""Every command with every option it has: numbers that are none, files for folders, folders for files, names too long, pipes.

Commands and options are asked of the program itself, so that a new one is tried as well.
"""

import os
import shutil
import signal
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multimodal as mm
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("cyclopts")

from multimodal.cli import app, main  # noqa: E402

RECIPE = """
import numpy as np
import multimodal as mm
from multimodal_tokenizers import ImagePatches, Labels


def recipe():
    data = [{"image": np.full((4, 4), i % 2, np.float32), "label": "ab"[i % 2]} for i in range(4)]
    model = mm.Model({"image": ImagePatches(patch=4, channels=1), "label": Labels(("a", "b"))}, mm.Core.tiny(), ["image -> label"])
    data = {"image -> label": data}
    return mm.TrainingJob(model=model, data=data, evaluation=data, recipe=mm.Recipe(steps=1, batch=2, device="cpu"))
"""
# by command: arguments that work, with little to do
WORK = {
    "train": ["small.py", "--folder", "new_run"],
    "report": ["run", "--out", "report.png"],
    "replay": ["run"],
    "shards": ["photos", "new_shards"],
    "search": [
        "small.py",
        "--range",
        "batch=1,2",
        "--measure",
        "image -> label loss",
        "--trials",
        "1",
        "--folder",
        "found",
    ],
    "plan": ["small.py", "--samples", "2"],
    "bench": ["no-such-row", "--quick"],
    "predict": ["model", "--image", "light.png", "--task", "image -> label"],
    "generate": ["model", "--image", "light.png", "--task", "image -> text", "--max-tokens", "2", "--one-of", "a,b"],
    "transcribe": ["model", "beep.wav"],
    "serve": ["no_such_model"],  # one that is there would be served without end
    "demo": [
        "--folder",
        "small.py",
        "--steps",
        "0",
    ],  # a file, and no step: either is refused, so that nothing is trained
    "look": ["model", "--image", "light.png", "--task", "image -> label"],
    "check": ["multimodal_tokenizers:Labels"],
    "verify": ["model", "--image", "light.png"],
    "pretrained": ["check", "model"],
    "export": ["model", "--to", "hf", "--out", "exported"],
    "push": ["model", "ann/shapes", "--dry-run"],
    "evaluate": ["model", "photos", "--samples", "4", "--resamples", "10", "--out", "report"],
    "quantize": ["model", "--out", "smaller", "--data", "photos", "--samples", "2"],
}
NUMBERS = ("nan", "-inf", "-1", str(10**20), "1e400", "")
LONG = "n" * 300


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    kinds = {
        "image": ImagePatches(patch=4, channels=1),
        "sound": AudioFrames(rate_hz=8000, mels=8),
        "text": TextBytes(),
        "label": Labels(("a", "b")),
    }
    tasks = ["image -> label", "image -> text", mm.Task("sound -> text", mm.CTC())]
    mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), tasks).save(folder / "model")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (folder / "small.py").write_text(RECIPE)
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), 230, np.uint8)).save(folder / "photos" / name / "0.png")
    Image.fromarray(np.full((8, 8), 230, np.uint8)).save(folder / "light.png")
    soundfile.write(folder / "beep.wav", np.sin(np.arange(2000) / 5).astype(np.float32), 8000)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    return folder


def names() -> list[str]:
    return sorted(name for name in app if not name.startswith("-"))


def options(command: str) -> Iterator[tuple[str, set[type]]]:
    """(name, types) of every option of a command, with the type inside of a list or of `.. | None`."""

    def inside(hint: object) -> set[type]:
        parts = typing.get_args(hint)
        return set().union(*map(inside, parts)) if parts else {hint} if isinstance(hint, type) else set()

    for argument in app[command].assemble_argument_collection():
        if argument.name.startswith("--") and "[KEYWORD]" not in argument.name:
            yield argument.name, inside(argument.hint)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A command that waits for ever is an error with the line where it waits."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def ends_well(capsys, home, monkeypatch):
    """Runs a command and gives what is wrong with how it ended, if anything is."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("tempfile.tempdir", str(home))

    def run(*arguments: str) -> str:
        capsys.readouterr()
        try:
            with within(60):
                code = main(arguments)
        except BaseException as error:
            return f"{arguments}: {type(error).__name__}: {error}"[:400]
        err = capsys.readouterr().err
        good = code in (0, 1) or (code == 2 and err.splitlines()[-1:] and "multimodal: " in err)
        good = good and "Traceback" not in err and len(err) < 3000
        return "" if good else f"{arguments}: exit code {code}: {err}"[:600]

    return run


def test_fault_78b_the_sweep_knows_every_command() -> None:
    assert names() == sorted(WORK)
    assert {name for command in names() for name, _ in options(command)} >= {"--max-tokens", "--shard-mb", "--plugin"}


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(WORK))
def test_fault_78c_every_command_with_numbers_that_are_none(command, ends_well) -> None:
    wrong = [
        ends_well(command, *WORK[command], f"{name}={number}")
        for name, kinds in options(command)
        if kinds & {int, float}
        for number in NUMBERS
    ]
    assert [line for line in wrong if line] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(WORK))
def test_fault_78d_every_command_with_files_that_are_none(command, ends_well, home) -> None:
    places = [
        "nowhere",
        "",
        LONG,
        f"{LONG}.png",
        "light.png",
        "light.png/inside.png",
        ".",
        "photos",
        "pipe",
        "/proc/new/x.png",
    ]
    shutil.rmtree(
        home / "nowhere", ignore_errors=True
    )  # a command before may have put a model there, which serve would serve
    wrong = [
        ends_well(command, *WORK[command], f"{name}={place}")
        for name, kinds in options(command)
        if Path in kinds
        for place in places
    ]
    first, *rest = WORK[command]
    # the folder itself holds a model, and would be served without end
    firsts = [place for place in places if command != "serve" or place not in ("", ".")]
    wrong += [ends_well(command, place, *rest) for place in firsts]
    if "--image" in rest:
        at = rest.index("--image") + 1
        wrong += [ends_well(command, first, *rest[:at], place, *rest[at + 1 :]) for place in places]
    if command == "shards":
        wrong += [ends_well(command, first, place) for place in places]
    if command == "transcribe":
        wrong += [ends_well(command, first, place) for place in places]
    assert [line for line in wrong if line] == []
    assert (home / "light.png").is_file()
