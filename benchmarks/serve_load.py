"""Load of a service: times of the first text and of the whole answer, throughput beside one request at a time, growth of memory.

uv run benchmarks/serve_load.py --write                    a small model of its own, 64 clients, five minutes
uv run benchmarks/serve_load.py --checkpoint runs/four_jobs --clients 32 --seconds 600
uv run benchmarks/serve_load.py --seconds 5 --clients 4    does it run?

Clients ask tasks of every sort in turn, of other lengths and media, some drawn with a seed, each as soon as its last answer has
come; every tenth request is left halfway. First one client asks alone for a fifth of the time, then all of them. At last one client
asks again, alone, for every request that was answered, and the answers are compared: same ids and texts, vectors within 1e-5.
"""

import asyncio
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from benchmarks import report
from benchmarks.script import parsed, parser, table

ROOT = Path(__file__).resolve().parents[1]
RATE = 8000  # of the sounds that are sent
LEAVES = 10  # every tenth request is left halfway
DISTINCT = 500  # requests; then they come again
CLOSE = 1e-5  # two vectors that agree


@dataclass
class Measured:
    """What clients measured.

    first_s, whole_s: seconds from a request to its first text, and to its end.
    tokens: that were written. left: requests that were left. statuses: number of answers by status.
    answers: to each request, by its number. memory: of the service, (seconds, bytes). seconds: that it took.
    """

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    answers: dict[int, list[Any]] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0


def small_model(folder: Path) -> Path:
    """A model with fresh weights that reads pictures, sound and text; it writes, classifies, transcribes and makes vectors."""
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
        [
            *("image -> label", "text -> answer:text", "image text -> answer:text", "audio -> answer:text"),
            mm.Task("audio -> text", mm.CTC()),
            mm.Task("image <-> text", mm.Contrast(width=32)),
        ],
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
    return [task for task in tasks if all(field["takes"] in sorts for field in task["reads"])]


def request(tasks: list[Mapping[str, Any]], number: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of a request; every third one that is written token by token is drawn."""
    task = tasks[number % len(tasks)]
    body: dict[str, Any] = {"fields": {f["field"]: value_of(f["takes"], number) for f in task["reads"]}}
    if not task["pair"]:
        body["stream"] = True
    if task["token_by_token"]:
        body["max_tokens"] = 1 + number * 7 % tokens
        if number // len(tasks) % 3 == 0:
            body |= {"temperature": 0.8, "seed": number}
    return f"/v1/tasks/{task['task']}", body


def told(event: Mapping[str, Any]) -> Any:
    """What two answers to one request share; None for a piece of one."""
    if event.get("object") == "task.vectors":
        return [event["left"], event["right"]]
    answers = event.get("answers")
    return None if answers is None else [[answer.get("ids"), answer["value"]] for answer in answers]


def same(one: Any, other: Any) -> bool:
    if one and isinstance(one[0][0], float):
        return bool(np.allclose(one, other, rtol=0, atol=CLOSE))
    return one == other


def resident(pid: int) -> int:
    """Bytes of memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


async def client(
    url: str, tasks: list[Mapping[str, Any]], numbers: Iterable[int], args: Any, m: Measured, leaves: bool = True
) -> None:
    """One client, which asks for these numbers one after another. leaves: whether it leaves some halfway."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        for number in numbers:
            path, body = request(tasks, number, args.tokens)
            leaving = leaves and number % LEAVES == 0 and "max_tokens" in body
            start, seen = time.monotonic(), None
            async with http.stream("POST", path, json=body) as answer:
                m.statuses[answer.status_code] += 1
                async for line in answer.aiter_lines():
                    line = line.removeprefix("data: ")
                    if not line.startswith("{"):  # between events, and behind the last one
                        continue
                    seen, found = seen or time.monotonic() - start, json.loads(line)
                    if leaving and "text" in found:
                        m.left += 1
                        break
                    if (whole := told(found)) is not None:
                        m.tokens += found["usage"]["completion_tokens"]
                        m.answers.setdefault(number, []).append(whole)
                else:
                    m.first_s.append(seen or time.monotonic() - start)
                    m.whole_s.append(time.monotonic() - start)


async def load(url: str, pid: int, tasks: list[Mapping[str, Any]], clients: int, seconds: float, args: Any) -> Measured:
    """Let clients ask for this time."""
    m, start = Measured(), time.monotonic()

    def numbers(first: int) -> Iterator[int]:
        number = first
        while time.monotonic() < start + seconds:
            yield number % DISTINCT
            number += 1

    async def watch() -> None:
        while time.monotonic() < start + seconds:
            m.memory.append((time.monotonic() - start, resident(pid)))
            await asyncio.sleep(max(seconds / 100, 0.1))

    asked = [client(url, tasks, numbers(DISTINCT * i // clients), args, m) for i in range(clients)]
    await asyncio.gather(watch(), *asked)
    m.seconds = time.monotonic() - start
    return m


def compared(url: str, tasks: list[Mapping[str, Any]], m: Measured, args: Any) -> str:
    """Ask again for all that was answered, one after the other, and compare."""
    alone = Measured()
    numbers = sorted(m.answers)
    asyncio.run(client(url, tasks, numbers, args, alone, leaves=False))
    other = [
        n for n in numbers for found in m.answers[n] if not all(same(found, x) for x in alone.answers.get(n, [None]))
    ]
    count = sum(map(len, m.answers.values()))
    agree = f"{count - len(other):,} of {count:,} answers to {len(numbers)} requests are those that each gets alone"
    return agree if not other else f"{agree}; others: {sorted(set(other))[:20]}"


def row(name: str, m: Measured) -> list[str]:
    """A row of the table."""

    def at(times: list[float], share: float) -> str:
        return f"{1000 * float(np.quantile(times, share)):,.0f}" if times else "-"

    other = sum(count for status, count in m.statuses.items() if status != 200)
    return [
        name,
        f"{len(m.whole_s) / m.seconds:,.1f}",
        f"{m.tokens / m.seconds:,.0f}",
        *(at(times, share) for times in (m.first_s, m.whole_s) for share in (0.5, 0.99)),
        f"{m.left}",
        f"{other}",
    ]


def growth(m: Measured) -> str:
    """The memory of the last fifth of a run beside that of its second: the minutes, where it takes five."""
    end = m.memory[-1][0]
    parts = [[size for at, size in m.memory if low <= at / end <= low + 0.2] for low in (0.2, 0.8)]
    if not all(parts) or not min(map(max, parts)):
        return "memory: this system does not say, or the run was too short"
    second, last = (max(part) / 2**20 for part in parts)
    return f"memory {second:,.1f} MiB in the second fifth of the time, {last:,.1f} MiB in the last: {last / second - 1:+.2%}"


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, "write")
    options.add_argument(
        "--checkpoint", type=Path, help="a run or model folder; by default a small model with fresh weights"
    )
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--seconds", type=float, default=300.0, help="that all clients ask")
    options.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--capacity", type=int, default=512)
    args = parsed(options)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or small_model(Path(folder))
        with service(checkpoint, args, Path(folder) / "log") as (url, pid):
            tasks = usable(wait_for(f"{url}/v1/tasks").json()["data"])
            alone = asyncio.run(load(url, pid, tasks, 1, args.seconds / 5, args))
            together = asyncio.run(load(url, pid, tasks, args.clients, args.seconds, args))
            agreement = compared(url, tasks, together, args)
            metrics = httpx.get(f"{url}/metrics", timeout=60).text
    head = ["clients", "answers/s", "tokens/s", "first p50 ms", "p99", "whole p50 ms", "p99", "left", "not 200"]
    lines = [table(head, [row("1", alone), row(str(args.clients), together)])]
    if alone.tokens:
        ratio = together.tokens / together.seconds / (alone.tokens / alone.seconds)
        lines.append(f"- {args.clients} clients get {ratio:.2f} times the tokens a second of one")
    counted = re.findall(r"^multimodal_((?:steps|passes|packed|left)_total)\S* (\d+)", metrics, re.MULTILINE)
    lines += [f"- {agreement}", f"- {growth(together)}", f"- {', '.join(f'{name} {count}' for name, count in counted)}"]
    body = "\n".join(lines)
    print(body)
    if args.write:
        command = f"benchmarks/serve_load.py --clients {args.clients} --seconds {args.seconds:g} --write"
        report.keep("serve_load", "A service under load", command, body)


def wait_for(url: str) -> httpx.Response:
    """The answer to a GET, as soon as there is one."""
    while True:
        try:
            return httpx.get(url, timeout=60)
        except httpx.TransportError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
