"""`--processes 4`: starts a command in 4 processes of this machine and waits for them, as `torchrun` does on many machines.

Every process gets the variables that torchrun sets (RANK, WORLD_SIZE, ...), so `fit` needs to know only these.
No process outlives the launcher: its standard input is a pipe from the launcher, which closes when the launcher ends in any way.
"""

import codecs
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from multimodal.shapes import ConfigError

STOPPED = 130  # exit code of a run that was asked to stop, and saved
LAUNCHED = "MULTIMODAL_LAUNCHED"  # set for the processes started here
SETTLE_S = 1.0  # time after the first failure in which others may fail too, one of which may have the reason
GRACE_S = 20.0  # from SIGTERM to SIGKILL when another process failed
ORPHAN_S = 60.0  # from SIGTERM to the end when the launcher is gone
LAST_LINES, LAST_CHARACTERS = 20, 8000


def launch(command: Sequence[str], processes: int, *, grace_s: float = GRACE_S) -> int:
    """Run `command` in `processes` processes until all have ended; returns the exit code of the launcher.

    When one fails, the others are ended and its last lines are shown. Ctrl-C and SIGTERM are passed on, so that all save and end;
    a third one kills. Only process 0 prints; the last lines of the others are printed if they fail.

    grace_s: seconds from SIGTERM to SIGKILL after a failure.

    Raises:
        ConfigError: fewer than 1 process, or this process is itself one of several.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes}: wanted 1 or more")
    if processes > (most := max(64, 8 * (os.cpu_count() or 1))):
        raise ConfigError(
            f"--processes {processes}: more than {most}, which this machine of {os.cpu_count()} cores cannot hold"
        )
    if "RANK" in os.environ:
        raise ConfigError(
            "--processes: this process is already one of several (RANK is set, as by torchrun); leave --processes out"
        )
    workers: list[_Worker] = []
    with _forward_signals(workers) as asked:
        try:
            shared = _environment(processes)
            for rank in range(processes):
                workers.append(_Worker(command, rank, shared))
            failed = _first_to_fail(workers, asked)
            if failed is not None:
                for worker in workers:
                    worker.send(signal.SIGTERM)
                _wait(workers, grace_s)
        finally:
            for worker in workers:
                worker.close()
    stopped = asked or any(worker.code == STOPPED for worker in workers)
    if failed is None or (asked and failed.code in (-signal.SIGINT, -signal.SIGTERM)):
        return STOPPED if stopped else 0
    print(failed.failure(processes), file=sys.stderr)
    return failed.code if failed.code > 0 else 128 - failed.code


def end_with_launcher(grace_s: float = ORPHAN_S) -> None:
    """In a process that `launch` started: when the launcher is gone, send SIGTERM to this process, and end it after `grace_s`."""
    if not os.environ.get(LAUNCHED):
        return

    def wait() -> None:
        while os.read(0, 1):
            pass
        if os.name == "nt":
            signal.raise_signal(signal.SIGTERM)  # os.kill would end it at once
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _environment(processes: int) -> dict[str, str]:
    """The environment of every process, without its rank."""
    with socket.socket() as unused:  # the system chooses an unused port
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        LAUNCHED: "1",
    }


class _Worker:
    """One process and the last lines of its output."""

    def __init__(self, command: Sequence[str], rank: int, shared: Mapping[str, str]) -> None:
        self.rank = rank
        self._tail = ""
        self.process = subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if rank else None,
            stderr=subprocess.STDOUT if rank else subprocess.PIPE,
            # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        source = self.process.stdout if rank else self.process.stderr
        assert source is not None
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()

    def _read(self, source: IO[bytes]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with source:
            while data := os.read(source.fileno(), 2**16):
                text = decoder.decode(data)
                self._tail = (self._tail + text)[-LAST_CHARACTERS:]
                if self.rank == 0:
                    print(text, end="", file=sys.stderr, flush=True)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def code(self) -> int:
        """Exit code of an ended process; negative: the signal that killed it."""
        return self.process.wait()

    def send(self, number: int) -> None:
        if not self.ended:
            # the only signal on Windows that a process can handle
            self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))

    def close(self) -> None:
        """Kill the process if it runs, with its data workers, which are in the same session."""
        if not self.ended:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:  # on Windows data workers notice by themselves that their process has ended
                self.process.kill()
        self.process.wait()
        self._reader.join(1)
        assert self.process.stdin is not None
        self.process.stdin.close()

    def failure(self, processes: int) -> str:
        """Which process failed and how, with its last lines unless they were printed before."""
        how = f"ended with exit code {self.code}"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            how = f"was killed by {name}" + (", as systems short of memory do" if name == "SIGKILL" else "")
        text = f"multimodal: process {self.rank} of {processes} {how}; the others were ended"
        lines = self._tail.splitlines()[-LAST_LINES:]
        return text + ". Its last lines:\n" + "\n".join(f"  {line}" for line in lines) if self.rank and lines else text


@contextmanager
def _forward_signals(workers: Sequence[_Worker]) -> Iterator[list[int]]:
    """Forwards Ctrl-C and SIGTERM to every worker; yields the list of received signals."""
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for worker in workers:
            worker.send(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_to_fail(workers: Sequence[_Worker], asked: Sequence[int]) -> _Worker | None:
    """Waits until a process fails, all have ended or three signals came; of several that failed, the one that failed first.

    A process that was stopped and has saved has not failed, and the others have unlimited time to save too.
    """

    def failed() -> list[_Worker]:
        return [worker for worker in workers if worker.ended and worker.code not in (0, STOPPED)]

    while not failed() and len(asked) < 3 and not _wait(workers, 0.05):
        pass
    # a process that was killed by a signal did not fail because of the others
    if not failed() or any(worker.code < 0 for worker in failed()):
        return min(failed(), key=lambda worker: worker.code, default=None)
    code = failed()[0].code
    _wait(workers, SETTLE_S)
    return min((worker for worker in failed() if worker.code == code), key=lambda worker: worker.rank)


def _wait(workers: Sequence[_Worker], seconds: float) -> bool:
    """Wait at most `seconds`; returns whether all have ended."""
    until = time.monotonic() + seconds
    while not (done := all(worker.ended for worker in workers)) and time.monotonic() < until:
        time.sleep(0.02)
    return done
