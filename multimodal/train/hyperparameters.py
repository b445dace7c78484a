"""`search`: trains a recipe with many settings, chosen by Optuna, and says which are the best."""

import io
import itertools
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin
from zlib import crc32

import torch

from multimodal.checkpoint import declarations, own_config
from multimodal.data import declared_sources, is_indexed
from multimodal.declare import plain
from multimodal.files import write_atomic
from multimodal.notebook import data_url
from multimodal.progress import Bar, progress_bar
from multimodal.shapes import (
    CheckpointError,
    ConfigError,
    MediaError,
    ShapeError,
    check_seed,
    check_whole,
    did_you_mean,
)
from multimodal.texts import listed, repeated, shortened
from multimodal.train import run_folder
from multimodal.train.callbacks import Callback, View
from multimodal.train.job import TrainingJob
from multimodal.train.recipe import MAY_CHANGE
from multimodal.train.run_report import Record, aligned, draw
from multimodal.train.run_report import settings as flat
from multimodal.train.settings import Setting, kind_of, make_job, type_name

JOURNAL, TRIALS, STUDY = "search.jsonl", "trial-*", "search"
MOST_COMBINATIONS = 10_000  # of which the ones that were not tried are looked for
MOST_DRAWN = 10  # curves of the picture
LARGEST = 2**53  # up to which a float holds every whole number; Optuna draws floats
MOST_DEATHS = 5  # of the process in one trial, without progress
# of these a trial fails; any other error ends the search
FAILURES = (ConfigError, FloatingPointError, MediaError, ShapeError, torch.OutOfMemoryError)
SPAN = re.compile(r"\s*([^,]+?)\s*\.\.\s*([^,:]+?)\s*(:log)?\s*")
# settings of a recipe that may change from one call to the next: they change neither the result nor when it is measured
FREE = set(MAY_CHANGE) - {"epochs", "evaluate_every", "patience", "best"}


@dataclass(frozen=True)
class Range:
    """The values of one setting to choose from.

    setting: its name, and all values as one text.
    low, high, log: the ends of a span, both included, and whether it is drawn from on a logarithmic scale.
    choices: the values of a list, as texts; (): it is a span.
    """

    setting: Setting
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ".".join(self.setting.path)

    @property
    def size(self) -> int | None:
        """The number of values; None: a span of numbers has no end of them."""
        if self.choices:
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if isinstance(self.low, int) else None

    def values(self) -> Sequence[Any]:
        """All values, of a list or a span of whole numbers."""
        return self.choices or range(int(self.low), int(self.high) + 1)

    def suggest(self, trial: Any) -> Any:
        """The value that Optuna chooses."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        suggest = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
        return suggest(self.name, self.low, self.high, log=self.log)

    @classmethod
    def of(cls, setting: Setting, kind: Any) -> "Range":
        """The values that a text describes: "1e-4..1e-2:log" or "2,4,6".

        kind: the type of the setting.

        Raises:
            ConfigError: values of another type, ends that do not rise, fewer than two values.
        """
        several = get_origin(kind) in (Union, UnionType)
        kinds = [option for option in get_args(kind) if isinstance(option, type)] if several else [kind]
        span = SPAN.fullmatch(setting.text)
        if span and str not in kinds:
            number = float if float in kinds else int
            if number not in kinds:
                raise ConfigError(
                    f"{setting}: from .. to is for numbers, and this is a {type_name(kind)}; give a list, such as a,b"
                )
            low, high = (replace(setting, text=end).read(number) for end in span.group(1, 2))
            if not math.isfinite(float(high) - float(low)):
                raise ConfigError(f"{setting}: the ends of a range must be finite")
            if number is int and max(abs(low), abs(high)) > LARGEST:
                raise ConfigError(f"{setting}: whole numbers beyond {LARGEST} cannot be drawn")
            if not low < high:
                raise ConfigError(f"{setting}: {span[1]} must be below {span[2]}; one value is given by --set")
            if span[3] and low <= 0:
                raise ConfigError(f"{setting}: on a logarithmic scale a range must begin above 0, such as 1e-5")
            return cls(setting, low, high, bool(span[3]))
        # commas inside of brackets belong to a value: (0.9,0.99),(0.9,0.95)
        choices = [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", setting.text)]
        if setting.text.endswith(":log"):
            raise ConfigError(f"{setting}: :log is for numbers from .. to, such as 1e-4..1e-2:log")
        if not all(choices):
            raise ConfigError(f"{setting}: a value is empty; give 1e-4..1e-2, 1e-4..1e-2:log, or a list such as 2,4,6")
        if len(choices) < 2:
            raise ConfigError(f"{setting}: one value leaves nothing to choose; give two or more, or give it by --set")
        read = [repr(replace(setting, text=choice).read(kind)) for choice in choices]
        if twice := repeated(read):
            raise ConfigError(f"{setting}: the value {twice[0]} comes twice")
        return cls(setting, choices=tuple(choices))


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    number: of the trial, from 0. Numbers may be missing: settings that were tried before are not trained again.
    settings: the value of each range, as text.
    state: "finished", "pruned" (ended early, since others were better), "failed" or "unfinished".
    value: the measure of its model; of a pruned one the last; None: there is none.
    folder: its run folder.
    reason: why it was pruned or failed.
    """

    number: int
    settings: Mapping[str, str]
    state: str
    value: float | None
    folder: Path
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class FoundSettings:
    """The trials of a search, and the settings of the best one. `repr` gives one line, `print` of `table()` the best trials.

    measure: what was compared.
    trials: all of them, in their order.
    finished: whether the search went to its end.
    """

    measure: str
    trials: tuple[Trial, ...]
    finished: bool

    @property
    def ranked(self) -> list[Trial]:
        """The finished trials, best first."""
        found = [trial for trial in self.trials if trial.state == "finished"]
        return sorted(found, key=lambda trial: (_sign(self.measure) * (trial.value or 0.0), trial.number))

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best value; None: none has finished."""
        return next(iter(self.ranked), None)

    @property
    def settings(self) -> list[str]:
        """The best settings, as of `multimodal train --set`; []: no trial has finished."""
        return [f"{name}={value}" for name, value in self.best.settings.items()] if self.best else []

    def __repr__(self) -> str:
        best = f"{', '.join(self.settings)}: {self.measure} {self.best.value:.4f}" if self.best else "no trial finished"
        return f"FoundSettings({best}, {len(self.trials)} trials{'' if self.finished else ', not finished'})"

    def _repr_html_(self) -> str:
        """For notebooks: the table and the curves."""
        curves = f'<img alt="curves" src="{data_url("image/png", self.picture())}">' if self.best else ""
        return f"<b>{escape(repr(self))}</b><pre>{escape(self.table())}</pre>{curves}"

    def table(self, most: int = 10) -> str:
        """The best trials as text, how many were pruned or failed, and why they failed."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        lines = [["trial", *names, self.measure]]
        for trial in self.ranked[:most]:
            lines.append([trial.folder.name, *map(_short, trial.settings.values()), f"{trial.value:.4f}"])
        states = [trial.state for trial in self.trials]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        text = (aligned(lines) + "\n\n" if self.best else "") + f"trials: {', '.join(counts) or 'none'}"
        reasons = dict.fromkeys(t.reason for t in self.trials if t.state == "failed")
        for reason in list(reasons)[:3]:
            first = next(t for t in self.trials if t.reason == reason)
            same = sum(t.reason == reason for t in self.trials) - 1
            more = f" (and {same} more)" if same else ""
            text += f"\n  {first.folder.name} failed{more}: {reason}"
        return text + (f"\n  {len(reasons) - 3} more reasons" if len(reasons) > 3 else "")

    def picture(self) -> bytes:
        """The curves of the best trials as a PNG, as `multimodal report` draws them.

        Raises:
            ConfigError: no trial has finished.
        """
        records = [Record.read(trial.folder) for trial in self.ranked[:MOST_DRAWN]]
        if not records:
            raise ConfigError("search: no trial has finished, so there are no curves to draw")
        data = io.BytesIO()
        draw(records, data)
        return data.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the picture, a PNG."""
        write_atomic(Path(path), self.picture())


def search(
    make: Callable[..., Any],
    ranges: Mapping[str, Any] | Iterable[str],
    *,
    measure: str,
    trials: int = 20,
    folder: str | Path,
    settings: Sequence[str] = (),
    prune: bool = True,
    seed: int = 0,
    quiet: bool = False,
    where: str = "the function",
    go_on: str = "call search(..) with the same arguments",
) -> FoundSettings:
    """Train with many settings, chosen by Optuna's tree-structured Parzen estimator, and compare a held-out measure.

    A search that was stopped or killed goes on when it is called again with the same arguments, and ends as one that was not; with
    more trials it goes on too. Settings that were tried before are not trained again.

    make: a function that returns a TrainingJob or a mapping of its fields, as recipe() of `multimodal train` does. It is called for
        each trial, and should take its model and data from fixed seeds.
    ranges: by name, as of `multimodal train --set`: {"lr": "1e-4..1e-2:log", "core.depth": [2, 4, 6]}, or texts such as
        "core.depth=2,4,6".
    measure: such as "image -> label exact". One that ends in " loss" is made small, any other one large.
    trials: the number of trials.
    folder: where the search is, with the run folder of each trial.
    settings: changes that all trials have, such as "steps=200".
    prune: whether a trial ends early if its measure is worse than the median of the others at the same step (after five trials, at
        every evaluation, of which `evaluate_every` says when they come).
    seed: of the choices. The seeds of weights and order are those of the job in all trials.
    quiet: print nothing.
    where, go_on: names for the function and for how to go on, in messages.

    Raises:
        ConfigError: a range or a measure that cannot be used, a folder that holds another search or cannot be written, or Optuna is
            not installed. CheckpointError: the journal is damaged. A trial that raises a ConfigError or a FloatingPointError, or
            needs too much memory, is noted as failed; other errors end the search.
    """
    if not callable(make):
        raise ConfigError(
            f"search: {type(make).__name__} cannot be called; give a function that returns a new job for each trial"
        )
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"search: folder is {type(folder).__name__}, wanted a path")
    check_whole("search", least=1, trials=trials)
    check_seed("search", seed)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("search: several processes were started, and it runs in one; start it by itself")
    optuna = _optuna()
    job = make_job(make, settings, where)
    wanted = _ranges(ranges, settings, make, job, where)
    _check_measure(measure, job)
    if prune and not quiet and not job.recipe.evaluate_every and not job.recipe.patience:
        print("search: no trial is pruned, as the recipe measures at the end only; evaluate_every=50 would change it")
    same = {
        "measure": measure,
        "seed": seed,
        "ranges": {one.name: one.setting.text for one in wanted},
        "settings": sorted(settings),
        "job": _described(job),
    }
    del job  # each trial makes its own
    folder = Path(folder)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with _locked(folder):
            one = _Search(optuna, make, wanted, measure, folder, settings, prune, seed, quiet, where)
            one.open(plain(same))
            finished = one.run(trials)
            found = FoundSettings(measure, tuple(one.trials()), finished)
    finally:
        optuna.logging.set_verbosity(verbosity)
    if not finished and not quiet:
        print(f"search: stopped; everything is saved in {folder}. To go on: {go_on}")
    return found


@dataclass
class _Search:
    """One call of `search`: `open`, then `run`. optuna: the module; the other fields are arguments of `search`."""

    optuna: Any
    make: Callable[..., Any]
    ranges: Sequence[Range]
    measure: str
    folder: Path
    settings: Sequence[str]
    prune: bool
    seed: int
    quiet: bool
    where: str
    study: Any = None
    storage: Any = None

    def open(self, same: Mapping[str, Any]) -> None:
        """Open the journal in the folder, or begin one. same: what has to be the same in a search that goes on.

        Raises:
            ConfigError: it is of another search. CheckpointError: it is damaged.
        """
        optuna, path = self.optuna, self.folder / JOURNAL
        if not path.is_file() and (there := sorted(self.folder.glob(TRIALS))):
            raise ConfigError(
                f"search: {self.folder} holds {there[0].name}, but no {JOURNAL} that says what it is; choose another folder"
            )
        try:
            _cut_incomplete_line(path)
            backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_NoLock())
            self.storage = optuna.storages.JournalStorage(backend)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=STUDY,
                load_if_exists=True,
                direction="minimize" if _sign(self.measure) > 0 else "maximize",
                pruner=optuna.pruners.MedianPruner() if self.prune else optuna.pruners.NopPruner(),
            )
            had = self.study.user_attrs.get("search")
            begun = len(self.study.get_trials(deepcopy=False))
        except OSError as error:
            raise ConfigError(f"search: {path} cannot be written ({error}); choose another folder") from error
        except Exception as error:
            raise CheckpointError(
                f"{path}: damaged, or not of a search ({type(error).__name__}: {shortened(error, 200)}); choose another folder"
            ) from error
        if had is None and not begun:
            self.study.set_user_attr("search", same)
        elif had != same:
            raise ConfigError(
                f"search: {self.folder} holds another search: {_difference(had, same)}; go on with the same arguments, or choose "
                "another folder"
            )

    def run(self, count: int) -> bool:
        """Train until `count` trials are done, or all combinations are; whether it went to the end."""
        sizes = [one.size for one in self.ranges]
        size = math.prod(n for n in sizes if n is not None) if None not in sizes else None
        with progress_bar("search", count, start=len(self.tried()), quiet=self.quiet) as bar:
            while len(tried := self.tried()) < count:
                if size is not None and len(tried) >= size:
                    if not self.quiet:
                        print(f"search: all {size} combinations of these values were tried")
                    break
                trial, values = self.next_trial()
                key = self.key(values)
                if key in tried:
                    self.repeat(trial, tried[key], tried, size)
                    continue
                best = self.best()
                note = f"trial {trial.number}" + ("" if best is None else f", best {best:.4f}")
                bar.update(len(tried), note)
                if not self.train(trial, values, partial(_show, bar, len(tried), note)):
                    return False
                bar.update(len(tried) + 1, note)
        return True

    def key(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_text(params[one.name]) for one in self.ranges)

    def tried(self) -> dict[tuple[str, ...], Any]:
        """The trials that have ended, by their values."""
        found = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and "repeats" not in trial.user_attrs:
                found[self.key(trial.params)] = trial
        return found

    def next_trial(self) -> tuple[Any, dict[str, str]]:
        """(a trial that was stopped, or a new one; its values)."""
        optuna = self.optuna
        everything = self.study.get_trials(deepcopy=False)
        stopped = [trial.number for trial in everything if trial.state == optuna.trial.TrialState.RUNNING]
        if stopped:
            study_id = self.storage.get_study_id_from_name(STUDY)
            at = self.storage.get_trial_id_from_study_id_trial_number(study_id, stopped[0])
            trial = optuna.trial.Trial(self.study, at)
        else:
            trial = self.study.ask()
        values = {}
        for one in self.ranges:
            # a sampler's generator is not saved, so each choice has a seed of its own: a search that goes on makes the same ones
            drawn = crc32(f"{self.seed}/{trial.number}/{one.name}".encode())
            self.study.sampler = optuna.samplers.TPESampler(seed=drawn)
            values[one.name] = _text(one.suggest(trial))
        return trial, values

    def repeat(self, trial: Any, before: Any, tried: Mapping[tuple[str, ...], Any], size: int | None) -> None:
        """End a trial of values that were tried before with the same result, and choose others for the next one."""
        states = self.optuna.trial.TrialState
        trial.set_user_attr("repeats", before.number)
        self.study.tell(
            trial, before.value if before.state == states.COMPLETE else None, state=before.state, skip_if_finished=True
        )
        if size is not None and size <= MOST_COMBINATIONS:
            everything = itertools.product(*(one.values() for one in self.ranges))
            left = [values for values in everything if tuple(map(_text, values)) not in tried]
            chosen = random.Random(f"{self.seed}/{trial.number}").choice(left)
            self.study.enqueue_trial({one.name: v for one, v in zip(self.ranges, chosen, strict=True)})

    def train(self, trial: Any, values: Mapping[str, str], show: Callable[[float], None]) -> bool:
        """Train one trial and note its result; False: the run was stopped."""
        states, changes = self.optuna.trial.TrialState, [f"{name}={value}" for name, value in values.items()]
        reported = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        watch = _Watch(trial, self.measure, self.prune, reported, show)
        value, reason = None, ""
        deaths = self.deaths(trial)
        try:
            if deaths >= MOST_DEATHS:  # as of one that needs more memory than the machine has
                raise ConfigError(f"the process died {deaths} times while it trained, each time at the same place")
            job = make_job(self.make, [*self.settings, *changes], self.where)
            job = replace(job, callbacks=[*job.callbacks, watch])
            run = job.run(self.run_folder(trial.number), resume=True, quiet=True)
        except FAILURES as error:
            reason = f"{type(error).__name__}: {shortened(error, 400)}"
        except BaseException:
            self.survived(trial)
            raise
        else:
            if not run.finished:
                self.survived(trial)
                return False
            value = next((row[self.measure] for row in reversed(run.history) if self.measure in row), None)
            if value is None or not math.isfinite(value):
                reason = f"its {self.measure} is {value}"
        if reason:
            state, value = states.FAIL, None
        elif watch.pruned:
            state, value, reason = states.PRUNED, None, f"at step {watch.pruned}, as others were better"
        else:
            state = states.COMPLETE
        if reason:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, value, state=state)
        if not self.quiet:
            what = f"{self.measure} {value:.4f}" if value is not None else f"{_name(state)}: {reason}"
            chosen = " ".join(f"{name}={_short(text)}" for name, text in values.items())
            print(f"search: trial {trial.number}: {chosen}: {what}", flush=True)
        return True

    def deaths(self, trial: Any) -> int:
        """How often the process died in this trial at its newest checkpoint; notes that it begins again."""
        step = Record.read(self.run_folder(trial.number)).step or 0
        at, times = trial.user_attrs.get("begun", (step, 0))
        times = times if at == step else 0
        trial.set_user_attr("begun", [step, times + 1])
        return times

    @staticmethod
    def survived(trial: Any) -> None:
        """Note that the process is alive, although this trial has not ended."""
        with suppress(OSError):
            trial.set_user_attr("begun", [0, 0])

    def run_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}"

    def best(self) -> float | None:
        """The best value so far."""
        found = [t.value for t in self.tried().values() if t.state == self.optuna.trial.TrialState.COMPLETE]
        return min(found, key=lambda value: _sign(self.measure) * value, default=None)

    def trials(self) -> Iterable[Trial]:
        """The trials that trained, or tried to."""
        for one in self.study.get_trials(deepcopy=False):
            if "repeats" not in one.user_attrs and one.params:
                values = {r.name: _text(one.params[r.name]) for r in self.ranges if r.name in one.params}
                reason = one.user_attrs.get("reason", "")
                yield Trial(one.number, values, _name(one.state), one.value, self.run_folder(one.number), reason)


class _Watch(Callback):
    """Reports held-out measures of a run to its trial, and ends a run that is worse than others."""

    def __init__(
        self, trial: Any, measure: str, prune: bool, reported: set[int], show: Callable[[float], None]
    ) -> None:
        self.trial, self.measure, self.prune, self.reported, self.show = trial, measure, prune, reported, show
        self.pruned = 0  # the step; 0: it was not

    def on_step(self, view: View) -> None:
        self.show(view.step / view.recipe.steps)

    def on_evaluation(self, view: View) -> None:
        if view.step >= view.recipe.steps or self.measure not in view.row or "loss" not in view.row:
            return  # of the end, where there is nothing to prune
        if view.step not in self.reported:
            self.trial.report(float(view.row[self.measure]), view.step)
            self.reported.add(view.step)
        if self.prune and self.trial.should_prune():
            self.pruned = view.step
            view.stop("the search has pruned this trial")

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pruned = int(state["pruned"])


class _NoLock:
    """For Optuna's journal, which only this process writes, since the folder is locked; a lock of Optuna's outlives a kill."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _show(bar: Bar, done: int, note: str, share: float) -> None:
    bar.update(done + share, note)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"search: {error}; pip install optuna, or pip install 'multimodal-stream[search]'") from error
    return optuna


@contextmanager
def _locked(folder: Path) -> Any:
    """The folder of a search, made if needed, and locked.

    Raises:
        ConfigError: it cannot be written, holds something else, or another process searches there.
    """
    try:
        taken = run_folder.is_run(folder) or own_config(folder) is not None
    except OSError as error:
        raise ConfigError(f"search: {folder} cannot be written ({error}); choose another folder") from error
    if taken:
        raise ConfigError(f"search: {folder} holds a run or a model; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = run_folder.lock(folder, patience_s=2.0)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"search: {folder} cannot be written ({error}); choose another folder") from error
    try:
        yield
    finally:
        file.close()


def _cut_incomplete_line(path: Path) -> None:
    """Remove the last line of a journal if a kill or a full disk has left a part of it: what is added would make it unreadable."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _ranges(given: Any, settings: Sequence[str], make: Callable[..., Any], job: TrainingJob, where: str) -> list[Range]:
    """The ranges of a call.

    Raises:
        ConfigError: one that cannot be used.
    """
    texts = []
    if isinstance(given, Mapping):
        for name, values in given.items():
            joined = values if isinstance(values, str) else ",".join(map(str, values))
            texts.append(f"{name}={joined}")
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"search: ranges is {type(given).__name__}; give a mapping of names, or a list of texts")
    else:
        texts += map(str, given)
    if not texts:
        raise ConfigError("search: no range is given, so there is nothing to choose; such as lr=1e-4..1e-2:log")
    found: list[Range] = []
    taken = {Setting.parse(text).path: f"--set {text}" for text in settings}
    for text in texts:
        setting = Setting.parse(text, "--range")
        path = setting.path[1:] if setting.path[0] == "recipe" else setting.path
        for other in (path, ("recipe", *path)):
            if other in taken:
                raise ConfigError(f"{setting} and {taken[other]}: both change one setting; give one")
        taken[path] = str(setting)
        found.append(Range.of(setting, kind_of(setting, make, job, where)))
    return found


def _check_measure(measure: Any, job: TrainingJob) -> None:
    """Refuse a measure that the held-out data do not have."""
    heads = job.model.packer
    known = [f"{pattern} {name}" for pattern in job.evaluation or {} for name in heads.head(pattern).measures]
    if not known:
        raise ConfigError("search: the job has no held-out data to compare trials on; give some as evaluation=")
    if measure not in known:
        raise ConfigError(
            f"search: {measure!r} is no measure of the held-out data; there are {listed(map(repr, known))}"
            f"{did_you_mean(str(measure), known)}"
        )


def _described(job: TrainingJob) -> dict[str, Any]:
    """What has to be the same in a search that goes on, as JSON values: all but what a range changes, and the contents of data."""
    sources: dict[str, Any] = dict(job.data)
    recipe = {name: value for name, value in job.recipe.config().items() if name not in FREE}
    return {
        **declarations(job.model),
        "recipe": recipe,
        "data": {pattern: len(data) if is_indexed(data) else None for pattern, data in sources.items()},
        "sources": declared_sources(sources),
        "held_out": {pattern: len(samples) for pattern, samples in (job.evaluation or {}).items()},
        "mix": job.mix if isinstance(job.mix, (int, float)) else dict(job.mix or {}),
    }


def _difference(had: Any, same: Mapping[str, Any]) -> str:
    """What is different, in words."""
    if not isinstance(had, Mapping):
        return "it is not of this program"
    old, new = flat(had), flat(same)
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    found = [
        f"{name.removeprefix('job.')} was {shortened(repr(old.get(name)), 80)}, now {shortened(repr(new.get(name)), 80)}"
        for name in names
    ]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _sign(measure: str) -> int:
    """1: less is better; -1: more is."""
    return 1 if measure.endswith(" loss") else -1


def _name(state: Any) -> str:
    return {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}.get(state.name, "unfinished")


def _text(value: Any) -> str:
    """A value as `--set` reads it, exactly."""
    return repr(value) if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    """A number with four digits, for tables."""
    with suppress(ValueError):
        return f"{float(text):.4g}" if not re.fullmatch(r"[+-]?\d+", text) else text
    return text
