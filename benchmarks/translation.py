"""English to German on Multi30k, from scratch, scored by sacrebleu on the validation sentences.

    uv run benchmarks/translation.py --folder RUN        about 28 CPU-minutes on one thread

The data are multi30k_train_val.zip in the folder MULTIMODAL_DATA (default ../shared/data), lower-cased as in most papers on it.
--score FOLDER scores a kept model.
"""

import argparse
import os
import time
import zipfile
from pathlib import Path

import torch

from multimodal import Core, EncoderDecoder, Model, NextToken, Recipe, Task, fit
from multimodal_tokenizers import TextBPE

DATA = Path(os.environ.get("MULTIMODAL_DATA", "../shared/data"))
TASK = "en:text -> de:text"


def pairs(split: str) -> list[dict[str, str]]:
    """Samples {"en", "de"} of "train" or "val"."""
    with zipfile.ZipFile(DATA / "multi30k_train_val.zip") as archive:
        lines = archive.read(f"{split}.tsv").decode("utf-8").split("\n")[:-1]
    keys = lines[0].split("\t")
    rows = [dict(zip(keys, line.lower().split("\t"), strict=True)) for line in lines[1:]]
    return [{"en": row["en"].strip(), "de": row["de"].strip()} for row in rows]


def train(folder: Path, seed: int, apart: bool) -> Model:
    data = pairs("train")
    text = TextBPE.train([row[language] for row in data for language in ("en", "de")], vocab_size=4000)
    core: Core | EncoderDecoder = Core(width=192, depth=4, heads=4, dropout=0.1)
    if apart:
        core = EncoderDecoder(reader=core.replace(depth=3), writer=core.replace(depth=3))
    model = Model({"text": text}, core, [Task(TASK, NextToken(label_smoothing=0.1))], seed=seed)
    recipe = Recipe(
        steps=1450, batch=128, lr=3e-3, optimizer="muon", ema=0.99, warmup=0.1, checkpoint_every=100, seed=seed
    )
    fit(model, {TASK: data}, recipe, folder=folder, resume=True)
    return model


def main() -> None:
    import sacrebleu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("translation_run"))
    parser.add_argument("--apart", action="store_true", help="one core reads and another writes")
    parser.add_argument("--score", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    model = Model.load(args.score) if args.score else train(args.folder, args.seed, args.apart)
    if not args.score:
        print(f"trained in {(time.process_time() - start) / 60:.1f} CPU-minutes")
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
