"""The handwritten digits: our example beside nearest neighbours and a plain timm ViT, on the same splits, in the same run.

    uv run benchmarks/digits.py [--seeds 0 1 2] [--write]         about 7 minutes on 2 cores

The timm ViT has the same width, depth, heads, patch and batch, 2,000 steps of AdamW with cosine, but no augmentation and no
averaged weights (with our augmentation and these steps it comes to less, see DECISIONS.md). Ours has 900 steps of Muon.
--write writes the table to benchmarks/results/digits.md.
"""

import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from benchmarks import report, script
from benchmarks.data import ROOT, Rows, digits_8x8

Parts = tuple[Rows, Rows]  # to train on, to test on
STEPS, BATCH = 2000, 64


def neighbours(parts: Parts, k: int) -> float:
    """k nearest neighbours on raw pixels."""
    x, y = (np.array([row["image"].ravel() for row in part], np.float32) for part in parts)
    labels, test_labels = ([row["label"] for row in part] for part in parts)
    return float(KNeighborsClassifier(k).fit(x, labels).score(y, test_labels))


def timm_vit(parts: Parts, seed: int) -> float:
    """timm's VisionTransformer of the same shape, trained by a plain loop."""
    from timm.models import VisionTransformer
    from timm.optim import param_groups_weight_decay
    from timm.scheduler import CosineLRScheduler

    torch.manual_seed(seed)
    np.random.seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=4
    )
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.1), lr=1e-3, betas=(0.9, 0.99), fused=True)
    schedule = CosineLRScheduler(
        optimizer, t_initial=STEPS, lr_min=1e-5, warmup_t=STEPS // 20, warmup_prefix=False, t_in_epochs=False
    )
    train, test = parts
    rounds = STEPS * BATCH // len(train) + 1
    order = np.concatenate([np.random.permutation(len(train)) for _ in range(rounds)])

    def batch(rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor(np.stack([row["image"] for row in rows])[:, None] / 255.0, dtype=torch.float32)
        return (x - 0.3) / 0.37, torch.tensor([int(row["label"]) for row in rows])

    model.train()
    for step in range(STEPS):
        schedule.step_update(step)
        x, y = batch([train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    x, y = batch(test)
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def ours(seed: int, printed: list[str]) -> float:
    """The accuracy of the example itself, as a user runs it; what it printed is added."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(ROOT / "examples" / "train_image_classifier.py"), "--seed", str(seed)]
        out = subprocess.run(program, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    printed.append(out)
    return float(out.split("test accuracy ")[1].split("%")[0]) / 100


def main() -> None:
    args = script.parser(__doc__, "seeds", "write", seeds=[0, 1, 2]).parse_args()
    rows: dict[str, list[tuple[float, float]]] = {}
    printed: list[str] = []  # by the example
    for seed in args.seeds:
        parts = digits_8x8(seed)
        for name, run in {
            "1 nearest neighbour": lambda p=parts: neighbours(p, 1),
            "3 nearest neighbours": lambda p=parts: neighbours(p, 3),
            "plain timm VisionTransformer, same shape, 2,000 steps": lambda p=parts, s=seed: timm_vit(p, s),
            "examples/train_image_classifier.py": lambda s=seed: ours(s, printed),
        }.items():
            start = time.perf_counter()
            rows.setdefault(name, []).append((run(), time.perf_counter() - start))
    lines = []
    for name, results in rows.items():
        accuracy, seconds = ([pair[i] for pair in results] for i in (0, 1))
        mean = [f"**{np.mean(accuracy):.2%}**", f"{np.mean(seconds):.0f}"]
        lines.append([name, *(f"{a:.2%}" for a in accuracy), *mean])
    head = ["held-out fifth of the digits", *(f"seed {s}" for s in args.seeds), "mean", "seconds"]
    table = script.table(head, lines)
    print(table)
    if args.write:
        first = f"```text\n$ uv run examples/train_image_classifier.py\n{printed[0]}```"
        report.keep("first_run", "The first command", "uv run benchmarks/digits.py --write", first)
        report.keep("digits", "Digits", "uv run benchmarks/digits.py --write", table)


if __name__ == "__main__":
    main()
