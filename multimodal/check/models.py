"""Checks of what tokenizers and heads do in a model: packing, saving, extending, training."""

import copy
import dataclasses
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.check.cases import Number, check_close, perturbed
from multimodal.check.measure import logits_by_sample, owners, sample_gradients, split_logits
from multimodal.check.report import Check, promise, want
from multimodal.declare import declaration, rebuild
from multimodal.model import Model
from multimodal.stream import Stream
from multimodal.train import fit

CHECKS: list[Check] = []


@promise(CHECKS)
def pickled(case: Any) -> None:
    """A pickled copy, as data workers get it, is equal and does the same."""
    again = pickle.loads(pickle.dumps(case.part))
    want(again == case.part, f"the copy is {again!r}, not {case.part!r}")
    case.check_same(again, "after pickling")


@promise(CHECKS)
def config_round_trip(case: Any) -> None:
    """Its configuration goes through JSON (large parts as files) and rebuilds an equal one."""
    data = json.loads(json.dumps(declaration(case.part)))
    again = rebuild(data, getattr(case.part, "files", dict)())
    want(again == case.part, f"{again!r} came back from JSON, not {case.part!r} (lists come back as tuples)")
    case.check_same(again, "after a trip through JSON")


@promise(CHECKS)
def packed_is_alone(case: Any) -> None:
    """Logits are the same alone and packed with other samples, kinds and tasks (1e-5, fp32)."""
    model = case.model()
    with torch.no_grad():
        together = logits_by_sample(model, model.packer(case.batch))
        for i, item in enumerate(case.batch):
            check_close(together[i], logits_by_sample(model, model.packer([item]))[0], f"sample {i} packed and alone")


@promise(CHECKS)
def order_of_pack(case: Any) -> None:
    """Logits do not depend on the order in which samples are packed (1e-5, fp32)."""
    model, batch = case.model(), [*case.batch, case.batch[0]]  # samples are packed by shape: only twins change places
    with torch.no_grad():
        forwards = logits_by_sample(model, model.packer(batch))
        backwards = logits_by_sample(model, model.packer(batch[::-1]))[::-1]
    for i, (a, b) in enumerate(zip(forwards, backwards, strict=True)):
        check_close(a, b, f"sample {i} of a pack and of the same pack turned round")


def _training_pack(case: Any) -> tuple[Model, Stream]:
    """A model in training mode and a pack of one task; two samples are equal, as equal shapes run as one batch."""
    samples, model = case.samples[:3], case.model().train()
    return model, model.pack(case.task, [*samples, samples[0]])


@promise(CHECKS)
def neighbour_unseen(case: Any) -> None:
    """Changing the contents of a neighbour in the pack changes no bit of a sample's logits, in training too."""
    model, stream = _training_pack(case)

    def logits(content: dict[str, Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # an embed may drop out
        found = model.logits(dataclasses.replace(stream, content=content))[case.task]
        return split_logits(found, stream.readings[case.task])

    sample_of = owners(stream)
    with torch.no_grad():
        before = logits(dict(stream.content))
        for own in range(stream.samples):
            changed = dict(stream.content)
            for kind, x in stream.content.items():
                vocab = None if kind.startswith("head:") else model.packer.ids_of(kind)
                other = x * 0.5 + 0.25 if x.is_floating_point() else x if vocab is None else (x + 1) % vocab
                changed[kind] = torch.where((sample_of[kind] == own).reshape(-1, *[1] * (x.dim() - 1)), x, other)
            want(torch.equal(logits(changed)[own], before[own]), f"sample {own} sees what is in its neighbours")


@promise(CHECKS)
def neighbour_gradient(case: Any) -> None:
    """The gradient of a sample's logits by a neighbour's content (ids: by its rows) is exactly 0, and by its own it is not."""
    for sample, by_kind in sample_gradients(*_training_pack(case)):
        for kind, (_, others) in by_kind.items():
            want(others == 0, f"sample {sample} has a gradient of {others:.2g} by its neighbours' {kind}")
        # the start token of what is written is no content of the sample
        reached = any(own for kind, (own, _) in by_kind.items() if not kind.startswith("head:"))
        want(reached, f"sample {sample} has no gradient by its own content")


@promise(CHECKS)
def save_load(case: Any) -> None:
    """A saved and loaded model gives the same logits, bit for bit."""
    model = case.model()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loaded = Model.load(model.save(Path(folder) / "model")).eval()
        pairs = zip(
            logits_by_sample(loaded, loaded.packer(case.batch)),
            logits_by_sample(model, model.packer(case.batch)),
            strict=True,
        )
        want(all(torch.equal(a, b) for a, b in pairs), "the loaded model gives other logits")


@promise(CHECKS)
def extends_trained_model(case: Any) -> None:
    """Added to a trained model it changes no old weight, answer or checkpoint; so does what is added after it."""
    old_batch = [("signal -> answer", {"signal": (i, 4 + i), "answer": i}) for i in range(3)]
    plain = perturbed(case.plain_model())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain.save(Path(folder) / "old")
        more = plain.extended(**case.addition).eval()
        steps = [(plain, more, old_batch), (plain, Model.load(Path(folder) / "old").eval(), old_batch)]
        perturbed(trained := copy.deepcopy(more))
        steps.append((trained, trained.extended({"later": Number(2)}, ["signal -> later"]).eval(), case.batch))
        for before, after, batch in steps:
            now = after.state_dict()
            changed = [name for name, x in before.state_dict().items() if not torch.equal(now[name], x)]
            want(not changed, f"weights changed: {', '.join(changed[:4])}")
            pairs = zip(
                logits_by_sample(before, before.packer(batch)),
                logits_by_sample(after, after.packer(batch)),
                strict=True,
            )
            want(all(torch.equal(a, b) for a, b in pairs), "the extended model gives other logits for an old task")


@promise(CHECKS)
def trains(case: Any) -> None:
    """`fit` works with it: 40 steps on a few samples bring the loss a fifth or more below where it was, and below chance."""
    model = case.plain_model().extended(**case.addition)
    stream = model.pack(case.task, case.samples)
    before = float(model.loss(stream).detach())
    data, batch = {case.task: case.samples}, len(case.samples)
    fit(model, data, steps=40, batch=batch, lr=3e-3, device="cpu", precision="float32", quiet=True)
    after = float(model.loss(stream).detach())
    bound = 0.8 * min(before, case.chance)
    want(after < bound, f"the loss went from {before:.3g} to {after:.3g}, wanted less than {bound:.3g}")
