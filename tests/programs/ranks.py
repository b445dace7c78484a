"""A training job that tests start in one or several processes: text, pictures and sound, one sample of one kind a process.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501 python ranks.py OUT '{"parallel": "fsdp", "steps": 3}'
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch

import multimodal as mm
import multimodal.train
from multimodal.data import Batches, Mixed
from multimodal.heads import Classify
from multimodal.train.processes import ParallelModel, connected_processes, cpu_copy
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

TASKS = ("text -> label", "image -> label", "audio -> text")
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]


def make(core: mm.Core, weights: tuple[float, ...] = ()) -> mm.Model:
    tokenizers = {
        "text": TextBytes(),
        "image": ImagePatches(patch=4, channels=1),
        "audio": AudioFrames(rate_hz=8000, mels=16),
        "label": Labels(("with a", "without")),
    }
    head = Classify(class_weights=weights)
    return mm.Model(tokenizers, core, [mm.Task(task, head) if task.endswith("label") else task for task in TASKS])


class Pictures:
    """Drawn anew each time, with all of the global generators."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict:
        rows = 8 + 4 * int(torch.randint(0, 3, ()))
        return {"image": torch.rand(rows, 8) / 2 + index / 14, "label": "without" if index % 2 else "with a"}


def data() -> dict:
    waves = [torch.sin(torch.arange(1600 + 80 * i) * (0.02 + 0.01 * i)) for i in range(5)]
    return {
        "text -> label": [{"text": w, "label": "with a" if "a" in w else "without"} for w in WORDS],
        "image -> label": Pictures(),
        "audio -> text": [{"audio": (wave, 8000), "text": WORDS[i]} for i, wave in enumerate(waves)],
    }


def gradients(settings: dict, parts: int) -> dict[str, torch.Tensor]:
    """Of the first step, summed over all micro-batches of all processes, each in one piece."""
    cpu = torch.device("cpu")
    with connected_processes(cpu) as processes:
        model = make(mm.Core(width=16, depth=2, heads=2)).train()
        parallel = ParallelModel(model, processes, settings.get("parallel", "ddp"), cpu, torch.float32)
        each = parts // processes.count
        batches = Batches(
            model.packer, data(), batch=parts, accumulate=each, rank=processes.rank, ranks=processes.count
        )
        streams = batches[0].streams
        assert all(len(stream.readings) == 1 for stream in streams)  # one kind of data in each
        own = {pattern: r.count for stream in streams for pattern, r in stream.readings.items()}
        counts: dict[str, int] = dict.fromkeys(TASKS, 0)
        for found in processes.all_gather(own if each == 1 else _counted(streams)):
            for pattern, count in found.items():
                counts[pattern] += count
        for i, stream in enumerate(streams):
            parallel.backward(stream, counts, last=i == len(streams) - 1)
        # a process alone leaves out the gradients of what it did not use; several have zeros there
        named = parallel.model.named_parameters()
        found = {name: cpu_copy(p.grad) if p.grad is not None else torch.zeros(p.shape) for name, p in named}
        # the last one that holds the connections waits for their threads, and DDP would wait with Python's lock held
        parallel.wrapped = None
        gc.collect()
        return found


def _counted(streams: list) -> dict[str, int]:
    counts: dict[str, int] = {}
    for stream in streams:
        for pattern, reading in stream.readings.items():
            counts[pattern] = counts.get(pattern, 0) + reading.count
    return counts


class Endless:
    """Words that can only be iterated; goes on from a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        while self.at < 37:
            self.at += 1
            yield {"text": "ab" * (self.at % 9 + 1), "label": "with a"}

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


def train(out: Path, settings: dict) -> mm.train.Run:
    """Everything that could make a resumed run differ: dropout, augmentation, averages, accumulation, mixtures, streams."""
    core = mm.Core(width=16, depth=2, heads=2, dropout=0.1, drop_path=0.1)
    sources = data()
    if settings.get("tokens"):
        sources["text -> label"] = Endless()
    else:
        sources["text -> label"] = Mixed(sources["text -> label"], sources["text -> label"][:3], weights=[2, 1])
    stop, weights = settings.pop("stop", None), tuple(settings.pop("class_weights", ()))
    if settings.get("patience"):
        settings["evaluation"] = {"text -> label": data()["text -> label"][:5]}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    trackers = [lambda row: row["step"] == stop and signal.raise_signal(signal.SIGTERM)]
    plain = {
        "trackers": trackers,
        "precision": "float32",
        "device": "cpu",
        "quiet": True,
        "folder": out,
        "resume": True,
        "lr": 3e-3,
    }
    return mm.fit(make(core, weights), sources, mix={"image -> label": 2.0}, **{**plain, **settings})


def main() -> None:
    torch.set_num_threads(1)
    out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    if parts := settings.pop("gradients", 0):
        found = gradients(settings, parts)
        if os.environ.get("RANK", "0") == "0":
            torch.save(found, out)
    else:
        train(out, settings)


if __name__ == "__main__":
    main()
