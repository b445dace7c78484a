"""The handwritten digits: our example beside nearest neighbours and a plain timm ViT, on the same splits, in the same run.

    uv run benchmarks/digits.py [--seeds 0 1 2] [--write]         about 7 minutes on 2 cores

The timm ViT has the same width, depth, heads, patch, number of steps and batch, AdamW and cosine, but no augmentation and no
averaged weights (with our augmentation and these steps it comes to less, see DECISIONS.md). --write keeps
the table in benchmarks/results/digits.md.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import image_sets  # noqa: E402
import report  # noqa: E402

STEPS, BATCH = 2000, 64


def neighbours(pictures: image_sets.PictureSet, k: int) -> float:
    """k nearest neighbours on raw pixels."""
    x, y = ([np.asarray(image).ravel() for image in part.images] for part in (pictures.train, pictures.test))
    model = KNeighborsClassifier(k).fit(np.float32(x), pictures.train.labels)
    return float(model.score(np.float32(y), pictures.test.labels))


def timm_vit(pictures: image_sets.PictureSet, seed: int) -> float:
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
    classes = {name: i for i, name in enumerate(pictures.names)}
    order = np.concatenate(
        [np.random.permutation(len(pictures.train)) for _ in range(STEPS * BATCH // len(pictures.train) + 1)]
    )

    def batch(part: image_sets.Pictures, which) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [part[i] for i in which]
        x = torch.tensor(np.stack([np.asarray(s["image"]) for s in samples])[:, None] / 255.0, dtype=torch.float32)
        return (x - 0.3) / 0.37, torch.tensor([classes[s["label"]] for s in samples])

    plain = image_sets.Pictures(pictures.train.images, pictures.train.labels)
    model.train()
    for step in range(STEPS):
        schedule.step_update(step)
        x, y = batch(plain, order[step * BATCH : (step + 1) * BATCH])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    x, y = batch(pictures.test, range(len(pictures.test)))
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def ours(seed: int) -> tuple[float, str]:
    """The example itself, as a user runs it: its accuracy and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(HERE.parent / "examples" / "train_image_classifier.py"), "--seed", str(seed)]
        out = subprocess.run(program, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return float(out.split("test accuracy ")[1].split("%")[0]) / 100, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {}
    printed: list[str] = []

    def example(seed: int) -> float:
        accuracy, out = ours(seed)
        printed.append(out)
        return accuracy

    for seed in args.seeds:
        pictures = image_sets.digits(seed)
        for name, run in {
            "1 nearest neighbour": lambda p=pictures: neighbours(p, 1),
            "3 nearest neighbours": lambda p=pictures: neighbours(p, 3),
            "plain timm VisionTransformer, same shape and steps": lambda p=pictures, s=seed: timm_vit(p, s),
            "examples/train_image_classifier.py": lambda s=seed: example(s),
        }.items():
            start = time.perf_counter()
            rows.setdefault(name, []).append((run(), time.perf_counter() - start))
    head = f"| held-out fifth of the digits | {' | '.join(f'seed {s}' for s in args.seeds)} | mean | seconds |\n"
    table = head + "|---" * (len(args.seeds) + 3) + "|\n"
    for name, results in rows.items():
        accuracy = [a for a, _ in results]
        seconds = sum(s for _, s in results) / len(results)
        table += (
            f"| {name} | {' | '.join(f'{a:.2%}' for a in accuracy)} | **{np.mean(accuracy):.2%}** | {seconds:.0f} |\n"
        )
    print(table)
    if args.write:
        first = f"```text\n$ uv run examples/train_image_classifier.py\n{printed[0]}```"
        report.keep("first_run", "The first command", "uv run benchmarks/digits.py --write", first)
        report.keep("digits", "Digits", "uv run benchmarks/digits.py --write", table)


if __name__ == "__main__":
    main()
