"""One model that sees digits, hears words, and answers in words: "seven plus three is ten".

    uv run examples/cross_modal_demo.py                              2 minutes on 2 cores
    uv run examples/cross_modal_demo.py --audio fsdd PATH            the same with real people's voices
    uv run examples/cross_modal_demo.py --resume --mine seven.wav    what the trained model hears in a recording of yours

`uv run multimodal demo` listens to a microphone, in a browser.

Expected: 95 % of unseen pictures, 90 % of unseen voices and 85 % of sums of the two right, or more; with either left out,
the sum falls to chance (about one in ten). Pictures: scikit-learn's scanned digits. Sound: synthetic voices that come with
this program, or the Free Spoken Digit Dataset (a folder of its recordings, or a zip).
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import image_sets
import numpy as np
import sound_sets

import multimodal as mm
from multimodal.demo import ADD, DIGITS, HEAR, RATE_HZ, SEE, DigitSamples, disturbed
from multimodal.look import draw_answers
from multimodal_tokenizers import AudioFrames, ImagePatches, TextBytes


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, test, draw; returns the shares that are right."""
    args = parse(arguments)
    start = time.perf_counter()

    # data
    pictures = image_sets.digits(args.seed)
    sounds = (
        sound_sets.synthetic() if args.audio[0] == "synthetic" else sound_sets.fsdd(Path(args.audio[1]), args.hold_out)
    )
    spoken_digits = [clip for clip in sounds.train if clip.word in DIGITS]
    train = {
        SEE: DigitSamples(pictures.train.varied(), None),
        HEAR: DigitSamples(None, sounds.train, disturbed),
        ADD: DigitSamples(pictures.train.varied(), spoken_digits, disturbed),
    }

    # tokenizers and model
    model = mm.Model(
        tokenizers={
            "image": ImagePatches(patch=2, channels=1, mean=0.3, std=0.37),
            "audio": AudioFrames(rate_hz=RATE_HZ, mels=40, stack=3),
            "text": TextBytes(),
        },
        core=mm.Core(width=96, depth=4, heads=4),
        tasks=[SEE, HEAR, ADD],
        seed=args.seed,
    )

    # fit
    recipe = mm.Recipe(
        batch=96,
        optimizer="muon",
        lr=6e-3,
        ema=0.98,
        weight_decay=0.1,
        steps=args.steps,
        workers=args.workers,
        seed=args.seed,
    )
    keep = {"folder": args.folder, "resume": args.resume, "go_on": f"uv run {shlex.join(sys.argv)} --resume"}
    run = mm.fit(model, train, recipe, **keep)
    if not run.finished:
        sys.exit(130)

    # show
    digits_heard = [clip for clip in sounds.test if clip.word in DIGITS]
    adding = DigitSamples(pictures.test, digits_heard)
    sums = [adding[i] for i in range(len(adding))]
    right = {
        "unseen pictures": share_right(model, SEE, DigitSamples(pictures.test, None)),
        sounds.about: share_right(model, HEAR, DigitSamples(None, sounds.test)),
        "sums": share_right(model, ADD, sums),
        "sums, picture left out": share_right(model, ADD, [{**s, "image": None} for s in sums]),
        "sums, sound left out": share_right(model, ADD, [{**s, "audio": None} for s in sums]),
    }
    if sounds.unheard:
        right[f"all clips of {args.hold_out}, never heard"] = share_right(
            model, HEAR, DigitSamples(None, sounds.unheard)
        )
    for name, share in right.items():
        print(f"{name:<40} {share:7.1%} right")
    draw_answers(model, ADD, sums[:6], args.folder / "answers.png")
    if args.mine:
        heard, seen = model.predict(HEAR, audio=args.mine), sums[0]["image"]
        added = model.predict(ADD, image=seen, audio=args.mine)
        print(
            f"{args.mine}: {heard.value!r} ({heard.confidence:.0%} sure); with the first test picture: {added.value!r}"
        )
    print(
        f"model {args.folder / 'model'}, picture {args.folder / 'answers.png'}, {time.perf_counter() - start:.0f} s in all"
    )
    return right


def share_right(model: mm.Model, task: str, samples: Any) -> float:
    """The share of answers whose last word, the digit or the sum, is right."""
    samples = [samples[i] for i in range(len(samples))]
    answers = model.predict(task, samples)
    return float(
        np.mean([a.value.split()[-1:] == s["text"].split()[-1:] for a, s in zip(answers, samples, strict=True)])
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", nargs="+", default=["synthetic"], metavar="SET", help="synthetic, or fsdd PATH")
    parser.add_argument(
        "--hold-out", metavar="SPEAKER", help="with fsdd: train without this speaker and test on them too"
    )
    parser.add_argument("--mine", type=Path, metavar="FILE", help="a recording of yours, of one digit")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "cross_modal", help="run folder")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1, help="data processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    args = parser.parse_args(arguments)
    if {"synthetic": 1, "fsdd": 2}.get(args.audio[0]) != len(args.audio):
        parser.error(f"--audio {' '.join(args.audio)}: give synthetic, or fsdd PATH")
    if args.mine and not args.mine.is_file():  # found out before the training
        parser.error(f"--mine {args.mine}: there is no such file")
    return args


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
