"""Speech to text from scratch, by CTC and by next token over one core: connected digits, one reader, words of strangers.

    uv run benchmarks/speech.py digits --folder RUN        about 12 CPU-minutes on one thread
    uv run benchmarks/speech.py ljspeech --folder RUN      about 12 CPU-minutes
    uv run benchmarks/speech.py an4 --folder RUN           about 20 CPU-minutes

digits: 2 to 5 recordings of FSDD joined, takes 5 to 49 to train on, 300 fixed strings of takes 0 to 4 to test. ljspeech: every
tenth clip is held out; 18 minutes of one voice are too few to read well, so its rates are only reported. an4: cepstra, every
eighth speaker is held out altogether. The files are in the folder MULTIMODAL_DATA (default ../shared/data). --score FOLDER
scores a kept model.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import speech_data
import torch
from torch import Tensor

from multimodal import CTC, Core, Model, NextToken, Recipe, Task, Tokenizer, fit, override
from multimodal_tokenizers import AudioFrames, Features, TextBytes

DATA = Path(os.environ.get("MULTIMODAL_DATA", "../shared/data"))
BY_CTC, BY_TOKEN = "audio -> text", "audio -> words:text"


@dataclass(frozen=True)
class Setting:
    """One benchmark: what is read, by which core, and how it is trained."""

    parts: Callable[[Path], speech_data.Parts]
    audio: Tokenizer
    core: Core
    recipe: Recipe
    mix: float = 1.0  # samples by CTC for each one by next token
    longest: int = 8  # symbols that next token may write


MUON = Recipe(optimizer="muon", lr=3e-3, ema=0.99, warmup=0.1, checkpoint_every=200)
CEPSTRA = Features(13, step_s=0.01, stack=speech_data.STACK, context=2, deltas=2, hidden=256)
SETTINGS = {
    "digits": Setting(
        speech_data.digits,
        AudioFrames(rate_hz=8000, mels=40),
        Core(width=128, depth=4, heads=4, dropout=0.1),
        override(MUON, steps=3800, batch=16),
    ),
    "ljspeech": Setting(
        speech_data.ljspeech,
        AudioFrames(),
        Core(width=128, depth=4, heads=4, dropout=0.1),
        override(MUON, steps=2300, batch=8),
        mix=3.0,
        longest=200,
    ),
    "an4": Setting(
        speech_data.an4,
        CEPSTRA,
        Core(width=128, depth=4, heads=4, dropout=0.1),
        override(MUON, steps=3800, batch=24),
        mix=3.0,
        longest=80,
    ),
}


def build(setting: Setting, seed: int) -> Model:
    tasks = [Task(BY_CTC, CTC()), Task(BY_TOKEN, NextToken(label_smoothing=0.1))]
    return Model({"audio": setting.audio, "text": TextBytes()}, setting.core, tasks, seed=seed)


def heard(
    model: Model, samples: Sequence[speech_data.Sample], decode: Callable[[Tensor], str], batch: int = 32
) -> list[str]:
    """Transcripts by CTC; `decode` makes text of log-probabilities (N, V), the blank last: greedily, or by a beam search."""
    found = [""] * len(samples)
    with model.inference_mode():
        for start in range(0, len(samples), batch):
            stream = model.pack(BY_CTC, samples[start : start + batch], answers=False)
            reading = stream.readings[BY_CTC]
            rows = model.logits(stream)[BY_CTC].float().log_softmax(-1).split(list(reading.lengths))
            for index, log_p_NV in zip(reading.samples, rows, strict=True):
                found[start + index] = decode(log_p_NV)
    return found


def greedy(log_p_NV: Tensor) -> str:
    """The likeliest symbol of every row, repetitions and blanks taken out."""
    return str(CTC().answer(log_p_NV, [len(log_p_NV)], TextBytes())[0])


def score(model: Model, samples: Sequence[speech_data.Sample], longest: int) -> None:
    """Print error rates of characters, words and whole transcripts, and five items."""
    import jiwer

    wanted = [sample["text"] for sample in samples]
    found = {
        "CTC, greedy": heard(model, samples, greedy),
        "next token, greedy": [str(a) for a in model.generate(BY_TOKEN, samples, max_tokens=longest, batch=32)],
    }
    for name, texts in found.items():
        characters, words = jiwer.cer(wanted, texts), jiwer.wer(wanted, texts)
        whole = sum(a == b for a, b in zip(wanted, texts, strict=True)) / len(wanted)
        print(f"{name}: character error rate {characters:.4f}, word error rate {words:.4f}, whole {whole:.4f}")
    for i in range(0, len(samples), -(-len(samples) // 5)):
        print("\n".join([f"  {wanted[i]}", *(f"  = {texts[i]}  ({name})" for name, texts in found.items())]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=SETTINGS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--score", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[args.run]
    train, test = setting.parts(DATA)
    start = time.process_time()
    if args.score:
        model = Model.load(args.score)
    else:
        model = build(setting, args.seed)
        recipe = override(setting.recipe, seed=args.seed, steps=args.steps or setting.recipe.steps)
        data, mix = {BY_CTC: train, BY_TOKEN: train}, {BY_CTC: setting.mix, BY_TOKEN: 1.0}
        fit(model, data, recipe, mix=mix, folder=args.folder, resume=True)
    print(f"{args.run}: {sum(p.numel() for p in model.parameters()):,} parameters, seed {args.seed}")
    if not args.score:
        print(f"trained in {(time.process_time() - start) / 60:.1f} CPU-minutes")
    print(f"{len(test)} held-out items, {sum(len(sample['text']) for sample in test):,} characters")
    start = time.process_time()
    score(model, test, setting.longest)
    print(f"scored in {time.process_time() - start:.0f} CPU-s")


if __name__ == "__main__":
    main()
