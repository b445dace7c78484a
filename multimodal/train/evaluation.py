"""Loss and accuracy on held-out data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from multimodal.data import Samples, as_samples, check_samples
from multimodal.heads import Classify, EachRow, Prediction
from multimodal.heads.classify import class_names
from multimodal.measures.answered import Answered
from multimodal.measures.calibration import Calibration, temper
from multimodal.measures.evaluation import Evaluation, Measures, measured, sort_of
from multimodal.model import Model
from multimodal.process_state import preserved_state
from multimodal.progress import Bar, progress_bar
from multimodal.retrieval import evaluate_pairs
from multimodal.shapes import check_whole
from multimodal.stream import Stream
from multimodal.train.processes import Processes


@preserved_state()
def evaluate(
    model: Model,
    task: str,
    samples: Samples,
    *,
    batch: int = 64,
    measures: Measures | None = None,
    resamples: int = 0,
    quiet: bool = True,
) -> Evaluation:
    """How good the answers to held-out samples are: a dict of figures, which prints as a table and has the worst answers.

    "loss" is the mean loss of a real target in nats (weighed, if the head has class weights), "exact" the share of answers that
    are exactly right. A head that answers row by row has "rows" too, the share of rows that are right, or of the groups of a
    `one_hot` kind, such as pixels; such a kind has no further measures. These are those of `multimodal.measures.MEASURES` that
    fit the answers: F1 and others of classes, error rates and others of texts, errors of numbers.

    A text is right if it equals the text of the sample, even if the tokenizer cannot represent that text. A task "a <-> b" has the
    recall at 1 and at 10 in both directions instead of "exact"; a head that hides tokens or writes features has the loss only.

    samples: each with the field that the task writes.
    batch: number of samples at once.
    measures: names of further measures, or functions of (wanted values, answers) that give a number; None: all that fit and whose
        libraries are installed.
    resamples: how often the samples are drawn again for 95 % intervals, such as 1000; 0: no intervals.
    quiet: whether no progress is shown.

    Raises:
        ConfigError, TaskError: no such task or measure, no samples, or batch below 1.

    Examples:
        >>> found = mm.evaluate(model, "image -> label", samples)
        >>> found["exact"], found["F1"]
        (1.0, 1.0)
    """
    model.packer.check_task(task)
    check_whole("evaluate", least=1, batch=batch)
    check_samples("evaluate", task, samples)
    pattern, head = model.packer.patterns[task], model.packer.head(task)
    samples = as_samples(samples)
    fields = {field.name: (model.packer.tokenizers[field.kind], field.many) for field in pattern.reads}
    if pattern.pair:
        found = evaluate_pairs(model, task, samples, batch=batch)
        return measured(task, found, Answered(), "others", measures, 0, samples, fields)
    written = model.packer.answer_tokenizers[task]
    by_class = isinstance(head, Classify) and bool(written.classes)
    answered = Answered(class_names(written) if by_class else ())
    with progress_bar(f"answers of {task}", len(samples), quiet=quiet) as bar:
        found = _figures(model, task, samples, Processes(), batch, answered, bar)
    sort = "others"
    if len(answered):
        by_row = isinstance(head, EachRow)
        sort = sort_of(answered.wanted[0], by_class or (by_row and bool(written.classes)), written.text, by_row)
    return measured(task, found, answered, sort, measures, resamples, samples, fields, quiet)


def calibrate(model: Model, task: str, samples: Samples, *, batch: int = 64) -> Calibration:
    """Make a classifier as sure as it is right, so that of its answers with a confidence of 91 % about 91 % are right.

    One number, the temperature (Guo et al. 2017), divides the logits, in the weights of the last layer. No answer changes. Save the
    model afterwards.

    samples: held-out samples, neither those of the training nor those that the report is made from; some hundred or more.

    Raises:
        ConfigError, TaskError: as of `evaluate`, or the task does not classify.
    """
    return temper(model, task, evaluate(model, task, samples, batch=batch, measures=()).answered)


def evaluate_share(
    model: Model, task: str, samples: Samples, processes: Processes, batch: int = 64
) -> dict[str, float]:
    """The figures of the head alone, where each process computes a share of the samples and all get the same result."""
    if model.packer.patterns[task].pair:  # recall compares all samples, so each process computes all
        return evaluate_pairs(model, task, as_samples(samples), batch=batch)
    return _figures(model, task, samples, processes, batch)


def _figures(
    model: Model,
    task: str,
    samples: Samples,
    processes: Processes,
    batch: int,
    answered: Answered | None = None,
    bar: Bar | None = None,
) -> dict[str, float]:
    """answered: to which wanted and given answers are added. bar: which is advanced."""
    pattern, samples = model.packer.patterns[task], as_samples(samples)
    written, head = model.packer.answer_tokenizers[task], model.packer.head(task)
    exact, by_row = "exact" in head.measures, "rows" in head.measures
    mine = range(processes.rank, len(samples), processes.count)
    total, count, right, right_rows, known_rows = 0.0, 0.0, 0, 0, 0
    for start in range(0, len(mine), batch):
        part = [model.packer.completed(task, samples[i]) for i in mine[start : start + batch]]
        stream = model.pack(task, part, first=mine[start])
        count += model.divisor(stream, task)
        if bar is not None:
            bar.advance(len(part))
        if head.autoregressive or not exact:
            with model.inference_mode():
                total += float(model.losses(stream)[task])
            if not exact:
                continue
            longest = max(stream.readings[task].target_lengths) + 8  # a longer answer is wrong anyway
            answers = model.generate(task, part, max_tokens=longest)
        else:
            loss, answers, rows = _one_pass(model, task, stream)
            total += loss
            right_rows, known_rows = right_rows + int(rows[:, 0].sum()), known_rows + int(rows[:, 1].sum())
            if not answers:  # an answer has a class where none is known, so rows say which samples are right
                lengths = list(stream.readings[task].lengths)
                right += sum(bool((one[:, 0] == one[:, 1]).all()) for one in rows.split(lengths))
                continue
        for sample, answer in zip(part, answers, strict=True):
            wanted = head.wanted(sample[pattern.answer], written)
            right += (same := _equal(answer.value, wanted))
            if answered is not None:
                answered.add(wanted, answer, same)
    # sums and not means, because shares of the samples differ in size
    sums = torch.tensor([total, count, right, right_rows, known_rows], dtype=torch.float64)
    total, count, right, right_rows, known_rows = processes.all_reduce(sums).tolist()
    found = {"loss": total / (count or 1)} | ({"exact": right / len(samples)} if exact else {})
    return found | ({"rows": right_rows / max(known_rows, 1)} if by_row else {})


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


def _one_pass(model: Model, task: str, stream: Stream) -> tuple[float, list[Prediction], Tensor]:
    """Sum of the losses, the answers in the order of the samples (none of a `one_hot` kind), and (right, known) of each row (N, 2)
    (none of a head without the measure "rows"), by one forward pass; for heads that do not generate."""
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
        rows = torch.stack(head.right_rows(logits, r.target), 1) if "rows" in head.measures else torch.zeros(0, 2)
        if len(rows) and tokenizer.one_hot is not None:
            return loss, [], rows
        found = head.answer(logits, r.lengths, tokenizer)
    return loss, [answer for _, answer in sorted(zip(r.samples, found, strict=True), key=lambda pair: pair[0])], rows
