"""`fit`: the training loop, from top to bottom.

data sets --Batches (workers)--> packed streams --model.loss--> backward --> AdamW --> averaged weights --> run folder
"""

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from multimodal.checkpoint import RUN, check_room, declarations, recover
from multimodal.data import Batches, Samples, check_samples, kept_generators
from multimodal.declare import override
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.stream import Stream
from multimodal.train.memory import keep_freed_memory
from multimodal.train.recipe import Recipe, choose_device, choose_precision, make_optimizer
from multimodal.train.report import bar, draw_curves
from multimodal.train.state import load_state, save_state

MODEL = RUN
STATE, LOG, CURVES, RECIPE = "state", "log.jsonl", "curves.png", "recipe.json"


@dataclass
class Run:
    """What a training run did: rows of {"step", "loss", ...}, where it is kept, and whether it went to its end."""

    folder: Path | None
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def last(self, key: str) -> Any:
        """The newest value of a column, such as 'loss' or 'image -> label exact'."""
        return next(row[key] for row in reversed(self.history) if key in row)


def fit(
    model: Model,
    data: Mapping[str, Samples],
    recipe: Recipe | None = None,
    *,
    evaluation: Mapping[str, Samples] | None = None,
    mix: Mapping[str, float] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train `model` in place on data sets by task: {"image -> label": samples}.

    recipe and settings: a Recipe, or changes to it by name (`steps=1500, lr=3e-4`). evaluation: held-out data by task. mix: the
    tasks' shares of each batch, equal unless given.
    folder: keeps the model, a state to resume from, the log and a picture of the curves. resume: go on from that state if
    there is one. Ctrl-C ends after the current step, with everything saved.

    Raises:
        ConfigError, TaskError, CheckpointError: before anything is trained. FloatingPointError: the loss is not finite.
    """
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    if not isinstance(data, Mapping):
        raise ConfigError(f"fit: data is {type(data).__name__}; give data by task, as in {{'image -> label': samples}}")
    recipe = override(recipe or Recipe(), **settings)
    run = Run(Path(folder) if folder is not None else None)
    device = choose_device(recipe.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype, why = choose_precision(recipe.precision, device)
    batches = Batches(model.packer, data, batch=recipe.batch, accumulate=recipe.accumulate, seed=recipe.seed, mix=mix)
    for pattern, samples in (evaluation or {}).items():
        model.packer.check_task(pattern)
        check_samples("evaluation", pattern, samples)
        with kept_generators():
            model.packer([(pattern, samples[0])], names=["held-out sample 0"])

    model.to(device).train()
    optimizer = make_optimizer(model, recipe, device)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(recipe.steps, 2),  # of a single step it would warn that there is nothing to anneal
        lr_min=recipe.lr * recipe.final_lr,
        warmup_t=round(recipe.steps * recipe.warmup),
        warmup_prefix=False,
        t_in_epochs=False,
    )
    ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    averaged = ema.module if ema else None
    torch.manual_seed(recipe.seed)

    facts = {
        **{
            part: _plain(value) for part, value in declarations(model).items() if part != "seed"
        },  # weights are in the state
        "recipe": _plain(recipe.config()),
        "data": {pattern: len(samples) for pattern, samples in data.items()},
        "mix": dict(mix or {}),
    }
    start = 0
    if run.folder is not None:
        recover(run.folder / STATE)
        check_room(run.folder / MODEL)
        if not resume:
            _make_room(run.folder, quiet)
        if resume and (run.folder / STATE).is_dir():
            start, saved = load_state(run.folder / STATE, model=model, optimizer=optimizer, ema=averaged, facts=facts)
            dtype, why = getattr(torch, saved["computed_in"]), "as before"
            run.history = [row for row in _read_log(run.folder / LOG) if row["step"] <= start]
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / RECIPE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _write_log(run.folder / LOG, run.history)
    threads = _threads_beside(recipe.workers) if device.type == "cpu" else torch.get_num_threads()
    if not quiet:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"fit: {parameters:,} parameters, {recipe.steps} steps of {recipe.batch} samples on {device.type} "
            f"({threads} {'thread' if threads == 1 else 'threads'}) in {str(dtype).removeprefix('torch.')} ({why})"
            + (f", resuming at step {start}" if start else "")
        )

    def keep(step: int) -> None:
        if run.folder is not None:
            kept = {**facts, "computed_in": str(dtype).removeprefix("torch.")}
            save_state(run.folder / STATE, step=step, model=model, optimizer=optimizer, ema=averaged, facts=kept)
            (averaged or model).save(run.folder / MODEL)

    step = start
    loader = batches.loader(start, recipe.steps, recipe.workers)
    with _asked_to_stop() as asked, bar(recipe.steps, start, quiet) as show, _cores_shared(threads):
        clock, tokens = time.perf_counter(), 0
        for streams in loader:
            schedule.step_update(step)
            row = _step(model, streams, optimizer, recipe, dtype, device, step)
            step += 1
            if ema:
                ema.update(model, step=step)
            tokens += sum(len(stream) for stream in streams)
            due = recipe.evaluate_every and step % recipe.evaluate_every == 0
            seconds = time.perf_counter() - clock
            row = {"step": step, **row, "lr": optimizer.param_groups[0]["lr"], "tokens_per_s": round(tokens / seconds)}
            if due and evaluation and step < recipe.steps:
                row |= _evaluate_all(averaged or model, evaluation)
            _note(run, row)
            show(row)
            if asked.is_set() or step == recipe.steps:
                break
            if recipe.checkpoint_every and step % recipe.checkpoint_every == 0:
                keep(step)
    run.finished = step == recipe.steps
    keep(step)  # the raw weights, to resume from, before the averaged ones become the model
    if averaged is not None:
        model.load_state_dict(averaged.state_dict())
    model.eval()
    if evaluation and run.finished and not (start == recipe.steps and "loss" not in run.history[-1]):
        _note(run, {"step": step, **_evaluate_all(model, evaluation)})
    if run.folder is not None and run.history:
        draw_curves(run.history, run.folder / CURVES)
    if not run.finished and not quiet:
        where = f"; everything is kept in {run.folder}, and resume=True goes on from there" if run.folder else ""
        print(f"fit: stopped after step {step} of {recipe.steps}{where}")
    return run


def _step(
    model: Model,
    streams: list[Stream],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    step: int,
) -> dict[str, Any]:
    """One optimiser step over its micro-batches; every real target of a task weighs the same, wherever it was packed."""
    counts: dict[str, int] = {}
    for stream in streams:
        for pattern, reading in stream.readings.items():
            counts[pattern] = counts.get(pattern, 0) + reading.count
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for stream in streams:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(stream.to(device), counts=counts)
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
    loss_value = float(total)
    if not math.isfinite(loss_value) or not math.isfinite(float(norm)):
        raise FloatingPointError(
            f"fit: the loss is {loss_value} (gradient norm {float(norm)}) at step {step}; lower lr={recipe.lr}, "
            f"or look at that batch: Batches(...)[{step}] makes it again"
        )
    optimizer.step()
    return {"loss": loss_value, "grad_norm": float(norm)}


def evaluate(model: Model, task: str, samples: Samples, *, batch: int = 64) -> dict[str, float]:
    """Mean loss of a real target in nats, and the share of answers that are exactly right (by `predict`)."""
    model.packer.check_task(task)
    check_samples("evaluate", task, samples)
    pattern = model.packer.patterns[task]
    written = model.packer.tokenizers[pattern.writes.kind]
    total, count, right = 0.0, 0, 0
    for start in range(0, len(samples), batch):
        part = [samples[i] for i in range(start, min(start + batch, len(samples)))]
        stream = model.pack(task, part, first=start)
        with model.resting():
            total += float(model.losses(stream)[task])
        count += stream.readings[task].count
        longest = max(stream.readings[task].target_lengths) + 8  # a longer answer is wrong anyway
        for sample, answer in zip(part, model.generate(task, part, max_tokens=longest), strict=True):
            right += answer.value == written.decode(written(sample[pattern.answer]))
    return {"loss": total / count, "exact": right / len(samples)}


def _evaluate_all(model: Model, evaluation: Mapping[str, Samples]) -> dict[str, float]:
    return {
        f"{pattern} {key}": value
        for pattern, samples in evaluation.items()
        for key, value in evaluate(model, pattern, samples).items()
    }


def _threads_beside(workers: int) -> int:
    """Threads to compute with while workers prepare data: more threads than free cores wait for each other at every product."""
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - workers))


@contextmanager
def _cores_shared(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a step is never cut in two; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _plain(value: Any) -> Any:
    """The value after a trip through JSON."""
    return json.loads(json.dumps(value))


def _note(run: Run, row: dict[str, Any]) -> None:
    run.history.append(row)
    if run.folder is not None:
        with (run.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed while it wrote
            break
    return rows


def _write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    aside = path.with_name(path.name + ".writing")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


def _make_room(folder: Path, quiet: bool) -> None:
    """Move a run that is already in the folder to the first free name beside it; nothing is written over."""
    if not any((folder / name).exists() for name in (STATE, MODEL, LOG)):
        return
    free = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    os.replace(folder, free)
    if not quiet:
        print(f"fit: the run that was in {folder} is now in {free}")
