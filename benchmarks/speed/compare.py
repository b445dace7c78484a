"""Run a row: both sides in processes of their own, their outputs compared, then timed in turn, A B B A."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.speed.row import Place, Row

ROOT = Path(__file__).parents[2]


class BenchError(RuntimeError):
    """A side failed, or the two do not do the same work."""


class Worker:
    """A side's process."""

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
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `end`
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
            told = "\n".join(self.errors.read().strip().split("\n")[-12:])
            raise BenchError(f"{self.name}: ended with code {self.process.returncode} and no answer\n{told}")
        return json.loads(line)

    def order(self, *words: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer tells why
            print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Let it go, or stop it."""
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


def measure(module: str, row: Row, place: Place, rounds: int, seconds: float) -> dict[str, Any]:
    """Everything that is known of a row after `rounds` rounds of each side, of about so many seconds each.

    Raises:
        BenchError: a side failed, or outputs differ.
    """
    if row.report is not None:
        worker = Worker(module, row, "report", place)
        try:
            return worker.answer()
        finally:
            worker.end()
    if row.fresh:
        return _whole_programs(module, row, place, rounds)
    workers: list[Worker] = []
    try:
        ready = []
        for side in ("theirs", "ours"):  # the peer first: it may leave its weights for us
            workers.append(Worker(module, row, side, place))
            ready.append(workers[-1].answer())
        theirs, ours = workers
        differ = None if row.tolerance is None else difference(row, *_written_outputs(place.folder, workers))
        warm = [worker.order("warm", seconds) for worker in workers]
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        turns = [("ours", ours, warm[1]), ("theirs", theirs, warm[0])]
        for i in range(rounds):  # A B, B A, ..: what drifts within a round goes either way
            for side, worker, told in turns if i % 2 == 0 else turns[::-1]:
                found[side].append(worker.order("time", told["count"]))
    finally:
        for worker in workers:
            worker.end()
    for side, told, first in zip(("theirs", "ours"), ready, warm, strict=True):
        told["facts"] |= {"first run, s": round(first["first"], 3)}
        for timed in found[side]:
            timed["wall"] /= told["units"]
            timed["cpu"] /= told["units"]
    return {
        "unit": ready[1]["unit"],
        "difference": differ,
        **{side: _side(found[side], told["facts"]) for side, told in zip(("theirs", "ours"), ready, strict=True)},
        **ratios(found["ours"], found["theirs"]),
    }


def _whole_programs(module: str, row: Row, place: Place, rounds: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    told: dict[str, dict[str, Any]] = {}
    for i in range(rounds):
        for side in ("ours", "theirs"):
            clock = time.perf_counter()
            worker = Worker(module, row, side, Place(**{**vars(place), "seed": place.seed + i}))
            try:
                told[side] = worker.answer()
            finally:
                worker.end()
            wall = (time.perf_counter() - clock) / told[side]["units"]
            found[side].append({"wall": wall, "cpu": told[side]["cpu"], "peak": told[side]["peak"]})
            told[side]["facts"] = _joined(found[side], told[side]["facts"])
    return {
        "unit": told["ours"]["unit"],
        "difference": None,
        **{side: _side(found[side], told[side]["facts"]) for side in found},
        **ratios(found["ours"], found["theirs"]),
    }


def _joined(so_far: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a round, with those of the rounds before it where they are not the same."""
    so_far[-1]["facts"] = facts
    rounds = [found["facts"] for found in so_far]
    return {k: v if all(r.get(k) == v for r in rounds) else [r.get(k) for r in rounds] for k, v in facts.items()}


def difference(row: Row, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest difference of two sides' tensors, as a share of the largest number.

    Raises:
        BenchError: it is beyond the row's tolerance, or there is nothing to compare.
    """
    if not ours or ours.keys() != theirs.keys():
        raise BenchError(
            f"{row.name}: we put out {sorted(ours)} and {row.peer} {sorted(theirs)}; give both the same names"
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


def _written_outputs(folder: Path, workers: Sequence[Worker]) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    for worker in workers:
        worker.order("outputs")
    return [load_file(folder / f"outputs-{side}.safetensors") for side in ("ours", "theirs")]


def _side(found: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "wall": statistics.median(f["wall"] for f in found),
        "cpu": statistics.median(f["cpu"] for f in found),
        "peak_mb": round(max(f["peak"] for f in found)),
        "facts": facts,
    }


def ratios(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Theirs / ours of neighbouring rounds: the median, and all of them in order."""
    found = {key: sorted(t[key] / o[key] for t, o in zip(theirs, ours, strict=True)) for key in ("wall", "cpu")}
    return {
        "ratio": statistics.median(found["wall"]),
        "ratio_cpu": statistics.median(found["cpu"]),
        "ratios": [round(r, 4) for r in found["wall"]],
    }
