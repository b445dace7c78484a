"""Captions of canvases with soft and hard attention (Xu et al. 2015), and whether the model looks at what it names.

    uv run examples/attention/captions.py          soft, hard and the mean-pooled twin, on one thread
    uv run examples/attention/captions.py --quick  a reduced form, seconds

1 to 3 MNIST digits in a jittered 2 x 2 layout, test digits unseen; synthetic captions name quarters and digits in reading order.
"pointing": share of the attention that lies in the right quarter while a digit is named; chance is a quarter. The twin sees the
mean of the annotation vectors; "blind" always says what captions say most often.

Measured (all numbers: benchmarks/results/seeds.json):
- soft attention (captions), 4.7 CPU-minutes, seed 0: exact = 0.87 (bar >= 0.9, missed; bar >= (mean-pooled exact)
  +0.2); pointing = 0.9425 (bar >= 0.95, missed); beside: mean-pooled exact 0.345
- hard attention (captions): not run yet
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import run
from drawing import looks
from kinds import Canvas, Caption
from sets import WORDS, Canvases, mnist

import multimodal as mm

TASK = "canvas -> caption"
REMARKS = {"hard reads one value": "must be 1"} | dict.fromkeys(
    ("mean exact", "blind exact", "blind digit word"), "baseline"
)


def learn(read: str, seed: int, quick: bool, out: Path | None) -> dict[str, float]:
    """Train with this read ("soft", "hard", "mean") and measure on test digits."""
    images, labels, test, test_labels = mnist()
    rest: dict[str, Any] = {"width": 128, "depth": 1, "heads": 1, "qk_norm": False, "rotary_split": (0, 0, 0)}
    look = mm.layers.CrossAttention(
        score=mm.attention.Additive(), read=mm.attention.Hard(weight=0.1, ahead=1) if read == "hard" else None
    )
    core = mm.EncoderDecoder(
        reader=mm.Core(**rest, block=(mm.layers.MLP(),)),
        writer=mm.Core(**rest, block=(mm.layers.Recurrent(), look, mm.layers.MLP())),
    )
    model = mm.Model({"canvas": Canvas(read == "mean"), "caption": Caption()}, core, [TASK], seed=seed)
    train, steps = Canvases(images, labels, 10**5, None), 3 if quick else 1200
    mm.fit(model, {TASK: train}, steps=steps, batch=64, lr=3e-3, optimizer="muon", ema=0.98, seed=seed, quiet=quick)
    right: dict[str, list[float]] = {"exact": [], "digit word": [], "pointing": [], "reads one value": []}
    shown = []
    for digits in (1, 2, 3):
        fixed = Canvases(test, test_labels, 6 if quick else 200, seed, digits)
        samples, named = [fixed[i] for i in range(len(fixed))], slice(1, 2 * digits, 2)
        said = model.generate(TASK, samples, max_tokens=8, batch=len(samples))
        right["exact"] += [a.value == s["caption"] for a, s in zip(said, samples, strict=True)]
        trace, stream = mm.attention.Trace(), model.pack(TASK, samples)
        with model.inference_mode():
            model(stream, trace=trace)
            ids = model.logits(stream)[TASK].argmax(-1).view(len(samples), -1)
        true = torch.tensor([[WORDS.index(word) for word in s["caption"].split()] for s in samples])
        right["digit word"] += (ids[:, named] == true[:, named]).flatten().tolist()
        if read == "mean":
            continue
        seen = trace.seen[-1]
        quarter = seen.weight_BHTM[:, 0, named].unflatten(-1, (2, 3, 2, 3)).sum((-3, -1)).flatten(2)
        right["pointing"] += quarter.gather(2, true[:, 0::2, None]).flatten().tolist()
        shown.append((samples[0], seen.weight_BHTM[0, 0, named], str(said[0].value)))
        if seen.choice is not None:
            key_BTK = seen.choice.key_BHT[:, 0, :, None].expand(-1, -1, seen.value_BMHK.shape[-1])
            right["reads one value"].append(
                torch.equal(seen.value_BMHK[:, :, 0].gather(1, key_BTK), seen.read_BTHK[:, :, 0])
            )
    if out is not None and shown:
        looks(shown, f"{read} attention over 6 x 6 places", out / "captions.png")
    return {name: float(np.mean(values)) for name, values in right.items() if values}


def measure(seed: int = 0, quick: bool = False, out: Path | None = None, read: str = "soft") -> dict[str, float]:
    """One read, beside its mean-pooled twin and a blind guess."""
    twin = {f"mean-pooled {name}": value for name, value in learn("mean", seed, quick, None).items()}
    return {**learn(read, seed, quick, out), **twin, **blind(seed)}


def everything(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """All reads; the picture is that of the hard one."""
    all_reads = {read: learn(read, seed, quick, out) for read in ("mean", "soft", "hard")}
    return {f"{read} {name}": v for read, values in all_reads.items() for name, v in values.items()} | blind(seed)


def blind(seed: int) -> dict[str, float]:
    """What the commonest caption and the commonest digit get."""
    images, labels, test, test_labels = mnist()
    known, unknown = Canvases(images, labels, 3000, seed + 1), Canvases(test, test_labels, 600, seed)
    usual = Counter(known[i]["caption"] for i in range(len(known))).most_common(1)[0][0]
    exact = float(np.mean([unknown[i]["caption"] == usual for i in range(len(unknown))]))
    return {"blind exact": exact, "blind digit word": float(np.bincount(labels).max() / len(labels))}


if __name__ == "__main__":
    run(everything, "captions", __doc__, REMARKS)
