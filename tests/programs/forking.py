"""Runs programs in forks of itself, which has imported the large libraries of others: most of a short program's time.

Reads a job a line, {"argv": [program, ...], "cwd": folder, "ranks": [variables, ...], "said": folder, "seconds": 300}, runs it in
one process a rank, and answers with a line of their exit codes. What they say is written to said/0.out, said/0.err and so on.
Each imports our own packages anew. It ends as any program does, but for the seconds in which Python would empty its memory.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
import warnings

LARGE = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.data"),
    *("timm.scheduler", "timm.optim", "torchvision", "torchaudio", "matplotlib.figure", "PIL.Image", "soundfile"),
    *("matplotlib.backends.backend_agg", "safetensors.torch", "tokenizers", "rich.progress", "rich.table", "cyclopts"),
)


def exit_codes(children: list[int], seconds: float) -> list[int]:
    """When one has failed or the time is over, the others are killed: they would wait for it."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(children):
        over = any(codes.values()) or time.monotonic() > until
        for child in (child for child in children if child not in codes):
            if over:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if over else os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[child] for child in children]


def serve() -> list[str]:
    """Returns in forks only: what each is to run."""
    for line in sys.stdin:
        job, children = json.loads(line), []
        for rank, variables in enumerate(job["ranks"]):
            if child := os.fork():
                children.append(child)
                continue
            os.environ |= variables
            os.chdir(job["cwd"])
            for number, name in enumerate((os.devnull, f"{job['said']}/{rank}.out", f"{job['said']}/{rank}.err")):
                file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
                os.dup2(file, number)
                os.close(file)
            return job["argv"]
        print(json.dumps(exit_codes(children, job["seconds"])), flush=True)
    sys.exit()


def run() -> None:
    warnings.filterwarnings("error", category=UserWarning)
    warnings.filterwarnings("error", category=FutureWarning)
    if sys.argv[0] == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    for name in LARGE:
        with contextlib.suppress(ImportError):  # a program that needs it says so
            importlib.import_module(name)
    with contextlib.suppress(ImportError):  # float32 on every CPU, as in tests/conftest.py
        importlib.import_module("torch").cpu._is_amx_tile_supported = lambda: False
    gc.freeze()  # else each fork copies what is collected from, page by page
    sys.argv = serve()
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


if __name__ == "__main__":
    main()
