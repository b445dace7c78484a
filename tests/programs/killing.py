"""Trains with the job of ranks.py, kills it without warning at random steps, and starts it again until it is done.

    python killing.py OUT '{"settings": {"steps": 40}, "processes": 2, "kills": 5, "seed": 0}'

It forks the processes that train, so that importing torch is paid once; prints at which steps it killed.
"""

import gc
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from ranks import train


def start(out: Path, settings: dict, processes: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        if processes > 1:
            who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in who.items()} | {"MASTER_ADDR": "127.0.0.1"}
        code = 1
        try:
            train(out, settings)
            code = 0
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return children


def reached(out: Path) -> int:
    """The last whole row of the log."""
    try:
        return json.loads((out / "log.jsonl").read_text().rstrip().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def main() -> None:
    torch.set_num_threads(1)
    out, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    steps, drawn = job["settings"]["steps"], random.Random(job["seed"])
    train(out.with_name("first"), {"steps": 1, "batch": 4, "ema": 0.9, "optimizer": "muon"})  # imports everything, once
    gc.freeze()
    for target in sorted(drawn.randrange(1, steps - 2) for _ in range(job["kills"])):
        children = start(out, job["settings"], job["processes"])
        while reached(out) < target:
            if os.waitpid(children[0], os.WNOHANG)[0]:
                sys.exit(f"the run ended by itself before step {target}")
            time.sleep(0.01)
        time.sleep(drawn.random() * 0.05)  # in the middle of anything: a step, a save, a pruning
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        print(f"killed at step {reached(out)}", flush=True)
    children = start(out, job["settings"], job["processes"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    main()
