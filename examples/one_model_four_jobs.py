"""One model, from scratch, four jobs: it classifies pictures, transcribes speech, writes captions, and draws and speaks.

    uv run examples/one_model_four_jobs.py                           9 minutes on 2 cores
    uv run examples/one_model_four_jobs.py --only transcribe         one job alone, for comparison
    uv run examples/one_model_four_jobs.py --real PATH               MNIST, Free Spoken Digits and Flickr8k, an hour or more

Expected: pictures 97 % right, words of unseen voices 97 % by CTC and token by token, captions 90 % exact; of what is drawn and
said 95 % are named rightly by their nearest real example. Leaves the model, drawings.png and WAV files in --folder.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import job_sets
import numpy as np
import soundfile
import torch
from job_sets import DRAW, HEAR, JOBS, SAY
from sound_sets import DIGITS, RATE_HZ

import multimodal as mm

CORE, LARGER = mm.Core(width=128, depth=4, heads=4), mm.Core.small().replace(dropout=0.1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, test, write; returns the shares that are right."""
    args = parse(arguments)
    start = time.perf_counter()

    # data and tokenizers
    sets = job_sets.real(args.real) if args.real else job_sets.small(args.seed)
    tasks = [task for job, tasks in JOBS.items() if args.only in (None, job) for task in tasks]
    data: dict[str, Any] = {task: sets.train[task] for task in tasks}
    for task in {DRAW, SAY} & set(tasks):
        data[task] = mm.Blanked(data[task], ("text",))

    # model
    core = LARGER if args.real else CORE
    heads = {HEAR: mm.CTC()}
    model = mm.Model(sets.tokenizers, core, [mm.Task(task, heads.get(task)) for task in tasks], seed=args.seed)

    # fit: every task has the same share of a step whether it is alone or not
    recipe = mm.Recipe(
        steps=args.steps, batch=args.share * len(tasks), lr=3e-3, optimizer="muon", ema=0.99, workers=args.workers
    )
    keep = {"folder": args.folder, "resume": args.resume, "go_on": f"uv run {shlex.join(sys.argv)} --resume"}
    run = mm.fit(model, data, recipe, seed=args.seed, **keep)
    if not run.finished:
        sys.exit(130)

    # show
    right = {}
    for task in tasks:
        if task not in (DRAW, SAY):
            right[task] = share_right(model, task, sets.test[task])
    if DRAW in tasks:
        right |= drawings(model, sets, args)
        right |= speech(model, sets, args)
    for name, share in right.items():
        print(f"{name:<45} {share:7.1%} right")
    print(f"model {args.folder / 'model'}, {time.perf_counter() - start:.0f} s in all")
    return right


def share_right(model: mm.Model, task: str, rows: job_sets.Rows) -> float:
    """The share of answers that are exactly what was wanted."""
    samples = [rows[i] for i in range(len(rows))]
    answer = model.packer.patterns[task].answer
    found = model.predict(task, samples)
    return float(np.mean([str(a.value) == s[answer] for a, s in zip(found, samples, strict=True)]))


def drawings(model: mm.Model, sets: job_sets.JobSet, args: argparse.Namespace) -> dict[str, float]:
    """Draw every digit many times and let the nearest real picture name each."""
    from torchvision.utils import save_image

    asked = [DIGITS[i % 10] for i in range(args.count)]
    written = model.generate(
        DRAW, [{"text": w} for w in asked], temperature=args.temperature, guidance=2.0, seed=args.seed
    )
    pictures = [a.value.clamp(0, 1) for a in written]
    save_image(torch.stack(pictures[:100]), args.folder / "drawings.png", nrow=10)
    known = sets.train[DRAW].rows
    reader = job_sets.Reader([job_sets.looks(x) for x, _ in known], [DIGITS[int(d)] for _, d in known])
    unseen = sets.test[DRAW].rows
    ceiling = reader.share([job_sets.looks(x) for x, _ in unseen], [DIGITS[int(d)] for _, d in unseen])
    print(f"of real unseen pictures the nearest example names {ceiling:.1%}")
    return {f"{DRAW}, named by the nearest picture": reader.share([p.flatten() for p in pictures], asked)}


def speech(model: mm.Model, sets: job_sets.JobSet, args: argparse.Namespace) -> dict[str, float]:
    """Say every word several times and let the nearest real clip name each."""
    known = sets.train[SAY].rows
    words = sorted({clip.word for clip in known})
    asked = [words[i % len(words)] for i in range(args.count)]
    samples = [{"text": word} for word in asked]
    written = model.generate(SAY, samples, temperature=args.temperature, guidance=2.0, seed=args.seed, max_tokens=100)
    for i, answer in enumerate(written[: len(words)]):
        soundfile.write(args.folder / f"{asked[i]}.wav", answer.value[0].numpy(), RATE_HZ)
    reader = job_sets.Reader([job_sets.sounds_like(c.wave_S) for c in known], [c.word for c in known])
    unseen = sets.test[SAY].rows
    ceiling = reader.share([job_sets.sounds_like(c.wave_S) for c in unseen], [c.word for c in unseen])
    print(f"of real unseen clips the nearest example names {ceiling:.1%}")
    return {
        f"{SAY}, named by the nearest clip": reader.share([job_sets.sounds_like(a.value[0]) for a in written], asked)
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=JOBS, help="train this job alone")
    parser.add_argument("--real", type=Path, metavar="PATH", help="folder with mnist_t10k, fsdd.zip and flickr8k.zip")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "four_jobs", help="run folder")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--share", type=int, default=12, help="samples of each task in a step")
    parser.add_argument("--count", type=int, default=400, help="how many pictures and words are written")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--workers", type=int, default=1, help="data processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
