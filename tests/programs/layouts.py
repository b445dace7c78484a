"""A training job that tests start in layouts of several processes: data, tensor and context parallel.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501 python layouts.py OUT '{"gradients": true, "tensor_parallel": 2}'
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch

import multimodal as mm
from multimodal.attention.exchange import local
from multimodal.core import recompute
from multimodal.data import Batches
from multimodal.layers import MLP, SelfAttention
from multimodal.train.processes import ParallelModel, connected_processes, cpu_copy
from multimodal.train.spikes import count_targets
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe", "decade" * 5]


def make(pairs: bool = False) -> mm.Model:
    """Grouped heads, biases, layers of other sorts, windows: all that can be divided; and a tower, which is not."""
    image = mm.Tower(ImagePatches(patch=4, channels=1), mm.Core(width=16, depth=1, heads=2))
    kinds = {"text": TextBytes(), "image": image, "label": Labels(("with a", "without"))}
    biased = (SelfAttention(bias=("query", "key", "value", "out")), MLP(bias=True))
    windowed = (SelfAttention(mask=mm.masks.Window(3)), MLP(gated=False, activation="gelu", bias=True))
    drop = 0.0 if pairs else 0.1  # what is dropped depends on the micro-batch, and so on the number of processes
    core = mm.Core(width=64, depth=2, heads=8, kv_heads=4, mlp_width=48, drop_path=drop, block=(biased, windowed))
    tasks: list = ["text -> label", "image -> label", "text -> text"]
    if pairs:
        tasks = [mm.Task("image <-> text", mm.Contrast(width=8)), "text -> label"]
        tasks += [mm.Task("text <-> image", mm.Contrast(width=8, form="sigmoid", pool=mm.heads.Mean()))]
    model = mm.Model(kinds, core, tasks)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # also of what starts at 0 or 1
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def data(pairs: bool = False) -> dict:
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(8, 8 + 4 * (i % 3), generator=generator) for i in range(len(WORDS))]
    labels = ["with a" if "a" in word else "without" for word in WORDS]
    said = [{"text": word, "label": label} for word, label in zip(WORDS, labels, strict=True)]
    if pairs:
        both = [{"image": image, "text": word} for image, word in zip(images, WORDS, strict=True)]
        return {"image <-> text": both, "text -> label": said, "text <-> image": both[::-1]}
    seen = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    told = [{"text": word, "answer": word[::-1]} for word in WORDS]
    return {"text -> label": said, "image -> label": seen, "text -> text": told}


def gradients(batch: int, parts: int, pairs: bool = False, again: bool = False, **settings) -> dict:
    """The loss and the gradients of a step, each in one piece. parts: micro-batches of all processes; of pairs, of each."""
    cpu = torch.device("cpu")
    recipe = mm.Recipe(**settings)
    with connected_processes(cpu, recipe.tensor_parallel, recipe.context_parallel) as processes:
        model = make(pairs).train()
        recompute(model, again)
        parallel = ParallelModel(model, processes, recipe.parallel, cpu, torch.float32)
        place = {"rank": processes.data_rank, "ranks": processes.data_count}
        each = parts if pairs else parts // processes.data_count
        step = Batches(model.packer, data(pairs), batch=batch, accumulate=each, **place)[0]
        streams = step.streams
        counts: dict[str, float] = dict.fromkeys(model.tasks, 0)
        for found in processes.all_gather(count_targets(streams, model))[:: processes.copies]:
            for pattern, count in found.items():
                counts[pattern] += count
        total = torch.zeros(())
        for i, (stream, number) in enumerate(zip(streams, step.numbers, strict=True)):
            torch.manual_seed(number)
            total += parallel.backward(stream, counts, last=i == len(streams) - 1)
        named = [(name, p) for name, p in parallel.model.named_parameters()]
        found = {
            name: parallel.order.restored(name, cpu_copy(p.grad)) if p.grad is not None else torch.zeros(p.shape)
            for name, p in named
        }
        found["loss"] = processes.sum_over_samples(total)
        found["lacks"] = torch.tensor(processes.all_gather(len(streams[0].readings) < len(model.tasks)))
        found["own"] = torch.tensor(sum(local(p).numel() for _, p in named))
        found["norm"] = parallel.clip_gradients(0.0)
        parallel.release()
        gc.collect()
        return found


def train(out: Path, stop: int | None = None, **settings) -> mm.train.Run:
    trackers = [lambda row: row["step"] == stop and "loss" in row and signal.raise_signal(signal.SIGTERM)]
    plain = {"precision": "float32", "device": "cpu", "quiet": True, "lr": 3e-3, "batch": 8, "steps": 6}
    plain |= {"checkpoint_every": 3, "ema": 0.9, "evaluation": {"text -> label": data()["text -> label"][:5]}}
    return mm.fit(make(), data(), folder=out, resume=True, trackers=trackers, **{**plain, **settings})


def main() -> None:
    torch.set_num_threads(1)
    out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    if settings.pop("gradients", False):
        found = gradients(**settings)
        if os.environ.get("RANK", "0") == "0":
            torch.save(found, out)
    else:
        train(out, **settings)


if __name__ == "__main__":
    main()
