"""Run a row: both sides in processes of their own, their outputs compared, then timed in turn, A B B A."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.row import Place, Row

ROOT = Path(__file__).parents[2]


class BenchError(RuntimeError):
    """A side failed, or the two do not do the same work."""


class Worker:
    """A side's process; `with` ends it."""

    def __init__(self, module: str, row: Row, side: str, place: Place) -> None:
        self.name = f"{row.name}, {'us' if side == 'ours' else row.peer or 'report'}"
        settings = [place.folder, int(place.quick), place.threads, place.device, place.seed]
        command = [sys.executable, "-m", "benchmarks.speed.worker", module, row.name, side, *map(str, settings)]
        paths = [str(ROOT), str(ROOT / "tokenizers"), os.environ.get("PYTHONPATH", "")]
        threads = str(place.threads)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `__exit__`
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def answer(self) -> dict[str, Any]:
        """The next line of its output.

        Raises:
            BenchError: it ended without one.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = "\n".join(self.errors.read().strip().split("\n")[-12:])
            raise BenchError(f"{self.name}: ended with code {self.process.returncode} and no answer\n{last}")
        return json.loads(line)

    def order(self, *words: object) -> dict[str, Any]:
        """The answer to an order, which is one line of words."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer says why
            print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends its input, upon which it ends; stops it after 20 s."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


Rounds = dict[str, list[dict[str, Any]]]  # by side, each with "wall" and "cpu" in seconds a unit, and "peak" in MB


def measure(module: str, row: Row, place: Place, rounds: int, seconds: float) -> dict[str, Any]:
    """The result of a row: that of its report, or times of `rounds` rounds of each side, of about `seconds` each.

    Raises:
        BenchError: a side failed, or outputs differ.
    """
    if row.report is not None:
        with Worker(module, row, "report", place) as worker:
            return worker.answer()
    if row.fresh:
        return _whole_programs(module, row, place, rounds)
    found: Rounds = {"theirs": [], "ours": []}
    with ExitStack() as stack:
        workers, ready = {}, {}
        for side in found:  # the peer first: it may leave its weights for us
            workers[side] = stack.enter_context(Worker(module, row, side, place))
            ready[side] = workers[side].answer()
        differ = None if row.tolerance is None else difference(row, *_saved_outputs(place.folder, workers))
        warm = {side: worker.order("warm", seconds) for side, worker in workers.items()}
        for i in range(rounds):  # A B, B A, ..: what drifts within a round goes either way
            for side in ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours"):
                found[side].append(workers[side].order("time", warm[side]["count"]))
    for side, times in found.items():
        ready[side]["facts"]["first run, s"] = round(warm[side]["first"], 3)
        for time_s in times:
            time_s["wall"] /= ready[side]["units"]
            time_s["cpu"] /= ready[side]["units"]
    return _result(ready["ours"]["unit"], differ, found, {side: ready[side]["facts"] for side in found})


def _whole_programs(module: str, row: Row, place: Place, rounds: int) -> dict[str, Any]:
    found: Rounds = {"theirs": [], "ours": []}
    facts: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    unit = ""
    for i in range(rounds):
        for side in ("ours", "theirs"):
            clock = time.perf_counter()
            with Worker(module, row, side, replace(place, seed=place.seed + i)) as worker:
                answer = worker.answer()
            wall = (time.perf_counter() - clock) / answer["units"]
            found[side].append({"wall": wall, "cpu": answer["cpu"], "peak": answer["peak"]})
            facts[side].append(answer["facts"])
            unit = answer["unit"]
    return _result(unit, None, found, {side: _joined(each) for side, each in facts.items()})


def _joined(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The last round's facts; where the rounds differ in one, those of all rounds."""
    return {
        key: value if all(facts.get(key) == value for facts in rounds) else [facts.get(key) for facts in rounds]
        for key, value in rounds[-1].items()
    }


def profiles(module: str, row: Row, place: Place) -> dict[str, Any]:
    """Where the time of both sides goes, as lines."""
    found = {}
    for side in ("theirs", "ours"):
        with Worker(module, row, side, place) as worker:
            worker.answer()
            worker.order("warm", 1)
            found[side] = worker.order("profile")["lines"]
    return {"profile": found}


def difference(row: Row, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference of two sides' tensors, as a share of the largest number.

    Raises:
        BenchError: it is beyond the row's tolerance, or there is nothing to compare.
    """
    if not ours or ours.keys() != theirs.keys():
        raise BenchError(
            f"{row.name}: our outputs are {sorted(ours)} and those of {row.peer} {sorted(theirs)}; give both the same names"
        )
    shares = [0.0]
    for name, mine in ours.items():
        if mine.shape != theirs[name].shape:
            raise BenchError(
                f"{row.name}: {name} is {tuple(mine.shape)} of ours and {tuple(theirs[name].shape)} of {row.peer}"
            )
        largest = max(float(theirs[name].double().abs().max()), 1e-30)
        shares.append(float((mine.double() - theirs[name].double()).abs().max()) / largest)
        if not shares[-1] <= (row.tolerance or 0.0):  # what is not a number is not the same either
            raise BenchError(
                f"{row.name}: {name} differs by {shares[-1]:.2g} of its largest, more than {row.tolerance}: not the same work"
            )
    return max(shares)


def _saved_outputs(folder: Path, workers: Mapping[str, Worker]) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    for worker in workers.values():
        worker.order("outputs")
    return [load_file(folder / f"outputs-{side}.safetensors") for side in ("ours", "theirs")]


def _result(unit: str, differ: float | None, found: Rounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    sides = {
        side: {
            "wall": statistics.median(r["wall"] for r in rounds),
            "cpu": statistics.median(r["cpu"] for r in rounds),
            "peak_mb": round(max(r["peak"] for r in rounds)),
            "facts": facts[side],
        }
        for side, rounds in found.items()
    }
    return {"unit": unit, "difference": differ, **sides, **ratios(found["ours"], found["theirs"])}


def ratios(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Theirs / ours of neighbouring rounds: the median, and all of them in order."""
    found = {key: sorted(t[key] / o[key] for t, o in zip(theirs, ours, strict=True)) for key in ("wall", "cpu")}
    return {
        "ratio": statistics.median(found["wall"]),
        "ratio_cpu": statistics.median(found["cpu"]),
        "ratios": [round(r, 4) for r in found["wall"]],
    }
