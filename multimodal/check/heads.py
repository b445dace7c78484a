"""Checks of what a head does by itself: logits, loss, answer."""

import torch

from multimodal.check.cases import (
    HeadCase,
    Number,
    Signal,
    Sizeless,
    check_close,
    check_gradients,
)
from multimodal.check.measure import content_or_value, same_answer
from multimodal.check.report import Check, promise, want
from multimodal.heads import Head, Pointer
from multimodal.shapes import ConfigError

CHECKS: list[Check] = []


@promise(CHECKS)
def logits_shape(case: HeadCase) -> None:
    """Logits are (rows, V), with V as the head says; targets are finite, and so is all else unless the head points at what it may.

    Every sample has a target to learn.
    """
    model = case.model()
    stream = model.pack(case.task, case.samples)
    logits, reading = model.logits(stream)[case.task], stream.readings[case.task]
    rows = len(reading.lengths) if getattr(case.head, "pool", None) else sum(reading.lengths)
    wanted = (rows, case.head.vocab(case.tokenizer) + max(reading.key_lengths, default=0))
    want(tuple(logits.shape) == wanted, f"logits are {tuple(logits.shape)}, wanted {wanted}")
    if isinstance(case.head, Pointer) and reading.target is not None:
        want(not logits.isnan().any(), "logits are not numbers")
        logits = logits.gather(1, reading.target[:, None])
    want(logits.isfinite().all(), "logits are not finite")
    want(min(reading.target_lengths) > 0, "a sample has nothing to learn")


@promise(CHECKS)
def loss_is_a_sum(case: HeadCase) -> None:
    """The loss is one finite number, the sum over samples and targets: packed together they add up."""
    model = case.model()
    together = model.losses(model.pack(case.task, case.samples))[case.task]
    alone = [model.losses(model.pack(case.task, [sample]))[case.task] for sample in case.samples]
    want(together.dim() == 0 and together.isfinite(), f"the loss is {together}")
    check_close(together, torch.stack(alone).sum(), "the loss of a pack and the sum of its samples' losses")


@promise(CHECKS)
def readout_learns(case: HeadCase) -> None:
    """A gradient of the loss reaches every parameter of the readout."""
    model = case.model()
    model.losses(model.pack(case.task, case.samples))[case.task].backward()
    check_gradients(model.readout(case.task))


@promise(CHECKS)
def one_answer_a_sample(case: HeadCase) -> None:
    """Every sample gets one answer with a confidence in 0 to 1, the same alone and beside others."""
    model = case.model()
    answers = model.generate(case.task, case.samples, max_tokens=4, temperature=0.0)
    want(len(answers) == len(case.samples), f"{len(answers)} answers to {len(case.samples)} samples")
    for answer, sample in zip(answers, case.samples, strict=True):
        want(-1e-6 <= answer.confidence <= 1 + 1e-6, f"confidence is {answer.confidence}, wanted 0 to 1")
        alone = model.generate(case.task, [sample], max_tokens=4, temperature=0.0)[0]
        want(
            same_answer(content_or_value(alone), content_or_value(answer)),
            f"beside others the answer is {answer.value!r}, alone {alone.value!r}",
        )


@promise(CHECKS)
def unwritable_refused(case: HeadCase) -> None:
    """A kind that this head cannot write raises a ConfigError that names the head."""
    for kind in (Sizeless(), Signal(), Number(3)):
        try:
            vocab = case.head.vocab(kind)
        except ConfigError as error:
            names = [cls.__name__ for cls in type(case.head).__mro__ if issubclass(cls, Head) and cls is not Head]
            want(any(name in str(error) for name in names), f"the error does not name {names[0]}: {error}")
        else:
            want(not isinstance(kind, Sizeless), "a kind that declares neither vocab_size nor feature_size was taken")
            want(
                type(vocab) is int and vocab > 0,
                f"vocab gives {vocab!r} for {type(kind).__name__}, wanted a positive int",
            )
