"""Where a model looked, and pictures of its answers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.attention import DensePlan
from multimodal.heads import Prediction
from multimodal.model import Model
from multimodal.stream import Stream
from multimodal.tokenizer import Tokens


def looked_at(model: Model, task: str, sample: Mapping[str, Any]) -> dict[str, Tensor]:
    """For each field read, how much of the answer's attention each of its tokens got: (N,), all fields together sum to 1.

    Attention rollout (Abnar & Zuidema 2020): the product over layers of (responsibilities, mean over heads, + identity) / 2, from the
    answer's first row, or averaged over the context's rows where a head has none of its own.
    """
    kept: list[Tensor] = []
    with model.resting():
        stream = model.pack(task, [sample], answers=False)
        model(stream, backend=lambda rule, layout: DensePlan(rule, layout, kept))
    rollout_TM = torch.eye(len(stream), device=model.device)
    for posterior_HTM in kept:
        rollout_TM = (posterior_HTM.mean(0) + torch.eye(len(stream), device=model.device)) / 2 @ rollout_TM
    share_M = rollout_TM[stream.readings[task].row_N].mean(0).cpu()
    parts, start = {}, 0
    for field in model.packer.patterns[task].reads:
        if sample[field.name] is not None:
            size = _tokens_in(stream, len(parts))
            parts[field.name] = share_M[start : start + size]
            start += size
    total = sum(float(part.sum()) for part in parts.values())
    return {name: part / total for name, part in parts.items()}


def _tokens_in(stream: Stream, segment: int) -> int:
    return int((stream.layout.places.segment == segment).sum())


def draw_answers(
    model: Model, task: str, samples: Sequence[Mapping[str, Any]], path: str | Path, *, columns: int = 8
) -> list[Prediction]:
    """Each sample's picture with where the model looked laid over it, the right answer and the one given (red if wrong).

    The task reads a field whose tokenizer can decode pictures with places in rows and columns.
    """
    from matplotlib.figure import Figure

    field = next(f for f in model.packer.patterns[task].reads if hasattr(model.packer.tokenizers[f.kind], "patch"))
    tokenizer = model.packer.tokenizers[field.kind]
    answers = model.predict(task, samples)
    rows = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(1.5 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        tokens = tokenizer(sample[field.name])
        picture = tokenizer.decode(tokens).permute(1, 2, 0).clamp(0, 1).numpy()
        heat = _heat(tokens, looked_at(model, task, sample)[field.name], picture.shape)
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        for ax in (above, below):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        below.imshow(heat, cmap="inferno", alpha=0.55, interpolation="bilinear")
        right = str(sample.get(model.packer.patterns[task].answer, ""))
        wrong = right not in ("", str(answer.value))
        title = f"{answer.value} {answer.confidence:.0%}" + (f"\nis {right}" if wrong else "")
        above.set_title(title, fontsize=8, color="tab:red" if wrong else "black")
    figure.savefig(path, dpi=110)
    return answers


def _heat(tokens: Tokens, share_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, columns = (int(tokens.position_NA[:, axis].max()) + 1 for axis in (1, 2))
    grid_YX = share_N.view(rows, columns)
    return grid_YX.repeat_interleave(shape[0] // rows, 0).repeat_interleave(shape[1] // columns, 1)
