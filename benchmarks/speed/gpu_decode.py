"""Greedy decoding of a 200 M model on a GPU, as a share of its memory's floor and against Hugging Face's static cache.

Hoped for, not yet measured: 1,000 tokens/s at batch 1, 60 % of the floor; at batch 64 1.5 times Hugging Face's tokens.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.speed.gpu import ceilings, clocked, llama
from benchmarks.speed.row import Place, Row
from benchmarks.speed.scaling import ids

DECODE = "note:text -> text"


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
    peer = llama(core, vocab, place, use_cache=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    peer = peer.to(torch.bfloat16).eval()
    draw = torch.Generator().manual_seed(place.seed)
    lines = [
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in bfloat16, prompt {prompt}, {new} new tokens; copy "
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
        name="gpu-decode",
        what="greedy decoding in bfloat16, one answer and 64, by Model.generate; bytes of weights and cache over the copy's speed",
        needs=("transformers",),
        report=decode_report,
        cuda=True,
    ),
)
