"""`plan`: what a training run needs, put together from the parts of this package, and what would make it fit."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multimodal.count.flops import Flops, parameters, token_flops, transformer
from multimodal.count.memory import MemoryUse, Work, rank_memory
from multimodal.count.streams import StreamStats, count_stream, stream_of_length
from multimodal.data.batches import steps_of_epoch
from multimodal.data.sources import shares, weighed
from multimodal.model import Model
from multimodal.notebook import tables_html
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.train.recipe import Recipe
from multimodal.train.split import check_split

GB = 1e9
# of a GPU's memory: its context, the allocator's gaps and the communication library take the rest (assumed)
USABLE = 0.9
MOST_GPUS = 65536


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU, as far as memory is concerned.

    name: what `find_gpu` calls it.
    memory: bytes.
    bfloat16: whether it multiplies bfloat16 in hardware.
    source: where its memory is stated.
    """

    name: str
    memory: float
    bfloat16: bool = True
    source: str


GPUS = {
    name: GPU(name=name, memory=gigabytes * GB, bfloat16=name != "t4", source=source)
    for name, gigabytes, source in (
        ("a100-40", 40, "NVIDIA A100 data sheet 2021 (SXM 40 GB)"),
        ("a100-80", 80, "NVIDIA A100 data sheet 2021 (SXM 80 GB)"),
        ("h100", 80, "NVIDIA H100 white paper 2022, table 1 (SXM5)"),
        ("h200", 141, "NVIDIA H200 data sheet 2024 (SXM)"),
        ("b200", 180, "NVIDIA Blackwell data sheet 2025 (HGX B200)"),
        ("l40s", 48, "NVIDIA L40S data sheet 2023"),
        ("rtx4090", 24, "NVIDIA Ada white paper 2022, appendix A"),
        ("t4", 16, "NVIDIA T4 data sheet 2019"),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of this name; "cpu" is this machine.

    Raises:
        ConfigError: no such name (lists those there are).
    """
    if name == "cpu":
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return GPU(name="cpu", memory=memory, bfloat16=torch.cpu._is_amx_tile_supported(), source="this machine")
    known = [*GPUS, "cpu"]
    if name.lower() not in GPUS:
        raise ConfigError(
            f"plan: GPU {name!r} is unknown; there are {', '.join(known)}{did_you_mean(name.lower(), known)}"
        )
    return GPUS[name.lower()]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run needs.

    gpu: the GPU it is planned for.
    gpus: number of GPUs, a process each.
    busy: number of GPUs that have something to do.
    parameters: number of parameters by part.
    stats: what the packed data are like.
    work: what one process does in a step.
    flops: FLOPs of one token.
    memory: bytes of one process, by part.
    steps: number of optimiser steps.
    repairs: changes that would make it fit, each planned again; empty where it fits.
    warnings: settings that do not work, or not as they seem to.
    """

    gpu: GPU
    gpus: int
    busy: int
    parameters: Mapping[str, int]
    stats: StreamStats
    work: Work
    flops: Flops
    memory: MemoryUse
    steps: int
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """For notebooks: whether it fits, its memory and work, and what would make it fit."""
        tables = {
            "memory of a process, GB": [(name, size / GB) for name, size in self.memory.parts.items()],
            "work": [
                ("steps", self.steps),
                ("tokens a step", self.step_tokens),
                ("FLOPs of the run", self.run_flops),
                ("parameters", sum(self.parameters.values())),
            ],
            "would make it fit": [(line,) for line in self.repairs],
            "warnings": [(line,) for line in self.warnings],
            "assumed": [(line,) for line in self.assumptions],
        }
        total, most = self.memory.total / GB, self.gpu.memory / GB
        fits = "fits" if self.fits else "does not fit"
        return tables_html(f"{fits} on {self.gpus} x {self.gpu.name}: {total:,.3g} of {most:,.3g} GB", tables)

    @property
    def fits(self) -> bool:
        """Whether the memory fits into the usable share of the GPU's."""
        return self.memory.total <= USABLE * self.gpu.memory

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimiser step, all GPUs together."""
        return self.work.tokens * self.work.micro_batches * (self.busy // (self.work.tensor * self.work.context))

    @property
    def token_flops(self) -> float:
        """FLOPs of training on a token, with what is computed again."""
        return self.flops.training + (self.flops.again if self.work.checkpointing else 0.0)

    @property
    def step_flops(self) -> float:
        """FLOPs of an optimiser step, all GPUs together."""
        return self.token_flops * self.step_tokens

    @property
    def run_flops(self) -> float:
        """FLOPs of the whole run, all GPUs together."""
        return self.step_flops * self.steps

    @property
    def assumptions(self) -> tuple[str, ...]:
        """One line each: everything that was not counted."""
        lines = [
            f"memory of {self.gpu.name}: {self.gpu.memory / GB:,.4g} GB, {self.gpu.source}",
            f"fits: up to {100 * USABLE:.0f} % of it; the rest is for the context and gaps (assumed)",
        ]
        if self.work.cuda:
            lines.append("activations under CUDA: from the kernels' sources; only those of CPUs were measured")
        if self.stats.samples:
            lines.append(f"lengths: of {self.stats.samples} samples of the recipe's data, packed")
        else:
            lines.append(f"lengths: {self.stats.length:g} tokens a sample, as given; causal, all of the first task")
        if self.work.tensor * self.work.context > 1:
            lines.append("tensor and context parallel: memory counted, not measured; embeddings and heads count once")
        if self.memory.unknown:
            lines.append(f"not modelled, so memory is a lower bound: {', '.join(self.memory.unknown)}")
        return tuple(lines)


def plan(
    model: Model,
    recipe: Recipe,
    *,
    data: Mapping[str, Any] | None = None,
    stats: StreamStats | None = None,
    gpus: int = 1,
    gpu: str | GPU = "h100",
    mix: Mapping[str, float] | float | None = None,
    samples: int = 256,
    tokens: int | None = None,
    length: int | None = None,
    train_tokens: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainingPlan:
    """Plan a run. A model of any size takes no memory if it is made inside `with torch.device("meta"):`.

    What its data are like is counted on up to `samples` samples of `data`, with tasks mixed by `mix`, or given: by `stats`, or by a
    `length` (tokens of a sample).
    tokens: of one GPU's micro-batch, instead of the recipe's.
    train_tokens: number of tokens to train on, instead of the recipe's steps.
    progress: called with the number of samples packed since its last call.

    Raises:
        ConfigError: an unknown GPU, no data and no length, numbers below 1, a model that is not modelled.
    """
    for name, value in (("gpus", gpus), ("samples", samples), ("tokens", tokens), ("train_tokens", train_tokens)):
        if value is not None and not (value >= 1 and value == int(value)):
            raise ConfigError(f"plan: {name}={value} must be a whole number, 1 or more")
    if recipe.epochs and train_tokens is None:
        epoch = None
        if data is not None and not recipe.tokens:
            epoch = steps_of_epoch(data, shares(recipe.batch, weighed(data, mix, "plan")))
        recipe = recipe.in_steps(epoch)
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    transformer(model)  # raises before anything is counted
    check_split(model, recipe, gpus, "plan")
    if stats is None and length is not None:
        stats = stream_of_length(model, length)
    if stats is None:
        if data is None:
            raise ConfigError("plan: give the recipe's data, or a length (tokens of a sample)")
        stats = count_stream(model, data, samples=samples, mix=mix, progress=progress)
    work, busy, warnings = work_of(recipe, stats, gpus, card, tokens)
    found = TrainingPlan(
        gpu=card,
        gpus=gpus,
        busy=busy,
        parameters=parameters(model),
        stats=stats,
        work=work,
        flops=token_flops(model, stats),
        memory=rank_memory(model, stats, work),
        steps=recipe.steps,
        warnings=tuple(warnings),
    )
    if train_tokens is not None:
        found = dataclasses.replace(found, steps=math.ceil(train_tokens / found.step_tokens))
    return found if found.fits else dataclasses.replace(found, repairs=tuple(_repairs(model, found)))


def work_of(recipe: Recipe, stats: StreamStats, gpus: int, gpu: GPU, tokens: int | None) -> tuple[Work, int, list[str]]:
    """What each GPU does under a recipe, the number of GPUs with work, and warnings."""
    warnings: list[str] = []
    if recipe.precision == "bfloat16" and not gpu.bfloat16:
        raise ConfigError(f"plan: {gpu.name} has no hardware for bfloat16; use precision=float32")
    half = recipe.precision == "bfloat16" or (recipe.precision == "auto" and gpu.bfloat16)
    budget, packs = recipe.tokens, recipe.packs
    copies = recipe.tensor_parallel * recipe.context_parallel  # GPUs that hold the same samples
    own = gpus // copies
    busy, parts = own, recipe.accumulate
    unit, needed = f"batch={recipe.batch}", f"batch={own * recipe.accumulate}"
    if tokens is not None:
        each = float(tokens)
    elif budget:
        each, busy = float(budget), min(own, packs)
        parts = math.ceil(packs / busy)
        unit, needed = f"packs={packs}", f"packs={own}"
    else:
        mine = recipe.batch / recipe.accumulate / own
        busy = own if mine >= 1 else max(1, recipe.batch // recipe.accumulate)
        each = max(mine, 1.0) * stats.length
    busy *= copies
    if busy < gpus:
        warnings.append(
            f"{unit} gives work to only {busy} of {gpus} GPUs, which `fit` refuses; try --set {needed} or more"
        )
    if stats.longest > each:
        warnings.append(f"the longest sample counted has {stats.longest} tokens, more than a micro-batch of {each:.0f}")
    work = Work(
        # a batch of samples holds its longest one whole; a given number of tokens is a bound
        tokens=max(each, float(stats.longest)) if stats.samples and tokens is None and not budget else each,
        micro_batches=parts,
        processes=gpus,
        parallel=recipe.parallel,
        half=half,
        cuda=gpu.name != "cpu",
        checkpointing=recipe.activation_checkpointing,
        optimizer=recipe.optimizer,
        averaged=recipe.ema > 0,
        tensor=recipe.tensor_parallel,
        context=recipe.context_parallel,
    )
    return work, busy, warnings


def _repairs(model: Model, first: TrainingPlan) -> list[str]:
    """Changes that make it fit, each planned again: single ones first, then all together on more GPUs."""

    def fits(work: Work) -> bool:
        return rank_memory(model, first.stats, work).total <= USABLE * first.gpu.memory

    work, found = first.work, []
    least = max(first.stats.longest if first.stats.samples else first.stats.length, 1.0)
    checkpointed = dataclasses.replace(work, checkpointing=True)
    sharded = dataclasses.replace(work, parallel="fsdp")
    if not work.checkpointing and fits(checkpointed):
        found.append("activation_checkpointing=true")
    if work.shards == 1 and work.processes > 1 and fits(sharded):
        found.append("parallel=fsdp")
    both = dataclasses.replace(sharded, checkpointing=True) if work.processes > 1 else checkpointed
    for base, change in ((work, ""), (both, _changes(work, both))):
        if change and not found and base != work and fits(base):
            found.append(change)
        parts = 2
        while not found and work.tokens / parts >= least:
            if fits(dataclasses.replace(base, tokens=work.tokens / parts, micro_batches=work.micro_batches * parts)):
                tokens = f"micro-batches of {work.tokens / parts:,.0f} tokens ({work.micro_batches * parts} a step: accumulate)"
                found.append(f"{change} and {tokens}" if change else tokens)
            parts *= 2
    parts = 2
    while not found and work.context == 1 and parts <= 16 and not work.processes % (parts * work.tensor):
        more = dataclasses.replace(both, parallel="fsdp", context=parts, tokens=min(work.tokens, least))
        if _divides(model, more) and fits(more):
            change = " and ".join([f"context_parallel={parts}", *filter(None, [_changes(work, more)])])
            found.append(f"{change}, with {more.tokens:,.0f} tokens a micro-batch")
        parts *= 2
    many = max(2 * first.gpus, 2)
    while not found and many <= MOST_GPUS:
        more = dataclasses.replace(both, parallel="fsdp", processes=many, tokens=min(work.tokens, least))
        if fits(more):
            found.append(
                f"{many} GPUs with parallel=fsdp, activation_checkpointing=true, {more.tokens:,.0f} tokens a micro-batch"
            )
        many *= 2
    return found


def _divides(model: Model, work: Work) -> bool:
    """Whether `fit` could divide the model so."""
    recipe = Recipe(parallel="fsdp", tensor_parallel=work.tensor, context_parallel=work.context)
    try:
        check_split(model, recipe, work.processes, "plan")
    except ConfigError:
        return False
    return True


def _changes(work: Work, other: Work) -> str:
    changes = []
    if other.parallel != work.parallel:
        changes.append("parallel=fsdp")
    if other.checkpointing and not work.checkpointing:
        changes.append("activation_checkpointing=true")
    return " and ".join(changes)
