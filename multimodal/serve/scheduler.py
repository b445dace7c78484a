"""One thread for each checkpoint: it decodes the rows of an engine step by step, and packs what is answered at once."""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multimodal.generate import Engine, Piece
from multimodal.generate.request import Request
from multimodal.model import Model
from multimodal.packer import Prepared
from multimodal.serve.errors import ApiError
from multimodal.serve.logs import log
from multimodal.serve.settings import Settings
from multimodal.stream import Reading, Stream
from multimodal.transcription.recordings import TranscriptionTask, window_rows

MOST_AT_ONCE = 256  # samples of one packed pass


@dataclass(eq=False)
class Writing:
    """An answer that is written token by token.

    request: what is asked for.
    tell: called in the thread with each `Piece`; the last one has the prediction or the error.
    """

    request: Request
    tell: Callable[[Piece], None]
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and answer."""
        return self.request.prompt + self.request.limit


@dataclass(eq=False)
class OnePass:
    """A sample that is answered in one pass.

    prepared: the sample, laid out.
    tell: called in the thread with the result or the error: a Prediction; the vector of a pair's side; or, for a window of a
        recording, its rows and their times.
    spec: the CTC task of a window. size: its sound samples.
    """

    prepared: Prepared
    tell: Callable[[Any], None]
    spec: TranscriptionTask | None = None
    size: int = 0
    cancelled: bool = False


Job = Writing | OnePass


@dataclass
class Load:
    """What a scheduler does now, for metrics. The thread alone writes it, but for latest_s, to which requests add theirs."""

    rows: int = 0
    waiting: int = 0
    steps: int = 0
    passes: int = 0
    packed: int = 0  # samples of all passes
    written: int = 0  # tokens
    read: int = 0  # tokens
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=32))  # seconds of the newest requests


class Scheduler:
    """Answers the requests of one model, in a thread of its own, which nothing else may use the model in.

    Raises:
        ConfigError: there is no memory for the rows.
    """

    def __init__(self, model: Model, name: str, settings: Settings) -> None:
        self.model, self.name, self.settings = model, name, settings
        self.load = Load()
        self._writes = any(head.autoregressive for head in model.packer.heads.values())
        self.engine = Engine(model, rows=settings.rows, capacity=settings.capacity) if self._writes else None
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._leases = 0
        self._waiting_tokens = 0
        self._closing = False
        # these belong to the thread
        self._waiting: deque[Writing] = deque()
        self._running: dict[int, Writing] = {}  # by ticket
        self._gathered: deque[OnePass] = deque()
        self._due = math.inf  # when the gathered samples are read
        self.thread = threading.Thread(target=self._run, name=f"serve {name}", daemon=True)
        self.thread.start()

    @contextmanager
    def lease(self) -> Iterator[None]:
        """A place among the requests of this model; the thread goes on until all are given back.

        Raises:
            ApiError: all places are taken.
        """
        with self._lock:
            if self._leases >= self.settings.rows + self.settings.queue:
                raise self.busy(f"{self._leases} requests are open")
            self._leases += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases -= 1
            self._inbox.put(None)

    @property
    def leases(self) -> int:
        """Number of places that are taken."""
        return self._leases

    @property
    def waiting_tokens(self) -> int:
        """Tokens of requests that wait for a row."""
        return self._waiting_tokens

    def busy(self, why: str) -> ApiError:
        """The error of a request that finds no place."""
        latest = list(self.load.latest_s)
        mean_s = sum(latest) / len(latest) if latest else 1.0
        wait_s = mean_s * max(self.load.waiting, 1) / self.settings.rows
        return ApiError(
            429,
            f"the model {self.name!r} is busy: {why}; try again later",
            code="queue_full",
            retry_s=min(max(math.ceil(wait_s), 1), 60),
        )

    def submit(self, job: Job, *, admitted: bool = False) -> None:
        """Hand a job to the thread. admitted: it belongs to a request that was let in before.

        Raises:
            ApiError: too many tokens wait already.
        """
        if isinstance(job, Writing):
            with self._lock:
                # whoever comes first is let in, however long it is: the engine has refused what no row can hold
                if self._waiting_tokens and not admitted:
                    most = self.settings.waiting_tokens
                    if self._waiting_tokens + job.tokens > most:
                        raise self.busy(f"{self._waiting_tokens} tokens wait, and at most {most} may")
                self._waiting_tokens += job.tokens
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Drop a job between two steps; nothing happens if it has ended."""
        job.cancelled = True
        self._inbox.put(None)

    def close(self) -> None:
        """Let the thread end as soon as all requests have; those with a place may still hand in jobs."""
        self._closing = True
        self._inbox.put(None)

    def _run(self) -> None:
        while self._receive():
            try:
                self._work()
            except BaseException as error:
                log.error("step failed", exc_info=error, extra={"fields": {"model": self.name}})
                self._fail_all(error)

    def _receive(self) -> bool:
        """Take new jobs, and wait while there is nothing to do. False: closed, and all is done."""
        while True:
            working = bool(self._running or self._waiting)
            if self._closing and not (working or self._gathered or self._leases) and self._inbox.empty():
                return False
            wait_s = 0.0 if working else self._due - time.monotonic()
            try:
                if wait_s <= 0:
                    job = self._inbox.get_nowait()
                else:
                    job = self._inbox.get(timeout=None if math.isinf(wait_s) else wait_s)
            except queue.Empty:
                return True
            if isinstance(job, Writing):
                self._waiting.append(job)
            elif job is not None:
                if not self._gathered:
                    self._due = time.monotonic() + self.settings.gather_ms / 1000
                self._gathered.append(job)
            else:
                self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        for ticket, job in list(self._running.items()):
            if job.cancelled and self.engine is not None:
                self.engine.cancel(ticket)
                del self._running[ticket]
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._no_longer_waits(job)
        self._gathered = deque(job for job in self._gathered if not job.cancelled)
        if not self._gathered:
            self._due = math.inf
        self._count()

    def _no_longer_waits(self, job: Writing) -> None:
        with self._lock:
            self._waiting_tokens -= job.tokens

    def _count(self) -> None:
        self.load.rows = sum(job.request.width for job in self._running.values())
        self.load.waiting = len(self._waiting) + len(self._gathered)

    def _work(self) -> None:
        if self._gathered and time.monotonic() >= self._due:
            self._read_gathered()
        if self.engine is None:
            return
        self._enter_waiting(self.engine)
        if not self.engine.busy:
            return
        pieces = self.engine.step()
        self.load.steps += 1
        self.load.written += len(self._running)
        for piece in pieces:
            job = self._running.get(piece.ticket)
            if job is None:
                continue
            if piece.prediction is not None or piece.error is not None:
                del self._running[piece.ticket]
            job.tell(piece)
        self._count()

    def _enter_waiting(self, engine: Engine) -> None:
        """Let those that wait into free rows, in their order, but not more tokens than one pass may read."""
        tokens = 0
        while self._waiting and self._waiting[0].request.width <= engine.free_rows:
            job = self._waiting[0]
            if tokens and tokens + job.request.prompt > self.settings.pass_tokens:
                break
            self._waiting.popleft()
            self._no_longer_waits(job)
            if job.cancelled:
                continue
            tokens += job.request.prompt
            try:
                self._running[engine.enter(job.request)] = job
            except Exception as error:
                job.tell(Piece(-1, error=error))
        self.load.read += tokens

    def _read_gathered(self) -> None:
        jobs: list[OnePass] = []
        tokens = 0
        while self._gathered and len(jobs) < MOST_AT_ONCE:
            count = len(self._gathered[0].prepared)
            if jobs and tokens + count > self.settings.pass_tokens:
                break
            tokens += count
            jobs.append(self._gathered.popleft())
        if not self._gathered:
            self._due = math.inf  # else the rest is read after the next step
        self._read(jobs)
        self.load.passes += 1
        self.load.packed += len(jobs)
        self.load.read += tokens
        self._count()

    def _read(self, jobs: list[OnePass]) -> None:
        """Answer samples in one pass; if it fails, each by itself, so that one bad sample spoils no other."""
        try:
            results = self._pass(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].tell(error)
                return
            for job in jobs:
                self._read([job])
            return
        for number, job in enumerate(jobs):
            job.tell(results[number])

    def _pass(self, jobs: list[OnePass]) -> dict[int, Any]:
        packer = self.model.packer
        with self.model.inference_mode():
            stream = packer.lay([job.prepared for job in jobs], answers=False).to(self.model.device)
            logits = self.model.logits(stream)
            found: dict[int, Any] = {}
            for task, reading in stream.readings.items():
                found |= self._answers(task, stream, reading, logits[task], jobs)
        return found

    def _answers(
        self, task: str, stream: Stream, reading: Reading, logits: Tensor, jobs: list[OnePass]
    ) -> Mapping[int, Any]:
        """By number of a job of this task, its result."""
        head, pattern = self.model.packer.heads[task], self.model.packer.patterns[task]
        if pattern.pair:
            return dict(zip(reading.samples, logits.float().cpu(), strict=True))
        specs = {number: job.spec for number in reading.samples if (job := jobs[number]).spec is not None}
        found: dict[int, Any] = {}
        if len(specs) < len(reading.samples):
            hidden = {"hidden": reading.hidden} if reading.hidden else {}
            tokenizer = self.model.packer.tokenizers[pattern.writes.kind]
            answers = head.answer(logits, reading.lengths, tokenizer, **hidden)
            found |= dict(zip(reading.samples, answers, strict=True))
        if specs:
            spec = next(iter(specs.values()))
            found |= window_rows(spec, stream, logits, {number: jobs[number].size for number in specs})
        return found

    def _fail_all(self, error: BaseException) -> None:
        """After an error that no single request is to blame for: all that run fail, and the engine starts afresh."""
        running, self._running = list(self._running.values()), {}
        gathered, self._gathered, self._due = list(self._gathered), deque(), math.inf
        for job in running:
            job.tell(Piece(-1, error=_as_exception(error)))
        for job in gathered:
            job.tell(error)
        if self.engine is not None:
            self.engine = None  # its cache is freed before the new one is made
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.engine = Engine(self.model, rows=self.settings.rows, capacity=self.settings.capacity)
        self._count()


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(str(error))
