"""Saves and restores the state of a training run, atomically: weights, optimiser, averages, data order.

RUN/checkpoints/step-0000100/   state.safetensors   tensors (shared-out ones: pieces/, a file from each process)
                                state.json          step, settings, where the data go on
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
from dataclasses import dataclass
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
from multimodal.files import check_fields, check_inside, file_hash, flush, free_name, read_json, shown_short
from multimodal.model import Model
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.train.pieces import INDEX, Pieces, write_pieces
from multimodal.train.processes import Processes, whole
from multimodal.train.recipe import FREE, PRECISIONS, Recipe

CHECKPOINTS, TENSORS, PIECES = "checkpoints", "state.safetensors", "pieces"
SHARDED = "sharded"  # folder of sharded tensors of earlier versions, written by torch.distributed.checkpoint, which uses pickle
TRUST = "MULTIMODAL_TRUST_PICKLE_IN"  # the environment variable that names the run folder whose pickle may be read
FACTS, MANIFEST = "state.json", "manifest.json"
FORMAT = 2
OLD = "state"  # where format 1 lies, which had no manifest and one state only
WRITING, DAMAGED = ".writing", ".damaged"
RUN_PARTS = {"recipe", "core", "tasks", "tokenizers"}  # keys of the configuration and of the states of a run


@dataclass
class Trained:
    """The parts of a state: a model in training, its optimiser and its averaged weights (None: no average)."""

    model: Model
    optimizer: torch.optim.Optimizer
    ema: Model | None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: "model/..", "ema/..", "optimizer/exp_avg/.."."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema/{name}": t for name, t in self.ema.state_dict().items()}
        for name, parameter in self._parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        return found

    def like(self, header: Header) -> dict[str, Tensor]:
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
                    f"foreign {shown_short(key)}{did_you_mean(key, _keys(fits)) if len(problems) < 3 else ''}"
                )
            elif fits[name][part] not in _fitting(shape, "a number" if kind in FLOATS else kind):
                problems.append(f"{key} is {kind} {shape}, wanted {' '.join(map(str, reversed(fits[name][part])))}")
        begun = {key.partition("/")[2] for key in there}
        # a parameter that no step has used has no moments
        problems += [f"missing {key}" for key in _keys(fits) if key.partition("/")[2] in begun and key not in there]
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

    def put(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """Restore model, averages and optimiser.

        Raises:
            CheckpointError: the state is that of another model.
        """
        self.check(header_of(tensors), where)
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
    """The states of a run folder: written atomically, checked by checksums when they are read, and only the last `keep` stay.

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
        trained: Trained,
        facts: Mapping[str, Any],
        extra: Mapping[str, Any],
        data: Mapping[str, Any],
        also: Callable[[], Any] = lambda: None,
    ) -> None:
        """Write the state after `step`. `facts` are JSON values that must agree when it is read again, `extra` others; `data` is
        where each process's data go on; `also` is done after that, by the same thread.

        If this fails, because the disk is full for instance, the older states stay, and a warning says why.
        """
        parts = self.processes.gather(dict(data))
        data = {key: {k: v for part in parts for k, v in part[key].items()} for key in data}
        tensors = trained.tensors()
        shapes = {name: [list(t.shape), short_name(t.dtype)] for name, t in tensors.items()}
        told = {"format": FORMAT, "step": step, **facts, **extra, "data_state": data, "tensors": shapes}
        self._tell()
        place = self._place(step)
        if self.processes.rank == 0:
            for left in self.folder.glob(f"step-*{WRITING}*"):  # left by a run that was killed
                if re.fullmatch(rf"step-\d+{re.escape(WRITING)}(\.\d+)?", left.name):
                    remove(left)
        # a folder that is still there holds foreign files
        aside = self.processes.gather(free_name(place.with_name(place.name + WRITING)))[0]
        sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
        if sharded:
            try:
                write_pieces(aside / PIECES, tensors, self.processes)
            except OSError as error:  # raised in every process
                self.failed = OSError(f"the state after step {step} could not be kept ({error})")
                return
        if self.processes.rank:
            return
        copies = {} if sharded else {name: whole(t) for name, t in tensors.items()}

        def write() -> None:
            what = "state"
            try:
                aside.mkdir(parents=True, exist_ok=True)
                if copies:
                    write_tensors(copies, aside / TENSORS)
                (aside / FACTS).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                seal(aside)
                os.replace(aside, place)
                flush(self.folder)
                for old in self._all()[: -self.keep]:
                    remove(old)
                if is_of_a_run(self.old / FACTS):
                    remove(self.old)
                what = "model"
                also()
            except (OSError, CheckpointError) as error:
                with suppress(OSError):
                    remove(aside)
                self.failed = OSError(f"the {what} after step {step} could not be kept ({error})")
            except Exception as error:  # of a thread it would be lost
                self.failed = error

        self.thread = Thread(target=write, name="checkpoint")
        self.thread.start()

    def finish(self) -> None:
        """Wait until the last state is written.

        Raises:
            OSError: it could not be.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed

    def _tell(self) -> None:
        try:
            self.finish()
        except OSError as error:
            warnings.warn(f"fit: {error}; what was kept before is as it was, and training goes on", stacklevel=4)

    def latest(self) -> Path | None:
        """The newest complete state. Damaged ones are renamed, with a warning.

        Raises:
            CheckpointError: there are states, and all are damaged.
        """
        states = self._all()
        for folder in reversed(states):
            try:
                check(folder)
                return folder
            except CheckpointError as error:
                warnings.warn(f"{error}; it is put aside, and the state before it is looked at", stacklevel=2)
                os.replace(folder, free_name(folder.with_name(folder.name + DAMAGED)))
        if is_of_a_run(self.old / FACTS):
            return self.old
        if states:
            raise CheckpointError(
                f"{self.folder}: every state is damaged; begin again in another folder, or move this one away"
            )
        return None

    def load(
        self, folder: Path, trained: Trained, facts: Mapping[str, Any], *, parallel: str = "ddp"
    ) -> dict[str, Any]:
        """Restore a state; returns the facts saved with it, of which "step" and "data_state" say where training resumes.

        Raises:
            CheckpointError: damaged, of another model, or made with other facts (named).
        """
        saved = read_facts(folder)
        if other := list(differences(_with_new_defaults(saved, facts, folder), dict(facts))):
            raise CheckpointError(
                f"{folder}: this run was made with other settings: {'; '.join(other)}. Resume with the same, or choose "
                "another folder"
            )
        if (folder / SHARDED).is_dir():
            tensors = self._unpickled(folder, trained, saved, parallel)
        elif (folder / PIECES).is_dir():
            pieces = Pieces(folder / PIECES)
            _check_all_there(pieces.header, saved, folder)
            trained.check(pieces.header, folder)
            tensors = pieces.read(trained.like(pieces.header), self.processes)
        else:
            header = read_header(folder / TENSORS)
            _check_all_there(header, saved, folder)
            trained.check(header, folder)  # before anything is read
            tensors = read_tensors(folder / TENSORS)
            if any(hasattr(t, "full_tensor") for t in trained.model.state_dict().values()):
                tensors = _shared_like(tensors, trained)
        trained.put(tensors, folder)
        return saved

    def _unpickled(self, folder: Path, trained: Trained, saved: Mapping[str, Any], parallel: str) -> dict[str, Tensor]:
        """The tensors of a sharded state that an earlier version wrote with pickle.

        Raises:
            CheckpointError: parallel is not "fsdp", or the user has not named this run as trusted.
        """
        trusted = os.environ.get(TRUST)
        if parallel != "fsdp" or trusted is None or Path(trusted).resolve() != self.folder.parent.resolve():
            raise CheckpointError(
                f"{folder / SHARDED}: an earlier version wrote this state with Python's pickle, and reading that runs whatever "
                "code the folder's maker has put into it; if you made it yourself, resume once with parallel='fsdp' and the "
                f"variable {TRUST}={self.folder.parent}"
            )
        import torch.distributed.checkpoint as dcp

        shapes = saved.get("tensors")
        kinds = {short_name(kind): name for name, kind in KINDS.items()}
        check_fields(folder / FACTS, saved, {"tensors": dict}, CheckpointError)
        header: Header = {name: (tuple(shape), kinds[kind]) for name, (shape, kind) in shapes.items()}  # type: ignore[union-attr]
        trained.check(header, folder)
        tensors = trained.like(header)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=folder / SHARDED, no_dist=self.processes.count == 1)
        return tensors

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        """Folders of states, oldest first."""
        return sorted(
            path
            for path in self.folder.glob("step-*")
            if re.fullmatch(r"step-\d+", path.name)
            and any((path / name).exists() for name in (MANIFEST, FACTS, TENSORS, SHARDED))
        )


def is_of_a_run(path: Path) -> bool:
    """Whether this is the configuration of a run or the facts of a state, as `fit` writes them."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and facts.keys() >= RUN_PARTS


def remove(state: Path) -> None:
    """Delete the files of a state, and its folder if it is then empty. The manifest goes last: without it a state is damaged."""
    if state.is_symlink():
        return
    sharded, pieces = state / SHARDED, state / PIECES
    parts = [] if sharded.is_symlink() else [*sharded.glob("__*.distcp"), sharded / ".metadata"]
    if not pieces.is_symlink():
        parts += [pieces / INDEX, *pieces.glob("[0-9]" * 5 + ".safetensors")]
    if WRITING in state.suffixes:
        parts += [left for folder in (state, pieces) for left in folder.glob(".tmp" + "?" * 6)]  # of safetensors
    for path in (state / TENSORS, *parts, state / FACTS, state / MANIFEST):
        path.unlink(missing_ok=True)
    for folder in (sharded, pieces, state):
        with suppress(OSError):  # it does not exist, or holds foreign files
            folder.rmdir()


def seal(folder: Path) -> None:
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


def check(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, cut short or changed.
    """
    manifest = read_json(folder / MANIFEST, _Unreadable)
    check_inside(folder / MANIFEST, manifest, CheckpointError)
    if FACTS not in manifest:
        raise CheckpointError(f"{folder}: {MANIFEST} does not name {FACTS}")
    for name, entry in manifest.items():
        path = folder / name
        check_fields(f"{folder / MANIFEST}: {shown_short(name)}", entry, {"bytes": int, "sha256": str}, CheckpointError)
        try:
            if not path.is_file():
                raise CheckpointError(f"{folder}: {name} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, wanted {entry['bytes']}")
            if file_hash(path) != entry["sha256"]:
                raise CheckpointError(f"{folder}: {name} is damaged: its checksum is not the one it was saved with")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Unreadable(CheckpointError):
    def __init__(self, problem: str) -> None:
        super().__init__(f"{MANIFEST} cannot be read: {problem}")


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of state.json, with the fields that every run needs checked.

    Raises:
        CheckpointError: missing, damaged, of a later version, or with fields missing or of another type.
    """
    path = folder / FACTS
    saved = read_json(path, CheckpointError)
    if (made_as := saved.get("format", 1)) not in (1, FORMAT):
        raise CheckpointError(
            f"{folder}: format {shown_short(made_as)}, but this version reads 1 and {FORMAT}; update multimodal-stream"
        )
    kinds = {"step": int, "recipe": dict, "core": dict, "tokenizers": dict, "tasks": list, "computed_in": str}
    check_fields(path, saved, kinds, CheckpointError)
    if "data_state" in saved:
        check_fields(path, saved, {"data_state": dict, "tensors": dict}, CheckpointError)
    if saved["step"] < 0 or saved["computed_in"] not in PRECISIONS[1:]:
        raise CheckpointError(
            f"{path}: step {shown_short(saved['step'])} in {shown_short(saved['computed_in'])}; wanted a whole number, and "
            f"one of {', '.join(PRECISIONS[1:])}"
        )
    return saved


def _check_all_there(header: Header, saved: Mapping[str, Any], folder: Path) -> None:
    """Refuse a state that lacks tensors which its state.json lists, such as the moments of a parameter."""
    if missing := [name for name in saved.get("tensors", ()) if name not in header]:
        raise CheckpointError(
            f"{folder}: {shown_short(missing[0])} is missing, which {FACTS} names ({len(missing)} are)"
        )


def _fitting(shape: tuple[int, ...], kind: str) -> list[tuple[tuple[int, ...], str]]:
    """What moments of this shape and kind are right for; scalars also for one number with an axis, see `with_axis`."""
    return [(shape, kind), ((1,), kind)] if shape == () else [(shape, kind)]


def _keys(fits: Mapping[str, Iterable[str]]) -> list[str]:
    return [f"{part}/{name}" for name, parts in fits.items() for part in parts]


def differences(saved: Any, now: Any, name: str = "") -> Iterator[str]:
    """'recipe.steps was 120 and is 400', for every value of `now` that differs in `saved`."""
    for key, was, found in unequal(saved, now, name):
        yield f"{key} was {shown_short(was)} and is {shown_short(found)}"


def unequal(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """('recipe.steps', 120, 400), for every value of `other` that differs in `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in other if not name else {**one, **other}:
            yield from unequal(one.get(key), other.get(key), f"{name}.{key}" if name else str(key))
    elif one != other:
        yield name, one, other


def _with_new_defaults(saved: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A state with the defaults of settings that did not exist when it was saved. Tokenizers with files are unchanged."""
    try:
        recipe = {**Recipe().config(), **saved["recipe"]}
        kinds = {
            name: entry if entry["files"] else {**entry, **declaration(rebuild(entry))}
            for name, entry in saved["tokenizers"].items()
        }
        tasks = [{**task, "head": declaration(rebuild(task["head"]))} for task in saved["tasks"]]
        today = {
            "recipe": {k: v for k, v in recipe.items() if k not in FREE or k in facts["recipe"]},
            "core": declaration(rebuild(saved["core"])),
            "tokenizers": kinds,
            "tasks": tasks,
        }
        return {**saved, **plain(today)}
    except Exception as error:  # as of a config.json, which can be wrong in any way
        problem = str(error)[:1000] if isinstance(error, ValueError) else f"{type(error).__name__}: {str(error)[:1000]}"
        raise CheckpointError(f"{folder / FACTS}: what it declares cannot be built: {problem}") from error


def _shared_like(tensors: dict[str, Tensor], trained: Trained) -> dict[str, Tensor]:
    """Whole tensors, sharded like the weights that they belong to."""
    from torch.distributed.tensor import distribute_tensor

    spread = trained.like(header_of(tensors))
    shared: dict[str, Any] = {name: spread.get(name, t) for name, t in tensors.items()}
    return {
        name: distribute_tensor(with_axis(t, shared[name]), shared[name].device_mesh, shared[name].placements)
        if hasattr(shared[name], "full_tensor")
        else t
        for name, t in tensors.items()
    }
