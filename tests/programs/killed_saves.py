"""Kills forks of itself without warning while they save, and looks after each kill: a whole model, and no foreign byte changed.

    python killed_saves.py FOLDER '{"what": "save", "kills": 100, "seed": 0}'     or "what": "fit"

"save" replaces one of two models by the other, in a folder where a user keeps notes, links and sub-folders; "fit" goes on with a
run that writes a checkpoint after each step, in a run folder with such things. Prints what was met, as JSON.
"""

import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import multimodal as mm
from multimodal.checkpoint import below
from multimodal.files import is_part_path
from multimodal.saving import LOCK, PLACE
from multimodal.train.state import check_manifest
from multimodal_tokenizers import Labels, TextBPE, TextBytes

TASK = "text -> label"
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in ("ab", "cub", "dad", "bed")]


def model(seed: int) -> mm.Model:
    """Two that differ in weights, tokenizers and files."""
    text = TextBytes() if seed % 2 else TextBPE.train(["the cat sat", "on the mat"] * 3, vocab_size=260)
    labels = Labels(("with a", "without"))
    return mm.Model({"text": text, "label": labels}, mm.Core(width=16, depth=1, heads=2), [TASK], seed=seed)


def put_foreign(folder: Path) -> None:
    """Notes, a sub-folder, links, and names that look like those of a save."""
    for name in ("notes.txt", "mine/a.bin", "tokenizers/mine.txt", "state.old/x", "model.1.2.writing/y", "a.writing"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(300))
    (folder / "link").symlink_to("mine")
    (folder / "nowhere").symlink_to("gone")


def foreign(folder: Path, ours: tuple[str, ...] = ()) -> dict[str, bytes | str]:
    """All that is not of names that begin so."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(ours) and not is_part_path(path.name):
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
    return found


def forked(work: Callable[[], object]) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> bool:
    """Whether it came to its end before it was killed."""
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return not os.WIFSIGNALED(status)


def killed(work: Callable[[], object], after_s: float) -> bool:
    """Run in a fork that is killed; whether it was still at work."""
    child = forked(work)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return not ended(child)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def digest(weights: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def saves(folder: Path, kills: int, drawn: random.Random) -> Counter:
    models = [model(0), model(1)]
    place, met = folder / "shapes", Counter()
    models[0].save(place)
    put_foreign(place)
    put_foreign(folder)
    ours = ("config.json", "weights.safetensors", "tokenizers/text", PLACE)
    before = foreign(place, ours), foreign(folder, ("shapes/",))
    start = time.perf_counter()
    for i in (1, 0):
        ended(forked(lambda i=i: models[i].save(place)))
    usual_s, now = (time.perf_counter() - start) / 2, 0
    while met["kills"] < kills:
        other = 1 - now
        met["kills"] += killed(lambda other=other: models[other].save(place), drawn.random() * 1.2 * usual_s)
        loaded = mm.Model.load(place).state_dict()
        is_of = [same(loaded, m.state_dict()) for m in models]
        assert any(is_of), "neither the old model nor the new one"
        assert (foreign(place, ours), foreign(folder, ("shapes/",))) == before, "a foreign file was changed"
        met["killed in the middle"] += (place / PLACE / LOCK).exists()
        met["new model"] += is_of[other]
        now = is_of.index(True)
    models[0].save(place)
    assert not (place / PLACE).exists()
    return met


def runs(folder: Path, kills: int, drawn: random.Random) -> Counter:
    place, met = folder / "run", Counter()
    settings = {"steps": 100_000, "batch": 2, "checkpoint_every": 1, "device": "cpu", "quiet": True, "keep": 6}
    ours = (
        "log.",
        "curves.png",
        "config.json",
        "environment.json",
        ".lock",
        "model/weights",
        "model/config",
        f"model/{PLACE}",
    )
    ours += tuple(f"checkpoints/step-{n}" for n in range(10))

    def train(steps: int = 1_000_000) -> None:
        def stop(row: Mapping[str, object]) -> None:
            if row["step"] == steps:
                signal.raise_signal(signal.SIGTERM)

        mm.fit(model(1), {TASK: DATA}, folder=place, resume=True, trackers=[stop], **settings)

    train(3)
    for inner in ("", "checkpoints", "model"):
        put_foreign(place / inner)
    (place / "checkpoints" / "step-00000001" / "notes.txt").write_text("the best so far")
    notes = place / "checkpoints" / "step-00000001" / "notes.txt"
    before, seen = foreign(place, ours), set[str]()  # digests of the weights in states
    while met["kills"] < kills:
        reached = max((place / "checkpoints").glob("step-*[0-9]")).name
        child, patience = forked(train), time.monotonic() + 60
        while max((place / "checkpoints").glob("step-*[0-9]")).name == reached and time.monotonic() < patience:
            time.sleep(0.002)  # until it has written something
        time.sleep(drawn.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        met["kills"] += not ended(child)
        found = mm.Model.load(place / "model").state_dict()
        met["killed while the model was saved"] += (place / "model" / PLACE / LOCK).exists()
        met["killed while a state was saved"] += any((place / "checkpoints").glob("step-*[0-9].writing"))
        states = sorted(p for p in (place / "checkpoints").glob("step-*[0-9]") if (p / "state.json").exists())
        check_manifest(states[-1])
        kept = [load_file(p / "state.safetensors") for p in states if (p / "state.safetensors").exists()]
        seen |= {digest(below(state, "model/")) for state in kept}
        assert digest(found) in seen, "the model is of no step"
        assert foreign(place, ours) == before, "a foreign file was changed"
        assert notes.read_text() == "the best so far"
    met["steps"] = int(states[-1].name.removeprefix("step-"))
    return met


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    place, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    gc.freeze()
    print(json.dumps({"save": saves, "fit": runs}[job["what"]](place, job["kills"], random.Random(job["seed"]))))
