"""Saves and restores the state of a training run, atomically: weights, optimiser, averages, position in the data;
a run is resumed only with the settings that it was saved with.

RUN/checkpoints/step-00000100/  state.safetensors   tensors (sharded ones: pieces/, a file from each process)
                                state.json          step, settings, position in the data
                                manifest.json       size and SHA-256 of every file; written last
"""

import copy
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from multimodal.checkpoint import (
    FLOATS,
    KINDS,
    Header,
    below,
    check_tensors,
    header_of,
    put_weights,
    read_header,
    read_tensors,
    short_name,
    with_axis,
    write_tensors,
)
from multimodal.declare import declaration, plain, rebuild
from multimodal.files import check_fields, check_inside, file_hash, flush, read_json, unused_path
from multimodal.model import Model
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.texts import short_repr
from multimodal.train.processes import Processes, cpu_copy
from multimodal.train.recipe import MAY_CHANGE, PRECISIONS, Recipe
from multimodal.train.sharded_tensors import INDEX, ShardedTensors, write_sharded
from multimodal.train.split import RowOrder, fill

CHECKPOINTS, TENSORS, SHARDS = "checkpoints", "state.safetensors", "pieces"
PICKLED = "sharded"  # folder of sharded tensors of earlier versions, written by torch.distributed.checkpoint, which uses pickle
TRUST = "MULTIMODAL_TRUST_PICKLE_IN"  # the environment variable that names the run folder whose pickle may be read
STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 2
OLD = "state"  # the folder of format 1, which had one state only and no manifest
WRITING, DAMAGED = ".writing", ".damaged"
RUN_KEYS = {"recipe", "core", "tasks", "tokenizers"}  # keys of the configuration and of the states of a run


@dataclass
class TrainingState:
    """The tensors of a state.

    model: the model in training.
    optimizer: its optimiser.
    ema: a copy of the model with averaged weights; None: no average.
    order: how the rows of divided matrices lie in memory; in a saved state they are in their own order.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    ema: Model | None
    order: RowOrder = field(default_factory=RowOrder)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: "model/..", "ema/..", "optimizer/exp_avg/.."."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema/{name}": t for name, t in self.ema.state_dict().items()}
        for name, parameter in self._parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        return found

    def empty_like(self, header: Header) -> dict[str, Tensor]:
        """Empty tensors with the names and shapes of a header, sharded like the weights, to read a state into."""
        parameters = dict(self._parameters())
        found = self.tensors()
        for name, (shape, kind) in header.items():
            if name.startswith("optimizer/"):
                parameter = parameters.get(name.split("/", 2)[2])
                if parameter is not None and tuple(parameter.shape) == shape:
                    found[name] = torch.empty_like(parameter, dtype=KINDS[kind])
                else:
                    found[name] = torch.empty(shape, dtype=KINDS[kind])
        return {name: found[name] for name in header if name in found}

    def check(self, header: Header, where: Path) -> None:
        """Compare a state with the model and its optimiser, whose kernels would write out of bounds for moments of another shape.

        Raises:
            CheckpointError: names tensors that are missing, foreign, or of another shape or type.
        """
        check_tensors(below(header, "model/"), self.model.state_dict(), where)
        if self.ema is not None:
            check_tensors(below(header, "ema/"), self.ema.state_dict(), where)
        fits, there = self._moments(), below(header, "optimizer/")
        problems = []
        for key, (shape, kind) in there.items():
            part, _, name = key.partition("/")
            if part not in fits.get(name, {}):
                problems.append(
                    f"foreign {short_repr(key)}{did_you_mean(key, _keys(fits)) if len(problems) < 3 else ''}"
                )
            elif fits[name][part] not in _fitting(shape, "a number" if kind in FLOATS else kind):
                problems.append(f"{key} is {kind} {shape}, wanted {' '.join(map(str, reversed(fits[name][part])))}")
        # a parameter that no step has used has no moments, any other has all of them
        used = {key.partition("/")[2] for key in there}
        problems += [f"missing {key}" for key in _keys(fits) if key.partition("/")[2] in used and key not in there]
        if fits and not there:
            problems.append("missing: there is nothing of it")
        if problems:
            more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise CheckpointError(
                f"{where}: the optimiser's part does not fit the model: {'; '.join(problems[:6])}{more}"
            )

    def _moments(self) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
        """{parameter: {"exp_avg": (shape, "a number"), ..}}: the optimiser's state for each parameter, found by one step of a copy
        on the meta device."""
        alike: dict[Any, Tensor] = {}
        groups: list[dict[str, Any]] = []
        named = {parameter: name for name, parameter in self._parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                alike[p] = torch.zeros(tuple(p.shape), dtype=p.dtype, device="meta", requires_grad=True)
                alike[p].grad = torch.zeros_like(alike[p])
            # fused and foreach kernels need a real device
            plain_kernels = {key: False for key in ("fused", "foreach") if key in group}
            groups.append({**group, **plain_kernels, "params": [alike[p] for p in group["params"]]})
        trial = copy.copy(self.optimizer)
        trial.state, trial.param_groups = defaultdict(dict), groups
        type(trial).step(trial)
        found: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
        for p, like in alike.items():
            seen = {key: torch.as_tensor(value) for key, value in trial.state[like].items()}
            found[named[p]] = {
                key: (tuple(t.shape), "BOOL" if t.dtype == torch.bool else "a number") for key, t in seen.items()
            }
        return found

    def restore(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Load tensors, which `check` has seen, into model, averaged weights and optimiser."""
        put_weights(self.model, below(tensors, "model/"), where)
        if self.ema is not None:
            put_weights(self.ema, below(tensors, "ema/"), where)
        parameters = dict(self._parameters())
        entries: dict[str, dict[str, Any]] = {}
        for key, value in below(tensors, "optimizer/").items():
            kind, name = key.split("/", 1)
            if kind != "step" and name in parameters:
                value = with_axis(value, parameters[name])
            entries.setdefault(name, {})[kind] = value.item() if value.dtype == torch.bool else value
        state = {i: entries[name] for i, (name, _) in enumerate(self._parameters()) if name in entries}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [(names[p], p) for group in self.optimizer.param_groups for p in group["params"]]


class Checkpoints:
    """The states of a run folder: written atomically, compared with their checksums when they are read.

    keep: the number of states that stay, the newest ones.

    A thread writes a copy of the state while training goes on, which costs a tenth of the waiting time (DECISIONS.md).
    """

    def __init__(self, run: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = run / CHECKPOINTS, keep, processes
        self.old = run / OLD
        self.thread: Thread | None = None
        self.failed: Exception | None = None

    def save(
        self,
        step: int,
        state: TrainingState,
        metadata: Mapping[str, Any],
        extra: Mapping[str, Any],
        data: Mapping[str, Any],
        then: Callable[[], Any] = lambda: None,
    ) -> None:
        """Start to write the state after `step`.

        metadata: JSON values that must be equal when the state is loaded. extra: other JSON values. data: the position of this
        process in the data. then: called by the writing thread when the state is written.

        If writing fails, because the disk is full for instance, the older states stay, and the next call warns.
        """
        # each process has its own lanes; a state must be readable by any number of processes
        parts = self.processes.all_gather(dict(data))
        data = {key: {k: v for part in parts for k, v in part[key].items()} for key in data}
        tensors = state.tensors()
        shapes = {name: [list(t.shape), short_name(t.dtype)] for name, t in tensors.items()}
        saved = {"format": FORMAT, "step": step, **metadata, **extra, "data_state": data, "tensors": shapes}
        self._warn_of_failure()
        place = self._place(step)
        if self.processes.rank == 0:
            for left in self.folder.glob(f"step-*{WRITING}*"):  # left by a run that was killed
                if re.fullmatch(rf"step-\d+{re.escape(WRITING)}(\.\d+)?", left.name):
                    remove_state(left)
        # a folder that is still there holds foreign files
        aside = self.processes.all_gather(unused_path(place.with_name(place.name + WRITING)))[0]
        sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
        if sharded:
            try:
                write_sharded(aside / SHARDS, tensors, self.processes, state.order)
            except OSError as error:  # raised in every process
                self.failed = OSError(f"the state after step {step} could not be saved ({error})")
                return
        if self.processes.rank:
            return
        copies = {} if sharded else {name: cpu_copy(t) for name, t in tensors.items()}

        def write() -> None:
            what = "state"
            try:
                aside.mkdir(parents=True, exist_ok=True)
                if copies:
                    write_tensors(copies, aside / TENSORS)
                (aside / STATE).write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
                write_manifest(aside)
                os.replace(aside, place)
                flush(self.folder)
                for old in self._all()[: -self.keep]:
                    remove_state(old)
                if is_of_a_run(self.old / STATE):
                    remove_state(self.old)
                what = "model"
                then()
            except (OSError, CheckpointError) as error:
                with suppress(OSError):
                    remove_state(aside)
                self.failed = OSError(f"the {what} after step {step} could not be saved ({error})")
            except Exception as error:  # a thread would lose it; `finish` raises it
                self.failed = error

        self.thread = Thread(target=write, name="checkpoint")
        self.thread.start()

    def finish(self) -> None:
        """Wait until the last state is written.

        Raises:
            OSError: it could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed

    def _warn_of_failure(self) -> None:
        try:
            self.finish()
        except OSError as error:
            warnings.warn(f"fit: {error}; the states before it are as they were, and training goes on", stacklevel=4)

    def latest(self) -> Path | None:
        """The newest complete state. Damaged ones are renamed, with a warning.

        Raises:
            CheckpointError: there are states, and all are damaged.
        """
        states = self._all()
        for folder in reversed(states):
            try:
                check_manifest(folder)
                return folder
            except CheckpointError as error:
                warnings.warn(f"{error}; it is renamed, and the state before it is tried", stacklevel=2)
                os.replace(folder, unused_path(folder.with_name(folder.name + DAMAGED)))
        if is_of_a_run(self.old / STATE):
            return self.old
        if states:
            raise CheckpointError(
                f"{self.folder}: every state is damaged; begin again in another folder, or move this one away"
            )
        return None

    def load(
        self, folder: Path, state: TrainingState, metadata: Mapping[str, Any], *, parallel: str = "ddp"
    ) -> dict[str, Any]:
        """Load a state from `folder` into `state`; returns its metadata: "step" and "data_state" say where training resumes.

        Raises:
            CheckpointError: damaged, of another model, or of a run with other settings (named).
        """
        saved = read_metadata(folder)
        if other := list(differences(_with_new_defaults(saved, metadata, folder), dict(metadata))):
            raise CheckpointError(
                f"{folder}: this run was made with other settings: {'; '.join(other)}. Resume with the same, or choose "
                "another folder"
            )
        if (folder / PICKLED).is_dir():
            tensors = self._read_pickled(folder, state, saved, parallel)
        elif (folder / SHARDS).is_dir():
            sharded = ShardedTensors(folder / SHARDS)
            _check_all_there(sharded.header, saved, folder)
            state.check(sharded.header, folder)
            tensors = sharded.read(state.empty_like(sharded.header), state.order)
        else:
            header = read_header(folder / TENSORS)
            _check_all_there(header, saved, folder)
            state.check(header, folder)  # before anything is read
            tensors = read_tensors(folder / TENSORS)
            if any(hasattr(t, "full_tensor") for t in state.model.state_dict().values()):
                tensors = _sharded_like(tensors, state)
        state.restore(tensors, folder)
        return saved

    def _read_pickled(
        self, folder: Path, state: TrainingState, saved: Mapping[str, Any], parallel: str
    ) -> dict[str, Tensor]:
        """The tensors of a sharded state that an earlier version wrote with pickle.

        Raises:
            CheckpointError: parallel is not "fsdp", or the user has not named this run as trusted.
        """
        trusted = os.environ.get(TRUST)
        if parallel != "fsdp" or trusted is None or Path(trusted).resolve() != self.folder.parent.resolve():
            raise CheckpointError(
                f"{folder / PICKLED}: an earlier version wrote this state with Python's pickle, and reading that runs whatever "
                "code the folder's maker has put into it; if you made it yourself, resume once with parallel='fsdp' and the "
                f"variable {TRUST}={self.folder.parent}"
            )
        if state.order.parts:
            raise CheckpointError(
                f"{folder / PICKLED}: a state of an earlier version cannot be read with tensor_parallel; resume it once without"
            )
        import torch.distributed.checkpoint as dcp

        shapes = saved.get("tensors")
        kinds = {short_name(kind): name for name, kind in KINDS.items()}
        check_fields(folder / STATE, saved, {"tensors": dict}, CheckpointError)
        header: Header = {name: (tuple(shape), kinds[kind]) for name, (shape, kind) in shapes.items()}  # type: ignore[union-attr]
        state.check(header, folder)
        tensors = state.empty_like(header)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=folder / PICKLED, no_dist=self.processes.count == 1)
        return tensors

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        """Folders of states, oldest first."""
        return sorted(
            path
            for path in self.folder.glob("step-*")
            if re.fullmatch(r"step-\d+", path.name)
            and any((path / name).exists() for name in (MANIFEST, STATE, TENSORS, PICKLED))
        )


def is_of_a_run(path: Path) -> bool:
    """Whether this is the configuration of a run or the state.json of a state, as `fit` writes them."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= RUN_KEYS


def remove_state(state: Path) -> None:
    """Delete the files of a state, and its folder if it is then empty. The manifest goes last: without it a state is damaged."""
    if state.is_symlink():
        return
    pickled, shards = state / PICKLED, state / SHARDS
    parts = [] if pickled.is_symlink() else [*pickled.glob("__*.distcp"), pickled / ".metadata"]
    if not shards.is_symlink():
        parts += [shards / INDEX, *shards.glob("[0-9]" * 5 + ".safetensors")]
    if WRITING in state.suffixes:
        parts += [left for folder in (state, shards) for left in folder.glob(".tmp" + "?" * 6)]  # of safetensors
    for path in (state / TENSORS, *parts, state / STATE, state / MANIFEST):
        path.unlink(missing_ok=True)
    for folder in (pickled, shards, state):
        with suppress(OSError):  # it does not exist, or holds foreign files
            folder.rmdir()


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder, after all other files are safely on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files
    }
    for path in [*files, *(p for p in folder.rglob("*") if p.is_dir())]:
        flush(path)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)


def check_manifest(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, cut short or changed.
    """
    try:
        manifest = read_json(folder / MANIFEST, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from error
    check_inside(folder / MANIFEST, manifest, CheckpointError)
    if STATE not in manifest:
        raise CheckpointError(f"{folder}: {MANIFEST} does not name {STATE}")
    for name, entry in manifest.items():
        path = folder / name
        check_fields(f"{folder / MANIFEST}: {short_repr(name)}", entry, {"bytes": int, "sha256": str}, CheckpointError)
        try:
            if not path.is_file():
                raise CheckpointError(f"{folder}: {name} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, wanted {entry['bytes']}")
            if file_hash(path) != entry["sha256"]:
                raise CheckpointError(f"{folder}: {name} is damaged: its checksum is not the one it was saved with")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """The content of state.json, with the fields that every run needs checked.

    Raises:
        CheckpointError: missing, damaged, of a later version, or with fields missing or of another type.
    """
    path = folder / STATE
    saved = read_json(path, CheckpointError)
    if (made_as := saved.get("format", 1)) not in (1, FORMAT):
        raise CheckpointError(
            f"{folder}: format {short_repr(made_as)}, but this version reads 1 and {FORMAT}; update multimodal-stream"
        )
    kinds = {"step": int, "recipe": dict, "core": dict, "tokenizers": dict, "tasks": list, "computed_in": str}
    check_fields(path, saved, kinds, CheckpointError)
    if "data_state" in saved or made_as == FORMAT:  # version 0.1 had none
        check_fields(path, saved, {"data_state": dict, "tensors": dict}, CheckpointError)
    if saved["step"] < 0 or saved["computed_in"] not in PRECISIONS[1:]:
        raise CheckpointError(
            f"{path}: step {short_repr(saved['step'])} in {short_repr(saved['computed_in'])}; wanted a whole number, and "
            f"one of {', '.join(PRECISIONS[1:])}"
        )
    return saved


def _check_all_there(header: Header, saved: Mapping[str, Any], folder: Path) -> None:
    """Refuse a state that lacks tensors which its state.json lists, such as the moments of a parameter."""
    if missing := [name for name in saved.get("tensors", ()) if name not in header]:
        raise CheckpointError(
            f"{folder}: {short_repr(missing[0])} is missing, which {STATE} names ({len(missing)} are)"
        )


def _fitting(shape: tuple[int, ...], kind: str) -> list[tuple[tuple[int, ...], str]]:
    """The (shape, kind) of parameters whose moments these can be; a scalar also fits a vector of length 1, see `with_axis`."""
    return [(shape, kind), ((1,), kind)] if shape == () else [(shape, kind)]


def _keys(fits: Mapping[str, Iterable[str]]) -> list[str]:
    return [f"{part}/{name}" for name, parts in fits.items() for part in parts]


def differences(saved: Any, now: Any, name: str = "") -> Iterator[str]:
    """'recipe.steps was 120 and is 400', for every value of `now` that differs in `saved`."""
    for key, was, found in unequal(saved, now, name):
        yield f"{key} was {short_repr(was)} and is {short_repr(found)}"


def unequal(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """('recipe.steps', 120, 400), for every value of `other` that differs in `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in other if not name else {**one, **other}:
            yield from unequal(one.get(key), other.get(key), f"{name}.{key}" if name else str(key))
    elif one != other:
        yield name, one, other


def _with_new_defaults(saved: Mapping[str, Any], metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A saved state plus the defaults of settings that did not exist when it was saved; tokenizers with files are unchanged."""
    try:
        recipe = {**Recipe().config(), **saved["recipe"]}
        kinds = {
            name: entry if entry["files"] else {**entry, **declaration(rebuild(entry))}
            for name, entry in saved["tokenizers"].items()
        }
        tasks = [{**task, "head": declaration(rebuild(task["head"]))} for task in saved["tasks"]]
        today = {
            "recipe": {k: v for k, v in recipe.items() if k not in MAY_CHANGE or k in metadata["recipe"]},
            "core": declaration(rebuild(saved["core"])),
            "tokenizers": kinds,
            "tasks": tasks,
            "adapters": declaration(rebuild(saved["adapters"])) if saved.get("adapters") else None,
        }
        # versions before 0.2 did not save what sources declare
        return {"sources": metadata.get("sources"), **saved, **plain(today)}
    except Exception as error:  # as of a config.json, which can be wrong in any way
        problem = str(error)[:1000] if isinstance(error, ValueError) else f"{type(error).__name__}: {str(error)[:1000]}"
        raise CheckpointError(f"{folder / STATE}: what it declares cannot be built: {problem}") from error


def _sharded_like(tensors: dict[str, Tensor], state: TrainingState) -> dict[str, Tensor]:
    """Whole tensors, sharded like the weights that they belong to."""
    wanted = state.empty_like(header_of(tensors))
    like: dict[str, Any] = {name: wanted.get(name, t) for name, t in tensors.items()}
    return {
        name: fill(torch.empty_like(like[name]), with_axis(t, like[name]), state.order, name)
        if hasattr(like[name], "full_tensor")
        else t
        for name, t in tensors.items()
    }
