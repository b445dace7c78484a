"""The logit lens (nostalgebraist 2020): the head's prediction from the states of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.files import save_figure
from multimodal.heads import one_class
from multimodal.look.layers import layer_names, recorded, token_labels, transformers, whole_layers
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, written_tokens


@dataclass(frozen=True)
class Lens:
    """The head's prediction from the states of each layer.

    layers: names of the layers.
    probability_LNV: of each class, by layer and row that the head reads.
    classes: names of the classes.
    """

    layers: tuple[str, ...]
    probability_LNV: Tensor
    classes: tuple[str, ...]

    @property
    def entropy_LN(self) -> Tensor:
        """Entropy of the prediction in nats, by layer and row."""
        return torch.special.entr(self.probability_LNV).sum(-1)

    def best(self) -> list[list[str]]:
        """The likeliest class by layer and row."""
        return [[self.classes[i] for i in row] for row in self.probability_LNV.argmax(-1).tolist()]

    def draw(self, path: str | Path) -> None:
        """Write a picture: layers upwards, rows to the right; each cell names the likeliest class, brighter where it is surer."""
        from matplotlib.figure import Figure

        p_LN = self.probability_LNV.amax(-1)
        layers, rows = p_LN.shape
        figure = Figure(figsize=(1.6 + 0.55 * rows, 0.9 + 0.4 * layers), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(p_LN.numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for i, names in enumerate(self.best()):
            for j, name in enumerate(names):
                shown = name if len(name) <= 8 else name[:7] + "…"
                color = "black" if float(p_LN[i, j]) > 0.6 else "white"
                axes.text(j, i, shown.replace("$", r"\$"), ha="center", va="center", fontsize=7, color=color)
        axes.set_yticks(range(layers), self.layers)
        axes.set(xlabel="row that the head reads", title="what the head would say after each layer")
        figure.colorbar(image, label="probability")
        save_figure(path, figure, 110)


def lens(model: Model, task: str, sample: Mapping[str, Any]) -> Lens:
    """Apply the last norm and the head to every layer's states, at the rows that the head reads.

    A head that writes is applied at each token of the answer if the sample has one, otherwise at the first row only. Of a kind
    with several classes at once, each class has a probability of its own. Layers whose states have another width than the last
    norm (blocks can widen the stream) are left out. A pointer chooses among the states of the same layer or, in an
    EncoderDecoder, among the reader's last states; its classes are the tokens that were read.

    Raises:
        ConfigError: a head that writes features, and a pair, have no classes to look at.
    """
    packer = model.packer
    packer.check_task(task)
    pattern, head = packer.patterns[task], packer.head(task)
    if pattern.pair:
        raise ConfigError(f"lens: task {task!r} is a pair, which has vectors and no classes")
    if head.draws_features:
        raise ConfigError(f"lens: task {task!r} writes features by {type(head).__name__}, which has no classes")
    tokenizer = packer.written_parts.get(pattern.writes.kind, packer.tokenizers[pattern.writes.kind])
    several = tokenizer.classes and tokenizer.vocab_size is None
    probabilities, names = [], []
    with model.inference_mode(), recorded(model) as layers:
        stream = model.pack(task, [sample], answers=head.autoregressive and sample.get(pattern.answer) is not None)
        end_TD = model(stream)
        reading = stream.readings[task]
        whole = whole_layers(model, layers, stream)
        ends = [core for core in transformers(model).values() for _ in range(len(core.blocks) + 1)]
        for name, state_TD, core in zip(layer_names(model), whole, ends, strict=True):
            state_TD = state_TD.to(model.device, model.dtype)
            if bool(state_TD[reading.row_N].isnan().all()):  # the head reads rows of the other core
                continue
            other_T = state_TD.isnan().all(-1)  # rows of the other core, which have no state in this layer
            if core.narrow is not None:
                # blocks whose layers concatenate widen the stream, and `narrow` takes the last width alone
                if state_TD.shape[1] != core.narrow.in_features:
                    continue
                state_TD = core.narrow(state_TD)
            state_TD = torch.where(other_T[:, None], end_TD, core.norm(state_TD))
            inputs = head.inputs(reading, state_TD)
            logits = head.logits(model.readout(task), state_TD[reading.row_N], reading.lengths, **inputs).float()
            probabilities.append(logits.sigmoid() if several else logits.softmax(-1))
            names.append(name)
    probability_LNV = torch.stack(probabilities).cpu().clone()
    count = probability_LNV.shape[-1]
    source = head.source(packer.encoded(task, sample, "lens"))
    if source is not None:
        return Lens(tuple(names), probability_LNV, (*token_labels(tokenizer, source), f"[{count - 1}]"))
    return Lens(tuple(names), probability_LNV, _classes(tokenizer, count))


def _classes(tokenizer: Tokenizer, count: int) -> tuple[str, ...]:
    """The name of each class; a class that is no value of the kind (the stop, the blank) is its number in brackets."""
    found = []
    for c in range(count):
        try:
            tokens = one_class(c, tokenizer) if tokenizer.classes else written_tokens(tokenizer, torch.tensor([c]))
            value = tokenizer.decode(tokens) if c < (tokenizer.vocab_size or count) else None
        except ValueError:
            value = None
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        found.append(value if isinstance(value, str) else f"[{c}]")
    return tuple(found)
