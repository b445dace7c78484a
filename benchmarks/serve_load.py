"""Load of a service: times of the first text and of the whole answer, throughput beside one request at a time, growth of memory.

uv run benchmarks/serve_load.py                            a small model of its own, 16 clients, a minute
uv run benchmarks/serve_load.py --checkpoint runs/four_jobs --clients 32 --seconds 600
uv run benchmarks/serve_load.py --seconds 5 --clients 4    does it run?

Clients ask tasks of every sort in turn, each as soon as its last answer has come, and every tenth request is left halfway. First
one client asks alone, then all of them; both times are of the same length.
"""

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from benchmarks.script import parsed, parser, table

ROOT = Path(__file__).resolve().parents[1]
RATE = 8000  # of the sounds that are sent
LEAVES = 10  # every tenth request is left halfway


@dataclass
class Measured:
    """What clients measured.

    first_s, whole_s: seconds from a request to its first text, and to its end.
    tokens: that were written. left: requests that were left. statuses: number of answers by status.
    memory: of the service, (seconds, bytes).
    """

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)


def small_model(folder: Path) -> Path:
    """A model with fresh weights that reads pictures, sound and text, writes text and classifies."""
    import multimodal as mm
    from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

    model = mm.Model(
        {
            "image": ImagePatches(patch=4, channels=1),
            "text": TextBytes(causal=True),
            "audio": AudioFrames(rate_hz=RATE),
            "label": Labels(("cat", "dog")),
        },
        mm.Core(width=128, depth=4, heads=4),
        ["image -> label", "text -> answer:text", "image text -> answer:text", "audio -> answer:text"],
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(5)  # so that answers differ
    return model.save(folder / "small")


@contextmanager
def service(checkpoint: Path, args: Any, log: Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of `multimodal serve` while it runs."""
    paths = [str(ROOT), str(ROOT / "tokenizers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    limits = ["--rows", str(args.rows), "--capacity", str(args.capacity), "--queue", "1000"]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "multimodal", "serve", str(checkpoint), "--port", "0", *limits],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdout is not None
        try:
            found = re.search(r"at (http://\S+)", process.stdout.readline())
            if found is None:
                raise RuntimeError(f"the service did not start:\n{log.read_text(encoding='utf-8')}")
            yield found[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            process.stdout.close()


def value_of(takes: str, number: int) -> Any:
    """A value for a field of this sort, another one for each number."""
    random = np.random.default_rng(number)
    if takes == "picture":
        data = io.BytesIO()
        side = int(8 * random.integers(1, 5))
        Image.fromarray(random.integers(0, 255, (side, side)).astype(np.uint8)).save(data, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    if takes == "sound":
        wave = 0.1 * np.sin(np.arange(int(RATE * random.uniform(0.2, 1))) * random.uniform(0.1, 1))
        return {"array": wave.round(4).tolist(), "sampling_rate": RATE}
    return "what is this " * int(random.integers(1, 4))


def usable(tasks: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tasks whose fields can be made up here."""
    sorts = {"picture", "sound", "text"}
    return [task for task in tasks if not task["pair"] and all(field["takes"] in sorts for field in task["reads"])]


def resident(pid: int) -> int:
    """Bytes of memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


async def client(url: str, tasks: list[Mapping[str, Any]], first: int, until: float, tokens: int, m: Measured) -> None:
    """One client, which asks until the time is over."""
    number = first
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        while time.monotonic() < until:
            number += 1
            task = tasks[number % len(tasks)]
            body: dict[str, Any] = {
                "fields": {f["field"]: value_of(f["takes"], number) for f in task["reads"]},
                "stream": True,
            }
            if task["token_by_token"]:
                body["max_tokens"] = tokens
            start, seen = time.monotonic(), None
            async with http.stream("POST", f"/v1/tasks/{task['task']}", json=body) as answer:
                m.statuses[answer.status_code] = m.statuses.get(answer.status_code, 0) + 1
                async for line in answer.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    seen = seen or time.monotonic() - start
                    if number % LEAVES == 0 and task["token_by_token"]:
                        m.left += 1
                        break
                    if match := re.search(r'"completion_tokens": (\d+)', line):
                        m.tokens += int(match[1])
                else:
                    m.first_s.append(seen or time.monotonic() - start)
                    m.whole_s.append(time.monotonic() - start)


async def load(url: str, pid: int, tasks: list[Mapping[str, Any]], clients: int, args: Any) -> Measured:
    """Let clients ask for the time that was given."""
    m, start = Measured(), time.monotonic()
    until = start + args.seconds

    async def watch() -> None:
        while time.monotonic() < until:
            m.memory.append((time.monotonic() - start, resident(pid)))
            await asyncio.sleep(max(args.seconds / 20, 0.1))

    asked = [client(url, tasks, 1000 * i, until, args.tokens, m) for i in range(clients)]
    await asyncio.gather(watch(), *asked)
    return m


def row(name: str, m: Measured, seconds: float) -> list[str]:
    """A row of the table."""

    def at(times: list[float], share: float) -> str:
        return f"{1000 * float(np.quantile(times, share)):,.0f}" if times else "-"

    other = sum(count for status, count in m.statuses.items() if status != 200)
    return [
        name,
        f"{len(m.whole_s) / seconds:,.1f}",
        f"{m.tokens / seconds:,.0f}",
        *(at(times, share) for times in (m.first_s, m.whole_s) for share in (0.5, 0.99)),
        f"{m.left}",
        f"{other}",
    ]


def growth(m: Measured) -> str:
    """How much memory the second half of a run took beyond the first quarter."""
    early = [size for at, size in m.memory if at <= m.memory[-1][0] / 4]
    late = [size for at, size in m.memory if at >= m.memory[-1][0] / 2]
    if not early or not late or not max(late):
        return "memory: this system does not say"
    mib = 2**20
    return f"memory {max(early) / mib:,.0f} MiB in the first quarter, {max(late) / mib:,.0f} MiB in the second half"


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument(
        "--checkpoint", type=Path, help="a run or model folder; by default a small model with fresh weights"
    )
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--seconds", type=float, default=60.0, help="of each of the two measurements")
    options.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--capacity", type=int, default=512)
    args = parsed(options)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or small_model(Path(folder))
        with service(checkpoint, args, Path(folder) / "log") as (url, pid):
            while True:
                try:
                    tasks = usable(httpx.get(f"{url}/v1/tasks", timeout=60).json()["data"])
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            alone = asyncio.run(load(url, pid, tasks, 1, args))
            together = asyncio.run(load(url, pid, tasks, args.clients, args))
            metrics = httpx.get(f"{url}/metrics", timeout=60).text
    head = ["clients", "answers/s", "tokens/s", "first p50 ms", "p99", "whole p50 ms", "p99", "left", "not 200"]
    rows = [row("1", alone, args.seconds), row(str(args.clients), together, args.seconds)]
    print(table(head, rows), end="")
    if alone.tokens:
        print(f"throughput of {args.clients} clients: {together.tokens / alone.tokens:.2f} times that of one")
    print(growth(together))
    print(
        "\n".join(
            line for line in metrics.splitlines() if re.match(r"multimodal_(steps|passes|packed|left)_total", line)
        )
    )


if __name__ == "__main__":
    main()
