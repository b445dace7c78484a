"""`multimodal plan`: what a recipe will need on GPUs that are not here, as a table or as JSON."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from multimodal.cli.showing import print_json
from multimodal.progress import progress_bar

if TYPE_CHECKING:
    from multimodal.count import Range, TrainingPlan


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
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")] = False,
) -> int:
    """Say what training a recipe will need, without training: parameters, FLOPs, memory of each GPU by part, tokens/s, days.

    The model is made without its weights, so that it may be of any size. Exit code 1: it does not fit; the plan says what would
    make it fit.

    Example: multimodal plan recipe.py --gpus 1024 --gpu h200

    Example: multimodal plan recipe.py --gpus 8 --gpu a100-80 --set parallel=fsdp --train-tokens 300e9

    Parameters
    ----------
    recipe
        The Python file, as of `multimodal train`.
    gpus
        How many, in nodes of 8.
    gpu
        a100-40, a100-80, h100, h200, b200, l40s, rtx4090, t4, or cpu for this machine.
    setting
        Change a setting, as of `multimodal train`: name=value. Repeat it for more.
    samples
        How many samples of the data to pack, to learn their lengths.
    tokens
        Tokens of each GPU's micro-batch, instead of the recipe's.
    length
        Tokens of a sample, where the data are not at hand; none are read then.
    train_tokens
        How many tokens to train on, instead of the recipe's steps.
    """
    from multimodal.cli.loading import import_file
    from multimodal.count import outlined
    from multimodal.count import plan as make_plan
    from multimodal.shapes import ConfigError, did_you_mean
    from multimodal.train.settings import make_job

    module = import_file(recipe)
    make = getattr(module, "recipe", None)
    if not callable(make):
        raise ConfigError(f"{recipe} defines no function recipe(){did_you_mean('recipe', vars(module))}")
    if train_tokens is not None and not 1 <= train_tokens < math.inf:
        raise ConfigError(f"--train-tokens {train_tokens:g}: wanted a number of tokens, such as 300e9")
    with outlined():
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
        print_json(facts(found), indent=2)
    else:
        show_plan(found)
    return 0 if found.fits else 1


def facts(plan: "TrainingPlan") -> dict[str, Any]:
    """Everything as JSON values: bytes, FLOPs, tokens/s, seconds and days; ranges from best to worst."""
    return {
        "gpu": dataclasses.asdict(plan.gpu),
        "gpus": plan.gpus,
        "busy_gpus": plan.busy,
        "parameters": dict(plan.parameters),
        "stream": dataclasses.asdict(plan.facts),
        "work": dataclasses.asdict(plan.work),
        "flops_per_token": {"forward": dict(plan.flops.forward), "training": plan.flops_a_token},
        "memory_bytes": {
            "total": plan.memory.total,
            "of": plan.gpu.memory,
            "when": plan.memory.moment,
            "parts": dict(plan.memory.parts),
        },
        "fits": plan.fits,
        "would_fit": list(plan.repairs),
        "step": {
            "tokens": plan.step_tokens,
            "seconds": _pair(plan.time.total),
            "products_seconds": _pair(plan.time.products),
            "launching_seconds": _pair(plan.time.launching),
            "update_seconds": plan.time.update,
            "sending_seconds": plan.time.sending,
        },
        "tokens_per_second": _pair(plan.tokens_a_second),
        "steps": plan.steps,
        "days": _pair(plan.days),
        "assumptions": list(plan.assumptions),
        "warnings": list(plan.warnings),
    }


def show_plan(plan: "TrainingPlan") -> None:
    """Tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    counts, work = plan.parameters, plan.work
    numbers = Table(box=None, show_header=False, pad_edge=False)
    numbers.add_column(style="bold")
    numbers.add_column()
    parts = ", ".join(f"{name} {human(n)}" for name, n in counts.items())
    numbers.add_row("parameters", f"{human(sum(counts.values()))}  ({parts})")
    numbers.add_row(
        "sample",
        f"{plan.facts.length:,.0f} tokens (longest {plan.facts.longest:,}), each sees {plan.facts.context:,.0f} on average",
    )
    numbers.add_row(
        "FLOPs a token", f"{human(plan.flops_a_token)}  (forward {human(sum(plan.flops.forward.values()))})"
    )
    parallel = f" {work.parallel}," if work.processes > 1 else ""
    numbers.add_row(
        "each GPU",
        f"{work.micro_batches} x {work.tokens:,.0f} tokens a step,{parallel} {'bfloat16' if work.half else 'float32'}, "
        f"activation checkpointing {'on' if work.checkpointing else 'off'}",
    )
    numbers.add_row("step", f"{human(plan.step_tokens)} tokens in {_seconds(plan.time.total)}")
    numbers.add_row(
        "of which",
        f"products {_seconds(plan.time.products)}, launching kernels {_seconds(plan.time.launching)}, "
        f"update {plan.time.update:,.3g} s, sending {plan.time.sending:,.3g} s",
    )
    numbers.add_row("speed", f"{human(plan.tokens_a_second.worst)} to {human(plan.tokens_a_second.best)} tokens/s")
    numbers.add_row("training", f"{plan.days.best:,.3g} to {plan.days.worst:,.3g} days for {plan.steps:,} steps")
    console.print(f"[bold]{plan.gpus} x {plan.gpu.name}[/bold]")
    console.print(numbers)
    table = Table("memory of each GPU", "GB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in sorted(plan.memory.parts.items(), key=lambda item: -item[1]):
        table.add_row(f"  {name}", gigabytes(size))
    table.add_row(f"together ({plan.memory.moment})", gigabytes(plan.memory.total), style="bold")
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


def human(number: float) -> str:
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


def gigabytes(size: float) -> str:
    """Bytes as GB (10^9), small ones with more digits."""
    return f"{size / 1e9:,.2f}" if size >= 1e8 else f"{size / 1e9:,.4f}"


def _seconds(time: "Range") -> str:
    return f"{time.best:,.3g} to {time.worst:,.3g} s"


def _pair(time: "Range") -> dict[str, float]:
    return {"best": time.best, "worst": time.worst}
