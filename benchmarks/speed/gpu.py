"""What every row on one NVIDIA GPU needs, the two ceilings, and greedy decoding of a 200 M model.

Hoped for, not yet measured: 1,000 tokens/s at batch 1, 60 % of the memory's floor; at batch 64 1.5 times Hugging Face's tokens.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

from benchmarks.speed.row import Place, Row
from benchmarks.speed.work import ids, parameter_count, their_llama

DECODE = "note:text -> text"


def clocked(run: Callable[[], Any], device: str, rounds: int, warm: int = 3) -> float:
    """Median seconds of a round; on a GPU by its own clock, with nothing else waiting in its queue."""
    import torch

    for _ in range(warm):
        run()
    spent = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end) / 1000)
        else:
            clock = time.perf_counter()
            run()
            spent.append(time.perf_counter() - clock)
    return median(spent)


def ceilings(place: Place) -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product of random matrices, and bytes/s, read and written, of a copy."""
    import torch

    side, count = (128, 2**20) if place.quick else (8192, 2**31)
    a, b = (torch.randn(side, side, device=place.device).bfloat16() for _ in range(2))
    products = 10  # in a row, so that launching is hidden
    flops = 2 * side**3 * products / clocked(lambda: [a @ b for _ in range(products)], place.device, 5)
    source = torch.zeros(count, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return flops, 2 * count * products / clocked(
        lambda: [target.copy_(source) for _ in range(products)], place.device, 5
    )


def ceilings_report(place: Place) -> dict[str, Any]:
    flops, speed = ceilings(place)
    return {
        "lines": [f"bf16 product {flops / 1e12:.4g} TFLOP/s; copy {speed / 1e12:.4g} TB/s read and written"],
        "met": None,
    }


def halved(place: Place) -> AbstractContextManager:
    import torch

    return torch.autocast(place.device, dtype=torch.bfloat16)


def decode_report(place: Place) -> dict[str, Any]:
    import torch

    import multimodal as mm

    vocab, prompt, new, batches = (64, 8, 8, (1, 2)) if place.quick else (32000, 64, 256, (1, 64))
    core = mm.Core(width=64, depth=2, heads=2) if place.quick else mm.Core(width=1024, depth=12, heads=16)
    core = core.replace(qk_norm=False)
    _, speed = ceilings(place)
    model = mm.Model({"text": ids(vocab)}, core, [DECODE], seed=place.seed).to(place.device, torch.bfloat16).eval()
    with torch.no_grad():
        model.readout(DECODE).linear.bias[-1] = -1e4  # none stops before the others
    read = sum(p.nbytes for part in (model.core, model.readouts) for p in part.parameters())
    a_token = 2 * core.depth * core.groups * core.head_width * 2  # bytes of keys and values, bfloat16
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    peer = their_llama(core, vocab + 1, place, num_key_value_heads=core.groups, max_position_embeddings=4096, **ends)
    peer = peer.to(place.device, torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(place.seed)
    lines = [
        f"{parameter_count(model) / 1e6:.0f} M parameters in bfloat16, prompt {prompt}, {new} new tokens; copy "
        f"{speed / 1e12:.4g} TB/s",
        "",
        "| batch | tokens/s | of the memory's floor | Hugging Face, static cache, compiled | ours / theirs |",
        "| --- | --- | --- | --- | --- |",
    ]
    met = []
    for batch in batches:
        prompts = torch.randint(vocab, (batch, prompt), generator=draw)
        samples = [{"note": row[1:]} for row in prompts]  # ours has a learned token that opens the answer

        def ours(count: int, samples: list[Any] = samples, batch: int = batch) -> None:
            model.generate(DECODE, samples, max_tokens=count, batch=batch)

        def theirs(count: int, given: Any = prompts) -> None:
            settings: dict[str, Any] = {"cache_implementation": "static"} if place.device == "cuda" else {}
            with torch.inference_mode():
                peer.generate(
                    given.to(place.device), do_sample=False, max_new_tokens=count, min_new_tokens=count, **settings
                )

        rates = [batch / token_seconds(run, new, place) for run in (ours, theirs)]
        floor = (read + batch * a_token * (prompt + new / 2)) / speed
        share = floor * rates[0] / batch
        lines.append(
            f"| {batch} | {rates[0]:,.0f} | {100 * share:.3g} % | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} |"
        )
        met += [rates[0] >= 1000, share >= 0.6] if batch == 1 else [rates[0] >= 1.5 * rates[1]]
    return {"lines": lines, "met": None if place.quick else all(met)}


def token_seconds(generate: Callable[[int], None], new: int, place: Place) -> float:
    """Seconds of one more token: reading the prompt, and what is done once, is taken off."""
    few, many = max(1, new // 8), new
    rounds, warm = (1, 1) if place.quick else (3, 2)
    short, long = (clocked(lambda count=count: generate(count), place.device, rounds, warm) for count in (few, many))
    return max(long - short, 1e-9) / (many - few)


ROWS = (
    Row(
        name="gpu-ceilings",
        what="a large bfloat16 product, and a copy on the device",
        report=ceilings_report,
        cuda=True,
    ),
    Row(
        name="gpu-decode",
        what="greedy decoding in bfloat16, one answer and 64, by Model.generate; bytes of weights and cache over the copy's speed",
        needs=("transformers",),
        report=decode_report,
        cuda=True,
    ),
)
