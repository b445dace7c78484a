"""One request of a client: its slot at a model, its timeout, and its jobs, which are cancelled when the client disconnects."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from anyio import CapacityLimiter, to_thread

from multimodal.composite import Several
from multimodal.generate import Piece
from multimodal.generate.request import Request, new_request
from multimodal.heads import Prediction
from multimodal.model import Model
from multimodal.serve.answers import DONE, EventStream, event
from multimodal.serve.bodies import Params
from multimodal.serve.checkpoints import Checkpoint
from multimodal.serve.errors import ApiError, as_api_error, bad, stopping
from multimodal.serve.logs import log
from multimodal.serve.metrics import Metrics
from multimodal.serve.options import WritingOptions, option_named, refuse_options, writing_options
from multimodal.serve.scheduler import Closed, Job, ModelCall, OnePass, Scheduler, Writing
from multimodal.serve.settings import Settings
from multimodal.serve.tasks import Input, TaskView
from multimodal.serve.values import Upload, encoded
from multimodal.tokenizer import Tokens
from multimodal.transcription.recordings import TranscriptionTask

POOL = 4  # threads that decode and encode pictures, sounds and texts
_T = TypeVar("_T")
_pools: WeakKeyDictionary[asyncio.AbstractEventLoop, CapacityLimiter] = WeakKeyDictionary()


def _pool(loop: asyncio.AbstractEventLoop) -> CapacityLimiter:
    """The limit on threads of an event loop."""
    if loop not in _pools:
        _pools[loop] = CapacityLimiter(POOL)
    return _pools[loop]


class Call:
    """The state of one request. Use it in one event loop, and `close` it at the end.

    live: whether it is a live session. The client decides how long one takes, so no histogram counts it.
    id: its name in answers and in the log.
    prompt, written: tokens that were read and generated so far.
    """

    def __init__(self, endpoint: str, settings: Settings, metrics: Metrics, *, live: bool = False) -> None:
        self.endpoint, self.settings, self.metrics = endpoint, settings, metrics
        self.id, self.created = f"{endpoint.rpartition('/')[2]}-{secrets.token_hex(12)}", int(time.time())
        self.live = live
        self.prompt = self.written = 0
        self.model_name = self.task = ""
        self.status = 200
        self._start = time.monotonic()
        self._until = self._start + settings.timeout_s
        self._first_s: float | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._jobs: dict[int, Job] = {}  # unfinished jobs by number
        self._submitted = 0  # number of jobs so far
        self._lease = ExitStack()
        self._scheduler: Scheduler | None = None
        self._closed = False

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of its model; only after `enter`."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def model(self) -> Model:
        """The model that answers it; a reload does not change it for this request."""
        return self.scheduler.model

    def enter(self, checkpoint: Checkpoint) -> None:
        """Take a slot at a model, and release the former one, if any.

        Raises:
            ApiError: 429, all slots are taken; 503, the service stops.
        """
        with self.entered(checkpoint):
            pass

    @contextmanager
    def entered(self, checkpoint: Checkpoint) -> Iterator[None]:
        """`enter` for a block; if it raises, the former slot is kept, and the new one released.

        Raises:
            ApiError: as of `enter`.
        """
        before, held = (self._lease, self._scheduler, self.model_name), ExitStack()
        self.model_name = checkpoint.name  # for the log, if there is no slot
        scheduler = checkpoint.scheduler
        while scheduler is not self._scheduler:
            try:
                held.enter_context(scheduler.lease())
                break
            except Closed:
                closed, scheduler = scheduler, checkpoint.scheduler
                if scheduler is closed:  # it was not reloaded
                    raise stopping() from None
        if scheduler is not self._scheduler:
            self._lease, self._scheduler = held, scheduler
        try:
            yield
        except BaseException:
            self._lease, self._scheduler, self.model_name = before
            held.close()
            raise
        if before[0] is not self._lease:
            before[0].close()

    async def in_pool(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function in a thread of the pool, so that it does not block the event loop."""
        return await to_thread.run_sync(function, *arguments, limiter=_pool(self._loop))

    def encode(self, view: TaskView, raws: Mapping[str, Any]) -> dict[str, Tokens | None]:
        """{field: tokens} of the raw values that the client sent. Call it in the pool."""
        fields = {field.name: field for field in view.reads}
        return {name: self._encoded(fields[name], raw) for name, raw in raws.items()}

    def _encoded(self, field: Input, raw: Any) -> Tokens | None:
        """The tokens of what came for one field; of one with a star it is a list, or the one file of a form."""
        tokenizer = self.model.packer.tokenizers[field.kind]
        if raw is None or not field.many:
            return encoded(tokenizer, field.kind, raw, field.name, self.settings)
        raw = [raw] if isinstance(raw, Upload) else raw
        if not isinstance(raw, list) or any(each is None for each in raw):
            raise bad(f"{field.name}: wanted a list of any number of values, without null", field.name)
        found = [
            encoded(tokenizer, field.kind, each, f"{field.name}[{i}]", self.settings) for i, each in enumerate(raw)
        ]
        return Several([tokens for tokens in found if tokens is not None], tokenizer.step)

    async def ask(self, view: TaskView, raws: Mapping[str, Any], params: Params) -> WritingOptions | None:
        """Read the other parameters as options, and submit jobs for one sample; returns None if the task answers in one pass."""
        if view.token_by_token:
            options = writing_options(params, self.model, view.task, self.settings.rows)
            params.done()
            await self.write(view, raws, options)
            return options
        refuse_options(params, view.task)
        params.done()
        await self.read(view, [raws])
        return None

    async def write(self, view: TaskView, raws: Mapping[str, Any], options: WritingOptions) -> None:
        """Submit answers that are generated token by token, one for each seed; `next` returns their pieces."""
        self.task = view.task

        def made() -> list[Request]:
            tokens = self.encode(view, raws)
            with option_named(options.sent):
                return [self._request(view.task, tokens, options, seed) for seed in options.seeds]

        requests = await self.in_pool(made)
        self.prompt += requests[0].prompt
        for request in requests:
            self._submit(lambda send, request=request: Writing(request, send), admitted=bool(self._submitted))

    async def write_sample(self, task: str, sample: Mapping[str, Any], options: WritingOptions) -> int:
        """Submit one answer for a sample of plain values, as one more job of this request; returns its number."""
        request = await self.in_pool(self._request, task, sample, options, options.seeds[0])
        self.prompt += request.prompt
        return self._submit(lambda send: Writing(request, send), admitted=True)

    def _request(self, task: str, sample: Mapping[str, Any], options: WritingOptions, seed: int) -> Request:
        engine = self.scheduler.engine
        assert engine is not None
        packer = self.model.packer

        def made(most: int) -> Request:
            given = {**options.options, "max_tokens": most, "seed": seed}
            return new_request(packer, task, sample, "the request", None, given)

        request = made(options.max_tokens or self.settings.max_tokens)
        room = min(engine.capacity, self.model.most_tokens or engine.capacity) - request.prompt
        if self.model.most_written is not None:
            room = min(room, self.model.most_written - request.start_count - request.begin_count)
        if options.max_tokens is None and 0 < room < request.limit:
            # if the client sets no limit, an answer may fill the rest of its row
            request = made(room)
        if not engine.has_room(request):
            less = f"ask for at most {room}, or send less" if room > 0 else "send less, or a smaller file"
            raise bad(
                f"what is read has {request.prompt} tokens, which with max_tokens={request.limit} are more than the "
                f"capacity={engine.capacity} of this service; {less} (whoever runs it allows more by --capacity)",
                "max_tokens" if room > 0 else _longest(sample),
            )
        engine.check(request)
        return request

    async def read(self, view: TaskView, samples: list[Mapping[str, Any]], *, encode: bool = True) -> None:
        """Submit samples that are answered in one pass, one answer each; `next` returns them."""
        self.task = view.task

        def made() -> list[Any]:
            packer = self.model.packer
            every = [self.encode(view, sample) if encode else sample for sample in samples]
            absent = dict.fromkeys(field.name for field in view.reads) if view.writes is None else {}
            found = [
                packer.prepare(view.task, {**absent, **sample}, "the request", answers=False, random=False)
                for sample in every
            ]
            most = self.settings.pass_tokens
            if any(len(prepared) > most for prepared in found):
                longest = max(map(len, found))
                raise bad(
                    f"this is {longest} tokens, more than the {most} that one pass reads; send less, or a smaller file (whoever "
                    "runs the service allows more by --pass-tokens)",
                    _longest(every[found.index(max(found, key=len))]),
                )
            return found

        for prepared in await self.in_pool(made):
            self.prompt += len(prepared)
            self._submit(lambda send, prepared=prepared: OnePass(prepared, send))

    async def read_window(self, spec: TranscriptionTask, wave_S: Any) -> int:
        """Submit a window of a recording for its CTC rows; returns its number. wave_S: at the rate of the task."""
        sample = {spec.name: (wave_S, spec.rate_hz)}
        prepared = await self.in_pool(
            lambda: self.model.packer.prepare(spec.task, sample, "the sound", answers=False, random=False)
        )
        self.prompt += len(prepared)
        return self._submit(lambda send: OnePass(prepared, send, spec, len(wave_S)))

    async def run_on_model(self, run: Callable[[Model], _T]) -> _T:
        """Run a function of the model in the model's thread, and return its result, after all earlier jobs of the request ended."""
        if self.live:
            self._until = time.monotonic() + self.settings.timeout_s
        wanted = self._submit(lambda send: ModelCall(run, send))
        while True:
            number, found = await self.next()
            if number == wanted:
                return found

    def _submit(self, make: Callable[[Callable[[Any], None]], Job], *, admitted: bool = False) -> int:
        number = self._submitted

        def send(event: Any) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
            except RuntimeError:  # the event loop is closed, so nobody waits for the result
                job.cancelled = True

        job = make(send)
        self.scheduler.submit(job, admitted=admitted)
        self._submitted += 1
        self._jobs[number] = job
        return number

    async def next(self) -> tuple[int, Any]:
        """The next result: (number of the job, a Piece or the result of one pass).

        Raises:
            ApiError: 504, the timeout. Otherwise the error of the job.
        """
        left_s = self._until - time.monotonic()
        try:
            number, event = await asyncio.wait_for(self._events.get(), max(left_s, 0))
        except TimeoutError:
            raise ApiError(
                504, f"no answer within {self.settings.timeout_s:g} s; ask for less", code="timeout"
            ) from None
        if self._first_s is None:
            self._first_s = time.monotonic() - self._start
        error = event.error if isinstance(event, Piece) else event if isinstance(event, BaseException) else None
        if error is not None:
            self._jobs.pop(number, None)
            raise error
        if not isinstance(event, Piece):
            self._jobs.pop(number, None)
        elif event.prediction is not None:
            self.written += written_tokens(event.prediction, self._jobs.pop(number))
        return number, event

    async def results(self, count: int) -> list[Any]:
        """The results of the first `count` jobs in order; for generated answers, the final predictions."""
        found: dict[int, Any] = {}
        while len(found) < count:
            number, event = await self.next()
            if not isinstance(event, Piece):
                found[number] = event
            elif event.prediction is not None:
                found[number] = event.prediction
        return [found[i] for i in range(count)]

    def stream(self, events: AsyncGenerator[bytes]) -> EventStream:
        """A response that streams these events; an error is sent as the last event."""
        failed: list[ApiError] = []

        async def guarded() -> AsyncGenerator[bytes]:
            try:
                async for each in events:
                    yield each
                yield DONE
            except Exception as error:
                failed.append(self.failed(error))
                yield event(failed[0].body())
            finally:
                await events.aclose()

        return EventStream(guarded(), lambda: self.close(failed[0] if failed else None))

    def failed(self, error: Exception) -> ApiError:
        """The error that the client gets; logs the traceback if it is a bug of ours."""
        api_error = as_api_error(error)
        if api_error.status >= 500 and not isinstance(error, ApiError):
            log.error("failed", exc_info=error, extra={"fields": {"id": self.id, "endpoint": self.endpoint}})
        return api_error

    def close(self, error: ApiError | None = None, disconnected: bool = False) -> None:
        """Cancel unfinished jobs, release the slot, and record the request in metrics and log.

        error: the error that was sent. disconnected: whether the client disconnected before the answer.
        """
        if self._closed:
            return
        self._closed = True
        for job in self._jobs.values():
            self.scheduler.cancel(job)
        disconnected = disconnected or (error is None and bool(self._jobs))
        seconds = time.monotonic() - self._start
        status = 499 if disconnected else error.status if error else self.status
        self.metrics.add("requests_total", endpoint=self.endpoint, status=str(status))
        if disconnected:
            self.metrics.add("left_total", endpoint=self.endpoint)
        elif error is None and self._scheduler is not None and self._submitted and not self.live:
            self._scheduler.load.latest_s.append(seconds)
            self.metrics.time("whole_seconds", seconds, endpoint=self.endpoint)
            self.metrics.time("first_seconds", self._first_s or seconds, endpoint=self.endpoint)
        self._lease.close()
        fields = {
            "id": self.id,
            "endpoint": self.endpoint,
            "model": self.model_name,
            "task": self.task,
            "status": status,
            "seconds": round(seconds, 4),
            "first_seconds": None if self._first_s is None else round(self._first_s, 4),
            "prompt_tokens": self.prompt,
            "written_tokens": self.written,
        }
        if error is not None:
            # nothing of the message, which may repeat what the client sent
            fields |= {"code": error.code, "param": None if error.made_up else error.param}
        log.info("left" if disconnected else "refused" if error else "answered", extra={"fields": fields})


def _longest(sample: Mapping[str, Any]) -> str | None:
    """The field with the most tokens."""
    sizes = {name: len(tokens) for name, tokens in sample.items() if isinstance(tokens, Tokens)}
    return max(sizes, key=lambda name: sizes[name], default=None)


def written_tokens(answer: Prediction, job: Job) -> int:
    """Number of generated tokens of an answer, without the given beginning."""
    begin = job.request.begin_count if isinstance(job, Writing) else 0
    return 0 if answer.tokens is None else len(answer.tokens) - begin
