"""What a GPU can do, from its maker's data sheet; and this machine's CPU, measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from multimodal.shapes import ConfigError, did_you_mean

GB, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Dense peaks in FLOP/s, memory in bytes; link and network: bytes/s one way, inside a node and between nodes, of each GPU."""

    name: str
    bf16: float | None  # products in bfloat16 added up in float32, without sparsity; None: no hardware for it
    fp32: float  # without tensor cores: torch.get_float32_matmul_precision() is "highest" unless set
    memory: float
    bandwidth: float  # of its memory, bytes/s
    link: float
    network: float
    node: int = 8  # GPUs that share the fast link
    family: str = "hopper"  # whose published utilisations are used, see speed.py
    source: str

    def peak(self, half: bool) -> float:
        """FLOP/s of products.

        Raises:
            ConfigError: bfloat16, which this GPU does not multiply.
        """
        if half and self.bf16 is None:
            raise ConfigError(f"plan: {self.name} has no hardware for bfloat16; use precision=float32")
        return self.bf16 if half and self.bf16 is not None else self.fp32


def _gpu(name: str, bf16, fp32, memory, bandwidth, link, network, family: str, source: str, node: int = 8) -> GPU:
    return GPU(
        name=name,
        bf16=None if bf16 is None else bf16 * TERA,
        fp32=fp32 * TERA,
        memory=memory * GB,
        bandwidth=bandwidth * GB,
        link=link * GB,
        network=network * GB,
        family=family,
        source=source,
        node=node,
    )


# name, TFLOP/s bf16 and fp32, GB, GB/s of memory, GB/s one way inside a node (half of the data sheet's both ways) and between
# nodes (a 200 or 400 Gb/s adapter a GPU as in DGX machines; where no such machine is sold, 100 Gb/s a node of 8 is assumed)
_ROWS = (
    _gpu(
        "a100-40",
        312,
        19.5,
        40,
        1555,
        300,
        25,
        "ampere",
        "NVIDIA A100 data sheet 2021 (SXM 40 GB); DGX A100 data sheet",
    ),
    _gpu(
        "a100-80",
        312,
        19.5,
        80,
        2039,
        300,
        25,
        "ampere",
        "NVIDIA A100 data sheet 2021 (SXM 80 GB); DGX A100 data sheet",
    ),
    _gpu(
        "h100",
        989.4,
        66.9,
        80,
        3350,
        450,
        50,
        "hopper",
        "NVIDIA H100 white paper 2022, table 1 (SXM5); DGX H100 data sheet",
    ),
    _gpu("h200", 989.4, 66.9, 141, 4800, 450, 50, "hopper", "NVIDIA H200 data sheet 2024 (SXM); DGX H200 data sheet"),
    _gpu(
        "b200",
        2250,
        75,
        180,
        7700,
        900,
        50,
        "hopper",
        "NVIDIA Blackwell data sheet 2025 (HGX B200); DGX B200 data sheet",
    ),
    _gpu("l40s", 362.05, 91.6, 48, 864, 32, 1.56, "ampere", "NVIDIA L40S data sheet 2023 (PCIe 4 x16, no NVLink)"),
    _gpu("rtx4090", 165.2, 82.6, 24, 1008, 32, 1.56, "ampere", "NVIDIA Ada white paper 2022, appendix A (PCIe 4 x16)"),
    _gpu("t4", None, 8.1, 16, 320, 16, 1.56, "ampere", "NVIDIA T4 data sheet 2019 (PCIe 3 x16)"),
)
GPUS = {row.name: row for row in _ROWS}


def find_gpu(name: str) -> GPU:
    """The GPU of this name; "cpu" is this machine.

    Raises:
        ConfigError: no such name (lists those there are).
    """
    if name == "cpu":
        return this_cpu()
    known = [*GPUS, "cpu"]
    if name.lower() not in GPUS:
        raise ConfigError(
            f"plan: GPU {name!r} is unknown; there are {', '.join(known)}{did_you_mean(name.lower(), known)}"
        )
    return GPUS[name.lower()]


def this_cpu(seconds: float = 0.5, size: int = 768) -> GPU:
    """This machine with the threads torch uses now: its best products of square matrices, and memory copied, in `seconds` each."""
    import torch

    threads = torch.get_num_threads()
    a, b = torch.randn(size, size), torch.randn(size, size)
    big = torch.zeros(2**22)
    fp32 = 2.0 * size**3 * _rate(lambda: a @ b, seconds, threads)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    tiles = torch.cpu._is_amx_tile_supported()
    bf16 = 2.0 * size**3 * _rate(lambda: half_a @ half_b, seconds, threads) if tiles else None
    bandwidth = 2.0 * big.nbytes * _rate(big.clone, seconds, threads)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    what = f"measured: {size} x {size} products with {threads} thread(s)"
    return GPU(
        name="cpu",
        bf16=bf16,
        fp32=fp32,
        memory=memory,
        bandwidth=bandwidth,
        link=bandwidth / 2,
        network=bandwidth / 2,
        node=1,
        family="cpu",
        source=what,
    )


def _rate(work: Callable[[], Any], seconds: float, threads: int) -> float:
    """How often a second, at its best: by the CPU's time, as other programs may be running."""
    best, until = 0.0, time.perf_counter() + seconds
    while True:
        start = time.process_time()
        work()
        best = max(best, threads / max(time.process_time() - start, 1e-9))
        if time.perf_counter() > until:
            return best
