"""Two processes that are about to do different things: each case's errors in both, and how long they took, as JSON.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501 python agreeing.py OUT
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import multimodal as mm
from multimodal_tokenizers import Labels, TextBytes

TASK = "text -> label"
RANK = int(os.environ["RANK"])
SAMPLES = [{"text": word, "label": "yes" if "a" in word else "no"} for word in ("ab", "be", "cab", "dee", "ea", "fed")]
PLAIN: dict[str, Any] = {"steps": 2, "batch": 4, "device": "cpu", "precision": "float32", "quiet": True}


class Drawn:
    """Samples of a generator of their own: never twice the same, which is no disagreement."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(RANK)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        return {"text": "ab" * int(self.random.integers(1, 9)), "label": "yes"}


def model(names: tuple[str, ...] = ("yes", "no"), core: Any = None, **settings: Any) -> mm.Model:
    core = core or mm.Core(width=16, depth=1, heads=2)
    return mm.Model({"text": TextBytes(), "label": Labels(names)}, core, [TASK], **settings)


def loaded() -> mm.Model:
    made = model()
    if RANK:
        with torch.no_grad():
            made.core.norm.weight[3] = 2.0
    return made


def frozen() -> mm.Model:
    made = model()
    made.core.norm.weight.requires_grad_(RANK == 0)
    return made


class _Version:
    """Another torch in the second process."""

    def __enter__(self) -> None:
        self.before, torch.__version__ = torch.__version__, "2.0.1" if RANK else torch.__version__  # type: ignore[misc]

    def __exit__(self, *_: object) -> None:
        torch.__version__ = self.before  # type: ignore[misc]


def versions() -> Any:
    with _Version():
        return mm.fit(model(), {TASK: SAMPLES}, **PLAIN)


def fit(made: mm.Model | None = None, data: Any = SAMPLES, **settings: Any) -> Any:
    return mm.fit(made or model(), {TASK: data}, **{**PLAIN, **settings})


CASES: dict[str, Any] = {
    "classes": lambda: fit(model(("no", "yes") if RANK else ("yes", "no"))),
    "size": lambda: fit(data=SAMPLES[: 6 - RANK]),
    "order": lambda: fit(data=SAMPLES[::-1] if RANK else SAMPLES),
    "rate": lambda: fit(lr=1e-3 * (1 + RANK)),
    "seed": lambda: fit(seed=RANK),
    "weights": lambda: fit(loaded()),
    "first weights": lambda: fit(model(seed=RANK)),
    "frozen": lambda: fit(frozen()),
    "versions": versions,
    "held out": lambda: fit(evaluation={TASK: SAMPLES[: 3 + RANK]}),
    "mix": lambda: fit(mix={TASK: 1.0 + RANK}),
    "one fails": lambda: fit(data=[] if RANK else SAMPLES),
    "workers": lambda: fit(workers=RANK),
    "drawn anew": lambda: fit(data=Drawn()),
    "alike": fit,
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, case in CASES.items():
        start = time.monotonic()
        try:
            said = f"trained {case().history[-1]['step']}"
        except ValueError as error:
            said = f"{type(error).__name__}: {error}"
        found[name] = {"said": said, "seconds": time.monotonic() - start}
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
