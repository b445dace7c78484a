"""`plan`: what a training run will need, put together from the parts of this package, and what would make it fit."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from multimodal.count.gpus import GPU, find_gpu
from multimodal.count.memory import Memory, Work, rank_memory
from multimodal.count.parts import Flops, parameters, token_flops, transformer
from multimodal.count.speed import FLOAT32, SENT, UNTUNED, Range, StepTime, step_time, utilisation
from multimodal.count.streams import StreamFacts, count_stream, given_stream
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.train.recipe import Recipe

ROOM = 0.9  # of a GPU's memory: its context, the allocator's gaps and the communication library take the rest (assumed)
DAY = 86400.0
MOST_GPUS = 65536


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a run needs. Ranges go from the best case to the worst; everything about memory is of one process."""

    gpu: GPU
    gpus: int
    busy: int  # GPUs that have something to do
    parameters: Mapping[str, int]
    facts: StreamFacts
    work: Work
    flops: Flops
    memory: Memory
    time: StepTime
    steps: int
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.total <= ROOM * self.gpu.memory

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimiser step, all GPUs together."""
        return self.work.tokens * self.work.micro_batches * self.busy

    @property
    def tokens_a_second(self) -> Range:
        """All GPUs together."""
        return Range(self.step_tokens / self.time.total.best, self.step_tokens / self.time.total.worst)

    @property
    def days(self) -> Range:
        return self.time.total * (self.steps / DAY)

    @property
    def flops_a_token(self) -> float:
        """Of training, with what is computed again."""
        return self.flops.training + (self.flops.again if self.work.checkpointing else 0.0)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """One line each: everything that was not counted."""
        used = utilisation(self.gpu, sum(self.parameters.values()), self.work.half)
        where = {
            True: "measured on CPUs (benchmarks/results/plan.md)",
            False: f"published by MosaicML for tuned benchmarks, times {UNTUNED} at the low end; not measured here",
        }[self.gpu.family == "cpu"]
        if not self.work.half and self.gpu.family != "cpu":
            where = f"assumed {FLOAT32[0]} to {FLOAT32[1]} of float32 without tensor cores; not measured here"
        lines = [
            f"peak: {self.gpu.peak(self.work.half) / 1e12:,.4g} TFLOP/s, {self.gpu.source}",
            f"utilisation: {100 * used.worst:.0f} to {100 * used.best:.0f} % of it; {where}",
            f"fits: up to {100 * ROOM:.0f} % of {self.gpu.memory / 1e9:,.4g} GB; the rest is for the context and gaps (assumed)",
        ]
        if self.work.processes > 1:
            lines.append(
                f"sending: {100 * SENT:.0f} % of the links' data-sheet speed (assumed); best: all behind products, worst: none"
            )
        if self.work.cuda:
            lines.append("activations under CUDA: from the kernels' sources; only those of CPUs were measured")
        if self.facts.samples:
            lines.append(f"lengths: of {self.facts.samples} samples of the recipe's data, packed")
        else:
            lines.append(f"lengths: {self.facts.length:g} tokens a sample, as given; causal, all of the first task")
        if self.memory.unknown:
            lines.append(f"not modelled, so memory is a lower bound: {', '.join(self.memory.unknown)}")
        return tuple(lines)


def plan(
    model: Model,
    recipe: Recipe,
    *,
    data: Mapping[str, Any] | None = None,
    facts: StreamFacts | None = None,
    gpus: int = 1,
    gpu: str | GPU = "h100",
    mix: Mapping[str, float] | float | None = None,
    samples: int = 256,
    tokens: int | None = None,
    length: int | None = None,
    train_tokens: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainingPlan:
    """Plan a run. `with outlined(): model = Model(...)` makes a model of any size without its memory.

    What its data are like is counted on some `samples` of `data`, or given: by `facts`, or by a `length` (tokens of a sample).
    tokens: of one GPU's micro-batch, instead of the recipe's. train_tokens: how many to train on, instead of the recipe's steps.

    Raises:
        ConfigError: an unknown GPU, no data and no length, numbers below 1, a model that is not modelled.
    """
    for name, value in (("gpus", gpus), ("samples", samples), ("tokens", tokens), ("train_tokens", train_tokens)):
        if value is not None and not (value >= 1 and value == int(value)):
            raise ConfigError(f"plan: {name}={value} must be a whole number, 1 or more")
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    transformer(model)  # says what is not modelled, before anything is counted
    if facts is None and length is not None:
        facts = given_stream(model, length)
    if facts is None:
        if data is None:
            raise ConfigError("plan: give the recipe's data, or a length (tokens of a sample)")
        facts = count_stream(model, data, samples=samples, mix=mix, progress=progress)
    work, busy, warnings = work_of(recipe, facts, gpus, card, tokens)
    first = _planned(model, facts, work, card, gpus, busy, recipe.steps, train_tokens)
    repairs = () if first.fits else tuple(_repairs(model, first))
    return dataclasses.replace(first, warnings=tuple(warnings), repairs=repairs)


def work_of(recipe: Recipe, facts: StreamFacts, gpus: int, gpu: GPU, tokens: int | None) -> tuple[Work, int, list[str]]:
    """What each GPU does under a recipe, how many have work, and what is odd about it."""
    warnings: list[str] = []
    half = recipe.precision == "bfloat16" or (recipe.precision == "auto" and gpu.bf16 is not None)
    gpu.peak(half)
    budget, packs = recipe.tokens, recipe.packs
    busy, parts = gpus, recipe.accumulate
    unit, needed = f"batch={recipe.batch}", f"batch={gpus * recipe.accumulate}"
    if tokens is not None:
        each = float(tokens)
    elif budget:
        each, busy = float(budget), min(gpus, packs)
        parts = math.ceil(packs / busy)
        unit, needed = f"packs={packs}", f"packs={gpus}"
    else:
        mine = recipe.batch / recipe.accumulate / gpus
        busy = gpus if mine >= 1 else max(1, recipe.batch // recipe.accumulate)
        each = max(mine, 1.0) * facts.length
    if busy < gpus:
        warnings.append(
            f"{unit} gives work to only {busy} of {gpus} GPUs, which `fit` refuses; try --set {needed} or more"
        )
    if facts.longest > each:
        warnings.append(f"the longest sample counted has {facts.longest} tokens, more than a micro-batch of {each:.0f}")
    work = Work(
        tokens=max(each, float(facts.longest)) if facts.samples and tokens is None and not budget else each,
        micro_batches=parts,
        processes=gpus,
        parallel=recipe.parallel,
        half=half,
        cuda=gpu.family != "cpu",
        checkpointing=recipe.activation_checkpointing,
        optimizer=recipe.optimizer,
        averaged=recipe.ema > 0,
    )
    return work, busy, warnings


def _planned(
    model: Model,
    facts: StreamFacts,
    work: Work,
    gpu: GPU,
    gpus: int,
    busy: int,
    steps: int,
    train_tokens: float | None,
) -> TrainingPlan:
    counts = parameters(model)
    total = sum(counts.values())
    flops = token_flops(model, facts)
    outside = total - sum(p.numel() for block in transformer(model).blocks for p in block.parameters())
    found = TrainingPlan(
        gpu=gpu,
        gpus=gpus,
        busy=busy,
        parameters=counts,
        facts=facts,
        work=work,
        flops=flops,
        memory=rank_memory(model, facts, work),
        time=step_time(
            gpu,
            work,
            total,
            outside,
            transformer(model).core.depth,
            flops.training + (flops.again if work.checkpointing else 0.0),
        ),
        steps=steps,
    )
    if train_tokens is not None:
        found = dataclasses.replace(found, steps=math.ceil(train_tokens / found.step_tokens))
    return found


def _repairs(model: Model, first: TrainingPlan) -> list[str]:
    """Changes that make it fit, each planned again: single ones first, then all together on more GPUs."""

    def fits(work: Work) -> bool:
        return rank_memory(model, first.facts, work).total <= ROOM * first.gpu.memory

    work, found = first.work, []
    least = max(first.facts.longest if first.facts.samples else first.facts.length, 1.0)
    checkpointed = dataclasses.replace(work, checkpointing=True)
    sharded = dataclasses.replace(work, parallel="fsdp")
    if not work.checkpointing and fits(checkpointed):
        found.append("activation_checkpointing=true")
    if work.shards == 1 and work.processes > 1 and fits(sharded):
        found.append("parallel=fsdp")
    both = dataclasses.replace(sharded, checkpointing=True) if work.processes > 1 else checkpointed
    for base, said in ((work, ""), (both, _said(work, both))):
        if said and not found and base != work and fits(base):
            found.append(said)
        parts = 2
        while not found and work.tokens / parts >= least:
            if fits(dataclasses.replace(base, tokens=work.tokens / parts, micro_batches=work.micro_batches * parts)):
                tokens = f"micro-batches of {work.tokens / parts:,.0f} tokens ({work.micro_batches * parts} a step: accumulate)"
                found.append(f"{said} and {tokens}" if said else tokens)
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


def _said(work: Work, other: Work) -> str:
    changes = []
    if other.parallel != work.parallel:
        changes.append("parallel=fsdp")
    if other.checkpointing and not work.checkpointing:
        changes.append("activation_checkpointing=true")
    return " and ".join(changes)
