"""A run whose data worker is stuck in C code, which hears no signal but SIGKILL.

python stuck.py FOLDER [steps that are made before]
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

import multimodal as mm
from multimodal.data import fetching
from multimodal_tokenizers import Labels, TextBytes

FOLDER = Path(sys.argv[1])


class Stuck:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        count = FOLDER / "asked"
        count.write_text(f"{int(count.read_text()) + 1 if count.exists() else 1}")
        if int(count.read_text()) > 8:
            (FOLDER / "pid").write_text(str(os.getpid()))
            ctypes.PyDLL(None).pause()  # with Python's lock held, as C code does that never gives it back
            while True:
                ctypes.PyDLL(None).pause()
        return {"text": "ab", "label": "yes"}


def main() -> None:
    torch.set_num_threads(1)
    fetching.STUCK_S = 2.0
    model = mm.Model(
        {"text": TextBytes(), "label": Labels(("yes", "no"))}, mm.Core(width=16, depth=1, heads=2), ["text -> label"]
    )
    mm.fit(model, {"text -> label": Stuck()}, steps=9, batch=4, workers=1, device="cpu", folder=FOLDER / "run")


if __name__ == "__main__":
    main()
