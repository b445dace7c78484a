"""Speech to text from scratch, by CTC and by next token over one core: connected digits, one reader, words of strangers.

    uv run benchmarks/speech.py digits --folder RUN        about 12 CPU-minutes on one thread
    uv run benchmarks/speech.py ljspeech --folder RUN      about 12 CPU-minutes
    uv run benchmarks/speech.py an4 --folder RUN           about 20 CPU-minutes

digits: 2 to 5 recordings of FSDD joined, takes 5 to 49 to train on, 300 fixed strings of takes 0 to 4 to test. ljspeech: every
tenth clip is held out; 18 minutes of one voice are too few to read well, so its rates are only reported. an4: cepstra, every
eighth speaker is held out altogether. The files are in the folder MULTIMODAL_DATA.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks import script, speech_data
from multimodal import CTC, Core, Model, NextToken, Recipe, Task, Tokenizer, override
from multimodal_tokenizers import AudioFrames, Features, TextBytes

BY_CTC, BY_TOKEN = "audio -> text", "audio -> words:text"


@dataclass(frozen=True)
class Setting:
    """One benchmark: what is read, and how the model is trained."""

    parts: Callable[[], speech_data.Parts]
    audio: Tokenizer
    recipe: Recipe
    mix: float = 1.0  # samples by CTC for each one by next token
    longest: int = 8  # symbols that next token may write


MUON = Recipe(optimizer="muon", lr=3e-3, ema=0.99, warmup=0.1, checkpoint_every=200)
CEPSTRA = Features(13, step_s=0.01, stack=speech_data.STACK, context=2, deltas=2, hidden=256)
SETTINGS = {
    "digits": Setting(
        speech_data.digits,
        AudioFrames(rate_hz=8000, mels=40),
        override(MUON, steps=3800, batch=16),
    ),
    "ljspeech": Setting(
        speech_data.ljspeech,
        AudioFrames(),
        override(MUON, steps=2300, batch=8),
        mix=3.0,
        longest=200,
    ),
    "an4": Setting(
        speech_data.an4,
        CEPSTRA,
        override(MUON, steps=3800, batch=24),
        mix=3.0,
        longest=80,
    ),
}


def build(setting: Setting, seed: int) -> Model:
    tasks = [Task(BY_CTC, CTC()), Task(BY_TOKEN, NextToken(label_smoothing=0.1))]
    core = Core(width=128, depth=4, heads=4, dropout=0.1)
    return Model({"audio": setting.audio, "text": TextBytes()}, core, tasks, seed=seed)


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
    options = script.parser(__doc__, "folder", "score", "steps", "seed")
    options.add_argument("run", choices=SETTINGS)
    args = script.parsed(options)
    setting = SETTINGS[args.run]
    train, test = setting.parts()
    recipe = override(setting.recipe, steps=args.steps or setting.recipe.steps)
    data, mix = {BY_CTC: train, BY_TOKEN: train}, {BY_CTC: setting.mix, BY_TOKEN: 1.0}
    model = script.trained(args, lambda: build(setting, args.seed), data, recipe, mix=mix)
    print(f"{len(test)} held-out items, {sum(len(sample['text']) for sample in test):,} characters")
    start = time.process_time()
    score(model, test, setting.longest)
    print(f"scored in {time.process_time() - start:.0f} CPU-s")


if __name__ == "__main__":
    main()
