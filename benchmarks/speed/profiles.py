"""Where the time of a unit of work goes, against the floor counted from its multiply-adds and its bytes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARES = {  # what an operator's name holds -> the share it counts for; the first that fits
    "matrix products": ("mm", "linear", "conv", "einsum"),
    "attention": ("attention", "flash"),
    "optimiser": ("adam", "foreach"),
    "norms": ("norm", "rsqrt"),
    "loss": ("softmax", "nll", "cross_entropy", "ctc"),
    "copies": ("copy", "cat", "index", "embedding", "gather", "scatter", "zero", "fill", "contiguous", "clone"),
}


def profile(run: Callable[[], Any], times: int = 3) -> list[str]:
    """Lines of a table: shares of one thread's time by kind of operator, and the floors beside it."""
    run()
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    wall, cpu = (time.perf_counter() - clock) / times, (time.process_time() - cpu) / times
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(times):
            run()
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        share = next((s for s, parts in SHARES.items() if any(p in event.key.lower() for p in parts)), "the rest")
        spent[share] = spent.get(share, 0.0) + event.self_cpu_time_total / 1e6 / times
    spent["Python and waits"] = max(0.0, wall - sum(spent.values()))
    total = sum(spent.values())
    shares = ", ".join(
        f"{share} {t / total:.0%}" for share, t in sorted(spent.items(), key=lambda s: -s[1]) if t / total >= 0.005
    )
    flops, moved = counted(run)
    lines = [f"{1e3 * wall:.1f} ms ({1e3 * cpu:.1f} ms of CPU): {shares}"]
    if flops:
        rate = matmul_rate()
        least = f"{1e3 * flops / rate:.1f} ms, {flops / rate / wall:.0%} of the time"
        lines.append(f"floor of {flops / 1e9:.2f} GFLOP at {rate / 1e9:.0f} GFLOP/s: {least}")
    if moved:
        rate = copy_rate()
        least = f"from memory, at {rate / 1e9:.1f} GB/s, {1e3 * moved / rate:.1f} ms"
        lines.append(f"tensors in and out of operators: {moved / 1e9:.2f} GB; {least}")
    return lines


class _Bytes(TorchDispatchMode):
    """Counts what operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return out


def counted(run: Callable[[], Any]) -> tuple[float, float]:
    """(FLOPs of matrix products, bytes in and out of operators) of one run; zeros where it cannot be looked into."""
    from torch.utils.flop_counter import FlopCounterMode

    moved = _Bytes()
    try:
        with FlopCounterMode(display=False) as flops, moved:
            run()
    except Exception:  # compiled code refuses to be looked into, in many ways
        return 0.0, 0.0
    return float(flops.get_total_flops()), float(moved.moved)


_RATES: dict[str, float] = {}


def matmul_rate(size: int = 1024) -> float:
    """FLOP/s of a large float32 matrix product here; the best of several."""
    if "matmul" not in _RATES:
        a, b = torch.randn(size, size), torch.randn(size, size)
        _RATES["matmul"] = 2 * size**3 / _best(lambda: a @ b)
    return _RATES["matmul"]


def copy_rate(size: int = 2**28) -> float:
    """Bytes/s, read and written, of a copy too large for caches; the best of several."""
    if "copy" not in _RATES:
        a, b = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        _RATES["copy"] = 2 * size / _best(lambda: b.copy_(a))
    return _RATES["copy"]


def _best(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        clock = time.perf_counter()
        run()
        times.append(time.perf_counter() - clock)
    return min(times[1:])
