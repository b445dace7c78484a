"""One NVIDIA GPU: what every row on it needs, the two ceilings, and a command.

PYTHONPATH=.:tokenizers python3 -m benchmarks.speed.gpu gpu-ceilings gpu-train gpu-decode      a guess: 10 minutes of an H200

It needs neither `rich` nor `cyclopts`, which machines with a GPU may lack; its lines also go to the folder OUT, if that is set.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.row import Place, Row


def clocked(run: Callable[[], Any], device: str, rounds: int, warm: int = 3) -> float:
    """Median seconds of a round; on a GPU by its own clock, with nothing else waiting in its queue."""
    import torch

    for _ in range(warm):
        run()
    spent = []
    for _ in range(rounds):
        if device == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begun.record()
            run()
            ended.record()
            torch.cuda.synchronize()
            spent.append(begun.elapsed_time(ended) / 1000)
        else:
            clock = time.perf_counter()
            run()
            spent.append(time.perf_counter() - clock)
    return median(spent)


def ceilings(place: Place) -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product of random matrices, and bytes/s, read and written, of a copy."""
    import torch

    side, count = (128, 2**20) if place.quick else (8192, 2**31)
    a, b = (torch.randn(side, side, device=place.device).bfloat16() for _ in range(2))
    products = 10  # in a row, so that launching is hidden
    flops = 2 * side**3 * products / clocked(lambda: [a @ b for _ in range(products)], place.device, 5)
    source = torch.zeros(count, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return flops, 2 * count * products / clocked(
        lambda: [target.copy_(source) for _ in range(products)], place.device, 5
    )


def ceilings_report(place: Place) -> dict[str, Any]:
    flops, speed = ceilings(place)
    return {
        "lines": [f"bf16 product {flops / 1e12:.4g} TFLOP/s; copy {speed / 1e12:.4g} TB/s read and written"],
        "met": None,
    }


def halved(place: Place) -> AbstractContextManager:
    import torch

    return torch.autocast(place.device, dtype=torch.bfloat16)


def llama(core: Any, vocab: int, place: Place, **changes: Any) -> Any:
    """Hugging Face's of the same shape, with its fused attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(place.seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab + 1,
        "hidden_size": core.width,
        "intermediate_size": core.hidden,
        "num_hidden_layers": core.depth,
        "num_attention_heads": core.heads,
        "num_key_value_heads": core.groups,
        "max_position_embeddings": 4096,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**settings | changes))
    return model.to(place.device)


ROWS = (
    Row(
        name="gpu-ceilings",
        what="a large bfloat16 product, and a copy on the device",
        report=ceilings_report,
        cuda=True,
    ),
)


def main(names: Sequence[str], quick: bool) -> None:
    """Run rows without the command line's packages; lines are shown, and kept in the folder OUT."""
    import torch

    from benchmarks.speed import gpu_cifar, gpu_decode, gpu_train

    parts = (ROWS, gpu_train.ROWS, gpu_decode.ROWS, gpu_cifar.ROWS)
    rows = {row.name: row for part in parts for row in part}
    if unknown := set(names) - set(rows):
        raise SystemExit(f"there is no row {', '.join(unknown)}; there are {', '.join(rows)}")
    for name in names or rows:
        report = rows[name].report
        assert report is not None
        clock = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            found = report(Place(folder=Path(folder), device=device, quick=quick))
        found |= {"row": name, "seconds": round(time.perf_counter() - clock), "torch": torch.__version__}
        print("\n".join([f"{name} ({found['seconds']} s), goal met: {found['met']}", *found["lines"], ""]), flush=True)
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="all of them unless named")
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it run?")
    given = parser.parse_args()
    main(given.rows, given.quick)
