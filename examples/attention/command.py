"""How every program of this folder is called: `--seed --quick --out`, a table of numbers beside their bars."""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def run(
    measure: Callable[..., dict[str, float]],
    name: str,
    doc: str | None,
    bars: Mapping[str, str],
    **choices: Sequence[str],
) -> None:
    """Measure on one thread, then print each number and what is wanted of it.

    bars: by the name of a number. A quick form is too short for them, so it leaves them out.
    choices: further options such as --variant; `measure` is handed those that were chosen, all where none was.
    """
    import torch

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of data, start and order of the samples (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="only a few seconds, to see it run; too short for the bars"
    )
    folder = Path("runs") / name
    parser.add_argument("--out", type=Path, default=folder, help=f"folder of the picture (default: {folder})")
    for option, names in choices.items():
        parser.add_argument(
            f"--{option}", choices=names, nargs="+", default=list(names), help="only these (default: all)"
        )
    chosen = vars(parser.parse_args())
    seed, quick, out = (chosen.pop(option) for option in ("seed", "quick", "out"))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if quick:
        print("quick form: too short for the bars")
    for key, number in measure(seed, quick, out, **chosen).items():
        text = "not reached" if math.isinf(number) else f"{number:.5g}"
        print(f"{key:<52}{text:>12}   {'' if quick else bars.get(key, '')}".rstrip())
    print(f"picture: {out / name}.png; {time.process_time():.0f} CPU-s")
