"""English to German by a transformer of 2 + 2 layers (Vaswani et al. 2017), beside the recurrent models of translation_rnn.py.

    uv run examples/attention/translation_transformer.py          the whole form, on one thread
    uv run examples/attention/translation_transformer.py --quick  a reduced form, seconds

The same data, vocabulary and score as translation_rnn.py; the core has rotary places instead of sinusoids.

Measured (all numbers: benchmarks/results/seeds.json):
- Transformer encoder-decoder, 10.7 CPU-minutes, seed 0: BLEU = 31.75 (bar >= 20)
"""

import time
from pathlib import Path

from command import run
from translation_rnn import TASK, data, draw, learn, scored

import multimodal as mm
from multimodal_tokenizers import TextBPE


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    train, val = data(quick)
    text = TextBPE.train([line for pair in train for line in pair], vocab_size=256 + 1500)
    half = mm.Core(width=192, depth=2, heads=4, dropout=0.1)
    task = mm.Task(TASK, mm.NextToken(label_smoothing=0.1))
    model = mm.Model({"text": text}, mm.EncoderDecoder(reader=half, writer=half), [task], seed=seed)
    start = time.process_time()
    learn(model, train, 700, quick=quick, lr=4e-3, optimizer="muon", ema=0.98, warmup=0.1, seed=seed)
    seconds = time.process_time() - start
    numbers = scored(model, val, quick)
    if out is not None:
        draw(model, val[0], numbers, out / "translation_transformer.png")
    return {**numbers, "train CPU-s": seconds}


if __name__ == "__main__":
    run(measure, "translation_transformer", __doc__, {"BLEU": "8 above GRUs without attention"})
