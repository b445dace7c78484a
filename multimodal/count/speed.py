"""How long a step takes: products at a share of the GPU's peak, the optimiser at its memory's speed, and what GPUs send each other.

Every number here about GPUs is published by others or assumed, and none was measured by this project; that of CPUs was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from multimodal.count.gpus import GPU
from multimodal.count.memory import FLOAT, Work

UTILISATION: Mapping[str, tuple[tuple[float, float, float], ...]] = {
    # up to so many parameters, the lowest and the highest share of the bfloat16 peak, work that is done again counted in
    "ampere": (
        (50e6, 0.10, 0.30),
        (250e6, 0.43, 0.49),
        (1e9, 0.45, 0.57),
        (5e9, 0.57, 0.64),
        (float("inf"), 0.52, 0.77),
    ),
    "hopper": (
        (50e6, 0.07, 0.23),
        (250e6, 0.33, 0.36),
        (1e9, 0.35, 0.40),
        (5e9, 0.38, 0.46),
        (float("inf"), 0.40, 0.59),
    ),
}
"""HFU in MosaicML's llm-foundry, scripts/train/benchmarking/README.md: A100 80 GB and H100 80 GB, bfloat16, 125 M to 70 B
parameters, samples of 512 to 8192 tokens. Assumed: models below 50 M (which launch kernels more than they compute), the H100 at
125 M (the A100's figures in the ratio of the two at 760 M), PCIe, Ada and Turing cards as the A100, Blackwell as the H100."""
# the lowest is for runs, not benchmarks: other kernels, evaluation, checkpoints; assumed, and Llama 3.1 8B lies just below it
UNTUNED = 0.55
FLOAT32 = (0.5, 0.85)  # of the float32 peak without tensor cores: assumed
CPU = (0.12, 0.61)  # of the best product of this machine, measured: width 64 to width 384, benchmarks/results/plan.md
SENT = 0.75  # share of the links' data-sheet speed that collectives reach: assumed (nccl-tests show 0.7 to 0.9)
LAUNCHED = {False: (83, 39, 60), True: (109, 51, 60)}
"""Kernels of a default block's forward and backward pass, of its forward pass alone, and of all outside the blocks; float32 and
under autocast. Counted on this project's model with a TorchDispatchMode, views left out."""
LAUNCH_S = (5e-6, 10e-6)  # seconds in which eager PyTorch gives a GPU one kernel: assumed
UPDATE = 7 * FLOAT  # bytes a parameter that AdamW reads and writes: weight, gradient, two moments; weight, two moments


@dataclass(frozen=True)
class Range:
    """From the best case to the worst."""

    best: float
    worst: float

    def __truediv__(self, by: float) -> "Range":
        return Range(self.best / by, self.worst / by)

    def __mul__(self, by: float) -> "Range":
        return Range(self.best * by, self.worst * by)


def utilisation(gpu: GPU, parameters: int, half: bool) -> Range:
    """Share of the peak that products reach, all of a training step counted."""
    if gpu.family == "cpu":
        return Range(CPU[1], CPU[0])
    if not half:
        return Range(FLOAT32[1], FLOAT32[0])
    low, high = next((low, high) for most, low, high in UTILISATION[gpu.family] if parameters <= most)
    return Range(high, low * UNTUNED)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step, and of its parts."""

    products: Range
    launching: Range  # until the host has told the GPU what to do: what a small model takes
    update: float
    sending: float
    total: Range  # best: sending is hidden behind products; worst: nothing is


def step_time(gpu: GPU, work: Work, parameters: int, outside: int, depth: int, flops_a_token: float) -> StepTime:
    """The step of one process, which all wait for.

    outside: parameters that lie outside the core's blocks, of which there are `depth`.
    """
    used = utilisation(gpu, parameters, work.half)
    flops = flops_a_token * work.tokens * work.micro_batches
    products = Range(flops / gpu.peak(work.half) / used.best, flops / gpu.peak(work.half) / used.worst)
    update = UPDATE * parameters / work.shards / gpu.bandwidth
    sending = sent_bytes(work, parameters, outside) / bus_bandwidth(gpu, work.processes)
    block, again, rest = LAUNCHED[work.half]
    kernels = work.micro_batches * (depth * (block + (again if work.checkpointing else 0)) + rest) * work.cuda
    launching = Range(kernels * LAUNCH_S[0], kernels * LAUNCH_S[1])
    best = max(products.best, sending, launching.best) + update
    worst = max(products.worst, launching.worst) + sending + update
    return StepTime(products=products, launching=launching, update=update, sending=sending, total=Range(best, worst))


def sent_bytes(work: Work, parameters: int, outside: int) -> float:
    """What each process sends in a step, by rings: an all-reduce sends 2 (n - 1) / n of what is reduced, an all-gather or a
    reduce-scatter (n - 1) / n (Patarasu & Yuan 2009).

    "ddp": one all-reduce of the gradients. "fsdp": weights gathered for the forward and once more for the backward pass of every
    micro-batch (outside the blocks once), gradients scattered once.
    """
    n = work.processes
    around = (n - 1) / n
    if work.shards == 1:
        return 2 * around * FLOAT * parameters
    size = 2 if work.half and work.cast_by_fsdp else FLOAT
    gathered = size * (2 * (parameters - outside) + outside) * work.micro_batches
    return around * (gathered + FLOAT * parameters)


def bus_bandwidth(gpu: GPU, processes: int) -> float:
    """Bytes/s that each process of a ring can send: by the link inside a node, beyond it through all adapters of a node at once."""
    speed = gpu.link if processes <= gpu.node else min(gpu.link, gpu.node * gpu.network)
    return speed * SENT
