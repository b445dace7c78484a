"""Decoding: requests share one cache and one pass of the core a token; they join when rows are free and leave when they end.

submit --> waiting --packed prefill--> rows of the cache --one pass a token for all rows--> Piece, Piece, .. Prediction

A request has one row, two with guidance (one of them reads nothing), or one a beam. Rows in use are always the first ones, so
that a pass reads the cache where it lies.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimodal.attention import Cache, Layout, Span
from multimodal.generate.decode_batch import Lineup
from multimodal.generate.next_token import advance
from multimodal.generate.request import Answer, Options
from multimodal.generate.step import Step, is_plain
from multimodal.heads import Prediction
from multimodal.packer import Packer
from multimodal.shapes import ConfigError, StreamError, check_whole, did_you_mean
from multimodal.tokenizer import Tokens

if TYPE_CHECKING:
    from multimodal.model import Model


@dataclass(frozen=True)
class Piece:
    """News of one request: text that has become sure (none for kinds that are no text),
    at the end the whole prediction or the error.

    ticket: which request or sample it is of.
    text: what is sure now and was not before.
    prediction: the whole answer, with the last piece.
    error: what went wrong, in the place of an answer.
    """

    ticket: int
    text: str = ""
    prediction: Prediction | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Prefix:
    """The first fields of a task, read once: their tokens, and the core's keys and values of them (see `Model.read`)."""

    model: "Model"
    task: str
    fields: Mapping[str, Tokens | None]
    cache: Cache
    count: int  # tokens


class Engine:
    """Writes the answers of many requests at once, of any tasks of one model that write; each as if it were alone.

    rows: how many answers (beams, guided twins) are written at the same time; others wait. capacity: tokens a row has room for,
    prompt and answer together. Use it in one thread; `submit` and `cancel` may come between any two steps. A model must not be
    trained while answers are being written; new weights count from when all of them have ended.
    """

    def __init__(self, model: "Model", *, rows: int = 16, capacity: int = 1024) -> None:
        check_whole("Engine", rows=rows, capacity=capacity)
        if rows < 1 or capacity < 2:
            raise ConfigError(f"Engine: rows={rows} must be at least 1 and capacity={capacity} at least 2")
        self.model = model
        self.rows, self.capacity = rows, capacity
        dtype = next(model.core.parameters()).dtype
        try:
            self.cache = model.core.core.cache(rows=rows, capacity=capacity, device=model.device, dtype=dtype)
        except RuntimeError as error:
            raise ConfigError(
                f"Engine: there is no memory for rows={rows} of capacity={capacity} tokens; lower max_tokens, the capacity or "
                f"the rows ({error})"
            ) from error
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._lineup: Lineup | None = None  # of those running, until one joins or leaves
        self._owner: list[Answer] = []  # of each row in use
        self._tickets = 0
        self._most = model.most_tokens
        self._step: Step | None = None  # how a pass is computed, if not by the core itself

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being written."""
        return bool(self._waiting or self._running)

    @property
    def free(self) -> int:
        """Rows that no answer has or waits for."""
        return self.rows - len(self._owner) - sum(answer.width for answer in self._waiting)

    def has_room(self, answer: Answer) -> bool:
        """Whether a row is long enough for an answer."""
        return answer.prompt + answer.limit <= self.capacity

    def submit(
        self,
        task: str,
        sample: Mapping[str, Any],
        *,
        prefix: Prefix | None = None,
        name: str | None = None,
        **options: Any,
    ) -> int:
        """Ask for an answer; returns the ticket that its pieces carry. name: what errors call the sample.

        Options are those of `Model.generate`.

        Raises:
            ConfigError, TaskError, MediaError: from the sample or the options.
            StreamError: prompt and answer need more than the capacity.
        """
        answer = request(self.model.packer, task, sample, name or f"request {self._tickets}", prefix, options)
        return self.enter(answer)

    def enter(self, answer: Answer) -> int:
        """`submit` for what `request` made."""
        needed = answer.prompt + answer.limit
        if not self.has_room(answer):
            raise StreamError(
                f"{answer.name} of task {answer.task!r}: a prompt of {answer.prompt} tokens and an answer of up to "
                f"{answer.limit} need {needed} places, more than capacity={self.capacity}; shorten the prompt, lower max_tokens, "
                "or raise capacity"
            )
        most = self._most
        if most is not None and needed > most:
            raise StreamError(
                f"{answer.name} of task {answer.task!r}: a prompt of {answer.prompt} tokens and an answer of up to {answer.limit} "
                f"are more than the {most} places that this model's attention knows; shorten the prompt or lower max_tokens"
            )
        if answer.width > self.rows:
            raise ConfigError(f"{answer.name}: needs {answer.width} rows at once, but the engine has rows={self.rows}")
        answer.ticket = self._tickets
        self._tickets += 1
        self._waiting.append(answer)
        return answer.ticket

    def cancel(self, ticket: int) -> bool:
        """Drop a request; False if it has already ended (or never was)."""
        for answer in (*self._waiting, *self._running):
            if answer.ticket == ticket:
                if answer in self._running:
                    self._leave(answer)
                else:
                    self._waiting.remove(answer)
                return True
        return False

    def step(self) -> list[Piece]:
        """One token further for every request that has rows, after letting in those for whom rows are free."""
        with self.model.resting():
            pieces = self._admit()
            if self._running:
                try:
                    passed = self._pass()
                except Exception as error:  # one that outgrows what a layer knows stops the pass; those that wait go on
                    pieces += [Piece(answer.ticket, error=error) for answer in self._running]
                    for answer in list(self._running):
                        answer.error = error
                        self._leave(answer)
                else:
                    pieces += self._choose(*passed)
        return pieces

    def run(self) -> Iterator[Piece]:
        """Steps until nothing is left."""
        while self.busy:
            yield from self.step()

    def _admit(self) -> list[Piece]:
        joining: list[Answer] = []
        free = self.rows - len(self._owner)
        while self._waiting and self._waiting[0].width <= free:
            answer = self._waiting.popleft()
            free -= answer.width
            first = len(self._owner)
            answer.rows = list(range(first, first + answer.width))
            self._owner += [answer] * answer.width
            for row in answer.rows:
                self.cache.clear(row)
            joining.append(answer)
        if joining and not self._running:
            self._step = Step(core) if is_plain(core := self.model.core) else None
        pieces: list[Piece] = []
        for group in ([a for a in joining if a.prefix is None], [a for a in joining if a.prefix is not None]):
            if group:
                self._running += group
                self._lineup = None
                try:
                    states = self._read(group)
                except Exception as error:  # a stranger's embedding may fail; those who wrote before are not to suffer
                    for answer in group:
                        answer.error = error
                        self._leave(answer)
                    pieces += [Piece(answer.ticket, error=error) for answer in group]
                else:
                    pieces += self._choose(group, torch.cat(states), list(map(len, states)))
        return pieces

    def _read(self, answers: Sequence[Answer]) -> list[Tensor]:
        """Prefill: the states (rows, D) that each answer starts from."""
        batch = [(answer.task, sample, answer) for answer in answers for sample in answer.prompts()]
        names = [answer.name for *_, answer in batch]
        begun = [answer.begin for *_, answer in batch]
        stream = self.model.packer(
            [(task, sample) for task, sample, _ in batch], answers=False, names=names, begun=begun
        ).to(self.model.device)
        # sample -> its place in the stream, its query's row, its newest row
        where: dict[int, tuple[int, int, int]] = {}
        for reading in stream.readings.values():
            ends = torch.tensor(reading.lengths).cumsum(0)
            rows = reading.row_N.tolist()
            for sample, end, length in zip(reading.samples, ends.tolist(), reading.lengths, strict=True):
                newest = rows[end - 1]
                where[sample] = (int(stream.layout.places.sample[newest]), rows[end - length], newest)
        rows = [0] * len(batch)
        seen: dict[int, int] = {}
        for sample, (_, _, answer) in enumerate(batch):
            rows[where[sample][0]] = answer.rows[seen.setdefault(answer.ticket, 0)]
            seen[answer.ticket] += 1
        states_TD = self._prefill(stream, answers, batch, rows, where)
        found: dict[Answer, list[Tensor]] = {}
        for sample, (_, _, answer) in enumerate(batch):
            _, query, newest = where[sample]
            answer.start(stream.position_TA[query], int(stream.layout.places.segment[query]) + 1)
            found.setdefault(answer, []).append(states_TD[newest])
        for reading in stream.readings.values():
            for memory in reading.memory(states_TD).values():
                for sample, state_MD in zip(reading.samples, memory.state_MD.split(memory.lengths), strict=True):
                    batch[sample][2].state_MD = state_MD
        for answer in answers:
            answer.cached = self.cache.length[answer.rows[0]]
            for row in answer.rows[len(found[answer]) :]:
                self.cache.copy(answer.rows[0], row)
        return [torch.stack(found[answer]) for answer in answers]

    def _prefill(self, stream, answers, batch, rows, where) -> Tensor:
        prefix = answers[0].prefix
        if prefix is None:
            return self.model(stream, cache=self.cache.at(rows))
        counts = [0] * len(batch)
        for sample, (_, _, answer) in enumerate(batch):
            counts[where[sample][0]] = answer.prefix.count
            self.cache.copy(0, rows[where[sample][0]], of=answer.prefix.cache)
        places = stream.layout.places
        counts_T = torch.tensor(counts, device=self.model.device)[places.sample.long()]
        new = (places.order >= counts_T).nonzero()[:, 0]
        spans = tuple(Span(0, s.total - c) for s, c in zip(stream.layout.spans, counts, strict=True))
        states_TD = self.model.core(
            self.model.rows(stream)[new], stream.position_TA[new], Layout(spans, places[new]), cache=self.cache.at(rows)
        )
        return torch.zeros(len(stream), states_TD.shape[1], dtype=states_TD.dtype, device=states_TD.device).index_copy(
            0, new, states_TD
        )

    def _pass(self) -> tuple[list[Answer], Tensor, list[int]]:
        """One pass of the core: every running answer, and the states of each, so many rows, one after the other."""
        lineup = self._lineup = self._lineup or Lineup(self._running, self.model)
        stream_BD, position_BA = lineup.inputs()
        layout = lineup.layout(self.cache.length[: len(lineup.rows)])
        exact = not torch.is_autocast_enabled(self.model.device.type)  # which would round the stream itself in a step
        core, cache = (self._step if exact else None) or self.model.core, self.cache.at(lineup.rows)
        state_BD = core(stream_BD, position_BA, layout, cache=cache)
        return lineup.answers, lineup.states(state_BD), lineup.sizes

    def _choose(self, answers: Sequence[Answer], state_ND: Tensor, sizes: Sequence[int]) -> list[Piece]:
        """Let every answer choose its next token, from its states; those that end leave."""
        pieces: list[Piece] = []
        by_task: dict[str, list[int]] = {}
        for i, answer in enumerate(answers):
            by_task.setdefault(answer.task, []).append(i)
        parts = state_ND.split(list(sizes)) if len(by_task) > 1 else []
        for task, group in by_task.items():
            state_ND = torch.cat([parts[i] for i in group]) if parts else state_ND
            head, readout = self.model.packer.head(task), self.model.readout(task)
            for answer, copies in advance(
                [answers[i] for i in group], state_ND, [sizes[i] for i in group], head, readout
            ):
                for source, target, start in copies:
                    self.cache.copy(answer.rows[source], answer.rows[target], start=start)
                try:
                    text, prediction = answer.news(), answer.prediction()
                except Exception as error:  # a stranger's decode may fail in any way; the other answers go on
                    text, prediction = "", None
                    answer.error = StreamError(
                        f"{answer.name} of task {answer.task!r}: {type(answer.tokenizer).__name__}.decode failed: "
                        f"{type(error).__name__}: {error}"
                    )
                if text or answer.ended or answer.error:
                    pieces.append(Piece(answer.ticket, text, prediction, answer.error))
        for answer in [a for a in self._running if a.ended or a.error]:
            self._leave(answer)
        return pieces

    def _leave(self, answer: Answer) -> None:
        """Free an answer's rows; the last rows in use move into the gap."""
        self._running.remove(answer)
        self._lineup = None
        for row in sorted(answer.rows, reverse=True):
            last = len(self._owner) - 1
            owner = self._owner.pop()
            if row != last:
                self.cache.copy(last, row)
                self._owner[row] = owner
                owner.rows[owner.rows.index(last)] = row
            self.cache.clear(last)


def request(
    packer: Packer, task: str, sample: Mapping[str, Any], name: str, prefix: Prefix | None, options: Mapping[str, Any]
) -> Answer:
    """Check and encode what is asked for."""
    packer.check_task(task, answers=True)
    if not packer.head(task).writes:
        raise ConfigError(f"task {task!r}: {type(packer.head(task)).__name__} answers at once; use Model.predict")
    if prefix is not None:
        if prefix.task != task:
            raise ConfigError(f"{name}: the prefix was read for task {prefix.task!r}, not for {task!r}")
        if twice := [field for field in prefix.fields if field in sample]:
            raise ConfigError(
                f"{name} of task {task!r}: {', '.join(twice)} came with the sample and with the prefix; give it once"
            )
        if prefix.model.packer is not packer:
            raise ConfigError(f"{name} of task {task!r}: the prefix was read by another model")
        sample = {**sample, **prefix.fields}
    packer.patterns[task].check_sample(sample, False)
    known = [field.name for field in dataclasses.fields(Options)]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{name} of task {task!r}: {option!r} is neither a field that it reads nor an option of writing"
                + did_you_mean(option, [*known, *sample])
            )
    return Answer(task, packer.encoded(task, sample, name), name, Options(**options), packer, prefix)


def read_prefix(model: "Model", task: str, fields: Mapping[str, Any]) -> Prefix:
    """Read the first fields of a task once, for many answers that differ in the others.

    Raises:
        ConfigError: fields that are not the first of the task, or later fields that those would have had to see.
    """
    packer = model.packer
    packer.check_task(task, answers=True)
    pattern = packer.patterns[task]
    names = [field.name for field in pattern.reads]
    if not fields or names[: len(fields)] != [name for name in names if name in fields] or set(fields) - set(names):
        raise ConfigError(
            f"task {task!r}: a prefix is one or more of its first fields, of {', '.join(names)}; not {', '.join(fields) or 'none'}"
        )
    for field in pattern.reads[len(fields) :]:
        if not packer.tokenizers[field.kind].causal:
            raise ConfigError(
                f"task {task!r}: what comes before {field.name!r} cannot be read once for all, because tokenizer "
                f"{field.kind!r} is read freely, so what comes before looks at it; make that tokenizer with causal=True"
            )
    encoded = {
        name: None
        if fields[name] is None
        else packer.encode(pattern.reads[i].kind, fields[name], f"task {task!r}", name)
        for i, name in enumerate(names[: len(fields)])
    }
    with model.resting():
        stream = packer.prompt(task, encoded).to(model.device)
        cache = model.core.core.cache(
            rows=1, capacity=len(stream), device=model.device, dtype=next(model.core.parameters()).dtype
        )
        if cache.memory is not None:
            raise ConfigError(
                f"task {task!r}: an EncoderDecoder reads all of a sample at once, so no prefix of it can be read before; "
                "give generate the whole sample"
            )
        model(stream, cache=cache)
    return Prefix(model, task, encoded, cache, len(stream))
