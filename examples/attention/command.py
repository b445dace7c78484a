"""What every program of this folder does when it is called: `--seed --quick --out`, a table of numbers, where the picture is."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch


def run(measure: Callable[[int, bool, Path], dict[str, float]], doc: str | None, name: str, bars: str) -> None:
    """Measure on one thread and print what came of it beside the bars."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for key, number in measure(options.seed, options.quick, options.out).items():
        print(f"{key:<44}{number:>12.4f}")
    print(f"bars: {bars}")
    print(f"picture: {options.out / name}.png; {time.process_time():.0f} CPU-s")
