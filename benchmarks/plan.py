"""`multimodal plan` against what is measured here: memory and FLOPs.

    uv run benchmarks/plan.py                  about 5 CPU-minutes; on a busy machine 15
    uv run benchmarks/plan.py --write          and writes the tables to benchmarks/results/plan.md

Memory: a fresh process of one thread trains for three steps by `fit`, and PyTorch's profiler records every piece of memory that is
allocated and freed; the highest sum is what the plan has to say. Expected: within
2 % in one process, 10 % in several; the table shows where not.
"""

import argparse
import json
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(path) for path in (ROOT / "tokenizers", ROOT, HERE) if str(path) not in sys.path]

import torch  # noqa: E402

import multimodal as mm  # noqa: E402
from multimodal.core import recompute  # noqa: E402
from multimodal.count import MemoryUse, Work, count_stream, rank_memory, token_flops  # noqa: E402
from multimodal.count.flops import embed_cost, rowwise_layers, transformer  # noqa: E402
from multimodal.count.memory import layer_activations  # noqa: E402
from multimodal.count.streams import stream_tensors  # noqa: E402
from multimodal.layers import Sublayer  # noqa: E402
from multimodal.tokenizer import Tokenizer, Tokens, at_times  # noqa: E402

RESULT = HERE / "results" / "plan.md"


@dataclass(frozen=True)
class Ids(Tokenizer):
    """Numbers as they come."""

    vocab_size: int = 256
    causal: bool = True

    def encode(self, value: torch.Tensor) -> Tokens:
        return Tokens(value, at_times(torch.arange(float(len(value)))))

    def decode(self, tokens: Tokens) -> torch.Tensor:
        return tokens.content


@dataclass(frozen=True)
class Rows(Tokenizer):
    """Features as they come."""

    feature_size: int = 48

    def encode(self, value: torch.Tensor) -> Tokens:
        return Tokens(value, at_times(torch.arange(float(len(value)))))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model and a recipe that this machine trains."""

    width: int
    depth: int
    batch: int
    length: int  # ids of a sample; one more token opens it
    vocab: int = 300
    heads: int = 4
    kv_heads: int = 4
    rows: int = 0  # of features that are read before the ids are written
    accumulate: int = 1
    ema: float = 0.0
    optimizer: str = "adamw"
    precision: str = "float32"
    checkpointing: bool = False
    parallel: str = "ddp"
    processes: int = 1

    @property
    def task(self) -> str:
        return "row -> id" if self.rows else "-> id"

    @property
    def changes(self) -> str:
        """What differs from a plain case."""
        changed = [f"{self.rows} rows read, prefix-LM"] * bool(self.rows)
        changed += [f"{self.kv_heads} key-value heads"] * (self.kv_heads != self.heads)
        changed += [f"accumulate {self.accumulate}"] * (self.accumulate > 1)
        changed += ["averaged weights"] * (self.ema > 0) + [self.optimizer] * (self.optimizer != "adamw")
        changed += ["bfloat16"] * (self.precision == "bfloat16") + ["checkpointing"] * self.checkpointing
        changed += [f"{self.processes} processes, {self.parallel}"] * (self.processes > 1)
        return ", ".join(changed) or "-"

    def model(self) -> mm.Model:
        core = mm.Core(width=self.width, depth=self.depth, heads=self.heads, kv_heads=self.kv_heads)
        kinds: dict[str, Tokenizer] = {"id": Ids(self.vocab)} | ({"row": Rows()} if self.rows else {})
        model = mm.Model(kinds, core, [mm.Task(self.task, mm.NextToken())])
        recompute(model, self.checkpointing)
        return model

    def data(self) -> dict[str, list[dict[str, Any]]]:
        draw = torch.Generator().manual_seed(0)
        samples = []
        for _ in range(self.batch):
            ids = torch.randint(0, self.vocab, (self.length,), generator=draw)
            samples.append({"id": ids, "row": torch.randn(max(self.rows, 1), 48, generator=draw)})
        return {self.task: samples}

    def recipe(self, steps: int = 3) -> mm.Recipe:
        return mm.Recipe(
            steps=steps,
            batch=self.batch,
            accumulate=self.accumulate,
            ema=self.ema,
            optimizer=self.optimizer,
            precision=self.precision,
            activation_checkpointing=self.checkpointing,
            parallel=self.parallel,
            device="cpu",
        )

    def work(self, tokens: float) -> Work:
        return Work(
            tokens=tokens * self.batch / self.accumulate / self.processes,
            micro_batches=self.accumulate,
            processes=self.processes,
            parallel=self.parallel,
            half=self.precision == "bfloat16",
            checkpointing=self.checkpointing,
            optimizer=self.optimizer,
            averaged=self.ema > 0,
        )

    def planned(self) -> MemoryUse:
        model = self.model()
        stats = count_stream(model, self.data())
        return rank_memory(model, stats, self.work(stats.length))


CASES = (
    Case(width=64, depth=4, batch=8, length=63, vocab=500),
    Case(width=128, depth=6, batch=16, length=127),
    Case(width=256, depth=4, batch=8, length=127, kv_heads=2),
    Case(width=384, depth=6, batch=4, length=255, heads=6, kv_heads=6),
    Case(width=128, depth=2, batch=4, length=127, vocab=8000),
    Case(width=128, depth=4, batch=8, length=63, rows=32),
    Case(width=256, depth=6, batch=8, length=127, checkpointing=True),
    Case(width=128, depth=4, batch=8, length=127, precision="bfloat16"),
    Case(width=192, depth=4, batch=8, length=127, precision="bfloat16", checkpointing=True),
    Case(width=128, depth=4, batch=8, length=63, accumulate=4, ema=0.9),
    Case(width=128, depth=3, batch=8, length=63, optimizer="muon"),
    Case(width=256, depth=4, batch=4, length=31, processes=2),
    Case(width=256, depth=6, batch=4, length=31, processes=2, parallel="fsdp"),
    Case(width=256, depth=4, batch=4, length=31, processes=2, parallel="fsdp", accumulate=2, precision="bfloat16"),
)
COUNTED = CASES[:5]  # their FLOPs are counted too


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that is allocated while `work` runs, above what was there: from the profiler's record of every piece."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    result = record.profiler.kineto_results  # type: ignore[union-attr]
    events = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    live = highest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        highest = max(highest, live)
    return highest


def measure(case: Case) -> dict[str, float]:
    """Bytes that `fit` takes, the weights included; bytes that a forward pass saves for the backward pass; FLOPs of a step."""
    torch.set_num_threads(1)
    model, data = case.model(), case.data()
    weights = sum(p.nbytes for p in model.parameters())
    found = {"weights": float(weights)}
    if case.processes == 1:
        mm.fit(CASES[0].model(), CASES[0].data(), CASES[0].recipe(2), quiet=True)  # imports what is imported late
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        mm.fit(model, data, case.recipe(2), quiet=True)
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["grown"] = float(weights + highest - pages * os.sysconf("SC_PAGE_SIZE"))
        model = case.model()
    found["total"] = float(weights + peak_bytes(lambda: mm.fit(model, data, case.recipe(), quiet=True)))
    if case.processes == 1 and case.accumulate == 1 and not case.checkpointing:
        found |= saved_by_part(case)
    if case in COUNTED:
        found["flops"], found["planned_flops"] = counted_flops(case)
    return found


def saved_by_part(case: Case) -> dict[str, float]:
    """Bytes that a forward pass saves for the backward pass in all attention layers, in all MLPs, and elsewhere."""
    model, data = case.model().train(), case.data()
    stream = model.pack(case.task, data[case.task])
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *stream_tensors(stream))}
    found: dict[int, tuple[str, int, torch.Tensor]] = {}
    where = ["rest"]
    for module in model.modules():
        if isinstance(module, Sublayer):
            name = type(module.layer).__name__
            module.register_forward_pre_hook(lambda _, __, name=name: where.append(name))
            module.register_forward_hook(lambda *_: where.pop() and None)

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            found.setdefault(storage._cdata, (where[-1], storage.nbytes(), t))
        return t

    half = case.precision == "bfloat16"
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        loss = model.loss(stream)
    sums: dict[str, float] = dict.fromkeys(("saved SelfAttention", "saved MLP", "saved rest"), 0.0)
    for part, size, _ in found.values():
        sums[f"saved {part}"] += size
    del loss
    return sums


def planned_by_part(case: Case) -> dict[str, float]:
    """The same, planned."""
    model = case.model()
    stats = count_stream(model, case.data())
    half, tokens = case.precision == "bfloat16", stats.length * case.batch
    sums: dict[str, float] = dict.fromkeys(("SelfAttention", "MLP", "rest"), 0.0)
    for layer in transformer(model).sublayers():
        saved = layer_activations(layer, transformer(model).core, stats, half=half, cuda=False)
        saved = saved.of(stats.wanted) if layer in rowwise_layers(model) else saved
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        sums[type(layer.layer).__name__] += tokens * sum(saved.parts.values()) + 2 * matrices * half
    rotations, heads = 4.0 * case.width / case.heads, 2 if half else 4
    sums["SelfAttention"] += tokens * rotations
    rows = stats.rows["id_NextToken"] * tokens
    sums["rest"] += stats.wanted * tokens * 4 * (case.width + 1) + rows * (4 * (case.vocab + 1) + heads * case.width)
    if case.rows:
        tokenizer = model.packer.tokenizers["row"]
        sums["rest"] += tokens * stats.kinds["row"] * embed_cost(tokenizer, case.width, half).saved
    return sums | {"rest": sums["rest"] + 2 * case.width * (case.vocab + 1) * half}


def counted_flops(case: Case) -> tuple[float, float]:
    """FLOPs of a training step: as PyTorch counts them on the model itself with attention written out, and as planned for that."""
    from dataclasses import replace

    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, data = case.model().train(), case.data()
    stream = model.pack(case.task, data[case.task])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(stream).backward()
    # PyTorch's plain attention computes all pairs
    stats = replace(count_stream(model, data), context=float(stream.layout.spans[0].total))
    flops = token_flops(model, stats)
    return float(counter.get_total_flops()), (flops.training + flops.again * case.checkpointing) * len(stream)


def in_processes(case: Case) -> dict[str, float]:
    """`measure` in fresh processes, as many as the case has; returns what the first one measured."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(asdict(case))]
    running = []
    for rank in range(case.processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "9"}
        if case.processes > 1:
            rendezvous = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.processes, "MASTER_PORT": port}
            environment |= {name: str(value) for name, value in rendezvous.items()} | {"MASTER_ADDR": "127.0.0.1"}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = [process.communicate(timeout=600)[0] for process in running]
    for process, text in zip(running, found, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of {case} ended with {process.returncode}: {text[-500:]}")
    return json.loads(found[0].splitlines()[-1])


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}"


def memory_table(found: Mapping[Case, dict[str, float]]) -> str:
    lines = [
        "| width x depth | batch x tokens | also | measured MB | planned MB | planned / measured | saved by attention; MLP; rest: "
        "measured MB, planned / measured | process grew by MB (RSS) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for case, row in found.items():
        planned = case.planned()
        saved = "-"
        if "saved SelfAttention" in row:
            pairs = [(row[f"saved {part}"], size) for part, size in planned_by_part(case).items()]
            saved = "; ".join(f"{megabytes(real)}, {size / real:.3f}" for real, size in pairs)
        what = f"{case.width} x {case.depth} | {case.batch} x {case.length + 1 + case.rows} | {case.changes}"
        sizes = f"{megabytes(row['total'])} | {megabytes(planned.total)} | {planned.total / row['total']:.3f}"
        grown = f"{row['grown'] / 1e6:.0f}" if "grown" in row else "-"
        lines.append(f"| {what} | {sizes} | {saved} | {grown} |")
    return "\n".join(lines)


def flops_table(found: Mapping[Case, dict[str, float]]) -> str:
    lines = ["| width x depth | FLOPs a step: counted by PyTorch | planned / counted |", "|---|---:|---:|"]
    for case, row in found.items():
        if "flops" in row:
            ratio = row["planned_flops"] / row["flops"]
            lines.append(f"| {case.width} x {case.depth} | {row['flops']:.4e} | {ratio:.6f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", default="")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Case(**json.loads(options.measure)))))
        return
    found = {}
    for number, case in enumerate(CASES, 1):
        found[case] = in_processes(case)
        print(f"  {number}/{len(CASES)} {case.width} x {case.depth} {case.changes}", flush=True)
    text = f"## Memory, measured on this CPU\n\n{memory_table(found)}\n\n## FLOPs of a step\n\n{flops_table(found)}"
    print(text)
    if options.write:
        machine = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}"
        head = "# What `multimodal plan` says, against what is measured\n\n`uv run benchmarks/plan.py --write`\n"
        RESULT.write_text(f"{head}{machine}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
