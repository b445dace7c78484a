"""Attention rollout, and pictures of answers with it."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from multimodal.attention import Trace
from multimodal.files import save_figure
from multimodal.heads import Prediction
from multimodal.look.layers import picture_and_grid, read_values
from multimodal.model import Model
from multimodal.shapes import ConfigError

if TYPE_CHECKING:
    from multimodal.look.attention_xray import XRay

MOST_NUMBERS = 100  # a larger array is not shown as numbers


def attention_rollout(model: Model, task: str, sample: Mapping[str, Any]) -> dict[str, Tensor]:
    """The share of the answer's attention on each token (N,) of each field that is read; all fields together sum to 1.

    Attention rollout (Abnar & Zuidema 2020): the product over layers of (mean over heads of the responsibilities + identity) / 2.
    The mean is taken over the rows that the task's head reads.

    Raises:
        TaskError: a field of the task is missing in the sample.
    """
    trace = Trace()
    with model.inference_mode():
        stream = model.pack(task, [sample], answers=False)
        model(stream, backend="dense", trace=trace)
    identity_TM = torch.eye(len(stream), device=model.device)
    rollout_TM = identity_TM
    for seen in trace.seen:
        if seen.weight_BHTM.shape[-2:] != rollout_TM.shape:
            continue  # a memory of parameters is no part of the stream
        rollout_TM = (seen.weight_BHTM[0].mean(0) + identity_TM) / 2 @ rollout_TM
    share_M = rollout_TM[stream.readings[task].row_N].mean(0).cpu()
    parts, start = {}, 0
    for name, _, tokens in read_values(model.packer, task, sample):
        parts[name] = share_M[start : start + len(tokens)]
        start += len(tokens)
    total = sum(float(part.sum()) for part in parts.values())
    return {name: part / total for name, part in parts.items()}


def draw_answers(
    model: Model, task: str, samples: Sequence[Mapping[str, Any]], path: str | Path, *, columns: int = 8
) -> list[Prediction]:
    """Draw each sample's fields, below each the same with attention rollout over it, and the answer (red if wrong).

    Shows the fields whose tokenizers make a `picture`: photographs, spectrograms. Returns the answers.

    Raises:
        ConfigError: the task reads no such field.
    """
    from matplotlib.figure import Figure

    pattern = model.packer.patterns[task]
    answers = model.predict(task, samples)
    shown = [_pictures(model, task, sample) for sample in samples]
    fields = list(dict.fromkeys(name for pictures in shown for name in pictures))
    if not fields:
        raise ConfigError(f"draw_answers: task {task!r} reads no field that can be shown as a picture")
    columns, high = min(columns, len(samples)), 2 * len(fields)
    rows = math.ceil(len(samples) / columns)
    figure = Figure(figsize=(1.6 * columns, 1.65 * high * rows), layout="constrained")
    axes = figure.subplots(high * rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (sample, pictures, answer) in enumerate(zip(samples, shown, answers, strict=True)):
        row, column = high * (i // columns), i % columns
        for name, (picture_YXC, heat_YX) in pictures.items():
            extent = (0, picture_YXC.shape[1], picture_YXC.shape[0], 0)
            below = row + 2 * fields.index(name)
            aspect = "equal" if len(heat_YX) > 1 else "auto"  # a spectrogram has no natural shape
            for ax in axes[below : below + 2, column]:
                ax.imshow(picture_YXC.numpy(), cmap="gray", vmin=0, vmax=1, aspect=aspect, extent=extent)
            axes[below + 1, column].imshow(heat_YX.numpy(), cmap="inferno", alpha=0.55, aspect=aspect, extent=extent)
        right = str(sample.get(pattern.answer, ""))
        wrong = right not in ("", str(answer.value))
        lines = [f"{answer.value} {answer.confidence:.0%}"] + ([f"is {right}"] if wrong else [])
        title = "\n".join(textwrap.fill(textwrap.shorten(line, 60, placeholder=" ..."), 20) for line in lines)
        axes[row, column].set_title(title, fontsize=8, color="tab:red" if wrong else "black")
    figure.supxlabel("below each: the same with where the model looked (bright: more)", fontsize=8)
    save_figure(path, figure, 110)
    return answers


def _pictures(model: Model, task: str, sample: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Field -> its picture (Y, X, C), and the attention on each of its tokens (rows, columns)."""
    pictures = {}
    shares = attention_rollout(model, task, sample)
    for name, kind, tokens in read_values(model.packer, task, sample):
        tokenizer, share_N = model.packer.tokenizers[kind], shares[name]
        picture_YXC, grid = picture_and_grid(tokenizer, tokens)
        if picture_YXC is not None:
            pictures[name] = picture_YXC, share_N[tokenizer.learned :].view(grid)
    return pictures


def answer_line(ray: "XRay", most: int = 60) -> str:
    """The answer, shortened, and its confidence."""
    value = ray.prediction.value
    if ray.model.packer.patterns[ray.task].pair:
        return f"→ a vector of {len(value)} numbers"
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim <= 2 and math.prod(value.shape) <= MOST_NUMBERS:
        value = value.tolist()
    if isinstance(value, (str, int, float)):
        text = short(value)
    elif isinstance(value, list):
        text = ", ".join(map(short, value)) or "(none)"
    else:
        text = f"a {ray.task.rpartition('->')[2].strip()}"
    text = text if len(text) <= most else text[: most - 1] + "…"
    sure = ray.prediction.confidence
    return f"→ {text}" + (f"  {sure:.0%}" if ray.prediction.probability and sure == sure else "")


def short(value: Any) -> str:
    """A part of an answer as text: floats with four digits, points in brackets."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(short, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
