"""What encoders share: the preparation of pictures, classes, tasks, and the tensors of embeddings and blocks."""

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
MOST_CLASSES = 2**20  # of a configuration without their names, lest memory ends before the tensors are seen
OTHER_CLASSIFIERS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
"""How the classes of models end whose tensors a classifier of whole values has too."""


def sides(settings: Settings, name: str) -> tuple[int, int]:
    """Rows and columns of a field that is one number for both, or two numbers."""
    value = settings.need(name)
    rows, columns = value if isinstance(value, (list, tuple)) else (value, value)
    return rows, columns


def image_processor(files: Mapping[str, bytes], default: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings for pictures in the files beside the weights; default: if there are none."""
    for name in (PREPROCESSOR, "processor_config.json"):
        if name in files:
            found = json.loads(files[name])
            # newer versions write one file for all processors of a model
            found = found.get("image_processor", found if name == PREPROCESSOR else None)
            if found:
                return found
    return default


def patches(settings: Settings, processor: Mapping[str, Any]) -> ImagePatches:
    """The pictures of a vision transformer; processor: how they are prepared, see `image_processor`."""
    rows, columns = sides(settings, "patch_size")
    if rows != columns:
        raise CheckpointError(f"{settings.where}: patch_size={(rows, columns)} is not supported; wanted squares")
    settings.only("num_channels", 3)
    try:
        return ImagePatches(patch=rows, position="rotary", **image_settings(processor))
    except ConfigError as error:
        raise CheckpointError(f"{settings.where}: {PREPROCESSOR}: {error}") from None


def classes(settings: Settings) -> Labels:
    """The names of the classes; to a name that occurs twice its number is added.

    Raises:
        CheckpointError: its outputs are not classes of a whole value.
    """
    config, several = settings.config, settings.config.get("problem_type") == "multi_label_classification"
    for name in config.get("architectures") or ():
        if str(name).endswith(OTHER_CLASSIFIERS):
            raise CheckpointError(
                f"{settings.where}: its tensors have the names of a classifier of whole values, but a {name} is none; save it as "
                "the encoder alone"
            )
    # the two classes of a configuration that names none are not written
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
            f"{settings.where}: {len(names)} outputs with problem_type={config.get('problem_type')!r} are scores, and no "
            "classes; save it as the encoder alone"
        )
    return Labels(tuple(names), several=several)


def vectors(kind: str, pool: Pool, width: int) -> tuple[list[Task], list[Pair]]:
    """The task of an encoder without a head, whose `Model.vectors` are its pooled states, and the pair of its unused scale."""
    head = Contrast(width=width, pool=pool, maps=())
    scale = new(f"readouts.{kind}__{kind}_Contrast.log_scale", lambda: torch.full((1,), math.log(1 / 0.07)))
    return [Task(f"{kind} <-> other:{kind}", head)], [scale]


def new(ours: str, make: Callable[[], Tensor]) -> Pair:
    """A weight of ours without a counterpart, initialised as in a new model; it is not exported."""
    return Pair(ours, (), make, lambda x: [])


def classifier(kind: str, pool: Pool, labels: Labels, width: int, theirs: str) -> tuple[list[Task], list[Pair]]:
    """The task of classifying a value of this kind, the pairs of its linear layer, and a new embedding of classes."""
    pairs = affine("readouts.label_Classify.linear", theirs)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        table = labels.embed(width)
    pairs += [new(f"embeds.label.{name}", x.detach().clone) for name, x in table.named_parameters()]
    return [Task(f"{kind} -> label", Classify(pool=pool))], pairs


def learned_pair(kind: str, theirs: Sequence[str], counts: Sequence[int], width: int) -> Pair:
    """The learned tokens of `ClassTokens`, which they store as several tensors (1, count, D)."""
    return Pair(
        f"embeds.{kind}.tokens_ND",
        tuple(theirs),
        lambda *parts: torch.cat([x.reshape(-1, width) for x in parts]),
        lambda x: [part[None] for part in x.split(list(counts))],
    )


def embedding_pairs(
    kind: str, theirs: str, width: int, channels: int, patch: int, *, bias: bool = True, linear: str = "of.linear"
) -> Iterator[Pair]:
    """The linear map of patches, which they store as a convolution; linear: its name within the embedding."""
    ours = f"embeds.{kind}.{linear}"
    square = (width, channels, patch, patch)
    yield shaped(f"{ours}.weight", f"{theirs}.weight", (width, channels * patch**2), square)
    if bias:
        yield same(f"{ours}.bias", f"{theirs}.bias")


def positions_pair(kind: str, theirs: str, count: int, width: int) -> Pair:
    """The learned positions of `ClassTokens`, which they store with a leading axis of size 1."""
    return shaped(f"embeds.{kind}.positions_ND", theirs, (count, width), (1, count, width))


@dataclass(frozen=True, kw_only=True)
class EncoderBlock:
    """A block of an encoder: its layers, and the names of their tensors within the block.

    width, heads: of the core. hidden: hidden width of the MLP. activation, gated: of the MLP.
    bias: which projections of the attention have a bias. mlp_bias: whether those of the MLP have.
    merge: how a layer's output joins the stream; `scales` has the names of a LayerScale.
    rotary: whether queries and keys have rotary positions, whose pairs are stored as halves.
    projections, out, up, down, norms, scales: their names. `projections` are those of queries, keys and values, or one name if
        they are one tensor; `up` has two names where the gate is a matrix of its own.
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
        """The declaration."""
        mlp = MLP(activation=self.activation, gated=self.gated, bias=self.mlp_bias, merge=self.merge)
        return SelfAttention(bias=self.bias, merge=self.merge), mlp

    def pairs(self, i: int, theirs: str) -> Iterator[Pair]:
        """The tensors of block i; theirs: its name."""
        ours, width = f"core.blocks.{i}.layers", self.width
        turn = width // self.heads if self.rotary else None
        projections = [f"{theirs}.{name}" for name in self.projections]
        turned = [turn, turn, None]
        yield from attention_pairs(
            attention_names(i), projections, f"{theirs}.{self.out}", [width] * 3, self.bias, turned
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
