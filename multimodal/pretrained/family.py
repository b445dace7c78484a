"""What a family of models defines: how its configuration becomes our declarations, and its tensors our weights."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from multimodal.core import Core
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.task import Task
from multimodal.texts import short_repr
from multimodal.tokenizer import Tokenizer

IGNORED = {
    # how the model was saved, run and used for generation
    "_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "auto_map", "bad_words_ids",
    "chunk_size_feed_forward", "cls_token_id", "cross_attention_hidden_size", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "label2id", "length_penalty",
    "mask_token_id", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "task_specific_params", "temperature",
    "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache",
    # training and initial weights
    "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout",
    "drop_path_rate", "dropout", "dropout_rate", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob",
    "initializer_factor", "initializer_range", "layerdrop", "resid_pdrop",
}  # fmt: skip
"""Fields of any configuration that do not change what a trained model computes."""


class Settings:
    """Reads a configuration of theirs field by field. `finish` raises an error if a field was not read."""

    def __init__(self, where: str, config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        self.where, self.config = where, config
        self._known = {name for name in config if name in IGNORED}
        self._options = dict(options or {})
        self._asked: dict[str, Sequence[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.config

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; the default if it is missing or None.

        Raises:
            CheckpointError: only one of value and default is a str, or only one is a mapping.
        """
        self._known.add(name)
        value = self.config.get(name)
        if value is None:
            return default
        for kind, wanted in ((str, "a text"), (Mapping, "fields by name")):
            if default is not None and isinstance(value, kind) != isinstance(default, kind):
                wanted = wanted if isinstance(default, kind) else f"a value such as {short_repr(default)}"
                raise CheckpointError(f"{self.where}: {name}={short_repr(value)} is not supported; wanted {wanted}")
        return value

    def stated(self, name: str, default: Any) -> Any:
        """The value of a field for which None is a value; the default only if the field is missing."""
        self._known.add(name)
        return self.config.get(name, default)

    def need(self, name: str) -> Any:
        """The value of a required field."""
        if self.get(name) is None:
            raise CheckpointError(f"{self.where}: its configuration has no {name!r}")
        return self.config[name]

    def only(self, name: str, *values: Any) -> Any:
        """The value of a field that supports only these values; the first one if it is missing.

        Raises:
            CheckpointError: another value, with which our model would compute something else.
        """
        value = self.get(name, values[0])
        if value not in values:
            wanted = " or ".join(map(short_repr, values))
            raise CheckpointError(f"{self.where}: {name}={short_repr(value)} is not supported; wanted {wanted}")
        return value

    def option(self, name: str, default: Any, values: Sequence[Any]) -> Any:
        """The value of an option that the user passed to `pretrained`, such as the language; else the default.

        Raises:
            CheckpointError: it is not one of `values`.
        """
        self._asked[name] = values
        value = self._options.get(name, default)
        if value not in values:
            raise CheckpointError(f"{self.where}: {name}={value!r} is not among {', '.join(map(repr, values))}")
        return value

    def ignore(self, *names: str) -> None:
        """Ignore fields that do not change what the trained model computes; the caller gives the reason in a comment."""
        self._known.update(names)

    def inner(self, name: str) -> "Settings":
        """The configuration in a field of this one; call `finish` on it too."""
        return Settings(f"{self.where}, {name}", self.need(name))

    def finish(self) -> None:
        """Raise a CheckpointError if a field or an option was not read."""
        if wrong := sorted(set(self._options) - set(self._asked)):
            known = ", ".join(self._asked)
            raise CheckpointError(
                f"{self.where}: this family has no option {wrong[0]!r}; it has {known or 'none'}, and every family has "
                f"{', '.join(EVERY)}{did_you_mean(wrong[0], [*self._asked, *EVERY])}"
            )
        if unknown := sorted(set(self.config) - self._known):
            raise CheckpointError(
                f"{self.where}: its configuration has {', '.join(unknown)}, which this version does not know; without "
                "it our model might compute something else"
            )


EVERY = ("revision", "dtype", "pickle")  # options of `pretrained` itself
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def activation(settings: Settings, name: str, default: str) -> Any:
    """Our name for the activation function in a field."""
    given = settings.get(name, default)
    if given not in ACTIVATIONS:
        raise CheckpointError(
            f"{settings.where}: {name}={given!r} is not supported; there are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[given]


@dataclass(frozen=True)
class Pair:
    """One of our weights, and the tensors of theirs that have the same numbers.

    ours: its name in `Model.state_dict`.
    theirs: the names of their tensors.
    join: their tensors -> our weight. split: our weight -> their tensors, bit for bit.
    part: (index, count), if one tensor of theirs is the concatenation of `count` weights of ours along axis 0.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[..., Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    part: tuple[int, int] | None = None


def same(ours: str, theirs: str) -> Pair:
    """The same tensor under another name."""
    return Pair(ours, (theirs,), lambda x: x, lambda x: [x])


def affine(ours: str, theirs: str) -> list[Pair]:
    """The weight and the bias of a norm or a linear layer."""
    return [same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def shaped(ours: str, theirs: str, shape: Sequence[int], their_shape: Sequence[int]) -> Pair:
    """A tensor that they store in another shape, with the numbers in the same order."""
    return Pair(ours, (theirs,), lambda x: x.reshape(shape), lambda x: [x.reshape(their_shape)])


def transposed(ours: str, theirs: str) -> Pair:
    """A matrix that they store transposed."""
    return Pair(ours, (theirs,), lambda x: x.T, lambda x: [x.T])


def stacked(
    ours: str, theirs: Sequence[str], rows: Sequence[int], rotary_widths: Sequence[int | None] | None = None
) -> Pair:
    """One weight of ours that is the concatenation of several tensors of theirs along axis 0, such as `qkv` and `gate_up`.

    rows: the number of rows of each.
    rotary_widths: for each, the width K of a head if they store rotary pairs as two halves (i, i + K/2); None: no reordering.
    """
    widths = rotary_widths or [None] * len(theirs)

    def join(*parts: Tensor) -> Tensor:
        return torch.cat([halves_to_pairs(x, width) for x, width in zip(parts, widths, strict=True)])

    def split(x: Tensor) -> list[Tensor]:
        return [pairs_to_halves(part, width) for part, width in zip(x.split(list(rows)), widths, strict=True)]

    return Pair(ours, tuple(theirs), join, split)


def fused(ours: str, theirs: str, rows: Sequence[int], rotary_widths: Sequence[int | None]) -> Pair:
    """A matrix that both sides concatenate; its parts are reordered. rows, rotary_widths: as for `stacked`."""

    def each(reorder: Callable[[Tensor, int | None], Tensor], x: Tensor) -> Tensor:
        return torch.cat([reorder(part, width) for part, width in zip(x.split(list(rows)), rotary_widths, strict=True)])

    return Pair(ours, (theirs,), lambda x: each(halves_to_pairs, x), lambda x: [each(pairs_to_halves, x)])


def unstacked(
    ours: Sequence[str], theirs: str, rows: Sequence[int], rotary_widths: Sequence[int | None] | None = None
) -> list[Pair]:
    """Several weights of ours that they concatenate along axis 0, such as the biases of queries, keys and values.

    rows, rotary_widths: as for `stacked`.
    """
    widths = rotary_widths or [None] * len(ours)

    def pair(i: int) -> Pair:
        return Pair(
            ours[i],
            (theirs,),
            lambda x: halves_to_pairs(x.split(list(rows))[i], widths[i]),
            lambda x: [pairs_to_halves(x, widths[i])],
            (i, len(ours)),
        )

    return [pair(i) for i in range(len(ours))]


def attention_pairs(
    ours: str,
    projections: Sequence[str],
    out: str,
    rows: Sequence[int],
    bias: Sequence[str],
    rotary_widths: Sequence[int | None] = (None, None, None),
) -> Iterator[Pair]:
    """The pairs of an attention layer.

    ours: the prefix of our names, see `attention_names`. out: their name of the output projection.
    projections: their names of the query, key and value projections, or one name if they are one tensor.
    rows, rotary_widths: as for `stacked`. bias: which projections have a bias, as in `SelfAttention`.
    """
    parts = ("query", "key", "value")
    own = [name for name in parts if name in bias]
    if len(projections) == 1:
        (together,) = projections
        yield fused(f"{ours}.qkv.weight", f"{together}.weight", rows, rotary_widths)
        assert own in ([], [*parts]), "one tensor holds the biases of all three"
        if own:
            yield from unstacked([f"{ours}.biases.{name}" for name in own], f"{together}.bias", rows, rotary_widths)
    else:
        yield stacked(f"{ours}.qkv.weight", [f"{name}.weight" for name in projections], rows, rotary_widths)
        for name, theirs, count, width in zip(parts, projections, rows, rotary_widths, strict=True):
            if name in bias:
                yield stacked(f"{ours}.biases.{name}", [f"{theirs}.bias"], [count], [width])
    yield from affine(f"{ours}.out", out) if "out" in bias else [same(f"{ours}.out.weight", f"{out}.weight")]


def halves_to_pairs(x: Tensor, width: int | None) -> Tensor:
    """Reorder the rows of each head of width K: row pairs (i, i + K/2) become (2i, 2i + 1). None: unchanged."""
    if width is None:
        return x
    return x.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(x: Tensor, width: int | None) -> Tensor:
    """The inverse of `halves_to_pairs`."""
    if width is None:
        return x
    return x.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def nested_pairs(pairs: Sequence[Pair], ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[Pair]:
    """The pairs of a model that is a part of another model, renamed.

    ours, theirs: {old prefix: new prefix}; the first prefix that matches is replaced.
    """
    return [
        replace(p, ours=renamed(p.ours, ours), theirs=tuple(renamed(name, theirs) for name in p.theirs)) for p in pairs
    ]


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with its prefix replaced, if it starts with one of these."""
    old = next((old for old in prefixes if name.startswith(old)), None)
    return name if old is None else prefixes[old] + name.removeprefix(old)


@dataclass(frozen=True)
class Blueprint:
    """Our declarations for a configuration of theirs, and what to do with each of their tensors. Patterns are regular expressions.

    tokenizers, core, tasks: the arguments of `Model`.
    pairs: one for each weight of our model.
    copies: {name of a copy: name of its original}, for tensors that some files store twice, such as a tied head.
    derived: patterns of tensors that are computed from the configuration, such as rotary frequencies.
    unused: {pattern: reason} of tensors of parts that this model does not have; `Pretrained.unused` lists them.
    spare: patterns of small tensors that only training used; the checkpoint stores them, and `export` writes them again.
    """

    tokenizers: Mapping[str, Tokenizer]
    core: Core | EncoderDecoder
    tasks: Sequence[Task]
    pairs: Sequence[Pair]
    copies: Mapping[str, str] = field(default_factory=dict)
    derived: Sequence[str] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    spare: Sequence[str] = ()


class Family(ABC):
    """Models that share one format of configuration and tensor names. Subclass, set `names`, and write `read`.

    names: the values of "model_type" in config.json that this class reads.
    peers: {task: class of transformers that computes it, or "timm"}; `gate.compare` compares our model with it.
    """

    names: tuple[str, ...]
    peers: ClassVar[Mapping[str, str]] = {}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether this family can read a configuration."""
        return config.get("model_type") in self.names

    @abstractmethod
    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        """Our declarations for a configuration, and the pairs of tensors.

        files: by name, the contents of files beside the weights, such as tokenizer.json.
        names: of their tensors; they show, for example, whether the file has a head.

        Raises:
            CheckpointError: a field is missing, or has a value that is not supported.
        """

    def peer(self, task: str, names: Sequence[str]) -> str | None:
        """The class that computes a task of the model with these tensors; None: there is none."""
        return self.peers.get(task)

    def peer_inputs(self, inputs: Mapping[str, Any], read: int) -> Mapping[str, Any]:
        """The keyword arguments of the peer's forward, from its ids, pixels or frames. read: number of ids before the answer."""
        return inputs


def attention_names(block: int, layer: int = 0) -> str:
    """The prefix of our names of an attention layer's weights."""
    return f"core.blocks.{block}.layers.{layer}.body.attention"


def matching(patterns: Sequence[str], name: str) -> str | None:
    """The first pattern that matches the whole name; None: none does."""
    return next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)
