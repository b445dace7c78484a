"""`fit`: the training loop, from top to bottom.

data --Batches or Packs (workers)--> packed streams --Network.loss, backward--> optimiser --> averaged weights --> run folder
"""

import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from multimodal import checkpoint
from multimodal.checkpoint import check_room, declarations, holds, put_weights, read_weights, short_name
from multimodal.core import compile_blocks, recompute
from multimodal.data import Bad, Batch, Packs, Samples, Source, StuckError, declared_sources, is_indexed
from multimodal.declare import override, plain
from multimodal.files import check_fields, write_atomic
from multimodal.model import Model
from multimodal.notebook import run_html
from multimodal.process_state import preserved_state
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.train import precision
from multimodal.train.callbacks import CallbackError, Callbacks, View, as_callbacks
from multimodal.train.consistency import equal_in_all_processes, settings_of
from multimodal.train.display import bar, draw_curves, environment, is_held_out, write_csv
from multimodal.train.embedding_cache import cached, check_cacheable
from multimodal.train.evaluation import evaluate_share
from multimodal.train.freezing import frozen, set_modes
from multimodal.train.loaders import check_evaluation, make_dataset
from multimodal.train.optimizer import make_optimizer, rate
from multimodal.train.processes import ParallelModel, Processes, connected_processes, process_count
from multimodal.train.recipe import MAY_CHANGE, Recipe, choose_device, choose_precision
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
    move_old_run,
    read_rows,
    write_rows,
)
from multimodal.train.runtime import asked_to_stop, cores_shared, keep_freed_memory, threads_beside
from multimodal.train.spikes import SpikeWatch, count_targets, save_spike
from multimodal.train.split import check_split
from multimodal.train.state import Checkpoints, TrainingState
from multimodal.train.stopping import BestSoFar

Tracker = Callable[[Mapping[str, Any]], Any]
FEWEST_STEPS = 50  # of a run in which the faster precision is measured; in a shorter one that costs more than it saves


@dataclass
class Run:
    """The result of a training run. `repr` gives one line; `history` has every row.

    folder: the run folder; None: the run was not saved.
    history: a row {"step", "loss", ...} for each report. What is measured during training on held-out data is in the row of its
        step; what is measured at the end is a last row of its own, without "loss".
    finished: whether all steps were done, or it ended early.
    ended: why it ended before its last step; "": it did not.
    best_step: the step of the best evaluation, whose weights the model has, with `patience`; None: the model is the last one.
    bad: the broken samples that were left out, each with its reason.

    Examples:
        >>> run = mm.fit(model, {"image -> label": samples}, steps=5, batch=4, quiet=True)
        >>> run.last("loss") == run.history[-1]["loss"]
        True
    """

    folder: Path | None
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    ended: str = ""
    best_step: int | None = None
    bad: list[Bad] = field(default_factory=list)

    def last(self, key: str) -> Any:
        """The newest value of a column, such as 'loss' or 'image -> label exact'."""
        return next(row[key] for row in reversed(self.history) if key in row)

    def __repr__(self) -> str:
        # the last training loss and the last value of each held-out measure: later rows replace earlier ones
        last = {key: value for row in self.history for key, value in row.items() if key == "loss" or is_held_out(key)}
        parts = [f"{self.history[-1]['step']} steps" if self.history else "no steps"]
        parts += [f"{key} {value:.4f}" for key, value in last.items()]
        parts += [] if self.finished else ["not finished"]
        parts += ["ended early"] if self.ended else []
        parts += [f"{len(self.bad)} broken samples"] if self.bad else []
        parts += [] if self.folder is None else [str(self.folder)]
        return f"Run({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """For notebooks: the summary, the curve of the loss and the last rows."""
        return run_html(repr(self), self.history)


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
    callbacks: Iterable[Any] = (),
    quiet: bool = False,
    go_on: str = "call fit(..., resume=True) with the same arguments",
    **settings: Any,
) -> Run:
    """Train `model` in place on data by task: {"image -> label": samples}.

    recipe and settings: a Recipe, or changes to it by name (`steps=1500, lr=3e-4`). evaluation: held-out data by task. mix: weights
    of the tasks, in whose ratio samples are drawn, equal unless given; a number is a temperature: len ** (1 / temperature).
    folder: where the model, states to resume from, the log and the curves are saved; None: nowhere. resume: load the newest state
    in the folder if there is one. trackers: functions that are called with each row of the log. callbacks: objects that are called
    in a run, see `multimodal.train.Callback`. quiet: print nothing. go_on: how to resume, for the message about a stopped run.

    Ctrl-C and SIGTERM end the run after the current step, with everything saved; a second one ends it at once. Started by torchrun
    or `multimodal train --processes`, it trains in all processes together, after they have compared settings, data and weights.

    Random generators, number of threads and other settings of the process are restored afterwards, with one exception: on Linux,
    training on a CPU tells the C library to keep freed memory for the next step, which cannot be undone. If MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_MAX_ or GLIBC_TUNABLES is set, that setting is left alone.

    Raises:
        ConfigError, TaskError, CheckpointError: before anything is trained. FloatingPointError: the loss is not finite.
        MediaError: more broken samples than max_bad. StreamError: a data worker died. CallbackError: a callback or tracker failed.

    Examples:
        >>> run = mm.fit(model, {"image -> label": samples}, steps=5, batch=4, lr=1e-3, folder="runs/shapes", quiet=True)
        >>> run.finished
        True
    """
    if isinstance(settings.get("cache"), Path):
        settings["cache"] = str(settings["cache"])
    recipe = override(recipe or Recipe(), **settings)
    given = {"evaluation": evaluation, "mix": mix, "folder": folder, "resume": resume, "quiet": quiet, "go_on": go_on}
    return train(model, data, recipe, trackers=trackers, callbacks=callbacks, **given)


def train(
    model: Model,
    data: Mapping[str, Source],
    recipe: Recipe,
    *,
    evaluation: Mapping[str, Samples] | None = None,
    mix: Mapping[str, float] | float | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    trackers: Iterable[Tracker] = (),
    callbacks: Iterable[Any] = (),
    quiet: bool = False,
    go_on: str = "",
    rates: Callable[[Recipe, int], float] | None = None,
) -> Run:
    """`fit`, with another function for the learning rate of a step; None: that of the recipe's schedule."""
    _check_call(model, data, evaluation, folder, resume)
    called = as_callbacks(trackers, callbacks)
    recipe.check_use(folder=folder is not None, evaluation=bool(evaluation))
    if recipe.cache:
        check_cacheable(model, recipe.freeze)
    check_split(model, recipe, process_count())
    device = choose_device(recipe.device)
    if device.type == "cpu":
        keep_freed_memory()
    was_training = model.training
    training: _Training | None = None
    try:
        with (
            preserved_state(draws=True),
            frozen(model, recipe.freeze),
            cached(model, recipe.cache) if recipe.cache else nullcontext() as cache,
            connected_processes(device, recipe.tensor_parallel, recipe.context_parallel) as processes,
        ):
            try:
                training = _Training(model, data, recipe, evaluation or {}, mix, folder, resume, processes, quiet)
                training.add_callbacks(called)
                training.go_on, training.rates = go_on, rates
                training.start(resume)
                training.train()
                training.finish()
                if cache is not None and not training.quiet:
                    print(
                        f"fit: {cache.computed:,} values passed a frozen tower, {cache.read:,} were in {recipe.cache}"
                    )
            finally:
                recompute(model, False)
                if training is not None:
                    training.join()
                    training.parallel.release()
                    if processes.count > 1:
                        gc.collect()
                    if training.lock:
                        training.lock.close()
    except BaseException as error:
        # a finished training has put the model into evaluation mode, and an error after that leaves it there
        if training is None or not training.finished or isinstance(error, CallbackError):
            model.train(was_training)
        raise
    assert training is not None
    return training.run


def _check_call(model: Any, data: Any, evaluation: Any, folder: Any, resume: bool) -> None:
    """Raise a ConfigError for arguments of wrong types."""
    if not isinstance(model, Model):
        raise ConfigError(f"fit: model is {type(model).__name__}, wanted a Model")
    if model.quantization is not None:
        raise ConfigError(
            "fit: the model is quantized, and rounded weights have no gradients; train the original, and quantize the result"
        )
    if not isinstance(data, Mapping):
        raise ConfigError(f"fit: data is {type(data).__name__}; give data by task, as in {{'image -> label': samples}}")
    if not isinstance(evaluation, (Mapping, type(None))):
        raise ConfigError(
            f"fit: evaluation is {type(evaluation).__name__}; give held-out data by task, as the data are"
        )
    if not isinstance(folder, (str, Path, type(None))):
        raise ConfigError(f"fit: folder is {type(folder).__name__}, wanted a path")
    if resume and folder is None:
        raise ConfigError("fit: resume=True resumes the run in a folder, and none was given; give folder=")


class _Training:
    """One call of `fit`: `start`, `train`, `finish` and `join`, in this order."""

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
        self.out = self.run.folder if processes.rank == 0 else None  # the run folder, in the process that writes it
        self.go_on, self.finished = "", False
        self.rates: Callable[[Recipe, int], float] | None = None
        self.lock: Any = None
        self.checkpoints: Checkpoints | None = None
        self.device = processes.device(choose_device(recipe.device))
        with equal_in_all_processes(processes) as settings:
            self.dataset = make_dataset(model, data, recipe, mix, processes)
            epoch = self.dataset.epoch
            self.recipe = recipe = recipe.in_steps(epoch).evaluated_each(epoch)
            check_evaluation(model, evaluation, recipe)
            sources: dict[str, Any] = dict(data)
            lengths = {pattern: len(found) if is_indexed(found) else None for pattern, found in sources.items()}
            sizes: dict[str, Any] = {"data": lengths}
            shares = {"mix": plain(mix if isinstance(mix, (int, float)) else dict(mix or {}))}
            shares["sources"] = declared_sources(sources)
            if processes.count > 1:
                sizes |= {"evaluation": {pattern: len(samples) for pattern, samples in evaluation.items()}}
                settings |= {"folder": None if folder is None else str(folder), "resume": bool(resume)}
                settings |= settings_of(model, recipe, self.device, self.dataset, {**sizes, **shares})
        self.dtype, self.dtype_reason = choose_precision(recipe.precision, self.device)
        # the name under which the faster precision will be remembered; None: it is known
        self.unmeasured: str | None = None
        model.to(self.device if recipe.parallel == "ddp" else "cpu")
        set_modes(model, recipe.freeze)
        recompute(model, recipe.activation_checkpointing)
        # packs are filled whatever the number of processes is, so that there each pack is compared by itself
        self.parallel = ParallelModel(
            model, processes, recipe.parallel, self.device, self.dtype, compares=not recipe.tokens
        )
        if recipe.compile:
            compile_blocks(self.parallel.model)
        self.optimizer = make_optimizer(
            self.parallel.model, recipe, self.device, self.parallel.sharded, self.parallel.divided.names
        )
        self.ema = self.parallel.make_ema(recipe.ema) if recipe.ema else None
        averaged = self.ema.module if self.ema else None
        self.state = TrainingState(self.parallel.model, self.optimizer, averaged, self.parallel.order)
        self.result = averaged or self.parallel.model  # whose weights become those of the given model
        self.step, self.bad = 0, set[tuple[str, str]]()
        self.best = BestSoFar.of(recipe)
        self.best_weights: dict[str, torch.Tensor] | None = None  # where there is no folder for them
        self.spikes = SpikeWatch(spike=recipe.spike)
        self.resumed_at = -1  # the step of the state that this run was resumed from
        # a contrastive head compares the pairs of one micro-batch, so there its size changes the loss
        fixed = {"accumulate"} if any(model.packer.head(pattern).smallest_batch > 1 for pattern in data) else set()
        # what must be equal when a run is resumed
        self.metadata = {
            "adapters": None,
            # without the seed: weights are in the state
            **{part: plain(value) for part, value in declarations(model).items() if part != "seed"},
            "recipe": {
                name: value for name, value in plain(recipe.config()).items() if name not in MAY_CHANGE or name in fixed
            },
            "data": sizes["data"],
            **shares,
        }

        self.add_callbacks([])

    def add_callbacks(self, callbacks: list[Any]) -> None:
        """Let these be called, in the first process."""
        view = View(self.parallel.model, self.recipe, self.run.folder, self.quiet)
        self.callbacks = Callbacks(callbacks if self.processes.rank == 0 else [], view)

    def start(self, resume: bool) -> None:
        """Create the run folder, or load the newest intact state in it."""
        folder = self.run.folder
        if folder is None:
            return
        self.checkpoints = Checkpoints(folder, self.recipe.keep, self.processes)
        newest = None
        if self.out:
            check_folder(folder)
            check_room(folder / MODEL)
            check_room(folder / BEST)
            folder.resolve().mkdir(parents=True, exist_ok=True)  # a link may lead to a folder that does not exist yet
            self.lock = lock(folder)  # before anything is read or moved: another run may be at work here
            newest = self.checkpoints.latest() if resume else None
            if newest is None:
                move_old_run(folder, self.quiet)
        # only process 0 has looked, and all must load the same state
        newest = self.processes.all_gather(newest)[0]
        if newest is not None:
            self._load(newest, folder)
        if self.out:
            held_out = {pattern: len(samples) for pattern, samples in self.evaluation.items()}
            config = {**self.metadata, "held_out": held_out, "recipe": plain(self.recipe.config())}
            config["processes"] = self.processes.count
            # written first, because it shows that a run wrote the other files
            write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            write_atomic(folder / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
            (folder / CURVES).unlink(missing_ok=True)  # drawn last of all: it shows that a run is finished
            write_rows(folder / LOG, self.run.history)

    def _load(self, newest: Path, folder: Path) -> None:
        """Load a state, and the rows of the log and the broken samples up to its step.

        Raises:
            CheckpointError: the state is damaged, or of a run with other settings.
        """
        assert self.checkpoints is not None
        saved = self.checkpoints.load(newest, self.state, self.metadata, parallel=self.recipe.parallel)
        self.step, self.dtype, self.dtype_reason = int(saved["step"]), getattr(torch, saved["computed_in"]), "as before"
        self.parallel.dtype = self.dtype
        self.resumed_at = self.step if "data_state" in saved else -1  # a state of version 0.1 is written anew
        # the folder is not trusted, and these parts of state.json were not checked before
        try:
            if self.best:
                self.best.load_state_dict(saved.get("best"), saved.get("stopping"))
            self.run.ended = str(saved.get("ended", ""))
            self.callbacks.restore(saved.get("callbacks", []))
            if "watch" in saved:
                self.spikes.load_state_dict(saved["watch"])
            if "data_state" in saved:
                self.dataset.restore(saved["data_state"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{newest}: its state.json does not say where to go on: {type(error).__name__}: {str(error)[:300]}"
            ) from error
        # steps after the state are trained again, so their rows go
        self.run.history = [row for row in read_rows(folder / LOG, numbers=True) if row["step"] <= self.step]
        broken = [row for row in read_rows(folder / BROKEN) if row["step"] <= self.step]
        for row in broken:
            check_fields(folder / BROKEN, row, {"task": str, "sample": str, "error": str}, CheckpointError)
        self.run.bad = [Bad(row["task"], row["sample"], row["error"]) for row in broken]
        self.bad = {(bad.task, bad.sample) for bad in self.run.bad}
        if self.out and (folder / BROKEN).is_file():
            write_rows(folder / BROKEN, broken)

    def train(self) -> None:
        """Train the steps that are left, or until a signal asks to stop."""
        recipe = self.recipe
        threads = threads_beside(recipe.workers) if self.device.type == "cpu" else torch.get_num_threads()
        self._recall_precision(threads)
        self._print_summary(threads)
        start, tokens = self.step, 0
        self.callbacks.call("on_start", step=self.step, row=dict(self.run.history[-1]) if self.run.history else {})
        before_s = self.run.last("seconds") if any("seconds" in row for row in self.run.history) else 0.0
        with (
            asked_to_stop() as asked,
            bar(recipe.steps, start, self.quiet) as show,
            cores_shared(threads),
            self.dataset.loader(start, recipe.steps, recipe.workers, asked.is_set) as batches,
        ):
            clock = time.perf_counter()
            while self.step < recipe.steps and not self.run.ended:
                if self.processes.count == 1 and self.callbacks.failed:  # in on_start
                    break
                try:
                    batch = next(batches)
                except StuckError:
                    # a single process has changed nothing since its last step, and its batches depend only on the step
                    if self.processes.count > 1 or isinstance(self.dataset, Packs):
                        raise
                    break
                counts, totals = self._all_reduce_counts(batch, asked.is_set() or bool(self.callbacks.failed))
                if self.unmeasured:
                    paused = time.perf_counter()
                    self._measure_precision(batch, counts)
                    clock += time.perf_counter() - paused
                lr = (self.rates or rate)(recipe, self.step)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
                row = self._train_step(batch, counts)
                self.step += 1
                if self.ema:
                    self.ema.update(self.parallel.model, step=self.step)
                tokens += totals["tokens"]
                seconds = time.perf_counter() - clock
                row = {
                    "step": self.step,
                    **({"epoch": round(self.step / epoch, 4)} if (epoch := self.dataset.epoch) else {}),
                    **row,
                    "lr": lr,
                    "tokens_per_s": round(tokens / seconds),
                    "seconds": round(before_s + seconds, 3),
                }
                if batch.filled is not None:
                    row["filled"] = totals["filled"] / self.processes.data_count
                # after the last step `finish` evaluates, unless that model has to be compared with the best one
                measured, due = {}, recipe.evaluate_every and self.step % recipe.evaluate_every == 0
                if (due and self.step < recipe.steps) or (recipe.patience and self.step == recipe.steps):
                    paused = time.perf_counter()
                    measured = self._evaluate()
                    row |= measured
                    clock += time.perf_counter() - paused  # the speed is that of training
                self._log(row)
                show(row)
                if measured:
                    paused = time.perf_counter()
                    self.callbacks.call("on_evaluation", model=self._measured_model())
                    self.callbacks.view.model = self.parallel.model
                    clock += time.perf_counter() - paused
                # several processes stop after the same step, so what counts is what all of them know
                alone, failed, wish = self.processes.count == 1, self.callbacks.failed, self.callbacks.view.asked
                if self.step < recipe.steps:
                    if self.best and self.best.worn_out:
                        self.run.ended = f"{self.best.waited} evaluations had no better {self.best.name}"
                    elif (wish and not failed) if alone else totals["end"]:
                        self.run.ended = self.processes.all_gather(wish)[0]
                if self.run.ended:
                    break
                stop = asked.is_set() or failed if alone else totals["stop"] > 0
                if stop or self.step == recipe.steps:
                    break
                if recipe.checkpoint_every and self.step % recipe.checkpoint_every == 0:
                    self._save(last=False)

    def finish(self) -> None:
        """Save the last state, copy the result into the given model, evaluate it, and write table and curves."""
        self.run.finished = self.step == self.recipe.steps or bool(self.run.ended)
        # resumed after the last step: the last row of the log is that of the evaluation
        evaluated = self.run.finished and self.run.history and "loss" not in self.run.history[-1]
        best = self._read_best() if self.run.finished and self.recipe.patience else None
        try:
            with asked_to_stop():  # a signal now must not cost the last state
                self._save(last=True, best=best)  # the raw weights, to resume from, before others become the model
        finally:
            self._copy_result(best)
            self.model.eval()
            self.finished = True
        if self.evaluation and self.run.finished and not evaluated:
            of_best = {} if self.run.best_step is None else {"best_step": self.run.best_step}
            measures = self.best.row if self.best and of_best else self._evaluate()
            self._log({"step": self.step, **of_best, **measures})
            self.callbacks.call("on_evaluation", model=self.model)
            if not self.quiet:
                print("fit: held out: " + ", ".join(f"{key} {value:.4f}" for key, value in measures.items()))
        if self.out and self.run.history:
            write_rows(self.out / LOG, self.run.history)
            write_csv(self.run.history, self.out / TABLE)
            draw_curves(self.run.history, self.out / CURVES)
        self.callbacks.call("on_end", model=self.model, finished=self.run.finished)
        if not self.quiet and self.run.ended:
            print(f"fit: ended after step {self.step} of {self.recipe.steps}: {self.run.ended}")
        if not self.quiet and self.best and self.run.best_step is not None:
            print(
                f"fit: the model is that of step {self.run.best_step}, whose {self.best.name} is {self.best.value:.4f}"
            )
        if not self.run.finished and not self.quiet:
            where = f"; everything is saved in {self.run.folder}. To go on: {self.go_on}" if self.out else ""
            print(f"fit: stopped after step {self.step} of {self.recipe.steps}{where}")
        self.callbacks.raise_failed(f"; everything is saved in {self.run.folder}" if self.out else "")

    def join(self) -> None:
        """Wait for the thread that writes the last state; the folder is locked until then."""
        if self.checkpoints is not None and self.checkpoints.thread is not None:
            self.checkpoints.thread.join()

    def _all_reduce_counts(self, batch: Batch, asked: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Sums over all processes: by task what its loss is divided by; and tokens, filled shares, broken samples, wishes to stop.

        Raises:
            MediaError: more broken samples than max_bad.
        """
        new = [bad for bad in batch.bad if (bad.task, bad.sample) not in self.bad]
        patterns = list(self.model.tasks)
        counts = dict.fromkeys(patterns, 0) | count_targets(batch.streams, self.model)
        tokens = sum(len(stream) for stream in batch.streams)
        end = bool(self.callbacks.view.asked)
        # one tensor, so that a step waits for the other processes once
        local = torch.tensor([*counts.values(), tokens, batch.filled or 0.0, len(new), asked, end], dtype=torch.float64)
        if not self.processes.leads:
            local[:-2] = 0  # the samples of another process
        sums = self.processes.all_reduce(local).tolist()
        totals: dict[str, float] = dict(
            zip(("tokens", "filled", "bad", "stop", "end"), sums[len(patterns) :], strict=True)
        )
        if totals["bad"]:
            self._add_broken(new)
        return {p: int(n) if n == int(n) else n for p, n in zip(patterns, sums, strict=False)}, totals

    def _add_broken(self, new: list[Bad]) -> None:
        """List new broken samples of all processes.

        Raises:
            MediaError: more broken samples than max_bad.
        """
        found = {(bad.task, bad.sample): bad for some in self.processes.all_gather(new) for bad in some}
        found = {key: bad for key, bad in found.items() if key not in self.bad}
        self.bad |= found.keys()
        self.run.bad += found.values()
        if self.out:
            add_rows(self.out / BROKEN, [{"step": self.step + 1, **asdict(bad)} for bad in found.values()])
        if len(self.bad) > self.recipe.max_bad:
            where = f", listed in {self.run.folder / BROKEN}" if self.run.folder else ""
            raise MediaError(
                f"fit: {len(self.bad)} samples are broken{where}, and max_bad={self.recipe.max_bad} may be; the last one: "
                f"{self.run.bad[-1].error}"
            )

    def _train_step(self, batch: Batch, counts: Mapping[str, float]) -> dict[str, Any]:
        """One optimiser step over its micro-batches; every real target of a task weighs the same, wherever it was packed."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, (stream, number) in enumerate(zip(batch.streams, batch.numbers, strict=True)):
            # what is dropped out is a function of the seed and of the micro-batch, in whichever process that is
            torch.manual_seed(crc32(f"{self.recipe.seed}/dropout/{self.step}/{number}".encode()))
            total += self.parallel.backward(stream.to(self.device), counts, last=i == len(batch.streams) - 1)
        if self.processes.count > 1:
            self.parallel.drop_unused_gradients()
        norm = self.parallel.clip_gradients(self.recipe.clip)
        # the only wait for the device in a step: nothing may change weights before these are known
        loss, norm = torch.stack([self.processes.sum_over_samples(total), norm]).tolist()
        row: dict[str, Any] = {"loss": loss, "grad_norm": norm}
        why = self.spikes.why(loss, norm)
        if why is None:
            self.optimizer.step()
        else:
            self._skip_step(why, batch, counts, finite=math.isfinite(loss) and math.isfinite(norm))
            row["left_out"] = 1
        return row

    def _recall_precision(self, threads: int) -> None:
        """Take the precision that was faster before at these shapes, or note that it has to be measured.

        A long run of one process on a CPU with bfloat16 is worth it. A cache of a tower has the vectors of one precision.
        """
        recipe = self.recipe
        asked = recipe.precision != "auto" or self.step or recipe.compile or recipe.cache or recipe.steps < FEWEST_STEPS
        if asked or self.processes.count > 1 or self.device.type != "cpu" or not precision.may_be_faster():
            return
        shapes = recipe.batch, recipe.tokens, recipe.packs, recipe.accumulate, recipe.activation_checkpointing
        key = precision.key_of(threads, shapes, plain(declarations(self.model)), recipe.freeze)
        ratio = precision.remembered(key)
        if ratio is None:
            self.unmeasured = key
            self.dtype_reason += "; the faster one is measured first"
        else:
            self.dtype, why = precision.choice(ratio)
            self.parallel.dtype, self.dtype_reason = self.dtype, f"{why}, as measured before"

    def _measure_precision(self, batch: Batch, counts: Mapping[str, float]) -> None:
        """Take the precision in which the gradients of this batch are there first, and remember it; nothing else changes."""
        assert self.unmeasured
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def backward(dtype: torch.dtype) -> None:
            self.parallel.dtype = dtype
            torch.manual_seed(0)
            for stream in batch.streams:
                self.parallel.backward(stream, counts, last=True)
            self.optimizer.zero_grad(set_to_none=True)

        ratio = precision.measure(backward)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self.dtype, self.dtype_reason = precision.choice(ratio)
        self.parallel.dtype = self.dtype
        precision.remember(self.unmeasured, ratio)
        self.unmeasured = None
        if not self.quiet:
            print(f"fit: computes in {short_name(self.dtype)} ({self.dtype_reason})")

    def _skip_step(self, why: str, batch: Batch, counts: Mapping[str, float], *, finite: bool) -> None:
        """Save the batch and the weights of a step with a loss spike, which does not change the weights.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        saved, folder, step = None, self.run.folder, self.step + 1  # as the log counts
        if folder is not None:
            weights = self.parallel.weights()
            rest: dict[str, Any] = {"counts": counts, "names": batch.names, "process": self.processes.rank}
            try:
                if self.processes.leads:
                    saved = save_spike(folder, step, batch.streams, why, None, precision=short_name(self.dtype), **rest)
                if saved and self.out:
                    checkpoint.save(self.model, saved / MODEL, weights)
            except (OSError, CheckpointError) as error:
                warnings.warn(f"fit: the batch of step {step} could not be saved ({error})", stacklevel=3)
        look = (
            f"multimodal replay {saved} shows its samples"
            if saved
            else "its batch is not saved, as there is no run folder or no room"
        )
        if not finite:
            raise FloatingPointError(
                f"fit: step {step}: {why}; {look}; lower lr={self.recipe.lr} if no sample is to blame"
            )
        if not self.quiet:
            print(f"fit: step {step} is left out: {why}; {look}")

    def _save(self, last: bool, best: dict[str, torch.Tensor] | None = None) -> None:
        """Save the state and the model. A full disk is an error only at the end; before that it is a warning.

        best: weights that the model gets instead of those of the last step.
        """
        folder = self.run.folder
        if folder is None or self.checkpoints is None or (self.step == self.resumed_at and not last):
            return
        if self.step == 0:  # an optimiser that has done no step has no state to resume from
            return
        extra = {"computed_in": short_name(self.dtype), "watch": self.spikes.state_dict(), "ended": self.run.ended}
        if self.best:
            extra |= {"best": self.best.value, "stopping": self.best.state_dict()}
        # copied also if there are better ones, as all processes take part in that
        weights = self.parallel.weights(self.result)
        weights = best or weights

        def save_model() -> None:
            checkpoint.save(self.model, folder / MODEL, weights)

        if self.step == self.resumed_at:
            # the state exists, but the run may have been killed, or the disk full, before its model was written
            if self.out and not holds(folder / MODEL, weights):
                save_model()
            return

        extra["callbacks"] = self.callbacks.state()
        self.checkpoints.save(self.step, self.state, self.metadata, extra, self.dataset.state(), save_model)
        if last:
            self.checkpoints.finish()

    def _read_best(self) -> dict[str, torch.Tensor] | None:
        """The weights of the best evaluation; None: there was none, or they are lost."""
        assert self.best is not None
        if self.best.value is None:
            return None
        best = self.best_weights
        if self.run.folder is not None:
            try:
                best = read_weights(self.run.folder / BEST)
            except CheckpointError as error:
                warnings.warn(
                    f"fit: the best model, of step {self.best.step}, is lost ({error}); the last one stays",
                    stacklevel=3,
                )
                return None
        self.run.best_step = self.best.step
        return best

    def _copy_result(self, best: dict[str, torch.Tensor] | None = None) -> None:
        """Copy the weights that are the result, or the best ones, into the given model."""
        if best is not None:
            self.model.to(self.device)
            put_weights(self.model, best, Path(BEST), finite=False)
        elif self.result is not self.model:
            self.model.to(self.device)
            self.model.load_state_dict(self.parallel.weights(self.result))

    def _evaluate(self) -> dict[str, float]:
        """Held-out measures of the result so far, each process on its share of the samples; saves the best model."""
        if self.parallel.sharded:
            self._copy_result()
        model = self._measured_model()
        row = {
            f"{pattern} {key}": value
            for pattern, samples in self.evaluation.items()
            for key, value in evaluate_share(model, pattern, samples, self.processes).items()
        }
        if self.best is not None:
            self._compare(self.best, row)
        return row

    def _measured_model(self) -> Model:
        """The model that `_evaluate` measures."""
        return self.model if self.parallel.sharded else self.result

    def _compare(self, best: BestSoFar, row: dict[str, float]) -> None:
        """Save the model if it is the best so far."""
        value = best.of_row(row, self.evaluation)
        if value is None:
            return
        best.waited += 1
        if not self.processes.all_gather(best.is_better(value))[0]:
            return
        best.waited = 0
        weights = self.parallel.weights(self.result)
        saved = True
        try:
            if self.out:
                checkpoint.save(self.model, self.out / BEST, weights)
        except (OSError, CheckpointError) as error:
            saved = False
            warnings.warn(f"fit: the best model, of step {self.step}, could not be saved ({error})", stacklevel=3)
        # if it was not saved, a later and worse model is still better than none
        if self.processes.all_gather(saved)[0]:
            best.take(value, self.step, row)
            self.best_weights = None if self.run.folder else weights

    def _log(self, row: dict[str, Any]) -> None:
        self.run.history.append(row)
        if self.out:
            add_rows(self.out / LOG, [row])
        if "loss" in row:
            self.callbacks.call("on_step", step=self.step, row=row)
        else:
            self.callbacks.view.row = row

    def _ways(self) -> list[str]:
        """How the processes share the work."""
        divided = {"tensor": self.recipe.tensor_parallel, "context": self.recipe.context_parallel}
        return [self.recipe.parallel, *(f"{name} parallel {count}" for name, count in divided.items() if count > 1)]

    def _print_summary(self, threads: int) -> None:
        if self.quiet:
            return
        recipe, count = self.recipe, self.processes.count
        parameters = sum(p.numel() for p in self.model.parameters())
        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        some = f", of which {learning:,} learn" if learning < parameters else ""
        each = f"{recipe.packs} x {recipe.tokens} tokens" if recipe.tokens else f"{recipe.batch} samples"
        one = "epoch" if recipe.epochs == 1 else "epochs"
        epochs = f"{recipe.epochs:g} {one} = " if recipe.epochs else ""
        print(
            f"fit: {parameters:,} parameters{some}, {epochs}{recipe.steps} steps of {each} on {self.device.type} "
            f"({threads} {'thread' if threads == 1 else 'threads'}) in {short_name(self.dtype)} ({self.dtype_reason})"
            + (f", {count} processes ({', '.join(self._ways())})" if count > 1 else "")
            + (f", resuming at step {self.step}" if self.step else "")
        )
