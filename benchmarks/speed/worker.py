"""One side of a row in a process of its own. It reads orders from its input, a line each, and answers each with a line of JSON.

python -m benchmarks.speed.worker MODULE ROW SIDE FOLDER QUICK THREADS DEVICE SEED
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.speed.row import Job, Place, Row


def main() -> None:
    module, name, side, folder, quick, threads, device, seed = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    row: Row = next(row for row in import_module(module).ROWS if row.name == name)
    place = Place(folder=Path(folder), quick=bool(int(quick)), threads=int(threads), device=device, seed=int(seed))

    def answer(**facts: Any) -> None:
        print(json.dumps(facts, default=str), file=answers, flush=True)

    if row.report is not None:
        answer(**row.report(place))
        return
    if row.fresh:  # what is imported is part of the work, so the worker imports nothing else
        job = row.job(side, place)
        facts = job.run()
        answer(
            units=job.units, unit=job.unit, facts={**job.facts, **(facts or {})}, peak=_peak(), cpu=time.process_time()
        )
        return
    clock = time.perf_counter()
    job = row.job(side, place)
    answer(units=job.units, unit=job.unit, facts=job.facts, outputs=job.outputs is not None)
    for line in sys.stdin:
        order, *rest = line.split()
        if order == "outputs":
            answer(**_save_outputs(job, place.folder / f"outputs-{side}.safetensors"))
        elif order == "warm":
            answer(**_warmed(job.run, float(rest[0])), start=time.perf_counter() - clock)
        elif order == "time":
            answer(**_timed(job.run, int(rest[0])), peak=_peak())
        elif order == "profile":
            from benchmarks.speed.profiles import profile

            answer(lines=profile(job.run))


def _save_outputs(job: Job, path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.as_tensor(t).detach().cpu().contiguous() for name, t in outputs(job).items()}, path)
    return {}


def outputs(job: Job) -> dict[str, Any]:
    """What a side computes, by name."""
    import torch

    assert job.outputs is not None
    with torch.no_grad():
        found = job.outputs()
    return found if isinstance(found, dict) else {"output": found}


def _timed(run: Callable[[], Any], count: int) -> dict[str, float]:
    """Seconds of a unit of work, of the clock and of all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        run()
    return {"wall": (time.perf_counter() - wall) / count, "cpu": (time.process_time() - cpu) / count}


def _warmed(run: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Run twice at least, and on for half a round; then how many runs fill a round, and how long the first one took."""
    first = _timed(run, 1)["wall"]
    spent = last = _timed(run, 1)["wall"]
    while spent < seconds / 2:
        last = _timed(run, 1)["wall"]
        spent += last
    return {"count": max(1, round(seconds / last)), "first": first}


def _peak() -> float:
    """Largest resident memory so far, in MB; 0 where the system does not report it."""
    try:
        import resource
    except ImportError:
        return 0.0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
