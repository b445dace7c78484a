"""Declarations: what a user writes down (core, tokenizer, head, mask rule), through JSON and back, without weights."""

import dataclasses
import importlib.metadata
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Self, TypeVar

from multimodal.files import check_fields, shown_short
from multimodal.shapes import CheckpointError, ConfigError, did_you_mean

_Part = TypeVar("_Part")
GROUPS = "multimodal."  # of entry points: multimodal.tokenizers, multimodal.heads, multimodal.parts
OURS = ("multimodal", "multimodal_tokenizers")  # the packages whose parts we know
_defined: dict[str, type["Declared"]] = {}


class Declared:
    """What a checkpoint names and rebuilds. Subclasses are frozen dataclasses of JSON values and other declarations."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _defined[type_name(cls)] = cls

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
        settings = {key: _from_json(value) for key, value in config.items()}
        if cls.__module__.partition(".")[0] in OURS:  # others may annotate as they like
            _check_kinds(cls, settings)
        return cls(**settings)


def declaration(part: Declared) -> dict[str, Any]:
    """{"type": "module:Class", "config": {...}}."""
    return {"type": type_name(type(part)), "config": part.config()}


def rebuild(data: dict[str, Any], files: dict[str, bytes] | None = None) -> Any:
    """The declaration behind what `declaration` gave.

    Raises:
        CheckpointError: no such class, or something else than what `declaration` gives.
    """
    check_fields("a part", data, {"type": str, "config": dict}, CheckpointError)
    return find(data["type"]).from_config(data["config"], files)


def part_types(config: Any) -> set[str]:
    """Every "type" that a checkpoint's config names."""
    if isinstance(config, Mapping):
        own = {config["type"]} if isinstance(config.get("type"), str) and "config" in config else set()
        return own.union(*(part_types(value) for value in config.values()))
    return set().union(*(part_types(value) for value in config)) if isinstance(config, list) else set()


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
    points = importlib.metadata.entry_points()
    installed = {
        point.value: point
        for group in points.groups
        if group.startswith(GROUPS)
        for point in points.select(group=group)
    }
    if name in installed:
        found = installed[name].load()
        if not isinstance(found, type) or not issubclass(found, Declared):
            raise CheckpointError(
                f"{name!r} is no declaration; an entry point in a group {GROUPS}* must be a subclass of Declared"
            )
        return found
    raise CheckpointError(
        f"{name!r} is not installed: install the package that offers it as an entry point, or import the module that defines it "
        f"first (on the command line: --plugin). Installed are: {', '.join(sorted(installed)) or 'none'}"
    )


def alias(name: str, cls: type[Declared]) -> None:
    """Let `find` take this class for another name too: a script's classes were saved under '__main__:Name'."""
    _defined.setdefault(name, cls)


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
            raise CheckpointError(f"{cls.__name__}: {name}={shown_short(value)} is no {_kind_name(hints[name])}")


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


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"type", "config"}:
        return rebuild(value)
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    return value
