"""`multimodal serve` beside `transformers serve`: the same text model, weights and requests, in one run.

uv run --group peers benchmarks/serve_peer.py --write       16 clients, 40 seconds a service
uv run --group peers benchmarks/serve_peer.py --seconds 5   does it run?

The model has fresh weights; `Model.export("hf")` gives them to the peer in the layout of Qwen3. Every client asks
/v1/chat/completions as soon as its last answer has come: prompts of 20 to 200 bytes, answers of 8 to 64 tokens, the likeliest token
each time. transformers runs without and with its continuous batching. It needs its own extra as well: transformers[serving].
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks import report
from benchmarks.script import parsed, parser, table
from benchmarks.serve_load import service, wait_for

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}<|start|>"
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "what", "was", "there", "before", "it", "went")


def model_folders(folder: Path, width: int, depth: int) -> tuple[Path, Path]:
    """(ours, theirs): the same model as a checkpoint of each library."""
    import multimodal as mm
    from multimodal_tokenizers import TextBytes

    torch.manual_seed(0)
    core = mm.Core(width=width, depth=depth, heads=8, rotary_split=(1, 0, 0))
    model = mm.Model(
        {"text": TextBytes(causal=True)}, core, [mm.Task("text -> text", mm.NextToken(bias=False))], seed=0
    )
    theirs = model.export("hf", folder / "theirs")
    settings = theirs / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**known, "chat_template": TEMPLATE}), encoding="utf-8")
    return model.save(folder / "ours"), theirs


@contextmanager
def transformers_service(folder: Path, log: Path, *more: str) -> Iterator[str]:
    """The address of `transformers serve` while it runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--device",
        "cpu",
    ]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", *more],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    httpx.get(f"{url}/health", timeout=5)
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            if process.returncode is not None:
                raise RuntimeError(f"transformers serve did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def request(number: int, name: str) -> dict[str, Any]:
    random = np.random.default_rng(number)
    text = " ".join(random.choice(WORDS, int(random.integers(5, 45))))[:200]
    return {
        "model": name,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": int(random.integers(8, 65)),
        "temperature": 0,
    }


async def asked(url: str, name: str, clients: int, seconds: float) -> dict[str, Any]:
    """What clients got in this time: tokens, answers by number of request, seconds of each, and how long it took in all."""
    found: dict[str, Any] = {"tokens": 0, "texts": {}, "each": [], "failed": 0}
    async with httpx.AsyncClient(base_url=url, timeout=100, limits=httpx.Limits(max_connections=None)) as http:
        await http.post("/v1/chat/completions", json=request(0, name))  # the first one loads and warms up
        start = time.monotonic()

        async def client(first: int) -> None:
            number = first
            while time.monotonic() < start + seconds:
                began = time.monotonic()
                answer = await http.post("/v1/chat/completions", json=request(number, name))
                if answer.status_code != 200:
                    found["failed"] += 1
                    continue
                body = answer.json()
                found["tokens"] += body["usage"]["completion_tokens"]
                # transformers repeats the prompt; what stands for bytes that are no UTF-8 depends on where a text was cut
                text = body["choices"][0]["message"]["content"].rpartition("<|start|>")[2]
                found["texts"][number] = re.sub("[^ -~]", "", text)
                found["each"].append(time.monotonic() - began)
                number += 1

        await asyncio.gather(*(client(10_000 * i) for i in range(clients)))
        found["seconds"] = time.monotonic() - start
    return found


def main() -> None:
    options = parser(__doc__, "write")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--seconds", type=float, default=40.0, help="of each service")
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--depth", type=int, default=8)
    options.add_argument("--rows", type=int, default=16)
    options.set_defaults(capacity=512)
    args = parsed(options)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ours, theirs = model_folders(folder, args.width, args.depth)
        with service(ours, args, folder / "log") as (url, _):
            wait_for(f"{url}/health")
            found["multimodal serve"] = asyncio.run(asked(url, "ours", args.clients, args.seconds))
        for name, more in (
            ("transformers serve", ()),
            ("transformers serve --continuous-batching", ("--continuous-batching",)),
        ):
            try:
                with transformers_service(theirs, folder / "their_log", *more) as url:
                    found[name] = asyncio.run(asked(url, str(theirs), args.clients, args.seconds))
            except (RuntimeError, httpx.TransportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
    own = found["multimodal serve"]
    rows = []
    for name, got in found.items():
        each = got["each"] or [float("nan")]
        both = set(own["texts"]) & set(got["texts"])
        same = sum(own["texts"][number] == got["texts"][number] for number in both)
        speed = got["tokens"] / got["seconds"]
        rows.append(
            [
                name,
                f"{speed:,.1f}",
                f"{own['tokens'] / own['seconds'] / speed:.2f}" if speed else "-",
                f"{np.quantile(each, 0.5):.2f}",
                f"{np.quantile(each, 0.99):.2f}",
                f"{same} of {len(both)}",
                str(got["failed"]),
            ]
        )
    head = ["", "tokens/s", "ours is faster by", "an answer, p50 s", "p99 s", "same text as ours", "not 200"]
    shape = f"{args.clients} clients, {args.seconds:g} s each, width {args.width}, depth {args.depth}, {os.cpu_count()} cores"
    body = f"{table(head, rows)}\n{shape}"
    print(body)
    if args.write:
        report.keep("serve_peer", "Beside transformers' service", "benchmarks/serve_peer.py --write", body)


if __name__ == "__main__":
    main()
