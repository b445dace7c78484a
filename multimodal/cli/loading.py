"""Files, checkpoints and tokenizers behind the names that were typed."""

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.texts import shortened

if TYPE_CHECKING:
    from types import ModuleType

    from multimodal.model import Model
    from multimodal.tokenizer import Tokenizer


def import_file(path: Path) -> "ModuleType":
    """Import a Python file under its own name, with its folder on the path, as `python file.py` would have it.

    Raises:
        ConfigError: no such file, a name that another module has, or an error inside it (with its line).
    """
    import importlib.util

    from multimodal.shapes import ConfigError

    file, name = path.resolve(), path.stem
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"{path} is no Python file" if file.exists() else f"there is no file {path}")
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file):
        return sys.modules[name]
    spec = importlib.util.find_spec(name) if name.isidentifier() and name not in sys.modules else None
    if not name.isidentifier() or name in sys.modules or (spec and spec.origin != str(file)):
        raise ConfigError(
            f"{path}: a module cannot be imported under the name {name!r}, or another has it; rename the file"
        )
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__":` may call sys.exit
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    return module


def import_recipe(path: Path) -> Callable[..., Any]:
    """The function recipe() of a Python file.

    Raises:
        ConfigError: as of `import_file`, or the file defines no such function.
    """
    from multimodal.shapes import ConfigError, did_you_mean

    module = import_file(path)
    make = getattr(module, "recipe", None)
    if not callable(make):
        raise ConfigError(f"{path} defines no function recipe(){did_you_mean('recipe', vars(module))}")
    return make


def model_folder(checkpoint: Path) -> Path:
    """The model's folder, for that folder, for the run folder around it, or for a name on the hub, whose commit is printed.

    Raises:
        CheckpointError: none of them.
    """
    from multimodal.checkpoint import CONFIG, RUN, folder_of
    from multimodal.checkpoint import model_folder as found_in
    from multimodal.hub import EXPLICIT, NAME, hub_name
    from multimodal.shapes import CheckpointError, did_you_mean

    if (name := hub_name(checkpoint)) is not None:
        folder = folder_of(checkpoint)
        print(f"{name} of the hub, commit {folder.name}", file=sys.stderr)
        return folder
    if ((folder := found_in(checkpoint)) / CONFIG).is_file():
        return folder
    if checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} holds no model: neither {CONFIG} nor {RUN}/{CONFIG} is there")
    if checkpoint.exists():
        raise CheckpointError(
            f"{checkpoint} is a file; give the folder of a run or a model first, and values behind the names of their fields, "
            f"such as --image {checkpoint}"
        )
    parent = checkpoint.parent
    near = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    on_hub = (
        f"; a model on the hub is {EXPLICIT}{checkpoint.as_posix()}" if NAME.fullmatch(checkpoint.as_posix()) else ""
    )
    raise CheckpointError(f"there is no folder {checkpoint}{did_you_mean(checkpoint.name, near)}{on_hub}")


def load(checkpoint: Path, plugins: Sequence[Path] | None, device: str, *, finite: bool = True) -> "Model":
    """The model of a checkpoint, once the files that define parts of it are imported.

    A part that a script defined was saved as `__main__:Name`, one of another file by that file's name. If such a Name is not
    found, a plugin that defines it takes its place, which is printed.

    Raises:
        CheckpointError: cannot be loaded; says so where --plugin would help.
    """
    folder = model_folder(checkpoint)
    from multimodal import declare
    from multimodal.checkpoint import read_config
    from multimodal.model import Model
    from multimodal.shapes import CheckpointError
    from multimodal.train.recipe import choose_device

    offered = {}
    for path in plugins or []:
        module = import_file(path)
        for name, part in vars(module).items():
            if isinstance(part, type) and issubclass(part, declare.Declared) and part.__module__ == module.__name__:
                offered[name] = part, path
    for name in sorted(declare.part_types(read_config(folder))):
        try:
            declare.find(name)
        except CheckpointError as error:
            module_name, _, class_name = name.partition(":")
            if class_name in offered:
                part, path = offered[class_name]
                declare.alias(name, part)
                if module_name != "__main__":
                    print(f"{name} is not there any more; {class_name} is taken from {path}", file=sys.stderr)
                continue
            script = " (a script that was run; it is the file to give)" if name.startswith("__main__:") else ""
            raise CheckpointError(
                f"{folder}: {error} Here: --plugin FILE.py, the file that defines it{script}."
            ) from None
    return Model.load(folder, device=choose_device(device), finite=finite)


def text_of(option: str, file: Path) -> str:
    """The text in a file that an option names, such as a key.

    Raises:
        ConfigError: no file, or no text.
    """
    from multimodal.shapes import ConfigError

    if not file.is_file():  # reading a pipe would wait
        raise ConfigError(f"{option} {file}: there is no such file")
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors begin a text with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {file}: cannot be read: {error}") from error


def samples_of(
    source: str, fields: Sequence[str] | None, files: Sequence[str] | None, most: int
) -> list[dict[str, Any]]:
    """The first samples of a source of `multimodal shards`, or of a folder of shards; broken rows are named on stderr and left out.

    fields: columns to take, "field=column" or a name. files: fields whose values are paths of files.

    Raises:
        ConfigError: nothing that can be read, or no samples.
    """
    from multimodal.data import Shards, open_table
    from multimodal.data.shards import INDEX
    from multimodal.shapes import ConfigError

    if most < 1:
        raise ConfigError(f"--samples {most}: take one sample or more")
    columns = {name: column or name for name, _, column in (text.partition("=") for text in fields or [])}
    found: list[dict[str, Any]] = []
    if (Path(source) / INDEX).is_file():
        shards = Shards(source)
        for i in range(min(most, len(shards))):
            row = shards[i]
            found.append({name: row.get(column) for name, column in columns.items()} if columns else row)
    else:
        for number, row in enumerate(open_table(source).select(columns, files or []).rows(0)):
            if len(found) == most:
                break
            if isinstance(row, Exception):
                print(f"row {number} is left out: {row}", file=sys.stderr)
            else:
                found.append(row)
    if not found:
        raise ConfigError(f"--data {shortened(source, 100)} holds no samples")
    return found


def tasks_of(model: "Model", chosen: str | None, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks to measure: those whose fields the first sample has.

    Raises:
        TaskError: there is none; says which fields they have, and which the data.
    """
    from multimodal.shapes import TaskError

    wanted = {
        text: {*(field.name for field in p.reads), *filter(None, [p.answer])}
        for text, p in model.packer.patterns.items()
        if chosen in (None, text)
    }
    found = [text for text, fields in wanted.items() if fields <= set(samples[0])]
    if not found:
        needs = "; ".join(f"{text!r} needs {', '.join(sorted(fields))}" for text, fields in wanted.items())
        raise TaskError(
            f"--data: samples have {', '.join(map(str, samples[0])) or 'no fields'}, and {needs}; give columns other names, as in "
            "--fields text=caption"
        )
    return found


def make_tokenizer(name: str, config: str) -> "Tokenizer":
    """The tokenizer behind module:Class or file.py:Class, with its settings from JSON.

    Raises:
        ConfigError: no such module or class, or settings that do not fit.
    """
    import importlib

    from multimodal.shapes import ConfigError, did_you_mean
    from multimodal.tokenizer import Tokenizer

    module_name, colon, class_name = name.rpartition(":")
    if not colon or not module_name or not class_name:
        raise ConfigError(f"{name!r} is not module:Class or path/to/file.py:Class")
    if module_name.endswith(".py"):
        module = import_file(Path(module_name))
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")  # the current folder, as `python -m` has it
        try:
            module = importlib.import_module(module_name)
        # the module may raise anything, and a name such as ".a" is that of no module
        except (Exception, SystemExit) as error:
            what = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise ConfigError(
                f"cannot import {module_name!r}: {what}{error}; a file is given as path/to/file.py:Class"
            ) from error
    found = getattr(module, class_name, None)
    if isinstance(found, Tokenizer):
        return found
    if not isinstance(found, type) or not issubclass(found, Tokenizer):
        there = [
            n
            for n, x in vars(module).items()
            if isinstance(x, type) and issubclass(x, Tokenizer) and x.__module__.startswith(module.__name__)
        ]
        raise ConfigError(
            f"{module_name} has no tokenizer {class_name!r}; it has {', '.join(there) or 'none'}{did_you_mean(class_name, there)}"
        )
    try:
        settings = json.loads(config)
        if not isinstance(settings, dict):
            raise ConfigError(f"--config {shortened(config, 100)}: wanted a JSON object, such as '{{\"patch\": 4}}'")
        return found.from_config(settings)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {shortened(config, 100)}: this is no JSON: {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(f"{class_name} cannot be made from --config {shortened(config, 100)}: {error}") from error
