"""Rows on the one core as it stands: masking, the cache, what a context costs, sampling, the scale of scores at the start.

    uv run benchmarks/seeds.py causal kv-cache context temperature scaled-start          under 2 CPU-minutes in all

Each `measure_...` returns its numbers by name; table.py has their bars.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multimodal as mm
from multimodal.attention import Backend, DensePlan
from multimodal.generate.samplers import Written

WRITE = "-> symbols"
Numbers = dict[str, float]


@dataclass(frozen=True)
class Symbols(mm.Tokenizer):
    """Numbers below `vocab_size`, one a token; a value is a sequence of them."""

    vocab_size: int = 16

    def encode(self, value: Sequence[int]) -> mm.Tokens:
        return mm.Tokens(torch.as_tensor(value), self.places(len(value)))

    def decode(self, tokens: mm.Tokens) -> tuple[int, ...]:
        return tuple(tokens.content.tolist())


def writer(core: mm.Core, vocab: int, seed: int, *, std: float = 0.1) -> mm.Model:
    """A model that writes symbols; with `std` its weights are drawn so large that its logits differ clearly."""
    model = mm.Model({"symbols": Symbols(vocab)}, core, [WRITE], seed=seed)
    draw = torch.Generator().manual_seed(seed)
    if std:
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=std, generator=draw)
    return model.eval()


def unmasked(rule, layout) -> DensePlan:
    """The mutation: every token sees every other of its sample."""
    from multimodal.masks import SameSample

    return DensePlan(SameSample(), layout)


@torch.no_grad()
def written_logits(model: mm.Model, ids: Sequence[int] | Tensor, backend: Backend = "auto") -> Tensor:
    """Logits (N + 1, V + 1): row i chooses symbol i from those before it, the last row the stop."""
    return model.logits(model.pack(WRITE, [{"symbols": ids}]), backend=backend)[WRITE]


def measure_causal(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """What an edit changes before itself, one parallel pass against a pass for each prefix, and both again without the mask."""
    size, prefixes, steps, vocab = (32, 8, 5, 16) if quick else (256, 64, 250, 16)
    model = writer(mm.Core(width=64, depth=4, heads=4), vocab, seed)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (size,), generator=draw)
    edited, at = ids.clone(), size // 2
    edited[at:] = (ids[at:] + 1) % vocab
    found: Numbers = {}
    for name, backend in {"masked": "auto", "unmasked": unmasked}.items():
        change = (written_logits(model, ids, backend) - written_logits(model, edited, backend)).abs().amax(-1)
        found[f"edit leak, {name}"] = float(change[: at + 1].max())
        found[f"edit reach, {name}"] = float(change[at + 1 :].max())
        parallel = F.cross_entropy(written_logits(model, ids[:prefixes], backend)[:-1], ids[:prefixes])
        last = torch.stack([_after(model, ids[:i], backend) for i in range(prefixes)])
        found[f"parallel - prefixes, {name}"] = float((parallel - F.cross_entropy(last, ids[:prefixes])).abs())
        found[f"loss on noise / entropy, {name}"] = _loss_on_noise(vocab, steps, seed, backend) / math.log(vocab)
    return found


@torch.no_grad()
def _after(model: mm.Model, ids: Tensor, backend: Backend) -> Tensor:
    """The logits (V + 1,) of what follows these symbols, from a pass over nothing else."""
    begun = [mm.Tokens(ids, Symbols().places(len(ids)))] if len(ids) else None
    stream = model.packer([(WRITE, {})], answers=False, begins=begun)
    return model.logits(stream, backend=backend)[WRITE][-1]


def _loss_on_noise(vocab: int, steps: int, seed: int, backend: Backend) -> float:
    """The loss in nats of a model that learns to write what cannot be foreseen; below the entropy, it looked ahead."""
    model = writer(mm.Core(width=32, depth=1, heads=2), vocab, seed, std=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        ids_BN = torch.randint(vocab, (16, 24), generator=draw)
        stream = model.pack(WRITE, [{"symbols": ids} for ids in ids_BN])
        logits = model.logits(stream, backend=backend)[WRITE].view(16, 25, -1)[:, :-1]
        order = list(stream.readings[WRITE].samples)
        loss = F.cross_entropy(logits.flatten(0, 1), ids_BN[order].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-20:]))


@dataclass(frozen=True)
class Seen(mm.generate.Sampler):
    """Changes nothing, and records every step's logits."""

    logits: list[Tensor] = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        self.logits.append(logits_BV.clone())
        return logits_BV


def measure_kv_cache(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Greedy writing with the cache against a whole pass for each token: the same logits and text, the ratio of CPU times."""
    model = writer(mm.Core(width=128, depth=4, heads=4), 64, seed)
    found: Numbers = {}
    lengths = {128: 6, 256: 10, 512: 14} if quick else {n: n for n in (128, 256, 512)}
    for name, count in lengths.items():
        answer, step_logits, cached_s = _with_cache(model, count)
        start = time.process_time()
        recomputed = _recomputed(model, count)
        full_s = time.process_time() - start
        cached = step_logits.log_softmax(-1)[:count]
        whole = written_logits(model, answer).log_softmax(-1)[:count]
        found[f"speed-up {name}"] = full_s / cached_s
        found[f"cached - full {name}"] = float((cached - whole).abs().max())
        found[f"same text {name}"] = float(tuple(recomputed) == tuple(answer))
        stream = model.pack(WRITE, [{"symbols": answer}])
        place_TA = stream.position_TA.clone()
        place_TA[-1, 0] += 1
        late = dataclasses.replace(stream, position_TA=place_TA)
        with torch.no_grad():
            off = model.logits(late)[WRITE][-1] - model.logits(stream)[WRITE][-1]
        found[f"last place off by one {name}"] = float(off.abs().max())
    core = mm.Core(width=128, depth=4, heads=4, kv_heads=2)
    cache = core.cache(rows=3, capacity=100)
    held = sum(x.numel() * x.element_size() for x in (*cache.k, *cache.v))
    found["bytes / formula"] = held / (2 * core.depth * 3 * 100 * core.groups * core.head_width * 4)
    found["growth of the speed-up"] = found["speed-up 512"] / found["speed-up 128"]
    return found


def _with_cache(model: mm.Model, count: int) -> tuple[tuple[int, ...], Tensor, float]:
    """The likeliest symbols by `generate`, every step's logits, and the median CPU time of three."""
    times, written, seen = [], (), Seen()
    for _ in range(3):
        seen, start = Seen(), time.process_time()
        written = model.generate(WRITE, [{}], max_tokens=count, sampler=seen | mm.generate.AtLeast(count + 1))[0].value
        times.append(time.process_time() - start)
    return written, torch.cat(seen.logits), median(times)


def _recomputed(model: mm.Model, count: int) -> list[int]:
    """The likeliest symbols, each from a whole pass over all before it."""
    ids: list[int] = []
    for _ in range(count):
        ids.append(int(_after(model, torch.tensor(ids, dtype=torch.long), "auto")[:-1].argmax()))
    return ids


def measure_context(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """How CPU time and memory of one layer grow with the context: all of it, and a window of 64 tokens."""
    from multimodal.masks import Causal, Window

    sizes, repeats = ([64, 128, 256], 1) if quick else ([4096, 8192, 16384, 32768], 3)
    model_of = {
        name: writer(mm.Core(width=64, depth=1, heads=4, mlp_width=16, **mask), 16, seed)
        for name, mask in {"global": {}, "local": {"mask": Causal() & Window(64)}}.items()
    }
    found: Numbers = {}
    for name, model in model_of.items():
        times = [_cpu_s(model, size, repeats) for size in sizes]
        found[f"time exponent, {name}"] = _exponent(sizes, times)
        found[f"ms at 32768 tokens, {name}"] = 1000 * times[-1]  # at 256 in the quick form
    small = sizes if quick else [512, 1024, 2048, 4096]
    for name, (model, backend) in {
        "fused": (model_of["global"], "auto"),
        "dense": (model_of["global"], "dense"),
        "local": (model_of["local"], "auto"),
    }.items():
        found[f"memory exponent, {name}"] = _exponent(small, [_peak_bytes(model, n, backend) for n in small])
    return found


def _noise(model: mm.Model, size: int):
    return model.pack(WRITE, [{"symbols": torch.randint(16, (size - 1,))}])


@torch.no_grad()
def _cpu_s(model: mm.Model, size: int, repeats: int) -> float:
    """Median CPU time of a pass over `size` tokens."""
    stream, times = _noise(model, size), []
    for _ in range(repeats + 1):
        start = time.process_time()
        model(stream)
        times.append(time.process_time() - start)
    return median(times[1:])


@torch.no_grad()
def _peak_bytes(model: mm.Model, size: int, backend: Backend) -> float:
    """The most that PyTorch's allocator held beyond what it held before, during a pass."""
    from torch.profiler import ProfilerActivity, profile

    stream = _noise(model, size)
    model(stream, backend=backend)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(stream, backend=backend)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return float(np.cumsum([held for _, held in memory]).max())


def _exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure_temperature(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Draws of `generate` against the softmax (chi-squared), colder and hotter, and what top-k and top-p leave."""
    from scipy.stats import chisquare

    draws, vocab = (300, 8) if quick else (100_000, 8)
    model = writer(mm.Core(width=32, depth=1, heads=2), vocab, seed, std=0.4)
    logits_V = written_logits(model, [0])[0]
    wanted = logits_V.double().softmax(-1).numpy()

    def drawn(count: int, **how) -> np.ndarray:
        answers = model.generate(WRITE, [{}] * count, max_tokens=1, seed=seed * draws, batch=500, **how)
        first = [answer.value[0] if answer.value else vocab for answer in answers]
        return np.bincount(first, minlength=vocab + 1)

    counts = drawn(draws, temperature=1.0)
    divided = wanted / 2 / (wanted / 2).sum()  # dividing probabilities by T = 2 changes nothing: the wrong temperature
    hot = drawn(draws // 10, temperature=2.0)
    right_hot = (logits_V.double() / 2).softmax(-1).numpy()
    entropies = []
    for temperature in (0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 5.0, 20.0):
        p = mm.Temperature(temperature)(logits_V[None], [])[0].double().softmax(-1)
        entropies.append(float(torch.special.entr(p).sum()))
    cold = drawn(20, temperature=0.0)
    order = np.argsort(-wanted)
    top_k = mm.TopK(3)(logits_V[None], [])[0].isfinite().numpy()
    top_p = mm.TopP(0.8)(logits_V[None], [])[0].isfinite().numpy()
    smallest = int(np.searchsorted(wanted[order].cumsum(), 0.8)) + 1
    return {
        "p of chi-squared, T=1": float(chisquare(counts, wanted * draws).pvalue),
        "p of chi-squared, T=2": float(chisquare(hot, right_hot * hot.sum()).pvalue),
        "p of chi-squared, T=2 on probabilities": float(chisquare(hot, divided * hot.sum()).pvalue),
        "greedy at T=0": float(cold[order[0]] == 20),
        "least rise of the entropy": min(b - a for a, b in pairwise(entropies)),
        "top-k exact": float(set(np.flatnonzero(top_k)) == set(order[:3])),
        "top-p exact": float(set(np.flatnonzero(top_p)) == set(order[:smallest])),
    }


def measure_scaled_start(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Fresh attention over 512 keys of width 512: the dot product is one-hot and passes no gradient, the scaled one is not."""
    width, keys = (64, 64) if quick else (512, 512)
    draw = torch.Generator().manual_seed(seed)
    found: Numbers = {}
    q, k, v = (torch.randn(n, width, generator=draw) for n in (64, keys, keys))
    for name, scale in {"scaled": width**-0.5, "dot": 1.0}.items():
        asked = q.clone().requires_grad_()
        weights = (scale * asked @ k.T).softmax(-1)
        fused = F.scaled_dot_product_attention(asked[None], k[None], v[None], scale=scale)[0]
        (gradient,) = torch.autograd.grad((fused * torch.randn(fused.shape, generator=draw)).sum(), asked)
        weights = weights.detach()
        found[f"largest weight, {name}"] = float(weights.amax(-1).mean())
        found[f"entropy / log n, {name}"] = float(torch.special.entr(weights).sum(-1).mean() / math.log(keys))
        # relative to the score's own scale: how far a relative change of q moves the read
        found[f"gradient of q, {name}"] = float(gradient.norm(dim=-1).median() / scale)
    found["gradient, dot / scaled"] = found["gradient of q, dot"] / found["gradient of q, scaled"]
    return found
