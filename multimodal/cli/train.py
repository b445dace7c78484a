"""Commands for training: `train` a recipe, `plan` what it needs, `report` on runs, `replay` a step with a loss spike."""

import dataclasses
import io
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from multimodal.cli.arguments import Device, Json, Plugins
from multimodal.cli.loading import import_recipe, load
from multimodal.cli.output import check_folder, print_json, printable, saved
from multimodal.progress import progress_bar

if TYPE_CHECKING:
    from multimodal.count import TrainingPlan
    from multimodal.train import Run
    from multimodal.train.spikes import ReplayRow

SHOWN = 12  # samples that `replay` lists


Repeated = Parameter(negative="")


def train(
    data: str,
    /,
    *,
    read: Annotated[list[str] | None, Repeated] = None,
    write: str | None = None,
    test: str | None = None,
    group: str | None = None,
    time: str | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    no_augment: Annotated[bool, Parameter(negative="")] = False,
    start: str | None = None,
    encoding: str | None = None,
    setting: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    folder: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    processes: int = 1,
    track: Annotated[list[str] | None, Parameter(negative="")] = None,
    tensorboard: Annotated[bool, Parameter(negative="")] = False,
    find_lr: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train on a folder, a table or a data set, or what a Python file describes, and save it. A run that was stopped goes on when
    the same command is given again.

    Of data everything is chosen by the rules of docs/quick.md: what is read, the parts, tokens, core, head and recipe. They are
    looked at first, and the result is measured on a part that was not trained on.

    A Python file defines a function recipe() that returns multimodal.train.job.TrainingJob(model=..., data=..., evaluation=...,
    recipe=Recipe(...)), or a mapping with these names.

    Example: multimodal train photos/

    Example: multimodal train table.csv --read image=file --read text --write label --minutes 10

    Example: multimodal train digits.py --set steps=200 --set core.depth=8 --folder runs/digits

    Parameters
    ----------
    data
        A folder with a sub-folder of pictures or sounds for each class; a .csv, .tsv, .jsonl, .parquet or .xlsx file; hf:NAME; or a
        Python file, which ends in .py.
    read
        A column that is read, or field=column; a field that is called image, audio, series, text, number or category is of this
        kind. Repeat it for more; unless given, all columns that say something.
    write
        The column that is answered, or field=column; unless given, the one called label, class or target.
    test
        The test part, of the same form as the data; unless given, the one that the data name (folders, a column split), else a
        fifth.
    group
        A column; samples of one group, such as a speaker, lie in one part.
    time
        A column of dates or numbers; the latest fifth is the test part.
    minutes
        The time that training may take; 5 unless given.
    seed
        Of the parts, the weights and the order; 0 unless given. Of a Python file: --set seed=1 --set model.seed=1.
    no_augment
        Pictures and sounds are not changed at random in training.
    start
        Trained weights to begin from: a name on the Hugging Face hub such as facebook/dinov2-small, or a folder. Their encoder is
        not trained further, and each value passes it once.
    encoding
        Of a text file that is not UTF-8, such as latin-1.
    setting
        Change a setting: steps=200 (of the Recipe, or a parameter of recipe()), core.depth=8, tokenizers.image.patch=8,
        "tasks.image -> label.weight=2", "mix.image -> label=3", model.seed=1. Repeat it for more.
    folder
        The folder of the run; runs/NAME for NAME.py, photos/ or table.csv unless given.
    resume
        Take a run that went to its end as it is, instead of refusing to train in its folder.
    processes
        Number of processes on this machine, which train together what a Python file describes. On several machines, each runs the
        command through torchrun.
    track
        Also write the log to wandb, mlflow, trackio (with a project: wandb:digits) or tensorboard. Repeat it for more.
    tensorboard
        The same as --track tensorboard: into the run's folder tensorboard.
    find_lr
        Instead of training, suggest a learning rate, by a short training of a copy of the model with a rising rate.
    """
    path = Path(data)
    name = (
        data.removeprefix("hf:").replace(":", "-").rpartition("/")[2] if data.startswith("hf:") else path.resolve().name
    )
    folder = folder or Path("runs", path.stem if path.suffix else name)
    track = list(dict.fromkeys([*(track or []), *(["tensorboard"] if tensorboard else [])]))
    check_folder(folder, "--folder")
    ours = {"read": read, "write": write, "test": test, "group": group, "time": time, "minutes": minutes}
    ours |= {"seed": seed, "no-augment": no_augment or None, "encoding": encoding, "start": start}
    if path.suffix != ".py":
        return _train_on(
            data,
            {name: value for name, value in ours.items() if value is not None},
            setting or [],
            folder,
            resume,
            processes,
            track,
            find_lr,
        )
    from multimodal.shapes import ConfigError

    if given := [name for name, value in ours.items() if value is not None]:
        raise ConfigError(
            f"--{given[0]} is for a folder, a table or a data set; {data} is a Python file, which says all of it (--set changes it)"
        )
    if find_lr:
        if processes != 1:
            raise ConfigError("--find-lr runs in one process; leave --processes out")
        return _find_lr(path, setting or [], folder)
    return _train_recipe(path, setting or [], folder, resume, processes, track)


def _train_on(
    data: str,
    given: dict[str, Any],
    setting: list[str],
    folder: Path,
    resume: bool,
    processes: int,
    track: list[str],
    find_lr: bool,
) -> int:
    """Train on data, by the rules of the quick path."""
    from multimodal.shapes import ConfigError, did_you_mean
    from multimodal.start import quick
    from multimodal.train.launch import STOPPED
    from multimodal.train.run_folder import CURVES, MODEL
    from multimodal.train.trackers import make_tracker

    if find_lr:
        raise ConfigError(
            "--find-lr is for a Python file; of data the rate is chosen by rule (--set lr=1e-3 changes it)"
        )
    if processes != 1:
        raise ConfigError(
            f"--processes {processes}: data are trained on in one process; a Python file (recipe) can be trained in many"
        )
    if not data.startswith("hf:") and not Path(data).exists():
        near = [entry.name for entry in Path(data).parent.iterdir()] if Path(data).parent.is_dir() else []
        raise ConfigError(f"there is no file or folder {data}{did_you_mean(Path(data).name, near)}")
    words = ["multimodal", "train", data]
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    words += [f"--set={change}" for change in setting] + ["--folder", str(folder)]
    words += [f"--track={name}" for name in track]
    trackers = [make_tracker(name, folder) for name in track]
    augment = given.pop("no-augment", None) is None
    found = quick(
        data,
        **given,
        augment=augment,
        settings=setting,
        folder=folder,
        resume=resume,
        trackers=trackers,
        command=shlex.join(words),
    )
    if not found.run.finished:
        return STOPPED
    names = (
        ("model", MODEL),
        ("curves", CURVES),
        ("report", "report/report.html"),
        ("data", "data.html"),
        ("program", "script.py"),
    )
    for name, file in names:
        print(f"{name:<10}{folder / file}")
    print("next")
    for line in found.next_commands:
        print(printable(f"  {line}"))
    return 0


def _train_recipe(
    recipe: Path, setting: list[str], folder: Path, resume: bool, processes: int, track: list[str]
) -> int:
    """Train what a Python file describes, in one process or several."""
    options = [str(recipe), *(f"--set={change}" for change in setting), "--folder", str(folder)]
    options += [f"--track={name}" for name in track]
    from multimodal.train.launch import LAUNCHED, end_with_launcher, launch

    # the launcher runs this command once in each process, where LAUNCHED is set
    if processes != 1 and LAUNCHED not in os.environ:
        command = [sys.executable, "-P", "-m", "multimodal", "train", *options, *(["--resume"] if resume else [])]
        return launch(command, processes)
    end_with_launcher()
    return _train(recipe, setting, folder, resume, options, track)


def _train(recipe: Path, setting: list[str], folder: Path, resume: bool, options: list[str], track: list[str]) -> int:
    from multimodal.train.launch import LAUNCHED, STOPPED
    from multimodal.train.settings import make_job
    from multimodal.train.trackers import make_tracker

    job = make_job(import_recipe(recipe), setting, f"recipe() of {recipe}")
    trackers = [make_tracker(name, folder) for name in track]
    count = int(os.environ.get("WORLD_SIZE", "1"))
    many = ["--processes", str(count)] if count > 1 else []
    command = shlex.join(["multimodal", "train", *options, *many, "--resume"])
    by_torchrun = count > 1 and LAUNCHED not in os.environ
    run = job.run(
        folder,
        resume=resume,
        trackers=trackers,
        go_on="the same torchrun command" if by_torchrun else command,
    )
    if run.finished and os.environ.get("RANK", "0") == "0":  # only the first process prints
        _show(run, folder, "tensorboard" in track)
    return 0 if run.finished else STOPPED


def _find_lr(recipe: Path, setting: list[str], folder: Path) -> int:
    from multimodal.train.rate_finder import find_lr
    from multimodal.train.settings import make_job

    job = make_job(import_recipe(recipe), setting, f"recipe() of {recipe}")
    found = find_lr(job.model, job.data, job.recipe, mix=job.mix, quiet=False)
    picture = saved(".png", found.picture(), "learning-rates", folder)
    if found.suggestion is None:
        print("the loss fell at no rate, so none is suggested: are the data and the model right?")
    else:
        change = [f"--set={change}" for change in [*setting, f"lr={found.suggestion:.1e}"]]
        print(f"lr      {found.suggestion:.1e}")
        print(f"train   {shlex.join(['multimodal', 'train', str(recipe), *change])}")
    print(f"picture {picture}")
    return 0 if found.suggestion is not None else 1


def _show(run: "Run", folder: Path, tensorboard: bool) -> None:
    """Where everything is, and how good it is."""
    from multimodal.train.run_folder import BEST, BOARD, BROKEN, CURVES, LOG, MODEL

    print(f"model   {folder / MODEL}")
    if (folder / BEST).is_dir():
        print(f"best    {folder / BEST}")
    print(f"curves  {folder / CURVES}\nlog     {folder / LOG}")
    if tensorboard:
        print(f"board   tensorboard --logdir {folder / BOARD}")
    if run.bad:
        print(f"broken  {folder / BROKEN}: {len(run.bad)} samples were left out")
    print(f"loss    {run.last('loss'):.4f}")
    for name, value in run.history[-1].items():
        if name.endswith(" exact"):
            print(f"{100 * value:.1f} % exactly right on held-out data: {name.removesuffix(' exact')}")
        elif " R@" in name:
            print(f"{100 * value:.1f} % of held-out pairs: {name}")


def plan(
    recipe: Path,
    /,
    *,
    gpus: int = 1,
    gpu: str = "h100",
    setting: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    samples: int = 256,
    tokens: int | None = None,
    length: int | None = None,
    train_tokens: float | None = None,
    as_json: Json = False,
) -> int:
    """Say what training a recipe needs, without training: parameters, FLOPs, and the memory of each GPU by part.

    The model is made without its weights, so that it may be of any size. Exit code 1: it does not fit; the plan says what would
    make it fit.

    Example: multimodal plan recipe.py --gpus 1024 --gpu h200

    Example: multimodal plan recipe.py --gpus 8 --gpu a100-80 --set parallel=fsdp --train-tokens 300e9

    Parameters
    ----------
    recipe
        The Python file, as of `multimodal train`.
    gpus
        Number of GPUs.
    gpu
        a100-40, a100-80, h100, h200, b200, l40s, rtx4090, t4, or cpu for this machine.
    setting
        Change a setting, as of `multimodal train`: name=value. Repeat it for more.
    samples
        Number of samples of the data to pack, to learn their lengths.
    tokens
        Tokens of each GPU's micro-batch, instead of the recipe's.
    length
        Tokens of a sample, where the data are not there; none are read then.
    train_tokens
        Number of tokens to train on, instead of the recipe's steps.
    """
    from multimodal.count import plan as make_plan
    from multimodal.network import without_weights
    from multimodal.shapes import ConfigError
    from multimodal.train.settings import make_job

    make = import_recipe(recipe)
    if train_tokens is not None and not 1 <= train_tokens < math.inf:
        raise ConfigError(f"--train-tokens {train_tokens:g}: wanted a number of tokens, such as 300e9")
    # the recipe makes its model itself, and its data have to be real
    with without_weights():
        job = make_job(make, setting or [], f"recipe() of {recipe}")
    if train_tokens is not None:
        train_tokens = float(round(train_tokens))
    with progress_bar("packing samples", samples, quiet=as_json or length is not None) as bar:
        found = make_plan(
            job.model,
            job.recipe,
            data=job.data,
            gpus=gpus,
            gpu=gpu,
            mix=job.mix,
            samples=samples,
            tokens=tokens,
            length=length,
            train_tokens=train_tokens,
            progress=bar.advance,
        )
    if as_json:
        print_json(_plan_as_json(found), indent=2)
    else:
        _show_plan(found)
    return 0 if found.fits else 1


def _plan_as_json(plan: "TrainingPlan") -> dict[str, Any]:
    """Everything as JSON values: bytes, FLOPs, tokens."""
    return {
        "gpu": dataclasses.asdict(plan.gpu),
        "gpus": plan.gpus,
        "busy_gpus": plan.busy,
        "parameters": dict(plan.parameters),
        "stream": dataclasses.asdict(plan.stats),
        "work": dataclasses.asdict(plan.work),
        "flops_per_token": {"forward": dict(plan.flops.forward), "training": plan.token_flops},
        "flops": {"step": plan.step_flops, "run": plan.run_flops},
        "memory_bytes": {
            "total": plan.memory.total,
            "of": plan.gpu.memory,
            "when": plan.memory.moment,
            "parts": dict(plan.memory.parts),
        },
        "fits": plan.fits,
        "would_fit": list(plan.repairs),
        "step": {"tokens": plan.step_tokens},
        "steps": plan.steps,
        "assumptions": list(plan.assumptions),
        "warnings": list(plan.warnings),
    }


def _show_plan(plan: "TrainingPlan") -> None:
    """Tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    counts, work = plan.parameters, plan.work
    numbers = Table(box=None, show_header=False, pad_edge=False)
    numbers.add_column(style="bold")
    numbers.add_column()
    parts = ", ".join(f"{name} {_human(n)}" for name, n in counts.items())
    numbers.add_row("parameters", f"{_human(sum(counts.values()))}  ({parts})")
    numbers.add_row(
        "sample",
        f"{plan.stats.length:,.0f} tokens (longest {plan.stats.longest:,}), each sees {plan.stats.context:,.0f} on average",
    )
    forward = _human(sum(plan.flops.forward.values()))
    numbers.add_row("FLOPs a token", f"{_human(plan.token_flops)}  (forward {forward})")
    ways = [work.parallel] if work.processes > 1 else []
    ways += [f"{name} parallel {n}" for name, n in (("tensor", work.tensor), ("context", work.context)) if n > 1]
    parallel = "".join(f" {way}," for way in ways)
    numbers.add_row(
        "each GPU",
        f"{work.micro_batches} x {work.tokens:,.0f} tokens a step,{parallel} {'bfloat16' if work.half else 'float32'}, "
        f"activation checkpointing {'on' if work.checkpointing else 'off'}",
    )
    numbers.add_row("step", f"{_human(plan.step_tokens)} tokens, {_human(plan.step_flops)} FLOPs")
    run_tokens = _human(plan.step_tokens * plan.steps)
    numbers.add_row("training", f"{plan.steps:,} steps, {run_tokens} tokens, {_human(plan.run_flops)} FLOPs")
    console.print(f"[bold]{plan.gpus} x {plan.gpu.name}[/bold]")
    console.print(numbers)
    table = Table("memory of each GPU", "GB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in sorted(plan.memory.parts.items(), key=lambda item: -item[1]):
        table.add_row(f"  {name}", _gigabytes(size))
    table.add_row(f"together ({plan.memory.moment})", _gigabytes(plan.memory.total), style="bold")
    console.print()
    console.print(table)
    verdict = "[green]fits[/green]" if plan.fits else "[red]does not fit[/red]"
    console.print(f"{verdict} in {plan.gpu.memory / 1e9:,.4g} GB")
    for repair in plan.repairs:
        console.print(f"  would fit: {repair}", soft_wrap=True)
    if not plan.fits and not plan.repairs:
        console.print("  nothing that was tried makes it fit: a smaller model, shorter samples, or larger GPUs")
    console.print()
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/yellow]  {warning}", soft_wrap=True)
    for line in plan.assumptions:
        console.print(f"assumed  {line}", style="dim", soft_wrap=True)


def _human(number: float) -> str:
    """1234567 as '1.23 M'."""
    for size, letter in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def _gigabytes(size: float) -> str:
    """Bytes as GB (10^9), small ones with more digits."""
    return f"{size / 1e9:,.2f}" if size >= 1e8 else f"{size / 1e9:,.4f}"


def report(
    runs: list[Path],
    /,
    *,
    out: Path | None = None,
    as_json: Json = False,
) -> int:
    """Compare training runs: their curves in one picture, a table of results, and the settings in which they differ.

    Example: multimodal report runs/small runs/large

    Example: multimodal report runs --out comparison.png

    Parameters
    ----------
    runs
        Run folders, or folders with run folders in them.
    out
        The picture; unless given, report.png in the first of the folders. No file is overwritten: the next gets a number.
    """
    from multimodal.shapes import ConfigError
    from multimodal.train.run_report import differences, draw, read_runs, table

    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: wanted the name of a picture that ends in .png")
    records = read_runs(runs)
    picture = io.BytesIO()
    draw(records, picture)
    out = runs[0] / "report.png" if out is None else out
    out = saved(out.suffix, picture.getvalue(), out.stem, out.parent)
    if as_json:
        found = {"runs": [r.to_json() for r in records], "differences": differences(records), "picture": str(out)}
        print_json(found, indent=2)
    else:
        print(printable(f"{table(records)}\n\npicture  {out}"))
    return 0


def replay(
    folder: Path,
    /,
    *,
    rows: int = SHOWN,
    as_json: Json = False,
    plugin: Plugins = None,
    device: Device = "auto",
) -> int:
    """Repeat a training step with a loss spike, sample by sample, and list the worst. Exit code 1: something is not finite.

    Example: multimodal replay runs/digits/trouble/step-0000123

    Parameters
    ----------
    folder
        A folder that training saved, below RUN/trouble.
    rows
        Number of samples to list; with --json all are.
    """
    from multimodal.shapes import ConfigError
    from multimodal.train import spikes

    if rows < 1:
        raise ConfigError(f"--rows {rows}: list one sample or more")
    found = spikes.load_spike(folder)
    model = load(folder, plugin, device, finite=False)  # weights that are not finite are to be found here
    count = sum(len(set(r.samples)) for batch in found.batches for r in batch.stream.readings.values())
    with progress_bar("replaying", count, quiet=as_json) as bar:
        done = spikes.replay(model, found, progress=bar.advance)
    if as_json:
        entries = {
            "step": found.step,
            "why": found.why,
            "batches": [row.to_json() for row in done.batches],
            "samples": [row.to_json() for row in done.samples],
            "weights": list(done.weights),
            "notes": list(done.notes),
        }
        print_json(entries)
    else:
        print(f"step {found.step}: {printable(found.why)}\n")
        print(_replay_table(done.batches) + "\n\n" + _replay_table(done.samples[:rows]))
        if len(done.samples) > rows:
            print(f"{len(done.samples) - rows} more samples (--rows)")
        if done.weights:
            print(f"\nweights that were not finite before the step: {_few(done.weights)}")
        for note in done.notes:
            print(f"\nnote: {note}")
    return 0 if all(row.finite for row in (*done.batches, *done.samples)) and not done.weights else 1


def _replay_table(rows: "tuple[ReplayRow, ...]") -> str:
    """Rows as text in columns; a column says where the first number that is not finite came up."""
    lines = [
        ["micro-batch", "sample", "task", "tokens", "loss", "grad norm", "first not finite", "gradients not finite"]
    ]
    for row in rows:
        sample = "all" if row.sample is None else f"{row.sample} {row.name}".strip()
        where = [printable(text) for text in (row.file, sample, row.task)]
        number = [f"{x:.4g}" if math.isfinite(x) else str(x) for x in (row.loss, row.norm)]
        lines.append([*where, str(row.tokens), *number, row.first or "", _few(row.parameters)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(size) if 3 <= i <= 5 else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
