"""Characters of Shakespeare: nanoGPT's CPU recipe, counting, and a larger model, in nats per character of the last tenth.

    uv run benchmarks/shakespeare.py recipe              about 3 minutes; nanoGPT's README says 1.88
    uv run benchmarks/shakespeare.py larger              about 25 CPU-minutes on one thread

The text is tinyshakespeare.txt.gz in the folder MULTIMODAL_DATA.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from benchmarks import script
from benchmarks.data import text_of
from multimodal import Core, Model, Recipe
from multimodal_tokenizers import TextBytes

TASK = "-> text"


@dataclass(frozen=True)
class Windows:
    """Pieces of `size` characters that begin anywhere."""

    text: str
    size: int

    def __len__(self) -> int:
        return len(self.text) // self.size

    def __getitem__(self, index: int) -> Mapping[str, str]:
        start = np.random.randint(len(self.text) - self.size + 1)
        return {"text": self.text[start : start + self.size]}


def parts() -> tuple[str, str]:
    """The first nine tenths to train on, the last to score."""
    text = text_of("tinyshakespeare.txt.gz")
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def counting(train: str, test: str, order: int) -> float:
    """An n-gram model interpolated by Witten and Bell (1991), `order` characters long, in nats per character."""
    counts: list[dict[str, dict[str, int]]] = [defaultdict(lambda: defaultdict(int)) for _ in range(order)]
    for i in range(len(train)):
        for n in range(min(order, i + 1)):
            counts[n][train[i - n : i]][train[i]] += 1
    letters = len(set(train + test))
    nats = 0.0
    for i, letter in enumerate(test):
        p = 1 / letters
        for n in range(min(order, i + 1)):
            seen = counts[n].get(test[i - n : i])
            if seen:
                total, kinds = sum(seen.values()), len(seen)
                p = (seen.get(letter, 0) + kinds * p) / (total + kinds)
        nats -= math.log(p)
    return nats / len(test)


def score(model: Model, text: str, size: int, stride: int, batch: int = 32) -> float:
    """Nats per character; each window of `size` scores its last `stride` characters (the first window all of its own)."""
    starts = list(range(0, len(text) - size + 1, stride))
    nats = count = 0.0
    with model.inference_mode():
        for at in range(0, len(starts), batch):
            part = starts[at : at + batch]
            stream = model.pack(TASK, [{"text": text[s : s + size]} for s in part])
            logits_NV, reading = model.logits(stream)[TASK], stream.readings[TASK]
            assert reading.target is not None
            loss_BT = F.cross_entropy(logits_NV, reading.target, reduction="none").view(len(part), size + 1)
            for start, loss_T in zip((part[i] for i in reading.samples), loss_BT, strict=True):
                # the last target is the stop, no character
                scored_T = loss_T[0 if start == 0 else size - stride : size]
                nats, count = nats + float(scored_T.sum()), count + len(scored_T)
    return nats / count


RUNS = {
    "recipe": (
        Core(width=128, depth=4, heads=4, mlp_width=352),
        64,
        Recipe(steps=2000, batch=12, lr=5e-3, optimizer="muon", weight_decay=0.01, ema=0.99, warmup=0.05),
    ),
    "larger": (
        Core(width=256, depth=4, heads=4, dropout=0.1),
        256,
        Recipe(steps=1050, batch=16, lr=3e-3, optimizer="muon", weight_decay=0.05, ema=0.99, checkpoint_every=300),
    ),
}


def main() -> None:
    options = script.parser(__doc__, "folder", "score", "steps", "seed")
    options.add_argument("run", choices=RUNS)
    options.add_argument("--lr", type=float)
    args = script.parsed(options)
    train, test = parts()
    core, size, recipe = RUNS[args.run]
    changes = {name: value for name in ("steps", "lr") if (value := getattr(args, name))}
    data = {TASK: Windows(train, size)}
    model = script.trained(
        args, lambda: Model({"text": TextBytes()}, core, [TASK], seed=args.seed), data, recipe, **changes
    )
    print(f"windows of {size}, side by side: {score(model, test, size, size):.4f} nats per character")
    print(f"at least {size // 2} characters of context: {score(model, test, size, size // 2):.4f}")
    for order in (4, 5, 6):
        print(f"counting, interpolated {order}-gram: {counting(train, test, order):.4f}")


if __name__ == "__main__":
    main()
