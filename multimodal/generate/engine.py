"""Decoding: requests share one cache and one pass of the core a token; they join when rows are free and leave when they end.

submit --> waiting --packed prefill--> rows of the cache --one pass a token for all rows--> Piece, Piece, .. Prediction

A request has one row, two with guidance (one of them reads nothing), or one a beam. Rows in use are always the first ones, so
that a pass reads the cache where it lies.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal.attention import Layout, Span
from multimodal.generate.decode_batch import DecodeBatch
from multimodal.generate.next_token import choose_next
from multimodal.generate.prefix import CachedPrefix
from multimodal.generate.request import Request, new_request
from multimodal.generate.shared import longest, shares
from multimodal.generate.step import Step, is_plain
from multimodal.heads import Prediction
from multimodal.network import Network
from multimodal.old_names import warn
from multimodal.shapes import ConfigError, StreamError, check_whole
from multimodal.stream import Stream


@dataclass(frozen=True)
class Piece:
    """What a step brought for one request: final text (none for kinds that are no text), at the end the prediction or the error.

    ticket: which request or sample it is of.
    text: the text that has become final since the piece before it.
    prediction: the whole answer, with the last piece.
    error: what went wrong, in the place of an answer.
    """

    ticket: int
    text: str = ""
    prediction: Prediction | None = None
    error: Exception | None = None


class Engine:
    """Writes the answers of many requests at once, of any tasks of one model that write; each as if it were alone.

    rows: number of answers (of beams, two with guidance) that are written at the same time; others wait. capacity: tokens of a row,
    prompt and answer together. plain: whether every prompt is read whole, and every token goes through the core's own modules; this
    is slower and gives the same. Else prompts that begin alike are read once. Use it in one thread; `submit` and `cancel` may come
    between any two steps. A model must not be trained while answers are being written; new weights count from when all of them have
    ended.

    Examples:
        >>> engine = mm.Engine(model, rows=8, capacity=64)
        >>> first = engine.submit("image -> text", {"image": square}, max_tokens=8)
        >>> second = engine.submit("image -> text", {"image": circle}, max_tokens=8)
        >>> [piece.prediction.value for piece in engine.run() if piece.prediction]
        ['square', 'circle']
    """

    def __init__(self, model: Network, *, rows: int = 16, capacity: int = 1024, plain: bool = False) -> None:
        check_whole("Engine", rows=rows, capacity=capacity)
        if rows < 1 or capacity < 2:
            raise ConfigError(f"Engine: rows={rows} must be at least 1 and capacity={capacity} at least 2")
        self.model = model
        self.rows, self.capacity = rows, capacity
        try:
            with torch.no_grad():  # so that it is one buffer
                self.cache = model.core.cache(rows=rows, capacity=capacity, device=model.device, dtype=model.dtype)
        except RuntimeError as error:
            raise ConfigError(
                f"Engine: there is no memory for rows={rows} of capacity={capacity} tokens; lower max_tokens, the capacity or "
                f"the rows ({error})"
            ) from error
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._batch: DecodeBatch | None = None  # of those running, until one joins or leaves
        self._owner: list[Request] = []  # of each row in use
        self._tickets = 0
        self._most, self._most_written = model.most_tokens, model.most_written
        self._plain = plain
        self._shares = not plain and shares(model)
        self._step: Step | None = None  # how a pass is computed, if not by the core itself

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def free_rows(self) -> int:
        """Number of rows that no request has or waits for."""
        return self.rows - len(self._owner) - sum(request.width for request in self._waiting)

    @property
    def free(self) -> int:
        """The name of `free_rows` in version 0.1; goes with 0.3."""
        warn("Engine.free", "Engine.free_rows", 1)
        return self.free_rows

    def has_room(self, request: Request) -> bool:
        """Whether a row is long enough for a request."""
        return request.prompt + request.limit <= self.capacity

    def submit(
        self,
        task: str,
        sample: Mapping[str, Any],
        *,
        prefix: CachedPrefix | None = None,
        name: str | None = None,
        **options: Any,
    ) -> int:
        """Ask for an answer; returns the ticket that its pieces carry. name: what errors call the sample.

        Options are those of `Model.generate`.

        Raises:
            ConfigError, TaskError, MediaError: from the sample or the options.
            StreamError: prompt and answer need more than the capacity.
        """
        request = new_request(self.model.packer, task, sample, name or f"request {self._tickets}", prefix, options)
        return self.enter(request)

    def check(self, request: Request) -> None:
        """Raise the error of a request that can never be answered here: too long for a row or the model, or too many rows."""
        needed = request.prompt + request.limit
        if not self.has_room(request):
            raise StreamError(
                f"{request.name} of task {request.task!r}: a prompt of {request.prompt} tokens and an answer of up to "
                f"{request.limit} need {needed} places, more than capacity={self.capacity}; shorten the prompt, lower max_tokens, "
                "or raise capacity"
            )
        most = self._most
        if most is not None and needed > most:
            raise StreamError(
                f"{request.name} of task {request.task!r}: a prompt of {request.prompt} tokens and an answer of up to "
                f"{request.limit} are more than the {most} places that this model's attention knows; shorten the prompt or "
                "lower max_tokens"
            )
        written = request.start_count + request.begin_count + request.limit
        if self._most_written is not None and written > self._most_written:
            raise StreamError(
                f"{request.name} of task {request.task!r}: a start of {request.start_count} tokens and an answer of up to "
                f"{request.begin_count + request.limit} are more than the {self._most_written} places of the writer; lower "
                "max_tokens"
            )
        if request.lookup is not None and (self.cache.state or self.cache.memory is not None):
            raise ConfigError(
                f"{request.name} of task {request.task!r}: lookup={request.lookup.most} needs a core whose cache can "
                "forget tokens, but this one has recurrent states or is an EncoderDecoder; leave it out"
            )
        if request.width > self.rows:
            raise ConfigError(
                f"{request.name}: needs {request.width} rows at once, but the engine has rows={self.rows}"
            )

    def enter(self, request: Request) -> int:
        """`submit` for a request that `new_request` made."""
        self.check(request)
        request.ticket = self._tickets
        self._tickets += 1
        self._waiting.append(request)
        return request.ticket

    def cancel(self, ticket: int) -> bool:
        """Drop a request; False if it has already ended (or never was)."""
        for request in (*self._waiting, *self._running):
            if request.ticket == ticket:
                if request in self._running:
                    self._leave(request)
                else:
                    self._waiting.remove(request)
                return True
        return False

    def step(self) -> list[Piece]:
        """Decode one token of every running request, after admitting those that fit into the rows left."""
        with self.model.inference_mode():
            pieces = self._admit()
            if self._running:
                batch = self._batch = self._batch or DecodeBatch(self._running, self.model)
                guesses = [request.guess() for request in batch.requests]
                some = any(guesses) and all(size == 1 for size in batch.sizes)
                try:
                    decoded = self._guessed_step(batch, guesses) if some else self._decode_step(batch)
                except Exception as error:  # one that outgrows what a layer knows stops the pass; those that wait go on
                    pieces += [Piece(request.ticket, error=error) for request in self._running]
                    for request in list(self._running):
                        request.error = error
                        self._leave(request)
                else:
                    pieces += self._choose_guessed(*decoded, guesses) if some else self._choose(*decoded)
        return pieces

    def run(self) -> Iterator[Piece]:
        """Steps until nothing is left."""
        while self.busy:
            yield from self.step()

    def _admit(self) -> list[Piece]:
        joining: list[Request] = []
        left = self.rows - len(self._owner)
        while self._waiting and self._waiting[0].width <= left:
            request = self._waiting.popleft()
            left -= request.width
            first = len(self._owner)
            request.rows = list(range(first, first + request.width))
            self._owner += [request] * request.width
            for row in request.rows:
                self.cache.clear(row)
            joining.append(request)
        if joining and not self._running:
            self._step = Step(core) if is_plain(core := self.model.core) and not self._plain else None
        pieces: list[Piece] = []
        for group in self._groups(joining):
            if group:
                self._running += group
                self._batch = None
                try:
                    states = self._read(group)
                except Exception as error:  # a user's embedding may fail; the requests that ran before go on
                    for request in group:
                        request.error = error
                        self._leave(request)
                    pieces += [Piece(request.ticket, error=error) for request in group]
                else:
                    pieces += self._choose(group, torch.cat(states), list(map(len, states)))
        return pieces

    def _groups(self, joining: Sequence[Request]) -> Iterator[list[Request]]:
        """The requests that join, as they are read: first those of which nothing is cached, then the others."""
        fresh: list[Request] = []
        later: list[Request] = []
        for request in joining:
            known = [*self._running, *fresh] if self._shares else []
            (fresh if request.prefix is None and longest(self.model, request, known) is None else later).append(request)
        yield fresh
        for request in later:  # what they share is in the cache by now, unless reading it failed
            request.shared = longest(self.model, request, self._running) if self._shares else None
        yield [a for a in later if a.prefix is None and a.shared is None]
        yield [a for a in later if a.prefix is not None or a.shared is not None]

    def _read(self, requests: Sequence[Request]) -> list[Tensor]:
        """Prefill: the states (rows, D) that each answer starts from."""
        batch = [(request, tokens) for request in requests for tokens in request.prompts]
        stream = self.model.packer(
            [(request.task, tokens) for request, tokens in batch],
            answers=False,
            names=[request.name for request, _ in batch],
            begins=[request.begin for request, _ in batch],
        ).to(self.model.device)
        # by prompt: its sample in the stream, the row of the last token of its start, and its newest row, whose state comes next
        where: dict[int, tuple[int, int, int]] = {}
        for reading in stream.readings.values():
            ends = torch.tensor(reading.lengths).cumsum(0)
            rows = reading.row_N.tolist()
            for prompt, end, length in zip(reading.samples, ends.tolist(), reading.lengths, strict=True):
                newest = rows[end - 1]
                where[prompt] = (int(stream.layout.info.sample[newest]), rows[end - length], newest)
        # by sample of the stream: its row of the cache; the second prompt of a request (guidance) has its second row
        cache_rows, prompts_of = [0] * len(batch), dict.fromkeys(requests, 0)
        for prompt, (request, _) in enumerate(batch):
            cache_rows[where[prompt][0]] = request.rows[prompts_of[request]]
            prompts_of[request] += 1
        states_TD = self._prefill(stream, batch, cache_rows, where)
        found: dict[Request, list[Tensor]] = {request: [] for request in requests}
        for prompt, (request, _) in enumerate(batch):
            _, start, newest = where[prompt]
            request.start(stream.position_TA[start], int(stream.layout.info.segment[start]) + 1)
            found[request].append(states_TD[newest])
        for reading in stream.readings.values():
            if reading.key_N is not None:
                keys = states_TD[reading.key_N].split(reading.key_lengths)
                for prompt, state_MD in zip(reading.samples, keys, strict=True):
                    batch[prompt][0].source_MD = state_MD
        for prompt, (request, _) in enumerate(batch):
            if request.options.ctc is not None:
                self._read_ctc(request, request.options.ctc[0], stream, where[prompt][0], states_TD)
        for request in requests:
            request.cached = self.cache.length[request.rows[0]]
            # beams start alike
            for row in request.rows[len(found[request]) :]:
                self.cache.copy(request.rows[0], row)
        return [torch.stack(states) for states in found.values()]

    def _read_ctc(self, request: Request, task: str, stream: Stream, sample: int, states_TD: Tensor) -> None:
        """Let the CTC task of a request read the states of its context, which do not depend on what is written after it."""
        info = stream.layout.info
        (rows,) = ((info.sample == sample) & (info.order < request.read_count)).nonzero(as_tuple=True)
        head, readout = self.model.packer.heads[task], self.model.readout(task)
        logits = head.logits(readout, states_TD[rows], [len(rows)])
        request.start_ctc(logits.float().log_softmax(-1))

    def _prefill(
        self,
        stream: Stream,
        batch: Sequence[tuple[Request, Any]],
        rows: list[int],
        where: Mapping[int, tuple[int, int, int]],
    ) -> Tensor:
        """States (T, D) of prompts, all with a cached beginning or none; of tokens that are cached they are 0."""
        if batch[0][0].prefix is None and batch[0][0].shared is None:
            return self.model(stream, cache=self.cache.at(rows))
        counts = [0] * len(batch)
        for prompt, (request, _) in enumerate(batch):
            sample = where[prompt][0]
            if request.prefix is not None:
                counts[sample] = request.prefix.count
                self.cache.copy(0, rows[sample], of=request.prefix.cache)
            elif request.shared is not None:
                other, counts[sample] = request.shared
                self.cache.copy(other.rows[0], rows[sample], count=counts[sample])
            request.shared = None  # the other request is needed no longer
        places = stream.layout.info
        counts_T = torch.tensor(counts, device=self.model.device)[places.sample.long()]
        new = (places.order >= counts_T).nonzero()[:, 0]
        spans = tuple(Span(0, s.total - c) for s, c in zip(stream.layout.spans, counts, strict=True))
        states_TD = self.model.core(
            self.model.rows(stream)[new], stream.position_TA[new], Layout(spans, places[new]), cache=self.cache.at(rows)
        )
        return torch.zeros(len(stream), states_TD.shape[1], dtype=states_TD.dtype, device=states_TD.device).index_copy(
            0, new, states_TD
        )

    def _decode_step(self, batch: DecodeBatch) -> tuple[list[Request], Tensor, list[int]]:
        """One pass of the core: the running requests, their states end to end, and the number of rows of each."""
        stream_BD, position_BA = batch.inputs()
        layout = batch.layout(self.cache.length[: len(batch.rows)])
        state_BD = self._pass(stream_BD, position_BA, layout, cache=self.cache.at(batch.rows))
        if batch.order_of_requests is not None:
            state_BD = state_BD[batch.order_of_requests]
        return batch.requests, state_BD, batch.sizes

    @property
    def _pass(self) -> Callable[..., Tensor]:
        """What computes the states of new tokens."""
        exact = not torch.is_autocast_enabled(self.model.device.type)  # which would round the stream itself in a step
        return (self._step if exact else None) or self.model.core

    def _guessed_step(
        self, batch: DecodeBatch, guesses: Sequence[Sequence[int]]
    ) -> tuple[list[Request], Tensor, list[int]]:
        """`_decode_step` for the newest token of each request and the guesses after it."""
        stream_TD, position_TA, layout = batch.guessed(guesses, self.cache.length[: len(batch.rows)])
        state_TD = self._pass(stream_TD, position_TA, layout, cache=self.cache.at(batch.rows))
        return batch.requests, state_TD, [1 + len(guess) for guess in guesses]

    def _choose_guessed(
        self, requests: Sequence[Request], state_TD: Tensor, sizes: Sequence[int], guesses: Sequence[Sequence[int]]
    ) -> list[Piece]:
        """Choose a token of each request, and one more as long as what was guessed is what was chosen; forget the other guesses."""
        states, logits = dict(zip(requests, state_TD.split(list(sizes)), strict=True)), {}
        for task in dict.fromkeys(request.task for request in requests if request.lookup is not None):
            head, readout = self.model.packer.heads[task], self.model.readout(task)
            group = [request for request in requests if request.task == task]
            together = head.next_logits(readout, torch.cat([states[a] for a in group]), [], []).float().cpu()
            logits |= zip(group, together.split([len(states[a]) for a in group]), strict=True)
        before = {
            request: self.cache.length[request.rows[0]] - size for request, size in zip(requests, sizes, strict=True)
        }
        going, right, pieces = list(requests), 0, []
        guess_of = dict(zip(requests, guesses, strict=True))
        while going:
            one = slice(right, right + 1)
            known = {a: logits[a][one] for a in going if a in logits}
            pieces += self._choose(going, torch.cat([states[a][one] for a in going]), [1] * len(going), known)
            now, going = going, []
            for request in now:
                guess = guess_of[request]
                if request not in self._running:
                    continue
                if right < len(guess) and request.ids[-1] == guess[right]:
                    going.append(request)
                    continue
                self.cache.shorten(request.rows[0], before[request] + 1 + right)
                if guess and request.lookup is not None:
                    request.lookup.learn(len(guess), right)
            right += 1
        return pieces

    def _choose(
        self,
        requests: Sequence[Request],
        state_ND: Tensor,
        sizes: Sequence[int],
        logits: Mapping[Request, Tensor] | None = None,
    ) -> list[Piece]:
        """Choose the next token of each request, from its newest states; requests that end give their rows back.

        logits: those that are known already.
        """
        pieces: list[Piece] = []
        by_task: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_task.setdefault(request.task, []).append(i)
        parts = state_ND.split(list(sizes)) if len(by_task) > 1 else []
        for task, group in by_task.items():
            state_ND = torch.cat([parts[i] for i in group]) if parts else state_ND
            head, readout = self.model.packer.heads[task], self.model.readout(task)
            known = [logits[requests[i]] for i in group if logits and requests[i] in logits]
            for request, copies in choose_next(
                [requests[i] for i in group],
                state_ND,
                [sizes[i] for i in group],
                head,
                readout,
                torch.cat(known) if known else None,
            ):
                for source, target, start in copies:
                    self.cache.copy(request.rows[source], request.rows[target], start=start)
                try:
                    text, prediction = request.new_text(), request.prediction()
                except Exception as error:  # a user's decode may fail in any way; the other answers go on
                    text, prediction = "", None
                    request.error = StreamError(
                        f"{request.name} of task {request.task!r}: {type(request.tokenizer).__name__}.decode failed: "
                        f"{type(error).__name__}: {error}"
                    )
                if text or request.ended or request.error:
                    pieces.append(Piece(request.ticket, text, prediction, request.error))
        for request in [a for a in self._running if a.ended or a.error]:
            self._leave(request)
        return pieces

    def _leave(self, request: Request) -> None:
        """Give a request's rows back; the last rows in use move into the gap."""
        self._running.remove(request)
        self._batch = None
        for row in sorted(request.rows, reverse=True):
            last = len(self._owner) - 1
            owner = self._owner.pop()
            if row != last:
                self.cache.copy(last, row)
                self._owner[row] = owner
                owner.rows[owner.rows.index(last)] = row
            self.cache.clear(last)
