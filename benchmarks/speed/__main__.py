"""Rows with a report, where `rich` and `cyclopts` are not installed, as on many machines with a GPU.

PYTHONPATH=.:tokenizers python3 -m benchmarks.speed gpu-ceilings gpu-train gpu-decode      a guess: 6 minutes of an H200

The lines also go to the folder OUT, if that is set.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.main import all_rows
from benchmarks.speed.row import Place


def main(names: Sequence[str], quick: bool) -> None:
    """Run rows one after the other in this process."""
    import torch

    rows = {row.name: row.report for _, row in all_rows() if row.report is not None}
    if unknown := set(names) - set(rows):
        raise SystemExit(f"there is no row {', '.join(unknown)} with a report; there are {', '.join(rows)}")
    for name in names:
        clock = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            found = rows[name](Place(folder=Path(folder), device=device, quick=quick))
        found |= {"row": name, "seconds": round(time.perf_counter() - clock), "torch": torch.__version__}
        print("\n".join([f"{name} ({found['seconds']} s), goal met: {found['met']}", *found["lines"], ""]), flush=True)
        if os.environ.get("OUT"):
            Path(os.environ["OUT"], f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it run?")
    given = parser.parse_args()
    main(given.rows, given.quick)
