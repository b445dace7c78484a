"""What encoder families share: image preprocessing, class names, tasks, and the pairs of embeddings and blocks."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multimodal.heads import Classify, Contrast
from multimodal.heads.pool import Pool
from multimodal.layers import MLP, SelfAttention
from multimodal.layers.base import Add, Merge, PostNorm
from multimodal.layers.mlp import Activation
from multimodal.pretrained.family import Pair, Settings, affine, attention_names, attention_pairs, same, shaped, stacked
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.task import Task
from multimodal_tokenizers import ImagePatches, Labels
from multimodal_tokenizers.fit import image_settings

PREPROCESSOR = "preprocessor_config.json"
MOST_CLASSES = 2**20  # if the configuration has no names, which are then made up: more might fill the memory
OTHER_CLASSIFIERS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
"""Suffixes of model classes that do not classify whole values, although their tensors have the same names."""


def sides(settings: Settings, name: str) -> tuple[int, int]:
    """(rows, columns) in a field that has one number for both, or two numbers."""
    value = settings.need(name)
    rows, columns = value if isinstance(value, (list, tuple)) else (value, value)
    return rows, columns


def image_processor(files: Mapping[str, bytes], default: Mapping[str, Any]) -> Mapping[str, Any]:
    """The image preprocessing in the files beside the weights; the default if there is none."""
    for name in (PREPROCESSOR, "processor_config.json"):
        if name in files:
            found = json.loads(files[name])
            # newer versions of transformers write one file for all processors of a model
            found = found.get("image_processor", found if name == PREPROCESSOR else None)
            if found:
                return found
    return default


def patches(settings: Settings, processor: Mapping[str, Any]) -> ImagePatches:
    """The tokenizer of a vision transformer. processor: the image preprocessing, see `image_processor`."""
    rows, columns = sides(settings, "patch_size")
    if rows != columns:
        raise CheckpointError(f"{settings.where}: patch_size={(rows, columns)} is not supported; wanted squares")
    settings.only("num_channels", 3)
    try:
        return ImagePatches(patch=rows, position="rotary", **image_settings(processor))
    except ConfigError as error:
        raise CheckpointError(f"{settings.where}: {PREPROCESSOR}: {error}") from None


def classes(settings: Settings) -> Labels:
    """The tokenizer of the classes. A name that occurs twice gets its class number as a suffix.

    Raises:
        CheckpointError: the outputs are not classes of a whole value.
    """
    config, several = settings.config, settings.config.get("problem_type") == "multi_label_classification"
    for name in config.get("architectures") or ():
        if str(name).endswith(OTHER_CLASSIFIERS):
            raise CheckpointError(
                f"{settings.where}: its tensors look like a classifier of whole values, but a {name} is none; save the "
                "encoder alone"
            )
    # transformers does not write the default, two classes without names
    given, count = config.get("id2label"), settings.get("num_labels", 2)
    if not given and count > MOST_CLASSES:
        raise CheckpointError(
            f"{settings.where}: num_labels={count} is more than {MOST_CLASSES}; give their names as id2label"
        )
    given = given or {i: f"LABEL_{i}" for i in range(count)}
    names = [str(name) for _, name in sorted((int(i), name) for i, name in given.items())]
    times = Counter(names)
    names = [f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names)]
    if config.get("problem_type") == "regression" or (len(names) == 1 and not several):
        raise CheckpointError(
            f"{settings.where}: {len(names)} outputs with problem_type={config.get('problem_type')!r} are scores, not "
            "classes; save the encoder alone"
        )
    return Labels(tuple(names), several=several)


def vector_task(kind: str, pool: Pool, width: int) -> tuple[list[Task], list[Pair]]:
    """The task of an encoder without a head, whose `Model.vectors` are the pooled states, and the pair of its new, unused scale."""
    head = Contrast(width=width, pool=pool, maps=())
    scale = new_weight(f"readouts.{kind}__{kind}_Contrast.log_scale", lambda: torch.full((1,), math.log(1 / 0.07)))
    return [Task(f"{kind} <-> other:{kind}", head)], [scale]


def new_weight(ours: str, make: Callable[[], Tensor]) -> Pair:
    """A weight of ours that they do not have; it gets the initial value of a new model, and is not exported."""
    return Pair(ours, (), make, lambda x: [])


def classifier_task(kind: str, pool: Pool, labels: Labels, width: int, theirs: str) -> tuple[list[Task], list[Pair]]:
    """The task that classifies values of this kind, and the pairs of its linear layer and of the class embedding, which is new."""
    pairs = affine("readouts.label_Classify.linear", theirs)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        table = labels.embed(width)
    pairs += [new_weight(f"embeds.label.{name}", x.detach().clone) for name, x in table.named_parameters()]
    return [Task(f"{kind} -> label", Classify(pool=pool))], pairs


def learned_pair(kind: str, theirs: Sequence[str], counts: Sequence[int], width: int) -> Pair:
    """The learned tokens (N, D) of `ClassTokens`, which they store as several tensors (1, count, D)."""
    return Pair(
        f"embeds.{kind}.tokens_ND",
        tuple(theirs),
        lambda *parts: torch.cat([x.reshape(-1, width) for x in parts]),
        lambda x: [part[None] for part in x.split(list(counts))],
    )


def embedding_pairs(
    kind: str, theirs: str, width: int, channels: int, patch: int, *, bias: bool = True, linear: str = "of.linear"
) -> Iterator[Pair]:
    """The linear layer that embeds patches, which they store as a convolution. linear: its name within our embedding."""
    ours = f"embeds.{kind}.{linear}"
    square = (width, channels, patch, patch)
    yield shaped(f"{ours}.weight", f"{theirs}.weight", (width, channels * patch**2), square)
    if bias:
        yield same(f"{ours}.bias", f"{theirs}.bias")


def positions_pair(kind: str, theirs: str, count: int, width: int) -> Pair:
    """The learned positions (N, D) of `ClassTokens`, which they store as (1, N, D)."""
    return shaped(f"embeds.{kind}.positions_ND", theirs, (count, width), (1, count, width))


@dataclass(frozen=True, kw_only=True)
class EncoderBlock:
    """A transformer block of an encoder: its layers, and the names of their tensors within the block.

    width, heads: of the core. hidden: hidden width of the MLP. activation, gated: of the MLP.
    bias: which attention projections have a bias. mlp_bias: whether the linear layers of the MLP have one.
    merge: how a layer's output is added to the residual stream.
    rotary: whether queries and keys have rotary positions, stored as two halves.
    projections, out, up, down, norms, scales: their tensor names. `projections`: of queries, keys and values, or one name if they
        are one tensor. `up`: two names if the gate is a matrix of its own. `scales`: of the two LayerScales, if any.
    """

    width: int
    heads: int
    hidden: int
    activation: Activation
    gated: bool = False
    bias: tuple[str, ...]
    mlp_bias: bool = True
    merge: Merge = field(default_factory=Add)
    rotary: bool = False
    projections: tuple[str, ...] = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
    out: str = "attention.output.dense"
    up: tuple[str, ...]
    down: str
    norms: tuple[str, str]
    scales: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[SelfAttention, MLP]:
        """The declarations of its layers."""
        mlp = MLP(activation=self.activation, gated=self.gated, bias=self.mlp_bias, merge=self.merge)
        return SelfAttention(bias=self.bias, merge=self.merge), mlp

    def pairs(self, i: int, theirs: str) -> Iterator[Pair]:
        """The pairs of block i. theirs: the prefix of its tensor names."""
        ours, width = f"core.blocks.{i}.layers", self.width
        rotary_width = width // self.heads if self.rotary else None
        projections = [f"{theirs}.{name}" for name in self.projections]
        rotary_widths = [rotary_width, rotary_width, None]
        yield from attention_pairs(
            attention_names(i), projections, f"{theirs}.{self.out}", [width] * 3, self.bias, rotary_widths
        )
        up = "gate_up" if self.gated else "up"
        rows = [(1 + self.gated) * self.hidden // len(self.up)] * len(self.up)
        for part in ("weight", "bias") if self.mlp_bias else ("weight",):
            yield stacked(f"{ours}.1.body.{up}.{part}", [f"{theirs}.{name}.{part}" for name in self.up], rows)
            yield same(f"{ours}.1.body.down.{part}", f"{theirs}.{self.down}.{part}")
        for layer, norm in enumerate(self.norms):
            place = "merge_weights" if isinstance(self.merge, PostNorm) else "norm"
            yield from affine(f"{ours}.{layer}.{place}", f"{theirs}.{norm}")
        for layer, scale in enumerate(self.scales):
            yield same(f"{ours}.{layer}.merge_weights.gamma", f"{theirs}.{scale}")
