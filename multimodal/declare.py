"""Declarations (core, tokenizer, head, mask rule): frozen dataclasses without weights, to JSON and back."""

import dataclasses
import importlib
import importlib.metadata
import json
import types
import typing
from collections.abc import Iterator, Mapping, MappingView, Set
from typing import Any, Self, TypeVar

import numpy as np

from multimodal.files import check_fields
from multimodal.notebook import declaration_html
from multimodal.old_names import new_type
from multimodal.shapes import CheckpointError, ConfigError, did_you_mean
from multimodal.texts import short_repr

_Part = TypeVar("_Part")
GROUPS = "multimodal."  # of entry points: multimodal.tokenizers, multimodal.heads, multimodal.parts
OURS = ("multimodal", "multimodal_tokenizers")  # the packages of this project
PARTS = {
    *(
        "attention.priors",
        "attention.reads",
        "attention.scores",
        "composite",
        "core",
        "encoder_decoder",
        "lora",
        "masks",
        "norm",
        "positions",
        "quantization",
    ),
    *("heads.pool", "tower", "train.recipe"),
    *(
        f"heads.{name}"
        for name in (
            "classify",
            "contrast",
            "ctc",
            "each_row",
            "flow",
            "masked",
            "next_token",
            "next_turn",
            "pointer",
            "regress",
        )
    ),
    *("layers.attend", "layers.base", "layers.mlp", "layers.recurrent", "zoo.temporal_conv", "zoo.turing_machine"),
}
"""Modules below `multimodal` that `find` may import, because a checkpoint names a class of theirs."""
_defined: dict[str, type["Declared"]] = {}


class Declared:
    """Base of what a checkpoint names and rebuilds. Subclasses are frozen dataclasses of JSON values and other declarations."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _defined[type_name(cls)] = cls

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        # here and not in __post_init__, because subclasses of users override that without calling ours
        fields = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        for name, value in (*zip(fields, args, strict=False), *settings.items()):
            check_ordered(f"{cls.__name__}: {name}", value)
        return super().__new__(cls)

    def config(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: _to_json(getattr(self, name)) for name in _fields(type(self))}

    def _repr_html_(self) -> str:
        """For notebooks: each field with its value and meaning."""
        return declaration_html(self)

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        """Rebuild a declaration from its `config`, as read from JSON; `files` are those that a tokenizer saved (`Tokenizer.files`).

        Raises:
            CheckpointError: a setting that this class does not have, or one of another type.
        """
        known = _fields(cls)
        for key in config:
            if key not in known:
                raise CheckpointError(
                    f"{cls.__name__} has no setting {key!r}; it has {', '.join(known) or 'none'}{did_you_mean(key, known)}"
                )
        settings = {key: _as_int(cls, key, _from_json(value)) for key, value in config.items()}
        if cls.__module__.partition(".")[0] in OURS:  # annotations of other packages may mean anything
            _check_types(cls, settings)
        return cls(**settings)


def check_ordered(where: str, value: Any) -> None:
    """Raise a ConfigError for a set, also within lists and mappings: its order differs between processes, so that an id would
    stand for another class in each."""
    if isinstance(value, Set) and not isinstance(value, MappingView):  # views of a dictionary are ordered
        raise ConfigError(
            f"{where} is a set, whose order differs from one process to the next; give a tuple or a list, such as tuple(sorted(..))"
        )
    if isinstance(value, (list, tuple)):
        for part in value:
            check_ordered(where, part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_ordered(f"{where}[{key!r}]", part)


def declaration(part: Declared) -> dict[str, Any]:
    """A part as JSON values: {"type": "module:Class", "config": {...}}."""
    return {"type": type_name(type(part)), "config": part.config()}


def rebuild(data: dict[str, Any], files: dict[str, bytes] | None = None) -> Any:
    """Rebuild a part from the result of `declaration`.

    Raises:
        CheckpointError: the class is not found, or the data are not of this form.
    """
    check_fields("a part", data, {"type": str, "config": dict}, CheckpointError)
    return find(data["type"]).from_config(data["config"], files)


def part_types(data: Any) -> set[str]:
    """Every "module:Class" in the result of `declaration` or in a checkpoint's config."""
    if isinstance(data, Mapping):
        own = {data["type"]} if isinstance(data.get("type"), str) and "config" in data else set()
        return own.union(*(part_types(value) for value in data.values()))
    return set().union(*(part_types(value) for value in data)) if isinstance(data, list) else set()


def parts_within(part: Any) -> Iterator["Declared"]:
    """A declaration and all those within it, from the outside in; also of a tuple of them."""
    if isinstance(part, (tuple, list)):
        for one in part:
            yield from parts_within(one)
    elif isinstance(part, Declared):
        yield part
        for name in _fields(type(part)):
            yield from parts_within(getattr(part, name))


def type_name(cls: type) -> str:
    """'module:Class', the form of packaging entry points."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find(name: str) -> type[Declared]:
    """The class that 'module:Class' names: defined in this process, one of our modules', or an installed entry point.

    It imports only our own modules and entry points, so that a checkpoint cannot choose which code runs.

    Raises:
        CheckpointError: no such class; the message lists the installed ones.
    """
    if name in _defined:
        return _defined[name]
    ours = new_type(name)
    module = ours.partition(":")[0]
    if module.partition(".")[0] == "multimodal" and module.partition(".")[2] in PARTS:
        importlib.import_module(module)
    if ours in _defined:
        return _defined[ours]
    points = importlib.metadata.entry_points()
    offered = [point for group in points.groups if group.startswith(GROUPS) for point in points.select(group=group)]
    installed = {point.value: point for point in offered}
    # entry points named by the former name of their class
    moved = {point.name: point for point in offered if ":" in point.name}
    if point := installed.get(name) or moved.get(name):
        found = point.load()
        if not isinstance(found, type) or not issubclass(found, Declared):
            raise CheckpointError(
                f"{name!r} is no declaration; an entry point in a group {GROUPS}* must be a subclass of Declared"
            )
        return found
    raise CheckpointError(
        f"{name!r} is not installed: install the package that offers it as an entry point, or import the module that defines it "
        f"first (on the command line: --plugin). If the class has moved, say so: mm.alias({name!r}, NewClass). "
        f"Installed are: {', '.join(sorted(installed)) or 'none'}"
    )


def alias(name: str, cls: type[Declared]) -> None:
    """Make checkpoints that name "old.module:Name" load this class, which has moved; new checkpoints have its new name.

    In a package, an entry point in a group multimodal.* whose name is the old name does the same for everybody who installs it.

    Raises:
        ConfigError: the class is no declaration, the name is not "module:Class", or another class has it.
    """
    if not isinstance(cls, type) or not issubclass(cls, Declared):
        raise ConfigError(
            f"alias: {cls!r} is no tokenizer, head or other part that checkpoints name; give the class itself"
        )
    if not all(name.partition(":")):
        raise ConfigError(f"alias: {name!r} is not 'old.module:Name', as the checkpoint's config.json has it")
    taken = _defined.get(name, cls)
    if taken is not cls and type_name(taken) != type_name(cls):
        raise ConfigError(
            f"alias: {name!r} is the name of {type_name(taken)}, which is there; it cannot stand for another"
        )
    _defined[name] = cls


def check_part(where: str, part: Any, kind: type[Declared], example: str) -> None:
    """Raise a ConfigError unless `part` is an instance of `kind` and a frozen dataclass; `where` names it in the message."""
    if not isinstance(part, kind):
        shown = part.__name__ if isinstance(part, type) else repr(part)
        call = "; call it" if isinstance(part, type) and issubclass(part, kind) else ""
        raise ConfigError(f"{where}={shown} is no {kind.__name__}{call}; give one such as {example}")
    settings = type(part).__dict__.get("__dataclass_params__")
    if settings is None or not settings.frozen:
        raise ConfigError(
            f"{where}: {type(part).__name__} is no frozen dataclass and could not be saved; write @dataclass(frozen=True) above it"
        )


def override(part: _Part, **changes: Any) -> _Part:
    """A copy of a frozen dataclass with some fields changed.

    Raises:
        ConfigError: a field that does not exist; the message lists those that do.
    """
    known = [f.name for f in dataclasses.fields(part)]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            raise ConfigError(
                f"{type(part).__name__} has no setting {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}"
            )
    return dataclasses.replace(part, **changes)  # type: ignore[type-var]


def plain(value: Any) -> Any:
    """The value as JSON would return it: tuples become lists, and keys become strings."""
    return json.loads(json.dumps(value))


def _check_types(cls: type, settings: Mapping[str, Any]) -> None:
    """Compare settings read from JSON with the annotations of a class; otherwise a wrong type might fail long after loading.

    Raises:
        CheckpointError: a setting of another type; the message says what came and what was wanted.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers only
        return
    for name, value in settings.items():
        if name in hints and not _is_instance(value, hints[name]):
            raise CheckpointError(f"{cls.__name__}: {name}={short_repr(value)} is no {_type_text(hints[name])}")


def _is_instance(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; types that are not handled here count as fitting."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_instance(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inside and inside[-1] is Ellipsis:
            return all(_is_instance(part, inside[0]) for part in value)
        return not inside or (len(value) == len(inside) and all(map(_is_instance, value, inside)))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) and kind is not list else True


def _type_text(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]


def _to_json(value: Any) -> Any:
    if isinstance(value, Declared):
        return declaration(value)
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value  # a number of numpy


def _as_int(cls: type, name: str, value: Any) -> Any:
    """The value of a setting, converted to int where the annotation says int: JSON of other tools writes 4 as 4.0."""
    if not isinstance(value, float):
        return value
    try:
        hint = typing.get_type_hints(cls).get(name)
    except NameError:  # a hint that is imported for type checkers only
        return value
    kinds = typing.get_args(hint) or (hint,)
    if int not in kinds or float in kinds:
        return value
    if not value.is_integer():
        raise ConfigError(f"{cls.__name__}: {name}={value} must be a whole number")
    return int(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"type", "config"}:
        return rebuild(value)
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    return value
