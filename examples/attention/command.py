"""How every program of this folder is called: `--seed --quick --out`, a table of numbers beside their bars."""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks.seed_rows.table import remarks_of


def run(
    measure: Callable[..., dict[str, float]],
    name: str,
    doc: str | None,
    remarks: Mapping[str, str] = MappingProxyType({}),
    **choices: Sequence[str],
) -> None:
    """Measure on one thread, then print each number and what is wanted of it.

    The bars and baselines of a number are those of the table benchmarks/seed_rows/table.py; remarks: more of them, by the name of
    a number. A quick form is too short for the bars, so it leaves all of this out.
    choices: further options such as --variant; `measure` is handed those that were chosen, all where none was.
    """
    import torch

    shown = remarks_of(name)
    shown |= {key: "; ".join(filter(None, (shown.get(key), text))) for key, text in remarks.items()}
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
        print(f"{key:<52}{text:>12}   {'' if quick else shown.get(key, '')}".rstrip())
    print(f"picture: {out / name}.png; {time.process_time():.0f} CPU-s")
