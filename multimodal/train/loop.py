"""`fit`: the training loop, from top to bottom.

data --Batches or Packs (workers)--> packed streams --Trainee.backward--> AdamW --> averaged weights --> run folder
"""

import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from multimodal import checkpoint
from multimodal.checkpoint import check_room, declarations, holds, short_name
from multimodal.core import compile_blocks, recompute
from multimodal.data import Bad, Batch, Packs, Samples, Source, StuckError
from multimodal.declare import override, plain
from multimodal.files import check_fields, put
from multimodal.model import Model
from multimodal.process_state import preserved_state
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.train.agree import agreement, facts_of
from multimodal.train.evaluation import measured
from multimodal.train.loaders import check_evaluation, make_feed, size
from multimodal.train.optimizer import make_optimizer, rate
from multimodal.train.processes import Processes, Trainee, found_processes, full, whole
from multimodal.train.recipe import FREE, Recipe, choose_device, choose_precision
from multimodal.train.report import bar, draw_curves, environment, is_held_out, write_csv
from multimodal.train.run_folder import (
    BEST,
    BROKEN,
    CONFIG,
    CURVES,
    ENVIRONMENT,
    LOG,
    MODEL,
    TABLE,
    add_rows,
    check_folder,
    lock,
    make_room,
    read_rows,
    write_rows,
)
from multimodal.train.runtime import asked_to_stop, cores_shared, keep_freed_memory, threads_beside
from multimodal.train.spikes import SpikeWatch, keep_trouble
from multimodal.train.state import Checkpoints, Trained

Tracker = Callable[[Mapping[str, Any]], Any]


@dataclass
class Run:
    """The result of a training run. `repr` gives one line; `history` has every row.

    folder: the run folder; None: the run was not saved.
    history: a row {"step", "loss", ...} for each report.
    finished: whether all steps were done.
    bad: the broken samples that were left out, each with its reason.
    """

    folder: Path | None
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    bad: list[Bad] = field(default_factory=list)  # broken samples that were left out

    def last(self, key: str) -> Any:
        """The newest value of a column, such as 'loss' or 'image -> label exact'."""
        return next(row[key] for row in reversed(self.history) if key in row)

    def __repr__(self) -> str:
        facts = [f"{self.history[-1]['step']} steps" if self.history else "no steps", *_ending(self.history)]
        facts += [] if self.finished else ["not finished"]
        facts += [f"{len(self.bad)} broken samples"] if self.bad else []
        facts += [] if self.folder is None else [str(self.folder)]
        return f"Run({', '.join(facts)})"


def _ending(history: list[dict[str, Any]]) -> list[str]:
    """The last training loss and the last held-out measures, as text."""
    found = {key: value for row in history for key, value in row.items() if key == "loss" or is_held_out(key)}
    return [f"{key} {value:.4f}" for key, value in found.items()]


def fit(
    model: Model,
    data: Mapping[str, Source],
    recipe: Recipe | None = None,
    *,
    evaluation: Mapping[str, Samples] | None = None,
    mix: Mapping[str, float] | float | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    trackers: Iterable[Tracker] = (),
    quiet: bool = False,
    go_on: str = "call fit(..., resume=True) with the same arguments",
    **settings: Any,
) -> Run:
    """Train `model` in place on data by task: {"image -> label": samples}.

    recipe and settings: a Recipe, or changes to it by name (`steps=1500, lr=3e-4`). evaluation: held-out data by task. mix: the
    tasks' shares of the samples by weight, equal unless given; a number is a temperature: len ** (1 / temperature).
    folder: keeps the model, states to resume from, the log and a picture of the curves. resume: go on from the newest state if
    there is one. trackers: called with each row of the log. Ctrl-C and SIGTERM end after the current step, with everything saved;
    a second one ends at once. go_on: how to resume, as the message about a stopped run says it.
    Started by torchrun or `multimodal train --processes`, it trains in all processes together, after they have compared their
    settings, data and weights.

    Random generators, number of threads and other settings of the process are restored afterwards, with one exception: on Linux,
    training on a CPU tells the C library to keep freed memory for the next step, which cannot be undone. If MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_MAX_ or GLIBC_TUNABLES is set, that setting is left alone.

    Raises:
        ConfigError, TaskError, CheckpointError: before anything is trained. FloatingPointError: the loss is not finite.
        MediaError: more broken samples than max_bad. StreamError: a data worker died.
    """
    recipe = override(recipe or Recipe(), **settings)
    trackers = list(trackers) if isinstance(trackers, Iterable) else trackers
    _check_call(model, data, evaluation, folder, resume, trackers)
    recipe.check_use(folder=folder is not None, evaluation=bool(evaluation))
    device = choose_device(recipe.device)
    if device.type == "cpu":
        keep_freed_memory()
    learned_before = model.training
    training: _Training | None = None
    try:
        with preserved_state(draws=True), found_processes(device) as processes:
            try:
                training = _Training(model, data, recipe, evaluation or {}, mix, folder, resume, processes, quiet)
                training.trackers, training.go_on = list(trackers), go_on
                training.begin(resume)
                training.go()
                training.end()
            finally:
                recompute(model, False)
                if training is not None:
                    training.rest()
                    # if DDP released the connections last, it and their threads could deadlock
                    training.trainee.wrapped = None
                    if processes.count > 1:
                        gc.collect()
                    if training.lock:
                        training.lock.close()
    except BaseException:
        if training is None or not training.ended:
            model.train(learned_before)
        raise
    assert training is not None
    return training.run


def _check_call(model: Any, data: Any, evaluation: Any, folder: Any, resume: bool, trackers: Iterable[Any]) -> None:
    """Raise a ConfigError for arguments of wrong types."""
    if not isinstance(model, Model):
        raise ConfigError(f"fit: model is {type(model).__name__}, wanted a Model")
    if not isinstance(data, Mapping):
        raise ConfigError(f"fit: data is {type(data).__name__}; give data by task, as in {{'image -> label': samples}}")
    if not isinstance(evaluation, (Mapping, type(None))):
        raise ConfigError(
            f"fit: evaluation is {type(evaluation).__name__}; give held-out data by task, as the data are"
        )
    if not isinstance(folder, (str, Path, type(None))):
        raise ConfigError(f"fit: folder is {type(folder).__name__}, wanted a path")
    if resume and folder is None:
        raise ConfigError("fit: resume=True goes on with the run in a folder, and none was given; give folder=")
    if not isinstance(trackers, Iterable) or not all(callable(tracker) for tracker in trackers):
        raise ConfigError("fit: trackers are called with each row of the log; give a list of functions")


class _Training:
    """One call of `fit`: what it is made of, and its three parts."""

    def __init__(
        self,
        model: Model,
        data: Mapping[str, Source],
        recipe: Recipe,
        evaluation: Mapping[str, Samples],
        mix: Mapping[str, float] | float | None,
        folder: str | Path | None,
        resume: bool,
        processes: Processes,
        quiet: bool,
    ) -> None:
        self.model, self.recipe, self.evaluation, self.processes = model, recipe, evaluation, processes
        self.run = Run(Path(folder) if folder is not None else None)
        self.quiet = quiet or processes.rank > 0
        self.keeps = self.run.folder is not None and processes.rank == 0
        self.trackers: list[Tracker] = []
        self.go_on, self.ended = "", False
        self.lock: Any = None
        self.states: Checkpoints | None = None
        self.device = processes.device(choose_device(recipe.device))
        with agreement(processes) as facts:
            self.feed = make_feed(model, data, recipe, mix, processes)
            check_evaluation(model, evaluation, recipe)
            sizes: dict[str, Any] = {"data": {pattern: size(source) for pattern, source in data.items()}}
            shares = {"mix": plain(mix if isinstance(mix, (int, float)) else dict(mix or {}))}
            if processes.count > 1:
                sizes |= {"evaluation": {pattern: len(samples) for pattern, samples in evaluation.items()}}
                facts |= {"folder": None if folder is None else str(folder), "resume": bool(resume)}
                facts |= facts_of(model, recipe, self.device, self.feed, {**sizes, **shares})
        self.dtype, self.why = choose_precision(recipe.precision, self.device)
        model.to(self.device if recipe.parallel == "ddp" else "cpu").train()
        recompute(model, recipe.activation_checkpointing)
        self.trainee = Trainee(model, processes, recipe.parallel, self.device, self.dtype)
        if recipe.compile:
            compile_blocks(self.trainee.model)
        self.optimizer = make_optimizer(self.trainee.model, recipe, self.device, self.trainee.sharded)
        self.ema = self.trainee.averages(recipe.ema) if recipe.ema else None
        averaged = self.ema.module if self.ema else None
        self.trained = Trained(self.trainee.model, self.optimizer, averaged)
        self.shown = averaged or self.trainee.model  # whose weights are the result
        self.step, self.best, self.bad = 0, None, set[tuple[str, str]]()
        self.watch = SpikeWatch(spike=recipe.spike)
        self.begun = -1  # the step of the state that it goes on from
        # pairs are told from the others of their micro-batch, so there its size matters
        also = {"accumulate"} if any(model.packer.head(pattern).pairs for pattern in data) else set()
        self.facts = {
            # without the seed: weights are in the state
            **{part: plain(value) for part, value in declarations(model).items() if part != "seed"},
            "recipe": {
                name: value for name, value in plain(recipe.config()).items() if name not in FREE or name in also
            },
            "data": sizes["data"],
            **shares,
        }

    def begin(self, resume: bool) -> None:
        """Make the run folder, or go on from the newest whole state in it."""
        folder = self.run.folder
        if folder is None:
            return
        self.states = Checkpoints(folder, self.recipe.keep, self.processes)
        newest = None
        if self.keeps:
            check_folder(folder)
            check_room(folder / MODEL)
            check_room(folder / BEST)
            folder.resolve().mkdir(parents=True, exist_ok=True)  # a link may lead to a folder that does not exist yet
            self.lock = lock(folder)  # before anything is read or moved: another run may be at work here
            newest = self.states.latest() if resume else None
            if newest is None:
                make_room(folder, self.quiet)
        newest = self.processes.gather(newest)[0]
        if newest is not None:
            saved = self.states.load(newest, self.trained, self.facts, parallel=self.recipe.parallel)
            self.step, self.dtype, self.why = int(saved["step"]), getattr(torch, saved["computed_in"]), "as before"
            self.trainee.dtype = self.dtype
            self.begun = self.step if "data_state" in saved else -1  # a state of version 0.1 is written anew
            try:
                self.best = saved.get("best")
                if self.best is not None:
                    self.best = float(self.best)
                if "watch" in saved:
                    self.watch.load_state_dict(saved["watch"])
                if "data_state" in saved:
                    self.feed.restore(saved["data_state"])
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{newest}: its state.json does not say where to go on: {type(error).__name__}: {str(error)[:300]}"
                ) from error
            self.run.history = [row for row in read_rows(folder / LOG, numbers=True) if row["step"] <= self.step]
            broken = [row for row in read_rows(folder / BROKEN) if row["step"] <= self.step]
            for row in broken:
                check_fields(folder / BROKEN, row, {"task": str, "sample": str, "error": str}, CheckpointError)
            self.run.bad = [Bad(row["task"], row["sample"], row["error"]) for row in broken]
            self.bad = {(bad.task, bad.sample) for bad in self.run.bad}
            if self.keeps and (folder / BROKEN).is_file():
                write_rows(folder / BROKEN, broken)
        if self.keeps:
            config = {**self.facts, "recipe": plain(self.recipe.config()), "processes": self.processes.count}
            # written first, because it shows that a run wrote the other files
            put(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            put(folder / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
            (folder / CURVES).unlink(missing_ok=True)  # drawn last of all, so that it tells a run that went to its end
            write_rows(folder / LOG, self.run.history)

    def go(self) -> None:
        """All steps that are left, or those until it is asked to stop."""
        recipe = self.recipe
        threads = threads_beside(recipe.workers) if self.device.type == "cpu" else torch.get_num_threads()
        self._say_what(threads)
        start, tokens = self.step, 0
        before = self.run.last("seconds") if any("seconds" in row for row in self.run.history) else 0.0
        with (
            asked_to_stop() as asked,
            bar(recipe.steps, start, self.quiet) as show,
            cores_shared(threads),
            self.feed.loader(start, recipe.steps, recipe.workers, asked.is_set) as batches,
        ):
            clock = time.perf_counter()
            while self.step < recipe.steps:
                try:
                    batch = next(batches)
                except StuckError:
                    # a single process has changed nothing since its last step, and its batches depend only on the step
                    if self.processes.count > 1 or isinstance(self.feed, Packs):
                        raise
                    break
                counts, told = self._told(batch, asked.is_set())
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(recipe, self.step)
                row = self._train(batch, counts)
                self.step += 1
                if self.ema:
                    self.ema.update(self.trainee.model, step=self.step)
                tokens += told["tokens"]
                seconds = time.perf_counter() - clock
                row = {
                    "step": self.step,
                    **row,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "tokens_per_s": round(tokens / seconds),
                    "seconds": round(before + seconds, 3),
                }
                if batch.filled is not None:
                    row["filled"] = told["filled"] / self.processes.count
                if recipe.evaluate_every and self.step % recipe.evaluate_every == 0 and self.step < recipe.steps:
                    paused = time.perf_counter()
                    row |= self._evaluated()
                    clock += time.perf_counter() - paused  # the speed is that of training
                self._note(row)
                show(row)
                stop = told["stop"] > 0 if self.processes.count > 1 else asked.is_set()
                if stop or self.step == recipe.steps:
                    break
                if recipe.checkpoint_every and self.step % recipe.checkpoint_every == 0:
                    self._keep(last=False)

    def end(self) -> None:
        """Keep what there is; the averaged weights become the model."""
        self.run.finished = self.step == self.recipe.steps
        # resumed when all was done: its last row is that of the evaluation
        rested = self.run.finished and self.run.history and "loss" not in self.run.history[-1]
        try:
            with asked_to_stop():  # a signal now must not cost the last state
                self._keep(last=True)  # the raw weights, to resume from, before the averaged ones become the model
        finally:
            self._put_back()
            self.model.eval()
            self.ended = True
        if self.evaluation and self.run.finished and not rested:
            found = self._evaluated()
            self._note({"step": self.step, **found})
            if not self.quiet:
                print("fit: held out: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
        if self.keeps and self.run.history:
            write_rows(self.run.folder / LOG, self.run.history)  # type: ignore[operator]
            write_csv(self.run.history, self.run.folder / TABLE)  # type: ignore[operator]
            draw_curves(self.run.history, self.run.folder / CURVES)  # type: ignore[operator]
        if not self.run.finished and not self.quiet:
            kept = f"; everything is kept in {self.run.folder}. To go on: {self.go_on}" if self.keeps else ""
            print(f"fit: stopped after step {self.step} of {self.recipe.steps}{kept}")

    def rest(self) -> None:
        """Wait for what is still being written; the folder is this run's until then."""
        if self.states is not None and self.states.thread is not None:
            self.states.thread.join()

    def _told(self, batch: Batch, asked: bool) -> tuple[dict[str, int], dict[str, float]]:
        """What the processes tell each other before a step: targets by task, tokens, broken samples, whether to stop.

        Raises:
            MediaError: more broken samples than max_bad.
        """
        new = [bad for bad in batch.bad if (bad.task, bad.sample) not in self.bad]
        patterns = list(self.model.tasks)
        counts = dict.fromkeys(patterns, 0)
        for stream in batch.streams:
            for pattern, reading in stream.readings.items():
                counts[pattern] += reading.count
        tokens = sum(len(stream) for stream in batch.streams)
        mine = [*counts.values(), tokens, batch.filled or 0.0, len(new), asked]
        figures = self.processes.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        told: dict[str, float] = dict(zip(("tokens", "filled", "bad", "stop"), figures[len(patterns) :], strict=True))
        if told["bad"]:
            self._note_bad(new)
        return {p: int(n) for p, n in zip(patterns, figures, strict=False)}, told

    def _note_bad(self, new: list[Bad]) -> None:
        found = {(bad.task, bad.sample): bad for bads in self.processes.gather(new) for bad in bads}
        found = {key: bad for key, bad in found.items() if key not in self.bad}
        self.bad |= found.keys()
        self.run.bad += found.values()
        if self.keeps:
            rows = [{"step": self.step + 1, **asdict(bad)} for bad in found.values()]
            add_rows(self.run.folder / BROKEN, rows)  # type: ignore[operator]
        if len(self.bad) > self.recipe.max_bad:
            where = f", listed in {self.run.folder / BROKEN}" if self.run.folder else ""
            raise MediaError(
                f"fit: {len(self.bad)} samples are broken{where}, and max_bad={self.recipe.max_bad} may be; the last one: "
                f"{self.run.bad[-1].error}"
            )

    def _train(self, batch: Batch, counts: Mapping[str, int]) -> dict[str, Any]:
        """One optimiser step over its micro-batches; every real target of a task weighs the same, wherever it was packed."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, (stream, number) in enumerate(zip(batch.streams, batch.numbers, strict=True)):
            # what is dropped out is a function of the seed and of the micro-batch, in whichever process that is
            torch.manual_seed(crc32(f"{self.recipe.seed}/dropout/{self.step}/{number}".encode()))
            total += self.trainee.backward(stream.to(self.device), counts, last=i == len(batch.streams) - 1)
        if self.processes.count > 1:
            self.trainee.leave_unused()
        norm = torch.nn.utils.clip_grad_norm_(self.trainee.model.parameters(), self.recipe.clip or math.inf)
        # the only wait for the device in a step: nothing may change weights before these are known
        loss, norm = torch.stack([self.processes.sum(total), full(norm)]).tolist()
        row: dict[str, Any] = {"loss": loss, "grad_norm": norm}
        why = self.watch.why(loss, norm)
        if why is None:
            self.optimizer.step()
        else:
            self._trouble(why, batch, counts, finite=math.isfinite(loss) and math.isfinite(norm))
            row["left_out"] = 1
        return row

    def _trouble(self, why: str, batch: Batch, counts: Mapping[str, int], *, finite: bool) -> None:
        """Keep what a step was made of; the weights are not changed by it.

        Raises:
            FloatingPointError: a step that is not finite.
        """
        kept, folder, step = None, self.run.folder, self.step + 1  # as the log counts
        if folder is not None:
            weights = {name: whole(t) for name, t in self.trainee.model.state_dict().items()}
            rest: dict[str, Any] = {"counts": counts, "names": batch.names, "process": self.processes.rank}
            try:
                kept = keep_trouble(folder, step, batch.streams, why, None, precision=short_name(self.dtype), **rest)
                if kept and self.keeps:
                    checkpoint.save(self.model, kept / MODEL, weights)
            except (OSError, CheckpointError) as error:
                warnings.warn(f"fit: the batch of step {step} could not be kept ({error})", stacklevel=3)
        look = (
            f"multimodal replay {kept} shows its samples"
            if kept
            else "its batch is not kept, as there is no run folder or no room"
        )
        if not finite:
            raise FloatingPointError(
                f"fit: step {step}: {why}; {look}; lower lr={self.recipe.lr} if no sample is to blame"
            )
        if not self.quiet:
            print(f"fit: step {step} is left out: {why}; {look}")

    def _keep(self, last: bool) -> None:
        """Save the state and the model; a disk that is full ends no training before its end."""
        folder = self.run.folder
        if folder is None or self.states is None or (self.step == self.begun and not last):
            return
        extra = {"computed_in": short_name(self.dtype), "best": self.best, "watch": self.watch.state_dict()}
        weights = {name: whole(t) for name, t in self.shown.state_dict().items()}

        def also() -> None:
            checkpoint.save(self.model, folder / MODEL, weights)

        if self.step == self.begun:
            # the state exists, but the run may have been killed, or the disk full, before its model was written
            if self.keeps and not holds(folder / MODEL, weights):
                also()
            return

        self.states.save(self.step, self.trained, self.facts, extra, self.feed.state(), also)
        if last:
            self.states.finish()

    def _put_back(self) -> None:
        """The weights that are the result into the model that was given."""
        if self.shown is not self.model:
            self.model.to(self.device)
            self.model.load_state_dict({name: whole(t) for name, t in self.shown.state_dict().items()})

    def _evaluated(self) -> dict[str, float]:
        """Held-out measures of the result so far, each process doing its share; keeps the best model."""
        model = self.shown
        if self.trainee.sharded:
            self._put_back()
            model = self.model
        row = {
            f"{pattern} {key}": value
            for pattern, samples in self.evaluation.items()
            for key, value in measured(model, pattern, samples, self.processes).items()
        }
        name = self.recipe.best
        if name in row and (
            self.best is None or (row[name] < self.best if name.endswith(" loss") else row[name] > self.best)
        ):
            weights = {name: whole(t) for name, t in self.shown.state_dict().items()}
            kept = True
            try:
                if self.keeps:
                    checkpoint.save(self.model, self.run.folder / BEST, weights)  # type: ignore[operator]
            except (OSError, CheckpointError) as error:
                kept = False
                warnings.warn(f"fit: the best model, of step {self.step}, could not be kept ({error})", stacklevel=3)
            if self.processes.gather(kept)[0]:  # if it was not saved, a later and worse model is still better than none
                self.best = row[name]
        return row

    def _note(self, row: dict[str, Any]) -> None:
        self.run.history.append(row)
        if self.keeps:
            add_rows(self.run.folder / LOG, [row])  # type: ignore[operator]
        if self.processes.rank == 0:
            for tracker in self.trackers:
                tracker(row)

    def _say_what(self, threads: int) -> None:
        if self.quiet:
            return
        recipe, count = self.recipe, self.processes.count
        parameters = sum(p.numel() for p in self.model.parameters())
        each = f"{recipe.packs} x {recipe.tokens} tokens" if recipe.tokens else f"{recipe.batch} samples"
        print(
            f"fit: {parameters:,} parameters, {recipe.steps} steps of {each} on {self.device.type} "
            f"({threads} {'thread' if threads == 1 else 'threads'}) in {short_name(self.dtype)} ({self.why})"
            + (f", {count} processes ({recipe.parallel})" if count > 1 else "")
            + (f", resuming at step {self.step}" if self.step else "")
        )
