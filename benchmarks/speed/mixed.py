"""Train steps on texts of mixed lengths: packed by us, padded or flattened by Hugging Face's collators; packing counted."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.text import MIDDLE, QUICK, TASK, VOCAB, Shape, build, llama, step

SAMPLES = 64
SHORTEST, LONGEST = 8, 512  # tokens of a sample, the opening one among them; each has a target
BATCHES = 4  # that follow each other, so that no layout is met twice in a row


def shape_at(place: Place) -> Shape:
    quick = {**QUICK, "length": 32, "batch": 4}
    return replace(MIDDLE, **(quick if place.quick else {"length": LONGEST, "batch": SAMPLES}))


def batches(place: Place) -> list[list[str]]:
    """Texts of log-uniform lengths: one of each 64th part of the range, in any order, so that batches are equally large."""
    import torch

    shape, draw = shape_at(place), torch.Generator().manual_seed(place.seed)
    found = []
    for _ in range(BATCHES):
        share = (torch.arange(shape.batch) + torch.rand(shape.batch, generator=draw)) / shape.batch
        lengths = SHORTEST * (shape.length / SHORTEST) ** share[torch.randperm(shape.batch, generator=draw)]
        ids = [torch.randint(97, 123, (int(n) - 1,), generator=draw).tolist() for n in lengths]
        found.append([bytes(row).decode() for row in ids])
    return found


def facts(model: Any, place: Place) -> dict[str, Any]:
    texts = batches(place)
    tokens = sum(len(text) + 1 for batch in texts for text in batch) / len(texts)
    longest = sum(len(batch) * (max(map(len, batch)) + 1) for batch in texts) / len(texts)
    told = {"parameters": sum(p.numel() for p in model.parameters()), "tokens if padded": longest}
    return {"units": tokens, "unit": "tokens", "facts": told}


def ours(place: Place) -> Job:
    import torch

    model = build(shape_at(place), place).to(place.device)
    turn: Iterator[list[str]] = cycle(batches(place))

    def stream(texts: list[str]) -> Any:
        return model.packer([(TASK, {"text": text}) for text in texts]).to(place.device)

    def outputs() -> Any:
        first = stream(batches(place)[0])
        reading, logits = first.readings[TASK], model.logits(first)[TASK]
        rows = dict(zip(reading.samples, logits.split(list(reading.lengths)), strict=True))
        return torch.cat([rows[i] for i in range(len(rows))])

    return Job(step(model.parameters(), lambda: model.loss(stream(next(turn)))), outputs, **facts(model, place))


def theirs(place: Place, *, flat: bool) -> Job:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast

    model = llama(shape_at(place), place).to(place.device)
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
        given = batch(texts)
        lengths = [len(text) + 2 for text in texts]
        logits = model(**given).logits
        rows = logits[0].split(lengths) if flat else [row[:n] for row, n in zip(logits, lengths, strict=True)]
        return torch.cat([row[:-1] for row in rows])

    return Job(step(model.parameters(), lambda: model(**batch(next(turn))).loss), outputs, **facts(model, place))


WORK = f"train step on {SAMPLES} texts of {SHORTEST} to {LONGEST} tokens (log-uniform), 256x6, fp32, texts to update"

ROWS = (
    Row(
        name="mixed",
        what=f"{WORK}; the same function, weights copied; theirs also reads the last token, which has no target",
        peer="transformers Llama (sdpa), padded by DataCollatorForLanguageModeling",
        needs=("transformers",),
        goal=2.5,
        ours=ours,
        theirs=partial(theirs, flat=False),
        tolerance=1e-4,
    ),
    Row(
        name="mixed-flat",
        what=f"{WORK}; packed by both, which theirs attends by one dense mask on CPUs",
        peer="transformers Llama (sdpa), packed by DataCollatorWithFlattening",
        needs=("transformers",),
        goal=1.0,
        ours=ours,
        theirs=partial(theirs, flat=True),
        tolerance=1e-4,
    ),
)
