"""Gradients of a model whose merges are gated by one number each, summed over all processes.

python gated.py OUT ddp|fsdp
"""

import gc
import os
import sys

import torch

import multimodal as mm
from multimodal.data import Batches
from multimodal.layers import MLP, Gated, SelfAttention
from multimodal.train.processes import ParallelModel, connected_processes, cpu_copy
from multimodal_tokenizers import Labels, TextBytes

TASK = "text -> label"
DATA = [{"text": word, "label": "yes" if "a" in word else "no"} for word in ("ab", "be", "cab", "dee")]


def main() -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    block = (SelfAttention(merge=Gated()), MLP(merge=Gated()))
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(("yes", "no"))}, mm.Core(width=16, depth=2, heads=2, block=block), [TASK]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    with connected_processes(cpu) as processes:
        parallel = ParallelModel(model.train(), processes, sys.argv[2], cpu, torch.float32)
        ranks = {"rank": processes.rank, "ranks": processes.count}
        batches = Batches(model.packer, {TASK: DATA}, batch=4, accumulate=2 // processes.count, **ranks)
        streams = batches[0].streams
        for i, stream in enumerate(streams):
            parallel.backward(stream, {TASK: 4}, last=i == len(streams) - 1)
        found = {name: cpu_copy(p.grad) for name, p in parallel.model.named_parameters() if p.grad is not None}
        parallel.wrapped = None
        gc.collect()
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
