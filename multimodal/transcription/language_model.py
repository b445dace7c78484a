"""Language models that rank texts in a beam search: n-grams, or a text task of the model itself."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from multimodal.attention import Cache, Layout, Span
from multimodal.files import write_atomic
from multimodal.masks import MaskInfo
from multimodal.model import Model
from multimodal.positions import in_steps, on_axes, only_time
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.tokenizer import Tokens, written_tokens

_START = -1  # a symbol before the text, so that beginnings have counts of their own


class LanguageModel(Protocol):
    """Log-probabilities of the next symbol."""

    @property
    def ends(self) -> bool:
        """Whether the last log-probability is that of the text's end."""
        ...

    def log_p(self, history: Sequence[int]) -> Tensor:
        """Nats of every symbol after these ids (V,), and then of the text's end if `ends` (V + 1,)."""
        ...


class NGramLM:
    """Interpolated Witten-Bell n-grams over ids (Chen & Goodman 1998, section 2.5); `NGramLM.train` counts one.

    p(w | h) = (count(h w) + kinds(h) * p(w | shorter h)) / (count(h) + kinds(h)), down to a uniform distribution; kinds(h) is the
    number of different symbols that followed h.
    """

    ends = True

    def __init__(self, order: int, vocab: int, counts: Mapping[tuple[int, ...], Mapping[int, int]]) -> None:
        if order < 1 or vocab < 1:
            raise ConfigError(f"NGramLM: order={order} and vocab={vocab} must be at least 1")
        self.order, self.vocab = order, vocab
        self.counts = {history: dict(follow) for history, follow in counts.items()}
        self._cached: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def train(cls, sequences: Iterable[Sequence[int]], order: int, vocab: int) -> Self:
        """Count sequences of ids in 0..vocab-1; a model of order 3 predicts from the last two.

        Raises:
            ConfigError: no sequences, or an id outside the vocabulary.
        """
        counts: dict[tuple[int, ...], Counter[int]] = {}
        for sequence in sequences:
            ids = [int(i) for i in sequence]
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                raise ConfigError(
                    f"NGramLM.train: ids run from {min(ids)} to {max(ids)}, outside 0..{vocab - 1}; "
                    "give vocab=tokenizer.vocab_size"
                )
            padded = [_START] * (order - 1) + ids + [vocab]
            for at in range(order - 1, len(padded)):
                for n in range(order):
                    counts.setdefault(tuple(padded[at - n : at]), Counter())[padded[at]] += 1
        if not counts:
            raise ConfigError("NGramLM.train: there are no sequences to count; give texts as lists of ids")
        return cls(order, vocab, counts)

    def log_p(self, history: Sequence[int]) -> Tensor:
        """Nats (vocab + 1,) of every next symbol and of the text's end, float64."""
        room = self.order - 1
        seen = (*[_START] * room, *history)[-room:] if room else ()
        if seen not in self._cached:
            p = torch.full((self.vocab + 1,), 1 / (self.vocab + 1), dtype=torch.float64)
            for n in range(self.order):
                follow = self.counts.get(seen[room - n :])
                if follow is None:  # longer histories were not counted either
                    break
                p = len(follow) * p
                p[list(follow)] += torch.tensor(list(follow.values()), dtype=torch.float64)
                p = p / (len(follow) + sum(follow.values()))
            self._cached[seen] = p.log()
        return self._cached[seen]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `from_dict` makes the same model."""
        counts = [[list(h), list(f), list(f.values())] for h, f in self.counts.items()]
        return {"order": self.order, "vocab": self.vocab, "counts": counts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The model of which these are the JSON values.

        Raises:
            CheckpointError: they were not made by `to_dict`.
        """
        try:
            counts = {tuple(h): dict(zip(ids, many, strict=True)) for h, ids, many in data["counts"]}
            return cls(data["order"], data["vocab"], counts)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"NGramLM.from_dict: this was not made by to_dict: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_atomic(Path(path), json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


class ModelLM:
    """A task of the model that writes the kind from nothing, such as "-> text", as a language model.

    One KV cache holds the newest history. Another history shares its cached prefix and is read from the first difference on; so
    the prefixes of a beam, which differ late, cost a few tokens each. The results of the last `remembered` histories are cached.

    Raises:
        ConfigError, TaskError: the task reads something, or does not write token by token.
    """

    ends = True

    def __init__(self, model: Model, task: str, *, context: int = 512, remembered: int = 4096) -> None:
        model.packer.check_task(task)
        pattern, head = model.packer.patterns[task], model.packer.head(task)
        if pattern.reads or not head.autoregressive:
            raise ConfigError(
                f"ModelLM: task {task!r} must write from nothing token by token, "
                f"such as Task('-> {pattern.writes.kind}', NextToken())"
            )
        if context < 2:
            raise ConfigError(f"ModelLM: context={context} ids is too short; use 2 or more")
        self.model, self.task, self.context, self.remembered = model, task, context, remembered
        self.kind, self.head = pattern.writes.kind, head
        self._cached: dict[tuple[int, ...], Tensor] = {}
        self._history: list[int] = []
        self._cache: Cache | None = None

    def log_p(self, history: Sequence[int]) -> Tensor:
        """Nats (V + 1,) of every next symbol and of the text's end; of a long history at most the last `context` ids are read."""
        # the start of a long history moves by half a context at a time, so that most histories share a cached prefix
        half = max(self.context // 2, 1)
        cut = 0 if len(history) <= self.context else math.ceil((len(history) - self.context) / half) * half
        key = tuple(history[cut:])
        if key not in self._cached:
            with self.model.inference_mode():
                state_D = self._state(list(key))
                logits_NV = self.head.logits(self.model.readout(self.task), state_D[None], [1])
            if len(self._cached) >= self.remembered:
                del self._cached[next(iter(self._cached))]
            self._cached[key] = logits_NV[0].float().log_softmax(-1).cpu().clone()
        return self._cached[key]

    def _state(self, ids: list[int]) -> Tensor:
        if self._cache is None:
            self._cache = self._prompt()
        shared = 0
        while shared < min(len(ids) - 1, len(self._history)) and ids[shared] == self._history[shared]:
            shared += 1
        if not ids:
            return self._first_D
        self._cache.length = [self._prompted + shared]
        self._history = ids[:shared]  # should a step fail, no more than this is valid in the cache
        self._place(ids, shared)
        state_TD = self._first_D[None]
        step = 1 if self._cache.memory is not None else len(ids)  # an EncoderDecoder's writer takes one token at a time
        for start in range(shared, len(ids), step):
            state_TD = self._step(ids[start : start + step], start, self._cache)
        self._history = ids
        return state_TD[-1]

    def _place(self, ids: list[int], shared: int) -> None:
        """Work out where these ids stand, of which the first `shared` are those of the history before."""
        tokenizer = self.model.packer.answer_tokenizers[self.task]
        if tokenizer.placed_by_content:
            before = Tokens(torch.tensor(ids[:shared], dtype=torch.long), self._placed_NA[:shared])
            more = written_tokens(tokenizer, torch.tensor(ids[shared:], dtype=torch.long), before)
            self._placed_NA = torch.cat([before.position_NA, more.position_NA])
            place_NA = in_steps(self._placed_NA, tokenizer.step)
            self._place_NA = on_axes(place_NA, tokenizer.axes, self.model.packer.axes).to(self.model.device)

    def _step(self, ids: list[int], start: int, cache: Cache) -> Tensor:
        """States (T, D) of more ids, the first of which is number `start` of the text."""
        device = self.model.device
        order_T = torch.arange(start, start + len(ids), dtype=torch.int32, device=device) + self._prompted
        nothing = torch.zeros_like(order_T)
        layout = Layout((Span(0, len(ids)),), MaskInfo(nothing, order_T, nothing, nothing + self._segment))
        rows_TD = self.model.embed(self.kind, torch.tensor(ids, device=device))
        position_TA = self._after_A + self._place_NA[start : start + len(ids)]
        return self.model.core(rows_TD, position_TA, layout, cache=cache)

    def _prompt(self) -> Cache:
        """A cache with the start of the written segment, from which all histories go on."""
        model, core = self.model, self.model.core.core
        stream = model.pack(self.task, [{}], answers=False)
        tokenizer = model.packer.answer_tokenizers[self.task]
        self._placed_NA = torch.zeros(0, len(tokenizer.axes))
        cache = core.cache(rows=1, capacity=len(stream) + self.context, device=model.device, dtype=model.dtype)
        self._prompted = len(stream)
        self._segment = int(stream.layout.info.segment[-1]) + 1
        place_NA = in_steps(tokenizer.places(self.context), tokenizer.step)
        self._place_NA = on_axes(place_NA, tokenizer.axes, model.packer.axes).to(model.device)
        self._after_A = only_time(stream.position_TA[-1] + 1)  # one step after the last token in time, as packed
        self._first_D = model(stream, cache=cache)[-1]
        return cache
