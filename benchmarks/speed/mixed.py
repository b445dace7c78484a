"""Train steps on texts of mixed lengths: packed by us, padded or flattened by Hugging Face's collators; packing counted."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.text import MIDDLE, QUICK, TASK, VOCAB, llama, our_model
from benchmarks.speed.work import training

SHAPE = replace(MIDDLE, length=512, batch=64)
SHORTEST = 8  # tokens of a sample, the opening one among them; each has a target; the longest has the shape's length
BATCHES = 4  # that follow each other, so that no layout is met twice in a row


def batches(place: Place) -> list[list[str]]:
    """Texts of log-uniform lengths: one of each 64th part of the range, in any order, so that batches are equally large."""
    import torch

    count, longest = place.sizes.batch, place.sizes.length
    draw = torch.Generator().manual_seed(place.seed)
    found = []
    for _ in range(BATCHES):
        share = (torch.arange(count) + torch.rand(count, generator=draw)) / count
        lengths = SHORTEST * (longest / SHORTEST) ** share[torch.randperm(count, generator=draw)]
        ids = [torch.randint(97, 123, (int(n) - 1,), generator=draw).tolist() for n in lengths]
        found.append([bytes(row).decode() for row in ids])
    return found


def tokens(place: Place) -> dict[str, Any]:
    """What a step is counted by: tokens of a batch, in the mean."""
    texts = batches(place)
    count = sum(len(text) + 1 for batch in texts for text in batch) / len(texts)
    longest = sum(len(batch) * (max(map(len, batch)) + 1) for batch in texts) / len(texts)
    return {"units": count, "unit": "tokens", "tokens if padded": longest}


def ours(place: Place) -> Job:
    import torch

    model = our_model(place)
    turn: Iterator[list[str]] = cycle(batches(place))

    def stream(texts: list[str]) -> Any:
        return model.packer([(TASK, {"text": text}) for text in texts]).to(place.device)

    def outputs() -> Any:
        first = stream(batches(place)[0])
        reading, logits = first.readings[TASK], model.logits(first)[TASK]
        rows = dict(zip(reading.samples, logits.split(list(reading.lengths)), strict=True))
        return torch.cat([rows[i] for i in range(len(rows))])

    return training(model, lambda: model.loss(stream(next(turn))), outputs, **tokens(place))


def theirs(place: Place, *, flat: bool) -> Job:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast

    model = llama(place)
    turn: Iterator[list[str]] = cycle(batches(place))
    # it is asked for nothing but to pad: no text has a byte of 0, and ids are bytes as ours are
    pads = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"": 0}, unk_token="")), pad_token="")
    pads.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    collate: Any = DataCollatorWithFlattening() if flat else DataCollatorForLanguageModeling(pads, mlm=False)

    def batch(texts: list[str]) -> dict[str, Any]:
        samples = [{"input_ids": [VOCAB - 1, *text.encode(), VOCAB - 1]} for text in texts]
        return {name: x.to(place.device) for name, x in collate(samples).items()}

    def outputs() -> Any:
        texts = batches(place)[0]
        lengths = [len(text) + 2 for text in texts]
        logits = model(**batch(texts)).logits
        rows = logits[0].split(lengths) if flat else [row[:n] for row, n in zip(logits, lengths, strict=True)]
        return torch.cat([row[:-1] for row in rows])

    return training(model, lambda: model(**batch(next(turn))).loss, outputs, **tokens(place))


def row(name: str, what: str, peer: str, goal: float, *, flat: bool) -> Row:
    work = f"train step on {SHAPE.batch} texts of {SHORTEST} to {SHAPE.length} tokens (log-uniform), 256x6, fp32, texts to update"
    return Row(
        name=name,
        what=f"{work}; {what}",
        peer=f"transformers Llama (sdpa), {peer}",
        needs=("transformers",),
        goal=goal,
        sizes=SHAPE,
        quick={**QUICK, "length": 32, "batch": 4},
        ours=ours,
        theirs=partial(theirs, flat=flat),
        tolerance=1e-4,
    )


PADDED = "the same function, weights copied; theirs also reads the last token, which has no target"
FLAT = "packed by both, which theirs attends by one dense mask on CPUs"
ROWS = (
    row("mixed", PADDED, "padded by DataCollatorForLanguageModeling", 2.5, flat=False),
    row("mixed-flat", FLAT, "packed by DataCollatorWithFlattening", 1.0, flat=True),
)
