"""A Neural Turing Machine learns to copy strings of 1 to 20 random bytes and copies strings three times as long.

    uv run examples/attention/ntm_copy.py            the whole form, on one thread
    uv run examples/attention/ntm_copy.py --quick    a reduced form, seconds

The layer is `TuringMachine` (Graves et al. 2014, section 4.1), trained with 128 slots and tested with 256: its parameters do not
know. An LSTM on the same strings stands beside.

Measured (all numbers: benchmarks/results/seeds.json):
- Neural Turing Machine, 4.7 CPU-minutes, seed 0: NTM strings right at 20 = 1 (bar == 1); NTM strings right at 40 = 1
  (bar == 1); NTM strings right at 60 = 1 (bar == 1); NTM bit error at 80 = 0 (bar <= 0.01); NTM bit error at 120 = 0
  (bar <= 0.1); beside: LSTM bit error at 20 0.3753; LSTM bit error at 40 0.4792; NTM parameters 15,420
"""

import sys
import time
from pathlib import Path

import numpy as np
from command import run
from drawing import blank, save
from kinds import Bits

import multimodal as mm
from multimodal.heads.each_row import EachRow
from multimodal.layers import Recurrent, Replace
from multimodal.task import Task
from multimodal.zoo import TuringMachine

TASK, LENGTHS = "tape -> copy", (10, 20, 30, 40, 60, 80, 120)
REMARKS = {f"LSTM strings right at {length}": "baseline" for length in LENGTHS}


class Strings:
    """Strings of `shortest` to `longest` random bytes: what is seen is the string, an end mark, and as many blanks to write in."""

    def __init__(self, count: int, shortest: int, longest: int, seed: int) -> None:
        self.count, self.lengths, self.seed = count, (shortest, longest + 1), seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self.seed, index))
        bits = random.integers(0, 2, (length := random.integers(*self.lengths), 8))
        tape = np.zeros((2 * length + 1, 9))
        tape[:length, :8], tape[length, 8] = bits, 1
        return {"tape": tape, "copy": bits}


def model_of(layer: TuringMachine | Recurrent, seed: int) -> mm.Model:
    core = mm.Core(width=16, depth=1, heads=1, rotary_split=(0, 0, 0), block=(layer,))
    return mm.Model({"tape": Bits(9), "copy": Bits(8)}, core, [Task(TASK, EachRow())], seed=seed)


def train(model: mm.Model, steps: int, batch: int, lr: float, longest: int, seed: int) -> float:
    """CPU-seconds of a run of Adam with clipped gradients, each string seen once."""
    start = time.process_time()
    recipe = mm.Recipe(
        steps=steps, batch=batch, lr=lr, warmup=0.01, final_lr=0.1, weight_decay=0.0, betas=(0.9, 0.999), precision="float32",
        device="cpu", seed=seed,
    )  # fmt: skip
    mm.fit(model, {TASK: Strings(batch * steps, 1, longest, seed)}, recipe, quiet=not sys.stdout.isatty())
    return time.process_time() - start


def copied(model: mm.Model, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Strings (count, length, 8) and what the model makes of them."""
    samples = [Strings(count, length, length, 10**6)[i] for i in range(count)]
    written = [answer.value[-length:] for answer in model.predict(TASK, samples)]
    return np.stack([s["copy"] for s in samples]), np.stack(written)


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    steps, longest, count = (10, 3, 2) if quick else (2400, 20, 64)
    trained = model_of(TuringMachine(slots=128, slot_width=20, hidden=100, merge=Replace()), seed)
    ntm = model_of(TuringMachine(slots=256, slot_width=20, hidden=100, merge=Replace()), seed)
    lstm = model_of(Recurrent(cell="lstm", hidden=256, merge=Replace()), seed)
    numbers = {"NTM parameters": float(sum(p.numel() for p in ntm.parameters()))}
    numbers["NTM CPU-s of training"] = train(trained, steps, 16, 3e-3, longest, seed)
    ntm.load_state_dict(trained.state_dict())
    numbers["LSTM CPU-s of training"] = train(lstm, steps // 4, 64, 1e-3, longest, seed)
    for name, model in (("NTM", ntm.eval()), ("NTM, slots as trained,", trained), ("LSTM", lstm)):
        for length in LENGTHS:
            wanted, written = copied(model, length, count)
            numbers[f"{name} bit error at {length}"] = float((wanted != written).mean())
            numbers[f"{name} strings right at {length}"] = float((wanted == written).all((1, 2)).mean())
    if out is not None:
        wanted, written = copied(ntm, LENGTHS[-1], 1)
        draw(numbers, wanted[0].T, written[0].T, out / "ntm_copy.png")
    return numbers


def draw(numbers: dict[str, float], wanted: np.ndarray, written: np.ndarray, path: Path) -> None:
    figure = blank(10, 5)
    curve, *strings = figure.subplots(4, 1, height_ratios=(5, 1, 1, 1))
    for name in ("NTM", "LSTM"):
        curve.plot(LENGTHS, [numbers[f"{name} bit error at {n}"] for n in LENGTHS], marker="o", label=name)
    curve.set(xlabel="length (trained: 1 to 20)", ylabel="bit error", ylim=(-0.02, 0.52))
    curve.legend()
    for axes, title, rows in zip(
        strings, ("wanted", "written", "wrong"), (wanted, written, wanted != written), strict=True
    ):
        axes.imshow(rows, aspect="auto", cmap="gray_r", vmin=0, vmax=1)
        axes.set(ylabel=title, xticks=[], yticks=[])
    save(figure, path)


if __name__ == "__main__":
    run(measure, "ntm_copy", __doc__, REMARKS)
