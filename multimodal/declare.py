"""Declarations: what a user writes down (core, tokenizer, head, mask rule), through JSON and back, without weights."""

import dataclasses
import importlib
import importlib.metadata
import json
import types
import typing
from collections.abc import Mapping, MappingView, Set
from typing import Any, Self, TypeVar

from multimodal.files import check_fields
from multimodal.old_names import new_type
from multimodal.shapes import CheckpointError, ConfigError, did_you_mean
from multimodal.texts import short_repr

_Part = TypeVar("_Part")
GROUPS = "multimodal."  # of entry points: multimodal.tokenizers, multimodal.heads, multimodal.parts
OURS = ("multimodal", "multimodal_tokenizers")  # the packages whose parts we know
PARTS = {
    *("attention.priors", "attention.reads", "attention.scores", "core", "encoder_decoder", "masks", "train.recipe"),
    *(
        f"heads.{name}"
        for name in ("classify", "contrast", "ctc", "each_row", "flow", "masked", "next_token", "pointer")
    ),
    *("layers.attend", "layers.base", "layers.mlp", "layers.recurrent", "zoo.temporal_conv", "zoo.turing_machine"),
}
"""Modules below `multimodal` whose parts a checkpoint may name before anybody has imported them."""
_defined: dict[str, type["Declared"]] = {}


class Declared:
    """What a checkpoint names and rebuilds. Subclasses are frozen dataclasses of JSON values and other declarations."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _defined[type_name(cls)] = cls

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        fields = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        for name, value in (*zip(fields, args, strict=False), *settings.items()):
            check_ordered(f"{cls.__name__}: {name}", value)
        return super().__new__(cls)

    def config(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: _to_json(getattr(self, name)) for name in _fields(type(self))}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        """Rebuild from what `config` gave after a trip through JSON; `files` are those a tokenizer saved beside it.

        Raises:
            CheckpointError: a setting that this class does not have.
        """
        known = _fields(cls)
        for key in config:
            if key not in known:
                raise CheckpointError(
                    f"{cls.__name__} has no setting {key!r}; it has {', '.join(known) or 'none'}{did_you_mean(key, known)}"
                )
        settings = {key: _whole(cls, key, _from_json(value)) for key, value in config.items()}
        if cls.__module__.partition(".")[0] in OURS:  # others may annotate as they like
            _check_kinds(cls, settings)
        return cls(**settings)


def check_ordered(where: str, value: Any) -> None:
    """Raise a ConfigError for a set, also within lists: its order differs between processes, so that one number would stand for
    different classes."""
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
    """{"type": "module:Class", "config": {...}}."""
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


def type_name(cls: type) -> str:
    """'module:Class', as packaging entry points write it."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find(name: str) -> type[Declared]:
    """The class behind 'module:Class': one already defined in this process, or an installed entry point. Runs no other code.

    Raises:
        CheckpointError: no such class; lists what is installed.
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
    """Load a class that has moved for checkpoints that name "old.module:Name"; new checkpoints have its new name.

    In a package, an entry point in a group multimodal.*, named by the old name, does the same for all who install it.

    Raises:
        ConfigError: the class is no declaration, or the name is no "module:Class" or that of another class.
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
    """Raises a ConfigError unless `part` is a declaration of this kind, made by its constructor and frozen; `where` names it."""
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
        ConfigError: a field that does not exist, with the fields that do.
    """
    known = [f.name for f in dataclasses.fields(part)]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            raise ConfigError(
                f"{type(part).__name__} has no setting {name!r}; it has {', '.join(known)}{did_you_mean(name, known)}"
            )
    return dataclasses.replace(part, **changes)  # type: ignore[type-var]


def plain(value: Any) -> Any:
    """The value after a trip through JSON: tuples are lists, numbers are keys no longer."""
    return json.loads(json.dumps(value))


def _check_kinds(cls: type, settings: Mapping[str, Any]) -> None:
    """Compare settings that came as JSON with the annotations of a class: one of another kind may fail long after it is loaded.

    Raises:
        CheckpointError: names the setting, what came and what was wanted.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a name that only a type checker sees
        return
    for name, value in settings.items():
        if name in hints and not _fits(value, hints[name]):
            raise CheckpointError(f"{cls.__name__}: {name}={short_repr(value)} is no {_kind_name(hints[name])}")


def _fits(value: Any, kind: Any) -> bool:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inside and inside[-1] is Ellipsis:
            return all(_fits(part, inside[0]) for part in value)
        return not inside or (len(value) == len(inside) and all(map(_fits, value, inside)))
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) and kind is not list else True


def _kind_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]


def _to_json(value: Any) -> Any:
    if isinstance(value, Declared):
        return declaration(value)
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    return value


def _whole(cls: type, name: str, value: Any) -> Any:
    """The value of a setting; an int setting accepts 4 and 4.0, but not 4.5."""
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
