"""Training steps of 65,536 packed tokens on a GPU, as shares of its matrix product's ceiling and against Hugging Face's Llama.

Hoped for, not yet measured: 50 % of the ceiling in model FLOPs, prefix-LM within 10 % of causal, Llama 1.3 times as long.
"""

import gc
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from benchmarks.speed.gpu import ceilings, clocked, halved
from benchmarks.speed.row import Place, Row
from benchmarks.speed.work import ids, their_llama, train_step

TASKS = ("image -> text", "audio -> text", "-> text")
MIXED, CAUSAL = "mixed, prefix-LM", "the same lengths, causal"  # these with whole blocks compiled


def cores(place: Place) -> dict[str, Any]:
    import multimodal as mm

    if place.quick:
        return {"tiny": mm.Core(width=64, depth=2, heads=2, kv_heads=1)}
    return {"350M": mm.Core.large().replace(qk_norm=False), "1.3B": mm.Core.xl_1b().replace(qk_norm=False)}


def mixed_samples(tokens: int, vocab: int, most: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Pictures and sounds with texts, and texts alone, of log-uniform lengths up to `most`: `tokens` tokens together."""
    import numpy as np
    import torch

    draw, noise = random.Random(seed), np.random.default_rng(seed)
    samples: list[tuple[str, dict[str, Any]]] = []

    def length(low: int, high: int) -> int:
        return round(2 ** draw.uniform(np.log2(low), np.log2(high)))

    def text(count: int) -> Any:
        return torch.from_numpy(noise.integers(vocab, size=count))

    left = tokens
    while left:
        task = draw.choice(TASKS)
        written = length(2, most // 8) if task != "-> text" else length(most // 32, most)
        rows, columns = (length(2, round(most**0.5)) for _ in range(2))
        frames = length(2, most // 2)
        read = {TASKS[0]: rows * columns, TASKS[1]: frames}.get(task, 0)
        if left - read - written < 2:  # what is left must hold a text of its own
            task, read, written = "-> text", 0, left
        fields: dict[str, Any] = {"text": text(written - 1)}  # and the token that opens it
        if task == TASKS[0]:
            fields["image"] = noise.random((rows * 16, columns * 16, 3), dtype=np.float32)
        if task == TASKS[1]:
            # of a frame every 10 ms, four a token
            fields["audio"] = noise.standard_normal(frames * 640, dtype=np.float32) * 0.1, 16000
        samples.append((task, fields))
        left -= read + written
    return samples


def mixed_model(core: Any, vocab: int, place: Place) -> Any:
    import multimodal as mm
    from multimodal_tokenizers import AudioFrames, ImagePatches

    kinds = {"image": ImagePatches(patch=16), "audio": AudioFrames(), "text": ids(vocab)}
    return mm.Model(kinds, core, list(TASKS), seed=place.seed).train().to(place.device)


def training(model: Any, streams: Sequence[Any], place: Place) -> Callable[[], None]:
    """A step over these micro-batches: weights and moments in float32, products in bfloat16 (autocast), fused AdamW."""
    model.zero_grad(set_to_none=True)  # a step that ran out of memory leaves some
    streams = [stream.to(place.device) for stream in streams]
    counts = {task: sum(s.readings[task].count for s in streams if task in s.readings) for task in model.tasks}

    def loss(stream: Any) -> Any:
        with halved(place):
            return model.loss(stream, counts=counts)

    return train_step(model, *(partial(loss, stream) for stream in streams))


def causal(stream: Any) -> Any:
    """The same lengths, all of them causal."""
    import torch

    layout = stream.layout
    info = replace(layout.info, bidirectional=torch.zeros_like(layout.info.bidirectional))
    return replace(
        stream, layout=replace(layout, spans=tuple(s._replace(bidirectional=0) for s in layout.spans), info=info)
    )


def step_flops(model: Any, streams: Sequence[Any], vocab: int) -> float:
    """Of a training step: core and heads; embedding pictures and sounds is left out. Only pairs that meet are counted."""
    core = model.core.core
    total = 0.0
    for stream in streams:
        pairs = sum(f * f + (t - f) * f + (t - f) * (t - f + 1) / 2 for f, t, _ in stream.layout.spans)
        rows = sum(len(reading.row_N) for reading in stream.readings.values())
        total += core.flops(len(stream), pairs / len(stream)) + 2.0 * rows * core.width * (vocab + 1)
    return 3 * total


@dataclass(frozen=True)
class Step:
    """What a step took: seconds, micro-batches that fit the memory, GiB at its peak; and its counted operations."""

    seconds: float
    parts: int
    gib: float
    flops: float


def fitting(make: Callable[[int], Callable[[], None]], flops: float, place: Place, rounds: int) -> Step:
    """Time a step, in as few micro-batches as fit the memory."""
    import torch

    cuda = place.device == "cuda"
    for parts in (1, 2, 4, 8):
        try:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = clocked(make(parts), place.device, rounds)
            return Step(seconds, parts, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0, flops)
        except torch.OutOfMemoryError:
            pass
        finally:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    raise MemoryError("a step does not fit in 8 micro-batches")


def llama_training(model: Any, parts: int, batch: int, length: int, vocab: int, place: Place) -> Callable[[], None]:
    import torch
    import torch.nn.functional as F

    model.zero_grad(set_to_none=True)
    draw = torch.Generator().manual_seed(place.seed)
    batches = torch.randint(vocab, (batch, length + 1), generator=draw).to(place.device).chunk(parts)

    def loss(ids_BT: Any) -> Any:
        with halved(place):
            logits = model(input_ids=ids_BT[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()) / len(batches)

    return train_step(model, *(partial(loss, part) for part in batches))


@dataclass(frozen=True)
class Work:
    """A step of `tokens`; texts of `most`, which is the longest of a mixture too."""

    tokens: int
    most: int
    vocab: int
    rounds: int


def our_steps(core: Any, work: Work, place: Place) -> Iterator[tuple[str, Step]]:
    import torch

    from multimodal.core import compile_blocks

    model = mixed_model(core, work.vocab, place)
    draw = torch.Generator().manual_seed(place.seed)
    texts = [torch.randint(work.vocab, (work.most - 1,), generator=draw) for _ in range(work.tokens // work.most)]

    @lru_cache
    def mixed(parts: int) -> list[Any]:
        size = work.tokens // parts
        return [model.packer(mixed_samples(size, work.vocab, work.most, place.seed + i)) for i in range(parts)]

    def even(parts: int) -> list[Any]:
        return [model.packer([("-> text", {"text": text}) for text in texts[i::parts]]) for i in range(parts)]

    flops = step_flops(model, mixed(1), work.vocab)
    for how, prepare in () if place.quick else (("eager", None), ("compile_blocks", compile_blocks)):
        if prepare:
            prepare(model)
        yield f"mixed, {how}", fitting(lambda parts: training(model, mixed(parts), place), flops, place, work.rounds)
    if not place.quick:
        # the plan of the variable-length kernel holds tensors and two numbers alone, so that one graph serves every layout
        for block in model.core.blocks:
            block.compile(dynamic=True)
    for what, packed in (
        (MIXED, mixed),
        (CAUSAL, lambda parts: [causal(stream) for stream in mixed(parts)]),
        (f"texts of {work.most}", even),
    ):
        flops = step_flops(model, packed(1), work.vocab)
        yield (
            what,
            fitting(lambda parts, packed=packed: training(model, packed(parts), place), flops, place, work.rounds),
        )


def their_steps(core: Any, work: Work, flops: float, place: Place) -> Iterator[tuple[str, Step | Exception]]:
    import torch

    for compiled in (False, True)[: 1 if place.quick else 2]:
        settings = {"num_key_value_heads": core.groups, "max_position_embeddings": 4096, "use_cache": False}
        model = their_llama(core, work.vocab + 1, place, **settings).to(place.device).train()
        if compiled:
            model.compile()

        def make(parts: int, model: Any = model) -> Callable[[], None]:
            return llama_training(model, parts, work.tokens // work.most, work.most, work.vocab, place)

        what = f"Llama, texts of {work.most}{', compiled' if compiled else ''}"
        try:
            yield what, fitting(make, flops, place, work.rounds)
        except Exception as error:  # a peer that breaks must not take our figures with it
            yield what, error
        torch.compiler.reset()


def train_report(place: Place) -> dict[str, Any]:
    work = Work(1024, 128, 64, 1) if place.quick else Work(65536, 2048, 32768, 4)
    ceiling, _ = ceilings(place)
    lines = [
        f"bf16 product {ceiling / 1e12:.4g} TFLOP/s. Steps of {work.tokens} tokens, vocabulary {work.vocab}; autocast to bfloat16, "
        "float32 weights, fused AdamW.",
        "",
        "| model | step | ms | tokens/s | model TFLOP/s | of the product | micro-batches | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    met = []
    for name, core in cores(place).items():
        found: dict[str, Step] = {}

        def add(
            what: str,
            step: Step | Exception,
            name: str = name,
            found: dict[str, Step] = found,
            lines: list[str] = lines,
        ) -> None:
            if isinstance(step, Exception):
                lines.append(f"| {name} | {what} | {type(step).__name__}: {str(step)[:80]} | | | | | |")
                return
            found[what] = step
            lines.append(
                f"| {name} | {what} | {1000 * step.seconds:.4g} | {work.tokens / step.seconds:,.0f} | "
                f"{step.flops / step.seconds / 1e12:.4g} | {100 * step.flops / step.seconds / ceiling:.3g} % | {step.parts} | "
                f"{step.gib:.3g} |"
            )

        for what, step in our_steps(core, work, place):
            add(what, step)
            print(lines[-1], file=sys.stderr, flush=True)  # should the time run out
        even = found[f"texts of {work.most}"]
        for what, step in their_steps(core, work, even.flops, place):
            add(what, step)
            print(lines[-1], file=sys.stderr, flush=True)
        ratio = min((s.seconds for what, s in found.items() if what.startswith("Llama")), default=0.0) / even.seconds
        apart = found[MIXED].seconds / found[CAUSAL].seconds
        lines.append(
            f"| {name} | Llama / ours {ratio:.2f}, goal 1.3; prefix-LM / causal {apart:.3f}, goal 1.1 | | | | | | |"
        )
        lines += attention_lines(name, core, work, place)
        met += [found[MIXED].flops / found[MIXED].seconds >= 0.5 * ceiling, ratio >= 1.3, apart <= 1.1]
    return {"lines": lines, "met": None if place.quick else all(met)}


def attention_lines(name: str, core: Any, work: Work, place: Place) -> list[str]:
    """One layer's attention alone, forward and backward, by each way that could run it."""
    import torch

    from multimodal.attention import Mechanism, ScaledDotProduct, Soft, plan_attention
    from multimodal.masks import PREFIX_LM

    model = mixed_model(core, work.vocab, place)
    stream = model.packer(mixed_samples(work.tokens, work.vocab, work.most, place.seed)).to(place.device)
    mechanism = Mechanism(ScaledDotProduct(), None, Soft(), core.heads, core.head_width)
    q, k, v = (
        torch.randn(work.tokens, heads, core.head_width, device=place.device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (core.heads, core.groups, core.groups)
    )
    push = torch.randn_like(q)
    lines = []
    for what, layout, backend in (
        ("prefix-LM", stream.layout, "varlen"),
        ("causal", causal(stream).layout, "varlen"),
        ("prefix-LM", stream.layout, "flex"),
    ):
        backend = "runs" if place.device == "cpu" else backend
        plan = plan_attention(PREFIX_LM, layout, backend=backend, dtype=q.dtype)

        def run(plan: Any = plan) -> None:
            torch.autograd.grad(plan.attend(q, k, v, mechanism, 0), (q, k, v), push)

        lines.append(
            f"| {name} | attention of a layer, {what}, {backend} | {1000 * clocked(run, place.device, work.rounds):.4g} "
            "| | | | | |"
        )
    return lines


ROWS = (
    Row(
        name="gpu-train",
        what=(
            "train step of 65,536 tokens of pictures, sounds and texts, packed; counted operations over the product's ceiling; "
            "texts of 2048 against Hugging Face's Llama of the same shape (eager and compiled, SDPA, no padding)"
        ),
        needs=("transformers",),
        report=train_report,
        cuda=True,
    ),
)
