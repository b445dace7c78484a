"""English to German on Multi30k, from scratch, scored by sacrebleu on the validation sentences.

    uv run benchmarks/translation.py --folder RUN        about 28 CPU-minutes on one thread

The data are multi30k_train_val.zip in the folder MULTIMODAL_DATA, lower-cased as in most papers on it.
"""

import time
import zipfile
from pathlib import Path

from benchmarks import script
from benchmarks.data import DATA
from multimodal import Core, EncoderDecoder, Model, NextToken, Recipe, Task
from multimodal_tokenizers import TextBPE

TASK = "en:text -> de:text"


def pairs(split: str) -> list[dict[str, str]]:
    """Samples {"en", "de"} of "train" or "val"."""
    with zipfile.ZipFile(DATA / "multi30k_train_val.zip") as archive:
        lines = archive.read(f"{split}.tsv").decode("utf-8").split("\n")[:-1]
    keys = lines[0].split("\t")
    rows = [dict(zip(keys, line.lower().split("\t"), strict=True)) for line in lines[1:]]
    return [{"en": row["en"].strip(), "de": row["de"].strip()} for row in rows]


RECIPE = Recipe(steps=1450, batch=128, lr=3e-3, optimizer="muon", ema=0.99, warmup=0.1, checkpoint_every=100)


def new_model(data: list[dict[str, str]], seed: int, apart: bool) -> Model:
    text = TextBPE.train([row[language] for row in data for language in ("en", "de")], vocab_size=4000)
    core: Core | EncoderDecoder = Core(width=192, depth=4, heads=4, dropout=0.1)
    if apart:
        core = EncoderDecoder(reader=core.replace(depth=3), writer=core.replace(depth=3))
    return Model({"text": text}, core, [Task(TASK, NextToken(label_smoothing=0.1))], seed=seed)


def main() -> None:
    import sacrebleu

    options = script.parser(__doc__, "folder", "score", "seed", folder=Path("translation_run"))
    options.add_argument("--apart", action="store_true", help="one core reads and another writes")
    args = script.parsed(options)
    data = [] if args.score else pairs("train")
    model = script.trained(args, lambda: new_model(data, args.seed, args.apart), {TASK: data}, RECIPE)
    test = pairs("val")
    start = time.process_time()
    found: list[str] = []
    for name, options in {"greedy": {}, "5 beams": {"beams": 5, "length_penalty": 1.0, "batch": 160}}.items():
        found = [str(a) for a in model.generate(TASK, [{"en": row["en"]} for row in test], max_tokens=80, **options)]
        bleu = sacrebleu.corpus_bleu(found, [[row["de"] for row in test]])
        print(f"{name}: BLEU {bleu.score:.2f} ({time.process_time() - start:.0f} CPU-s)")
        start = time.process_time()
    for row, hypothesis in list(zip(test, found, strict=True))[:5]:
        print(f"  {row['en']}\n  = {hypothesis}\n  ~ {row['de']}")


if __name__ == "__main__":
    main()
