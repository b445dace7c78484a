"""Loss and accuracy on held-out data."""

from collections.abc import Mapping
from typing import Any

import torch

from multimodal.data import Samples, as_samples, check_samples
from multimodal.heads import Prediction
from multimodal.model import Model
from multimodal.process_state import preserved_state
from multimodal.retrieval import evaluate_pairs
from multimodal.shapes import check_whole
from multimodal.stream import Stream
from multimodal.train.processes import Processes


@preserved_state()
def evaluate(model: Model, task: str, samples: Samples, *, batch: int = 64) -> dict[str, float]:
    """{"loss": mean loss of a real target in nats, "exact": share of answers that are exactly right}.

    A head that answers row by row has "rows" too, the share of rows that are right.

    A text is right if it equals the text of the sample, even if the tokenizer cannot represent that text. A task "a <-> b" has the
    recall at 1 and at 10 in both directions instead of "exact"; a head that hides tokens or writes features has the loss only.
    samples: each with the field that the task writes. batch: number of samples at once.

    Raises:
        ConfigError, TaskError: no such task, no samples, or batch below 1.

    Examples:
        >>> found = mm.evaluate(model, "image -> label", samples)
        >>> found["exact"]
        1.0
    """
    model.packer.check_task(task)
    check_whole("evaluate", least=1, batch=batch)
    check_samples("evaluate", task, samples)
    return evaluate_share(model, task, samples, Processes(), batch)


def evaluate_share(
    model: Model, task: str, samples: Samples, processes: Processes, batch: int = 64
) -> dict[str, float]:
    """`evaluate`, where each process computes a share of the samples and all get the same result."""
    pattern, samples = model.packer.patterns[task], as_samples(samples)
    if pattern.pair:  # recall compares all samples, so each process computes all
        return evaluate_pairs(model, task, samples, batch=batch)
    written, head = model.packer.answer_tokenizers[task], model.packer.head(task)
    exact, by_row = "exact" in head.measures, "rows" in head.measures
    mine = range(processes.rank, len(samples), processes.count)
    total, count, right, right_rows = 0.0, 0, 0, 0
    for start in range(0, len(mine), batch):
        part = [model.packer.completed(task, samples[i]) for i in mine[start : start + batch]]
        stream = model.pack(task, part, first=mine[start])
        count += stream.readings[task].count
        if head.autoregressive or not exact:
            with model.inference_mode():
                total += float(model.losses(stream)[task])
            if not exact:
                continue
            longest = max(stream.readings[task].target_lengths) + 8  # a longer answer is wrong anyway
            answers = model.generate(task, part, max_tokens=longest)
        else:
            loss, answers, rows = _one_pass(model, task, stream)
            total, right_rows = total + loss, right_rows + rows
        for sample, answer in zip(part, answers, strict=True):
            right += _equal(answer.value, head.wanted(sample[pattern.answer], written))
    # sums and not means, because shares of the samples differ in size
    sums = torch.tensor([total, count, right, right_rows], dtype=torch.float64)
    total, count, right, right_rows = processes.all_reduce(sums).tolist()
    found = {"loss": total / max(count, 1)} | ({"exact": right / len(samples)} if exact else {})
    return found | ({"rows": right_rows / max(count, 1)} if by_row else {})


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal; they may be or hold arrays."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if getattr(a, "shape", None) != getattr(b, "shape", None):
        return False
    same = a == b
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def _one_pass(model: Model, task: str, stream: Stream) -> tuple[float, list[Prediction], int]:
    """Sum of the losses, the answers in the order of the samples, and the number of rows that are right (0 of a head without
    this measure), by one forward pass; for heads that do not generate."""
    head, readout = model.packer.head(task), model.readout(task)
    with model.inference_mode():
        wanted_N, readings = stream.narrowed()
        r = readings[task]
        assert r.target is not None  # it was packed with answers
        state_TD = model(stream, wanted_N=wanted_N)
        state_ND, inputs = state_TD[r.row_N], head.inputs(r, state_TD)
        loss = float(head.state_loss(readout, state_ND, r.lengths, r.target, r.target_lengths, **inputs))
        tokenizer = model.packer.answer_tokenizers[task]
        logits = head.logits(readout, state_ND, r.lengths, **inputs)
        found = head.answer(logits, r.lengths, tokenizer)
        rows = int(head.right_rows(logits, r.target).sum()) if "rows" in head.measures else 0
    return loss, [answer for _, answer in sorted(zip(r.samples, found, strict=True), key=lambda pair: pair[0])], rows
