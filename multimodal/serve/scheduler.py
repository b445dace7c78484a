"""One thread for each checkpoint: it decodes generated answers in one batch, and packs samples that need only one pass."""

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
    """A job: an answer that is generated token by token.

    request: the request of the engine.
    send: called in the thread with each `Piece`; the last one has the prediction or the error.
    """

    request: Request
    send: Callable[[Piece], None]
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, and at most of the answer."""
        return self.request.prompt + self.request.limit


@dataclass(eq=False)
class OnePass:
    """A job: a sample that is answered in one forward pass.

    prepared: the sample, prepared by the packer.
    send: called in the thread with the result or the error. The result is a Prediction, the vector of one side of a pair, or, for
        a window of a recording, its CTC rows and their times.
    spec: for a window, the CTC task. size: for a window, its number of sound samples.
    """

    prepared: Prepared
    send: Callable[[Any], None]
    spec: TranscriptionTask | None = None
    size: int = 0
    cancelled: bool = False


@dataclass(eq=False)
class ModelCall:
    """A job: a function that runs with the model between two decoding steps.

    run: called in the thread with the model.
    send: called in the thread with the result of `run`, or with the error.
    """

    run: Callable[[Model], Any]
    send: Callable[[Any], None]
    cancelled: bool = False


Job = Writing | OnePass | ModelCall


@dataclass
class Load:
    """Counters of a scheduler, for metrics. Only its thread writes them, except latest_s, to which requests append."""

    rows: int = 0
    waiting: int = 0
    steps: int = 0
    passes: int = 0
    packed: int = 0  # samples of all passes
    written: int = 0  # tokens
    read: int = 0  # tokens
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=32))  # seconds of the newest requests


class Closed(Exception):
    """The scheduler takes no new requests; after a reload there is another one."""


class Scheduler:
    """Runs the jobs of one model in a thread of its own. Nothing else may use the model.

    Raises:
        ConfigError: the memory does not suffice for the rows.
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
        # only the thread uses these
        self._waiting: deque[Writing] = deque()
        self._running: dict[int, Writing] = {}  # by ticket
        self._gathered: deque[OnePass] = deque()
        self._due = math.inf  # monotonic time, in seconds, at which the gathered samples run
        self._model_calls: deque[ModelCall] = deque()
        self.thread = threading.Thread(target=self._run, name=f"serve {name}", daemon=True)
        self.thread.start()

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold a slot for a request of this model. After `close`, the thread runs until all slots are released.

        Raises:
            ApiError: 429, all slots are taken.
            Closed: it is closed, and its thread may have ended.
        """
        with self._lock:
            if self._closing and not self._leases:
                raise Closed
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
        """Number of slots that are taken."""
        return self._leases

    @property
    def waiting_tokens(self) -> int:
        """Tokens of requests that wait for a row."""
        return self._waiting_tokens

    def busy(self, why: str) -> ApiError:
        """The error 429 for a request that gets no slot."""
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
        """Give a job to the thread. admitted: whether it belongs to a request that has a job already.

        Raises:
            ApiError: 429, too many tokens wait already.
        """
        if isinstance(job, Writing):
            with self._lock:
                # if nothing waits, a request of any length is admitted: the engine has refused those that fit no row
                if self._waiting_tokens and not admitted:
                    most = self.settings.waiting_tokens
                    if self._waiting_tokens + job.tokens > most:
                        raise self.busy(f"{self._waiting_tokens} tokens wait, and at most {most} may")
                self._waiting_tokens += job.tokens
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Cancel a job before the next step; has no effect if the job has ended."""
        job.cancelled = True
        self._inbox.put(None)

    def close(self) -> None:
        """End the thread after all requests have ended; requests with a slot may still submit jobs."""
        with self._lock:
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
        """Take new jobs; wait while there is nothing to do. Returns False when the scheduler is closed and has no work."""
        while True:
            working = bool(self._running or self._waiting or self._model_calls)
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
            elif isinstance(job, ModelCall):
                self._model_calls.append(job)
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
            self._subtract_waiting(job)
        self._gathered = deque(job for job in self._gathered if not job.cancelled)
        self._model_calls = deque(job for job in self._model_calls if not job.cancelled)
        if not self._gathered:
            self._due = math.inf
        self._update_load()

    def _subtract_waiting(self, job: Writing) -> None:
        with self._lock:
            self._waiting_tokens -= job.tokens

    def _update_load(self) -> None:
        self.load.rows = sum(job.request.width for job in self._running.values())
        self.load.waiting = len(self._waiting) + len(self._gathered) + len(self._model_calls)

    def _work(self) -> None:
        if self._gathered and time.monotonic() >= self._due:
            self._read_gathered()
        if self._model_calls:
            self._run_model_call(
                self._model_calls.popleft()
            )  # one in each step, so that it does not hold up generation for long
        if self.engine is None:
            return
        self._admit_waiting(self.engine)
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
            job.send(piece)
        self._update_load()

    def _run_model_call(self, job: ModelCall) -> None:
        if job.cancelled:
            return
        try:
            found = job.run(self.model)
        except Exception as error:
            found = error
        job.send(found)
        self._update_load()

    def _admit_waiting(self, engine: Engine) -> None:
        """Move waiting jobs to free rows, in order, but at most `pass_tokens` tokens of prompts."""
        tokens = 0
        while self._waiting and self._waiting[0].request.width <= engine.free_rows:
            job = self._waiting[0]
            if tokens and tokens + job.request.prompt > self.settings.pass_tokens:
                break
            self._waiting.popleft()
            self._subtract_waiting(job)
            if job.cancelled:
                continue
            tokens += job.request.prompt
            try:
                self._running[engine.enter(job.request)] = job
            except Exception as error:
                job.send(Piece(-1, error=error))
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
            self._due = math.inf  # otherwise the next step takes the rest
        self._read(jobs)
        self.load.passes += 1
        self.load.packed += len(jobs)
        self.load.read += tokens
        self._update_load()

    def _read(self, jobs: list[OnePass]) -> None:
        """Answer samples in one pass. If that fails, run each one alone, so that a bad sample fails no other."""
        try:
            results = self._pass(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].send(error)
                return
            for job in jobs:
                self._read([job])
            return
        for number, job in enumerate(jobs):
            job.send(results[number])

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
        """{number of a job: its result} for the jobs of one task."""
        head, pattern = self.model.packer.heads[task], self.model.packer.patterns[task]
        if pattern.pair:
            return dict(zip(reading.samples, logits.float().cpu(), strict=True))
        specs = {number: job.spec for number in reading.samples if (job := jobs[number]).spec is not None}
        found: dict[int, Any] = {}
        if len(specs) < len(reading.samples):
            tokenizer = self.model.packer.tokenizers[pattern.writes.kind]
            more = head.answer_inputs(reading, stream.position_TA)
            answers = head.answer(logits, reading.lengths, tokenizer, **more)
            found |= dict(zip(reading.samples, answers, strict=True))
        if specs:
            spec = next(iter(specs.values()))
            found |= window_rows(spec, stream, logits, {number: jobs[number].size for number in specs})
        return found

    def _fail_all(self, error: BaseException) -> None:
        """After an error that belongs to no single request: fail all running jobs, and make a new engine."""
        running, self._running = list(self._running.values()), {}
        gathered, self._gathered, self._due = list(self._gathered), deque(), math.inf
        for job in running:
            job.send(Piece(-1, error=_as_exception(error)))
        for job in gathered:
            job.send(error)
        if self.engine is not None:
            self.engine = None  # free its cache before the new one is allocated
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.engine = Engine(self.model, rows=self.settings.rows, capacity=self.settings.capacity)
        self._update_load()


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(str(error))
