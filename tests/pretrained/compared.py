"""Comparison of a loaded model with the one of transformers that it came from."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from multimodal.pretrained.gate import computed

TOLERANCE = 1e-4


def saved(module: Any, folder: Path) -> Path:
    """The folder in which transformers saved this model, with weights that are not its initial ones: no zeros, no ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else 0.15))
    module.eval().save_pretrained(folder)
    return folder


def logits_by_sample(model: mm.Model, task: str, samples: list[dict[str, Any]]) -> list[Tensor]:
    """The logits of each sample, all packed together."""
    return computed(model, task, samples, "logits")


def states_by_sample(model: mm.Model, task: str, samples: list[dict[str, Any]]) -> list[Tensor]:
    """The states of what each sample reads, all packed together."""
    return computed(model, task, samples, "states")


def text_logits(loaded: Pretrained, ids: Sequence[list[int]]) -> list[Tensor]:
    """The logits of a language model behind each id of these texts."""
    return logits_by_sample(loaded.model(), "text -> text", [{"text": x[:1], "answer": x[1:]} for x in ids])


def their_logits(module: Any, ids: Sequence[list[int]]) -> list[Tensor]:
    """What `text_logits` gives of a model of transformers."""
    with torch.inference_mode():
        return [module(torch.tensor([x])).logits[0] for x in ids]


def states_or_logits(loaded: Pretrained, kind: str, values: Sequence[Any]) -> list[Tensor]:
    """The logits of an encoder's head, or its states if it has none, of these values of a kind."""
    model = loaded.model()
    task = next((task for task in model.tasks if "<->" not in task), None)
    if task is None:
        pair = f"{kind} <-> other:{kind}"
        return states_by_sample(model, pair, [{kind: value, "other": None} for value in values])
    found = logits_by_sample(model, task, [{kind: value} for value in values])
    return [x[0] for x in found] if task.endswith("-> label") else found


def check_packed_and_alone(
    loaded: Pretrained,
    samples: Sequence[Any],
    ours: Callable[[Pretrained, Any], list[Tensor]],
    theirs: list[Tensor],
) -> None:
    """Ours are theirs, all samples in one pack and each alone."""
    worst = [largest(ours(loaded, samples), theirs)]
    worst += [largest(ours(loaded, [x]), [wanted]) for x, wanted in zip(samples, theirs, strict=True)]
    print(max(worst))
    assert max(worst) < TOLERANCE, worst


def check_writing(
    module: Any, given: dict[str, Tensor], loaded: Pretrained, task: str, fields: dict[str, Any], count: int = 9
) -> None:
    """Both write the same ids, the likeliest each time. given: the input of theirs. fields: that of ours."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = module.generate(**given, max_new_tokens=count, **options)[0, given["input_ids"].shape[1] :].tolist()
    assert len(set(wanted)) > 2, "the case does not exercise anything"
    assert loaded.model().generate(task, **fields, max_tokens=count).value == wanted


def unlike_itself(module: Any, norm: Tensor) -> None:
    """Gives a model's last norm other weights, lest each token be followed by itself, to which a tied table is most similar."""
    torch.manual_seed(1)
    with torch.no_grad():
        norm.normal_(-1, 2)
    module.eval()


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any number."""
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    assert all(x.abs().max() > 1e-2 for x in theirs), "the case does not exercise anything"
    assert all(x.isfinite().all() for x in (*ours, *theirs)), "max would pass over NaN"
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def check_round_trip(folder: Path, given: Path) -> None:
    """In and out again gives the same tensors, bit for bit, under the same names; and a second time through `Model.save`."""
    model = pretrained(given).model()
    model.export("hf", folder / "out")
    first, second = load_file(given / "model.safetensors"), load_file(folder / "out" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model.save(folder / "ours")
    mm.Model.load(folder / "ours").export("hf", folder / "again")
    again = load_file(folder / "again" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def uneven(width: int) -> Tensor:
    """1e-3 and -1e-3 in turn, for tensors that a centred norm follows, which does not see what is added to all features."""
    return 1e-3 * torch.tensor([1.0, -1.0]).repeat(width // 2)


@contextmanager
def changed(folder: Path, name: str, by: float | Tensor = 1e-3) -> Iterator[None]:
    """Within this context every other number of a tensor on disk is off by this much; LayerNorm takes away what all share."""
    path = folder / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    half = torch.arange(tensors[name].numel()).reshape(tensors[name].shape) % 2 == 0
    tensors[name] += by * half
    save_file(tensors, path, {"format": "pt"})
    try:
        yield
    finally:
        path.write_bytes(before)


def check_mutations(
    given: Path,
    difference: Callable[[Pretrained], float],
    names: list[str],
    core: dict[str, Any],
    by: float | Tensor = 1e-3,
) -> None:
    """The comparison fails if half of any of these tensors is off by this much, or one setting of the core is another."""
    for name in names:
        with changed(given, name, by):
            assert difference(pretrained(given)) > TOLERANCE, name
    loaded = pretrained(given)
    for setting, value in core.items():
        assert difference(replace(loaded, core=loaded.core.replace(**{setting: value}))) > TOLERANCE, setting


def refused(config: dict[str, Any], given: Path, message: str) -> None:
    """A folder with these fields in its configuration is refused with this message."""
    path = given / "config.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), **config}), encoding="utf-8")
    try:
        with pytest.raises(mm.CheckpointError, match=message):
            pretrained(given)
    finally:
        path.write_text(before, encoding="utf-8")
