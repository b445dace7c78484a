"""The state of a training run in one folder: weights, optimiser, averaged weights, generators, step. No pickle."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from multimodal.checkpoint import put_weights, read_tensors, replace_folder
from multimodal.model import Model
from multimodal.shapes import CheckpointError

TENSORS, FACTS = "state.safetensors", "state.json"


def save_state(
    folder: Path, *, step: int, model: Model, optimizer: torch.optim.Optimizer, ema: Model | None, facts: dict[str, Any]
) -> None:
    """Write the state whole or not at all; `facts` are JSON values that must agree when it is read again."""
    aside = folder.with_name(folder.name + ".writing")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": t for name, t in ema.state_dict().items()}
    for (name, _), entry in zip(_trained(model, optimizer), _entries(optimizer), strict=True):
        tensors |= {f"optimizer/{key}/{name}": torch.as_tensor(value) for key, value in entry.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, aside / TENSORS)
    (aside / FACTS).write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", encoding="utf-8")
    replace_folder(aside, folder)


def load_state(
    folder: Path, *, model: Model, optimizer: torch.optim.Optimizer, ema: Model | None, facts: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Put a saved state back into model, optimiser, averages and generators; returns its step and the facts saved with it.

    Raises:
        CheckpointError: damaged, of another model, or made with other facts (named).
    """
    try:
        saved = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot read {FACTS}: {error}") from error
    if other := _differences(saved, facts):
        raise CheckpointError(
            f"{folder}: this run was made with other settings: {'; '.join(other)}. Resume with the same, or choose another folder"
        )
    tensors = read_tensors(folder / TENSORS)
    put_weights(model, _below(tensors, "model/"), folder)
    if ema is not None:
        put_weights(ema, _below(tensors, "ema/"), folder)
    entries: dict[str, dict[str, Any]] = {}
    for key, value in _below(tensors, "optimizer/").items():
        kind, name = key.split("/", 1)
        entries.setdefault(name, {})[kind] = value.item() if value.dtype == torch.bool else value
    state = {i: entries[name] for i, (name, _) in enumerate(_trained(model, optimizer)) if name in entries}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return int(saved["step"]), saved


def _differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """'recipe.steps was 120 and is 400', for everything of `now` that is not so in `saved`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = now if not name else {**saved, **now}
        return [d for k in keys for d in _differences(saved.get(k), now.get(k), f"{name}.{k}" if name else str(k))]
    return [] if saved == now else [f"{name} was {saved!r} and is {now!r}"]


def _trained(model: Model, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [(names[p], p) for group in optimizer.param_groups for p in group["params"]]


def _entries(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
