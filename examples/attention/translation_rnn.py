"""English to German by two GRUs, with attention (Bahdanau et al. 2015) and without (Sutskever et al. 2014), at equal CPU time.

    uv run examples/attention/translation_rnn.py          both, on one thread
    uv run examples/attention/translation_rnn.py --quick  a reduced form, seconds

Multi30k, lower-cased, a joint vocabulary of 1,500 merges, trained on 29,000 pairs; greedy BLEU (sacrebleu) on the 1,014 sentences
of the validation part, as the data have no test part. "shuffled": the same answers in another order.

Measured (all numbers: benchmarks/results/seeds.json):
- seq2seq with attention, 13.8 CPU-minutes, seed 0: BLEU, attention = 29.76 (bar >= 17; bar >= (BLEU, no attention) +5);
  BLEU >= 16 words, attention = 24.38 (bar >= 1.4 x (BLEU >= 16 words, no attention)); beside: BLEU, no attention 9.11;
  BLEU >= 16 words, no attention 7.789
"""

import random
import time
from pathlib import Path
from typing import Any

import torch
from command import run
from drawing import blank, save
from seq2seq import START, recurrent
from sets import multi30k

import multimodal as mm
from multimodal_tokenizers import TextBPE

TASK = "en:text -> de:text"
LENGTHS = {"<= 10 words": (0, 10), "11 to 15 words": (11, 15), ">= 16 words": (16, 999)}
CHEATS = ("BLEU, shuffled", "BLEU, copy of the source")
Pairs = list[tuple[str, str]]


def data(quick: bool) -> tuple[Pairs, Pairs]:
    """Training and validation pairs (English, German) in lower case."""
    train, val = ([(en.lower().strip(), de.lower().strip()) for en, de in part] for part in multi30k())  # type: ignore[misc]
    return (train[:64], val[:9]) if quick else (train, val)


def bleu(said: list[str], right: list[str]) -> float:
    import sacrebleu

    return sacrebleu.corpus_bleu(said, [right]).score if said else 0.0


def learn(model: mm.Model, train: Pairs, steps: int, *, quick: bool, **settings: Any) -> None:
    """Fit on pairs whose tokens are made once."""
    text = model.packer.tokenizers["text"]
    ready = [{"en": text(en), "de": text(de)} for en, de in train]
    mm.fit(model, {TASK: ready}, steps=2 if quick else steps, batch=32 if quick else 128, quiet=quick, **settings)


def scored(model: mm.Model, val: Pairs, quick: bool) -> dict[str, float]:
    """BLEU of greedy translations, overall and by the number of English words, and that of two ways to cheat."""
    samples = [{"en": en} for en, _ in val]
    said = [str(a) for a in model.generate(TASK, samples, max_tokens=5 if quick else 60, batch=256)]
    right = [de for _, de in val]
    for (en, de), answer in zip(val[:3], said, strict=False):
        print(f"  {en}\n  = {answer}\n  ~ {de}")
    numbers = {"BLEU": bleu(said, right)}
    for name, (low, high) in LENGTHS.items():
        some = [i for i, (en, _) in enumerate(val) if low <= len(en.split()) <= high]
        numbers[f"BLEU {name}"] = bleu([said[i] for i in some], [right[i] for i in some])
    cheats = (random.Random(0).sample(said, len(said)), [en for en, _ in val])
    return numbers | {name: bleu(cheat, right) for name, cheat in zip(CHEATS, cheats, strict=True)}


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """With attention and without; the picture is of the model that has it."""
    train, val = data(quick)
    text = TextBPE.train([line for pair in train for line in pair], vocab_size=256 + 1500)
    settings = {"lr": 4e-3, "optimizer": "muon", "ema": 0.98, "warmup": 0.1, "seed": seed}
    found: dict[str, float] = {}
    look = mm.layers.CrossAttention(score=mm.attention.Additive())
    cores = {
        "no attention": (recurrent(192, (START, mm.layers.Recurrent()), last=1, dropout=0.1), 900),
        "attention": (recurrent(192, (START, mm.layers.Recurrent(), look), dropout=0.1), 600),
    }
    models = {name: mm.Model({"text": text}, core, [TASK], seed=seed) for name, (core, _) in cores.items()}
    for name, model in models.items():
        start = time.process_time()
        learn(model, train, cores[name][1], quick=quick, **settings)
        found[f"train CPU-s, {name}"] = time.process_time() - start
        numbers = scored(model, val, quick)
        found |= {key if key in CHEATS else f"{key}, {name}": value for key, value in numbers.items()}
    if out is not None:
        draw(models["attention"], val[0], found, out / "translation_rnn.png")
    return found


def draw(model: mm.Model, pair: tuple[str, str], numbers: dict[str, float], path: Path) -> None:
    """BLEU by length, and where the last cross-attention looks while it writes the right translation of one sentence."""
    trace, text = mm.attention.Trace(), model.packer.tokenizers["text"]
    with model.inference_mode():
        model(model.pack(TASK, [{"en": pair[0], "de": pair[1]}]), trace=trace)
    pieces = [[text.decode(mm.Tokens(i[None], torch.zeros(1, 3))) for i in text(line).content] for line in pair]
    figure = blank(10, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    by_length = {name.removeprefix("BLEU "): value for name, value in numbers.items() if " words" in name}
    left.barh(list(by_length), list(by_length.values()))
    left.invert_yaxis()
    left.set(xlabel="BLEU")
    right.imshow(trace.seen[-1].weight_BHTM[0].mean(0).numpy(), cmap="gray_r")
    right.set_xticks(range(len(pieces[0])), pieces[0], rotation=90)
    right.set_yticks(range(len(pieces[1]) + 1), [*pieces[1], "(end)"])
    save(figure, path)


if __name__ == "__main__":
    run(measure, "translation_rnn", __doc__)
