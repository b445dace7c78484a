"""`--set core.depth=8`: changes settings of a recipe file's job; a value is converted to the type of its field."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from multimodal.model import Model
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.task import Task
from multimodal.train.job import TrainingJob

SIMPLE = (bool, int, float, str)
REBUILD = ("core", "tokenizers", "tasks", "model")  # parts of which the model is built anew
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Setting:
    """One `NAME=value`.

    typed: the whole text, for errors.
    path: the names between the dots.
    text: the value.
    option: the option that it was given by, for errors.
    """

    typed: str
    path: tuple[str, ...]
    text: str
    option: str = "--set"

    def __str__(self) -> str:
        return f"{self.option} {self.typed}"

    def read(self, kind: Any) -> Any:
        """The value, converted to a type.

        Raises:
            ConfigError: it is not of this type.
        """
        try:
            return _converted(self.text, kind)
        except (ValueError, OverflowError):
            raise ConfigError(f"{self}: {self.text!r} is no {type_name(kind)}") from None
        except TypeError:
            raise ConfigError(f"{self}: a {type_name(kind)} cannot be set here; it is chosen in the file") from None

    @classmethod
    def parse(cls, typed: str, option: str = "--set") -> "Setting":
        """A setting from text; parts of the name may be quoted.

        Raises:
            ConfigError: the text is not a name, `=` and a value.
        """
        name, equals, text = typed.partition("=")
        path = tuple(_normalised(part.strip().strip("\"'")) for part in name.split("."))
        if not equals or not all(path):
            raise ConfigError(f"{option} {typed}: wanted name=value, such as --set steps=200 or --set core.depth=8")
        return cls(typed, path, text.strip(), option)


def make_job(make: Callable[..., Any], settings: Sequence[str], where: str) -> TrainingJob:
    """The job of a recipe file's function `make`, with settings changed; `where` names the function in errors.

    A name without dots is a parameter of the function or, where it has no such parameter, a setting of the Recipe. `core.`,
    `tokenizers.NAME.`, `tasks.PATTERN.`, `mix.PATTERN` (`mix`: a temperature), `recipe.` and `model.seed` reach what it declared.

    Raises:
        ConfigError: no such name (lists those there are), a value that is not of its type, weights that a change would lose.
    """
    arguments, rest, settable = _arguments(make, list(map(Setting.parse, settings)), where)
    return changed(TrainingJob.of(make(**arguments), where), rest, settable)


def kind_of(setting: Setting, make: Callable[..., Any], job: TrainingJob, where: str) -> Any:
    """The type of what a setting changes in the job that `make` returned; its value is not looked at.

    Raises:
        ConfigError: no such name (lists those there are), or weights that a change would lose.
    """
    probe = _Probe(setting.typed, setting.path, setting.text, setting.option)
    try:
        _, rest, settable = _arguments(make, [probe], where)
        changed(job, rest, settable)
    except _KindFoundError as found:
        if setting.path[0] in REBUILD and len(setting.path) > 1:
            check_initial_weights(job.model)
        return found.kind
    raise AssertionError(f"{setting} was not read")


class _KindFoundError(Exception):
    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        self.kind = kind


class _Probe(Setting):
    """A setting that stops where its value would be read, before anything is built of it."""

    def read(self, kind: Any) -> Any:
        raise _KindFoundError(kind)


def _arguments(
    make: Callable[..., Any], settings: Sequence[Setting], where: str
) -> tuple[dict[str, Any], list[Setting], list[str]]:
    """(arguments of the recipe function, the other settings, names of its parameters that can be set)."""
    arguments: dict[str, Any] = {}
    rest: list[Setting] = []
    parameters = inspect.signature(make).parameters
    # a parameter of the function comes before a setting of the Recipe with the same name
    for setting in settings:
        name = setting.path[0]
        if len(setting.path) == 1 and name in parameters:
            default = parameters[name].default
            if type(default) not in SIMPLE:
                raise ConfigError(
                    f"{setting}: {where} has a parameter {name!r} whose default is no number, text or yes and no; "
                    "its type would be a guess"
                )
            arguments[name] = setting.read(type(default))
        else:
            rest.append(setting)
    for parameter in parameters.values():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty:
            raise ConfigError(f"{where} needs {parameter.name!r}; give that parameter a default")
    settable = [name for name, parameter in parameters.items() if type(parameter.default) in SIMPLE]
    return arguments, rest, settable


def changed(job: TrainingJob, settings: Sequence[Setting], parameters: Sequence[str] = ()) -> TrainingJob:
    """The job with changed settings. parameters: the names of the recipe function's own parameters, for errors."""
    model = job.model
    tasks = {pattern: Task(pattern, model.packer.head(pattern), task.weight) for pattern, task in model.tasks.items()}
    parts = {
        "recipe": job.recipe,
        "core": model.core.core,
        "tokenizers": dict(model.packer.tokenizers),
        "tasks": tasks,
        "mix": job.mix
        if isinstance(job.mix, (int, float))
        else {p: float((job.mix or {}).get(p, 1)) for p in job.data},
        "model": {"seed": model.seed},
    }
    changes: dict[str, Any] = {}
    for setting in settings:
        path = setting.path
        if len(path) == 1 and path[0] not in parts:
            path = ("recipe", *path)
            known = [field.name for field in dataclasses.fields(job.recipe)]
            if (name := path[1]) not in known:
                near = [place for place in _paths(parts) if place.rsplit(".", 1)[1] == name]
                more = f"; recipe() takes {', '.join(parameters)}" if parameters else ""
                hint = f"; did you mean {near[0]!r}?" if near else did_you_mean(name, [*known, *parameters])
                raise ConfigError(f"{setting}: Recipe has no setting {name!r}; it has {', '.join(known)}{more}{hint}")
        if path[0] not in parts:
            raise ConfigError(
                f"{setting}: there is no {path[0]!r}; there are {', '.join(parts)}{did_you_mean(path[0], parts)}"
            )
        _file_setting(changes, path, setting)
    temperature = changes.pop("mix").read(float) if isinstance(changes.get("mix"), Setting) else None
    new = _changed_part(parts, changes, "")
    # a model is built from its declarations, so a changed part needs a new model
    if any(part in changes for part in REBUILD):
        check_initial_weights(model)
        tasks = list(new["tasks"].values())
        model = type(model)(new["tokenizers"], new["core"], tasks, seed=new["model"]["seed"])
    mix = temperature if temperature is not None else new["mix"] if "mix" in changes else job.mix
    return dataclasses.replace(job, model=model, recipe=new["recipe"], mix=mix)


def _file_setting(changes: dict[str, Any], path: Sequence[str], setting: Setting) -> None:
    """Add a setting to the tree `changes`, so that all settings of one part are changed at once: width and heads must fit."""
    *above, last = path
    for name in above:
        changes = changes.setdefault(name, {})
        if isinstance(changes, Setting):
            raise ConfigError(f"{setting} and {changes}: one is inside of the other; give one")
    if isinstance(changes.get(last), dict):
        raise ConfigError(f"{setting}: {last!r} is also changed inside; give one or the other")
    changes[last] = setting


def _changed_part(part: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A copy of a part (frozen dataclass, mapping or tuple) with a tree of changes."""
    values, kinds = _fields_of(part)
    new: dict[str, Any] = {}
    known = {_normalised(name): name for name in values}
    for key, change in changes.items():
        name = known.get(key, key)
        here = f"{where}.{name}" if where else name
        typed = _first_of(change)
        if name not in values:
            what = type(part).__name__ if dataclasses.is_dataclass(part) else where
            there = ", ".join(values) or f"nothing to set: it is {part!r}"
            raise ConfigError(f"{typed}: {what} has no setting {name!r}; it has {there}{did_you_mean(name, values)}")
        value = values[name]
        if isinstance(change, dict):
            new[name] = _changed_part(value, change, here)
        # a whole part, such as a score, would need a name for a class
        elif _fields_of(value)[0] and not isinstance(value, tuple):
            raise ConfigError(
                f"{typed}: {here} is {type(value).__name__}, which is chosen in the file; here is set what is inside of it: "
                f"{', '.join(f'{here}.{inner}' for inner in _fields_of(value)[0])}"
            )
        else:
            new[name] = change.read(kinds[name])
    if isinstance(part, tuple):
        return tuple(new.get(name, value) for name, value in values.items())
    return {**part, **new} if isinstance(part, Mapping) else dataclasses.replace(part, **new)


def _fields_of(part: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values, types) by name of the settings of a part; empty for a plain value."""
    if isinstance(part, Mapping):
        return dict(part), {name: type(value) for name, value in part.items()}
    if isinstance(part, tuple):
        values = {str(i): value for i, value in enumerate(part)}
        return values, {name: type(value) for name, value in values.items()}
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return {}, {}
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    try:
        hints = typing.get_type_hints(type(part))
    except NameError:  # a name that only a type checker sees
        hints = {}
    return values, {name: hints.get(name, type(value)) for name, value in values.items()}


def _normalised(name: str) -> str:
    """One spelling of a name: a task without blanks around its arrow, other names with underscores for dashes."""
    return re.sub(r"\s*(<?->)\s*", r"\1", " ".join(name.split())) if "->" in name else name.strip().replace("-", "_")


def _first_of(change: Any) -> Setting:
    """The first setting of a tree of changes."""
    return change if isinstance(change, Setting) else _first_of(next(iter(change.values())))


def _paths(parts: Mapping[str, Any]) -> list[str]:
    """The paths that can be set, such as 'core.depth' and 'tokenizers.image.patch'."""
    found = []
    for name, part in parts.items():
        below = {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, Mapping) else {name: part}
        found += [f"{place}.{inner}" for place, value in below.items() for inner in _fields_of(value)[0]]
        found += [place for place in below if "." in place]
    return found


def type_name(kind: Any) -> str:
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join([*map(type_name, options), *(["none"] if len(options) < len(typing.get_args(kind)) else [])])
    return str(kind) if options else getattr(kind, "__name__", str(kind))


def _converted(text: str, kind: Any) -> Any:
    """Raises a ValueError for another kind of value, and a TypeError for a kind that has no text."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in inside and text.lower() == "none":
            return None
        options = sorted(
            (option for option in inside if option is not types.NoneType), key=lambda option: option is str
        )
        for option in options:
            try:
                return _converted(text, option)
            except (ValueError, TypeError):
                if option is options[-1]:
                    raise
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in inside}
        return choices[text] if text in choices else _fail(text)
    # "0.9,0.95", with or without brackets
    if kind is tuple or origin is tuple:
        # brackets around all of it only: "core[:6]" ends with its own
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not inside or inside[-1] is Ellipsis:
            return tuple(_converted(part, inside[0] if inside else str) for part in parts)
        return tuple(_converted(part, each) for part, each in zip(parts, inside, strict=True))
    if kind is bool:
        return True if text.lower() in YES else False if text.lower() in NO else _fail(text)
    if kind is int:
        number = float(text)  # 1e4 is a whole number too
        return int(number) if number == int(number) else _fail(text)
    if kind in (float, str):
        return kind(text)
    raise TypeError(kind)


def _fail(text: str) -> typing.NoReturn:
    raise ValueError(text)


def check_initial_weights(model: Model) -> None:
    """Raise a ConfigError if the weights are not the initial ones: a changed model is initialised anew, and would lose them."""
    if model.adapters is not None:
        raise ConfigError(
            "--set: a change of core, tokenizers, tasks or model.seed builds the model anew, without the adapters that this "
            "recipe has attached; make the change in the file, before they are"
        )
    tasks = [Task(pattern, model.packer.head(pattern), task.weight) for pattern, task in model.tasks.items()]
    initial = type(model)(model.packer.tokenizers, model.core.core, tasks, seed=model.seed)
    weights = initial.state_dict()
    # weights without memory, as of a plan, cannot be lost
    other = [n for n, t in model.state_dict().items() if not t.is_meta and not torch.equal(t.cpu(), weights[n])]
    trainable = {name for name, p in initial.named_parameters() if p.requires_grad}
    other += [name for name, p in model.named_parameters() if (name in trainable) != p.requires_grad]
    if other:
        raise ConfigError(
            "--set: a change of core, tokenizers, tasks or model.seed initialises the model's weights anew, and "
            f"{len(other)} of this recipe's are not initial ones (loaded, trained or frozen), such as {other[0]}; "
            "make the change in the file, before the weights are loaded"
        )
