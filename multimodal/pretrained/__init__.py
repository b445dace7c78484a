"""Loads pretrained models of other libraries into our core, `pretrained("owner/model")`, and exports them again.

config.json --family--> tokenizers, core, tasks (a Blueprint)        their tensors --pairs--> our weights

"Ours" is this library; "theirs" is the library that a model comes from.
"""

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.core import Core
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.model import Model
from multimodal.pattern import Pattern
from multimodal.pretrained import source as sources
from multimodal.pretrained.bert import Bert
from multimodal.pretrained.clip import CLIP, SigLIP
from multimodal.pretrained.convert import STORED, our_weights, packed_spare, their_tensors, unpacked_spare
from multimodal.pretrained.dinov2 import DINOv2
from multimodal.pretrained.dinov3 import DINOv3
from multimodal.pretrained.family import Blueprint, Family, Settings
from multimodal.pretrained.gemma3 import Gemma3
from multimodal.pretrained.gpt2 import GPT2
from multimodal.pretrained.llama import Llama
from multimodal.pretrained.modernbert import ModernBert
from multimodal.pretrained.nanovlm import NanoVLM
from multimodal.pretrained.own import as_qwen3
from multimodal.pretrained.paligemma import PaliGemma
from multimodal.pretrained.smolvlm import SmolVLM
from multimodal.pretrained.spectrogram import AST
from multimodal.pretrained.t5 import T5
from multimodal.pretrained.timm_vit import TimmViT
from multimodal.pretrained.vit import ViT
from multimodal.pretrained.whisper import Whisper
from multimodal.shapes import CheckpointError, ConfigError, TaskError
from multimodal.task import Task
from multimodal.texts import short_repr, shortened
from multimodal.tokenizer import Tokenizer

FAMILIES: tuple[Family, ...] = (
    *(AST(), Bert(), CLIP(), DINOv2(), DINOv3(), Gemma3(), GPT2(), Llama(), ModernBert(), NanoVLM()),
    *(PaliGemma(), SigLIP(), SmolVLM(), T5(), TimmViT(), ViT(), Whisper()),
)
"""The families of models that can be loaded and exported."""
DEPTHS = {
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "encoder_layers", "decoder_layers", "depth"),
    *("vit_n_blocks", "lm_n_blocks"),
}
"""Fields of a config.json that give a number of layers."""


@dataclass(frozen=True, eq=False)  # tensors have no equality of their own
class Pretrained:
    """A pretrained model as declarations and weights of this library.

    tokenizers, core, tasks: the arguments of `Model`.
    weights: tensors by their name in `Model.state_dict`.
    unused: for each tensor in the files that this model does not need, its name and the reason; it is not exported.
    origin: what a checkpoint stores so that `export` can write the original configuration and tensor names.
    """

    tokenizers: Mapping[str, Tokenizer]
    core: Core | EncoderDecoder
    tasks: Sequence[Task]
    weights: Mapping[str, Tensor] = field(repr=False)
    unused: Mapping[str, str] = field(repr=False)
    origin: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The folder, hub name or class name that it was loaded from."""
        return self.origin["name"]

    @property
    def revision(self) -> str | None:
        """The commit on the hub; None: it is not from the hub."""
        return self.origin["revision"]

    def __post_init__(self) -> None:
        # a mapping that replaces another one easily loses its other kinds
        kinds = {field.kind: task.pattern for task in self.tasks for field in Pattern.parse(task.pattern).fields}
        if lost := [kind for kind in kinds if kind not in self.tokenizers]:
            raise TaskError(
                f"Pretrained: tokenizers has {', '.join(self.tokenizers) or 'none'}, and task {kinds[lost[0]]!r} needs {lost[0]!r} "
                "too; keep the others, as in tokenizers={**loaded.tokenizers, 'image': ..}"
            )

    def model(
        self,
        tasks: Sequence[str | Task] = (),
        tokenizers: Mapping[str, Tokenizer] | None = None,
        *,
        keep: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Model:
        """Make a model with these weights, in evaluation mode. If weights differ in precision, all get the highest one.

        tasks: more tasks. One without a head, such as "image -> text", uses the pretrained head that writes the same kind, if any.
        tokenizers: more kinds, whose embeddings get new weights.
        keep: which of the pretrained tasks the model has, by pattern; None: all of them; (): none.
        seed: the seed of new weights.

        Raises:
            ConfigError: the model has a kind of this name already. TaskError: it has this task already, or no task to keep.
        """
        made = Model(self.tokenizers, self.core, self.tasks, seed=seed)
        # a model has one precision: the finest of the weights, so that no bit is lost
        dtype = reduce(torch.promote_types, {x.dtype for x in self.weights.values()})
        made.to(dtype).load_state_dict(dict(self.weights))
        made.origin = self.origin
        tasks = [self._with_head(task) for task in ([tasks] if isinstance(tasks, (str, Task)) else tasks)]
        made = made.extended(tokenizers, tasks) if tasks or tokenizers else made
        return (made if keep is None else self._with_some(made, [keep] if isinstance(keep, str) else keep)).eval()

    def _with_some(self, model: Model, keep: Sequence[str]) -> Model:
        """The model without those pretrained tasks that are not in `keep`."""
        own = [task.pattern for task in self.tasks]
        if foreign := [pattern for pattern in keep if pattern not in own]:
            raise TaskError(f"Pretrained.model: keep names {foreign[0]!r}; {self.name} has {', '.join(map(repr, own))}")
        tasks = [task for pattern, task in model.tasks.items() if pattern in keep or pattern not in own]
        if not tasks:
            raise TaskError("Pretrained.model: keep=() leaves no task; give tasks, or keep one")
        made = Model(model.packer.tokenizers, self.core, tasks, seed=model.seed)
        weights, names = model.state_dict(), made.state_dict().keys()
        made.to(model.dtype).load_state_dict({name: weights[name] for name in names})
        made.origin = model.origin
        return made

    def _with_head(self, task: str | Task) -> Task:
        """A task; a pattern without a head gets the pretrained head that writes the same kind, if there is one."""
        if isinstance(task, Task):
            return task
        written = Pattern.parse(task).written
        for known in self.tasks:
            pattern = Pattern.parse(known.pattern)
            if written is not None and pattern.written is not None and written.kind == pattern.written.kind:
                return Task(task, known.head)
        return Task(task)


def pretrained(
    source: Any,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    pickle: bool = False,
    **options: Any,
) -> Pretrained:
    """Load a pretrained model of transformers or timm.

    source: a folder with config.json and safetensors, a file of weights in such a folder, a name on the hub such as
        "facebook/dinov2-small", or a model object of transformers or timm.
    revision: the branch, tag or commit to load from the hub.
    dtype: the precision of the weights; None: as in the file.
    pickle: whether to read weights from a pickle (.bin), with `torch.load(weights_only=True)`.
    options: options of the model family, such as language="de" for Whisper; the docstring of its class lists them.

    Raises:
        CheckpointError: there is no such model, or its family, a field, a value, a tensor or an option is unknown.
        ConfigError: `source` is of another type.

    Examples:
        >>> smollm = mm.pretrained("smollm2")  # a folder, or a name such as "HuggingFaceTB/SmolLM2-135M"
        >>> answer = smollm.model().generate("text -> text", text=[5, 9, 2], max_tokens=4)
        >>> sorted(smollm.tokenizers), smollm.core.depth
        (['text'], 2)
    """
    if dtype is not None and dtype not in STORED:
        raise ConfigError(f"pretrained: dtype={dtype!r} must be one of {', '.join(map(str, STORED))}, or None")
    found = sources.find(source, revision=revision, pickle=pickle)
    blueprint, shapes = blueprint_of(found.name, found.config, found.files, list(found.tensors), options)
    weights, unused = our_weights(found, blueprint, shapes, dtype)
    origin = {
        "name": found.name,
        "revision": found.revision,
        "config": dict(found.config),
        "options": options,
        "tensors": sorted(set(found.tensors) - set(unused)),
        "files": {name: data.decode("utf-8") for name, data in found.files.items() if name != "tokenizer.json"},
    }
    if (spare := packed_spare(found, blueprint)) is not None:
        origin["spare"] = spare
    return Pretrained(blueprint.tokenizers, blueprint.core, tuple(blueprint.tasks), weights, unused, origin)


def blueprint_of(
    where: str,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    names: Sequence[str],
    options: Mapping[str, Any] | None = None,
) -> tuple[Blueprint, dict[str, torch.Size]]:
    """Return (our declarations for a configuration of theirs, the shapes of our weights by name).

    where: the name of the model, for errors. files: by name, the files beside the weights. names: of their tensors.
    options: those of `pretrained`.

    Raises:
        CheckpointError: the family, a field or a value is unknown.
    """
    family = family_of(where, config)
    settings = Settings(where, config, options)
    _check_depth(where, config, len(names))
    try:
        blueprint = family.read(settings, files, names)
        settings.finish()
        with torch.device("meta"):
            outline = Model(blueprint.tokenizers, blueprint.core, list(blueprint.tasks))
    except (CheckpointError, AssertionError):
        raise
    except Exception as error:  # impossible values and malformed files may raise errors of any class
        said = (
            shortened(error, 300)
            if isinstance(error, ConfigError)
            else f"{type(error).__name__}: {shortened(error, 300)}"
        )
        raise CheckpointError(f"{where}: its configuration and the files beside it make no model: {said}") from error
    shapes = {name: x.shape for name, x in outline.state_dict().items()}
    made = [pair.ours for pair in blueprint.pairs]
    # each of our weights comes from exactly one pair; anything else is a bug in the family
    assert sorted(made) == sorted(shapes), f"{set(shapes) ^ set(made) or 'one is made twice'}"
    return blueprint, shapes


def _check_depth(where: str, config: Mapping[str, Any], count: int) -> None:
    """Raise a CheckpointError if there are more layers than tensors: to build them all might fill the memory."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(f"{where}, {name}", value, count)
        elif name in DEPTHS and isinstance(value, (int, float)) and value > count:
            raise CheckpointError(f"{where}: {name}={value}, but there are only {count} tensors")


def family_of(where: str, config: Mapping[str, Any]) -> Family:
    """The family that can read this configuration.

    Raises:
        CheckpointError: no family can.
    """
    family = next((family for family in FAMILIES if family.reads(config)), None)
    if family is None:
        kind, known = config.get("model_type"), ", ".join(sorted(name for family in FAMILIES for name in family.names))
        raise CheckpointError(f"{where}: models of type {kind!r} are not supported; supported are {known}")
    return family


def foreign_model(source: str, config: Mapping[str, Any]) -> str:
    """For errors: which model a configuration of another library is of, and how to make a checkpoint of it; "" if it names none."""
    family = next((family for family in FAMILIES if family.reads(config)), None)
    own = None if family is None else family.names[0]  # some configurations name no type
    kind = config.get("model_type", config.get("architectures", config.get("architecture", own)))
    if kind is None:
        return ""
    what = f"a model of another library, of type {short_repr(kind)}"
    if family is None:
        return f"{what}, which mm.pretrained cannot read; `multimodal pretrained list` shows what it can"
    make = f'mm.pretrained({source!r}).model().save("FOLDER")'
    return f"{what} (family {type(family).__name__}); make a checkpoint of it first, in Python: {make}"


def export(model: Model, folder: str | Path, to: str = "hf", *, only_original: bool = False) -> Path:
    """Write a loaded model with its original configuration and tensor names, so that transformers' Auto classes load the folder.

    Weights that you did not train keep their numbers, and with `pretrained(.., dtype=None)` their bits. A text model that was
    trained here is written as a Qwen3 model: it needs `Core(rotary_split=(1, 0, 0))` and `NextToken(bias=False)`.

    to: the library that will load the folder: "hf" (transformers), or "timm", whose `load_state_dict` takes the tensors.
    only_original: leave out kinds and tasks that were added to the loaded ones; else they are an error that names them.

    Raises:
        ConfigError: the model has adapters, is quantized, or has tokenizers, tasks or a core that this layout cannot hold.
        CheckpointError: the folder has files already.
    """
    folder, origin = Path(folder), model.origin
    if model.adapters is not None:
        raise ConfigError("export: other libraries would not read this model's adapters; call lora.merge first")
    if model.quantization is not None:
        raise ConfigError("export: other libraries would not read quantized weights; export the original")
    if origin is None:
        if to != "hf":
            raise ConfigError(f"export: a model that was trained here has no layout of {to}; there is 'hf'")
        if only_original:
            raise ConfigError(
                "export: only_original=True, but this model was trained here and has no original; leave it out"
            )
        names = ["model.norm.weight", "lm_head.weight", *model.state_dict()]
        config, tensors, files = as_qwen3(model, lambda config: blueprint_of("export", config, {}, names)[0])
        sources.write(folder, config, tensors, files)
        return folder
    own = "timm" if str(origin["config"].get("model_type")).startswith("timm:") else "hf"
    if to != own:
        raise ConfigError(
            f"export: {origin['name']} has the layout of {own!r}, not of {to!r}; use Model.export({own!r}, folder)"
        )
    if (part := origin.get("options", {}).get("part", "both")) != "both":
        raise ConfigError(
            f"export: this is the {part} tower alone, and the layout of {origin['name']} has both; use Model.save"
        )
    files = {name: text.encode("utf-8") for name, text in origin["files"].items()}
    text = model.packer.tokenizers.get("text")
    spec = getattr(getattr(text, "tokenizer", text), "spec", None)  # a tower has its tokenizer inside
    if spec is not None:
        files["tokenizer.json"] = spec.encode("utf-8")
    blueprint, _ = blueprint_of(origin["name"], origin["config"], files, origin["tensors"], origin.get("options"))
    _check_exportable(model, blueprint, origin["name"], to, only_original)
    theirs = their_tensors(blueprint.pairs, model.state_dict())
    theirs |= unpacked_spare(origin.get("spare"))
    theirs |= {copy: theirs[name] for copy, name in blueprint.copies.items() if copy in origin["tensors"]}
    # transformers converts weights to the precision that the configuration names
    precision = str(model.dtype).removeprefix("torch.")
    named = {name: precision for name in ("dtype", "torch_dtype") if name in origin["config"]}
    sources.write(folder, {**origin["config"], **named}, theirs, files)
    return folder


def _check_exportable(model: Model, blueprint: Blueprint, name: str, to: str, only_original: bool) -> None:
    """Raise a ConfigError that says what was changed in a model or, unless `only_original`, added to it since it was loaded."""
    changed, added = [], []
    if (core := model.core.core) != blueprint.core:
        changed.append(f"the core was changed ({_differing(core, blueprint.core)})")
    parts = (
        ("kind", model.packer.tokenizers, dict(blueprint.tokenizers)),
        ("task", model.packer.heads, {task.pattern: task.head for task in blueprint.tasks}),
    )
    for what, now, before in parts:
        changed += [f"{what} {key!r} is missing" for key in before if key not in now]
        for key in (key for key in before if key in now and now[key] != before[key]):
            changed.append(f"{what} {key!r} was changed ({_differing(now[key], before[key])})")
        added += [f"{what} {key!r} was added" for key in now if key not in before]
    if changed or (added and not only_original):
        out = "" if changed else f"Model.export({to!r}, folder, only_original=True), which leaves out what was added; "
        raise ConfigError(
            f"export: {'; '.join([*changed, *added])}. The layout of {name} has no place for that. What remains: {out}"
            'Model.export("onnx", folder, task=..) for one task; Model.save for the whole model'
        )


def _differing(now: Any, before: Any) -> str:
    """The fields in which two declarations differ, or their classes."""
    if type(now) is not type(before):
        return f"{type(before).__name__} is now {type(now).__name__}"
    names = [f.name for f in fields(now) if f.compare]
    return ", ".join(name for name in names if getattr(now, name) != getattr(before, name))


class _CallableModule(types.ModuleType):
    """Makes this module callable: `mm.pretrained("owner/model")`."""

    def __call__(self, source: Any, **options: Any) -> Pretrained:
        return pretrained(source, **options)


sys.modules[__name__].__class__ = _CallableModule
