"""`multimodal bench`: the benchmarks of the checkout that this is run from."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from multimodal.cli.showing import check_folder

MOST = 10_000  # rounds, threads


def bench(
    *rows: str,
    quick: bool = False,
    rounds: int = 9,
    seconds: float = 1.0,
    threads: int = 0,
    profile: bool = False,
    keep: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    list_: bool = False,
) -> int:
    """Time ours and what people would pick instead on the same work, in turn. Exit code 1: a row failed or missed its goal.

    Example: multimodal bench vit decode-1

    Example: multimodal bench --keep

    Parameters
    ----------
    rows
        Which rows; all unless given. --list shows them.
    quick
        Tiny settings, to see that it runs; the figures say nothing and are written nowhere.
    rounds
        Rounds of each side.
    seconds
        About how long a round is.
    threads
        Threads of each side; 0: as many as there are cores.
    profile
        Show where the time goes instead.
    keep
        Add the figures to the checkout's benchmarks/results and its README; without it they are shown only.
    out
        Add them to bench.jsonl and bench.md in this folder instead.
    list_
        Show the rows and what is wanted of them.
    """
    from multimodal.shapes import ConfigError

    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "speed").is_dir():
        raise ConfigError(
            "bench: the benchmarks are no part of the installed package; run it in a checkout of the project"
        )
    if keep and out is not None:
        raise ConfigError(f"bench: --keep and --out {out}: the figures go to one place; give one of them")
    check_folder(out)
    if not 1 <= rounds <= MOST or not 0 < seconds < 3600 or not 0 <= threads <= MOST:
        raise ConfigError(
            f"bench: --rounds {rounds} --seconds {seconds:g} --threads {threads}: give positive numbers, rounds and threads of at "
            f"most {MOST:,}, seconds below 3600"
        )
    sys.path.insert(0, str(root))
    main = import_module("benchmarks.speed.main")  # by name: the package must not depend on its benchmarks

    if list_:
        for _, row in main.all_rows():
            goal = "" if row.goal is None else f" (goal {row.goal:g})"
            print(f"{row.name:18} {row.what}{f', beside {row.peer}' if row.peer else ''}{goal}")
        return 0
    cores = threads or os.cpu_count() or 1
    try:
        return main.bench(
            rows,
            quick=quick,
            rounds=1 if quick else rounds,
            seconds=0.0 if quick else seconds,
            threads=cores,
            profile=profile,
            keep=main.RESULTS if keep else out,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
