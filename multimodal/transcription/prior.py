"""How likely a text is before anything is heard: counts of n-grams, or the model's own text task."""

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
from multimodal.masks import Places
from multimodal.model import Model
from multimodal.shapes import CheckpointError, ConfigError

_START = -1  # stands before a text, so that beginnings have counts of their own


class Prior(Protocol):
    """Log-probabilities of the next symbol; `ends`: the last of them is that of the text's end."""

    @property
    def ends(self) -> bool: ...

    def log_p(self, history: Sequence[int]) -> Tensor:
        """(V,) nats of every symbol after these ids, or V of them and the end's."""
        ...


class NGram:
    """Interpolated Witten-Bell n-grams over ids (Chen & Goodman 1998, section 2.5); make one with `NGram.train`.

    p(w | h) = (count(h w) + kinds(h) * p(w | shorter h)) / (count(h) + kinds(h)), down to the same for all; kinds(h) is how
    many different symbols followed h.
    """

    ends = True

    def __init__(self, order: int, vocab: int, counts: Mapping[tuple[int, ...], Mapping[int, int]]) -> None:
        if order < 1 or vocab < 1:
            raise ConfigError(f"NGram: order={order} and vocab={vocab} must be at least 1")
        self.order, self.vocab = order, vocab
        self.counts = {history: dict(follow) for history, follow in counts.items()}
        self._known: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def train(cls, sequences: Iterable[Sequence[int]], order: int, vocab: int) -> Self:
        """Count sequences of ids in 0..vocab-1; order 3 looks at the last two.

        Raises:
            ConfigError: no sequences, or an id outside the vocabulary.
        """
        counts: dict[tuple[int, ...], Counter[int]] = {}
        for sequence in sequences:
            ids = [int(i) for i in sequence]
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                raise ConfigError(
                    f"NGram.train: ids run from {min(ids)} to {max(ids)}, outside 0..{vocab - 1}; "
                    "give vocab=tokenizer.vocab_size"
                )
            padded = [_START] * (order - 1) + ids + [vocab]
            for at in range(order - 1, len(padded)):
                for n in range(order):
                    counts.setdefault(tuple(padded[at - n : at]), Counter())[padded[at]] += 1
        if not counts:
            raise ConfigError("NGram.train: there are no sequences to count; give texts as lists of ids")
        return cls(order, vocab, counts)

    def log_p(self, history: Sequence[int]) -> Tensor:
        """(vocab + 1,) nats, float64; the last is the end's."""
        room = self.order - 1
        seen = (*[_START] * room, *history)[-room:] if room else ()
        if seen not in self._known:
            p = torch.full((self.vocab + 1,), 1 / (self.vocab + 1), dtype=torch.float64)
            for n in range(self.order):
                follow = self.counts.get(seen[room - n :])
                if follow is None:  # nor was any longer history met
                    break
                p = len(follow) * p
                p[list(follow)] += torch.tensor(list(follow.values()), dtype=torch.float64)
                p = p / (len(follow) + sum(follow.values()))
            self._known[seen] = p.log()
        return self._known[seen]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` takes them back."""
        counts = [[list(h), list(f), list(f.values())] for h, f in self.counts.items()]
        return {"order": self.order, "vocab": self.vocab, "counts": counts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        try:
            counts = {tuple(h): dict(zip(ids, many, strict=True)) for h, ids, many in data["counts"]}
            return cls(data["order"], data["vocab"], counts)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"NGram.from_dict: this was not made by to_dict: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_atomic(Path(path), json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


class ModelPrior:
    """The model's own text task that writes the kind from nothing, such as "-> text".

    One cache holds the history asked for last; another history is read from where the two part, so that the prefixes of a
    beam, which part late, cost a few tokens each. Answers are remembered, the newest `remembered` of them.

    Raises:
        ConfigError, TaskError: the task reads something, or does not write token by token.
    """

    ends = True

    def __init__(self, model: Model, task: str, *, context: int = 512, remembered: int = 4096) -> None:
        model.packer.check_task(task)
        pattern, head = model.packer.patterns[task], model.packer.head(task)
        if pattern.reads or not head.writes:
            raise ConfigError(
                f"ModelPrior: task {task!r} must write from nothing token by token, "
                f"such as Task('-> {pattern.writes.kind}', NextToken())"
            )
        if context < 2:
            raise ConfigError(f"ModelPrior: context={context} ids is too short; use 2 or more")
        self.model, self.task, self.context, self.remembered = model, task, context, remembered
        self.kind, self.head = pattern.writes.kind, head
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._held: list[int] = []
        self._cache: Cache | None = None

    def log_p(self, history: Sequence[int]) -> Tensor:
        """(V + 1,) nats, the last being the end's; of a long history only the last `context` ids or fewer are read."""
        half = max(self.context // 2, 1)
        cut = 0 if len(history) <= self.context else math.ceil((len(history) - self.context) / half) * half
        key = tuple(history[cut:])
        if key not in self._known:
            with self.model.resting():
                state_D = self._state(list(key))
                logits_NV = self.head.logits(self.model.readout(self.task), state_D[None], [1])
            if len(self._known) >= self.remembered:
                del self._known[next(iter(self._known))]
            self._known[key] = logits_NV[0].float().log_softmax(-1).cpu().clone()
        return self._known[key]

    def _state(self, ids: list[int]) -> Tensor:
        if self._cache is None:
            self._cache = self._prompt()
        shared = 0
        while shared < min(len(ids) - 1, len(self._held)) and ids[shared] == self._held[shared]:
            shared += 1
        if not ids:
            return self._first_D
        self._cache.length = [self._prompted + shared]
        self._held = ids[:shared]  # should a step fail, the cache holds no more than this
        state_TD = self._first_D[None]
        step = 1 if self._cache.memory is not None else len(ids)  # a core that writes apart takes one token at a time
        for start in range(shared, len(ids), step):
            state_TD = self._step(ids[start : start + step], start, self._cache)
        self._held = ids
        return state_TD[-1]

    def _step(self, ids: list[int], start: int, cache: Cache) -> Tensor:
        """States of some more ids, which stand at `start` of the text."""
        device = self.model.device
        order_T = torch.arange(start, start + len(ids), dtype=torch.int32, device=device) + self._prompted
        nothing = torch.zeros_like(order_T)
        layout = Layout((Span(0, len(ids)),), Places(nothing, order_T, nothing, nothing + self._segment))
        rows_TD = self.model.embed(self.kind, torch.tensor(ids, device=device))
        position_TA = self._after_A + self._place_NA[start : start + len(ids)]
        return self.model.core(rows_TD, position_TA, layout, cache=cache)

    def _prompt(self) -> Cache:
        """A cache that holds what opens the written segment."""
        model, core = self.model, self.model.core.core
        stream = model.pack(self.task, [{}], answers=False)
        tokenizer = model.packer.tokenizers[self.kind]
        dtype = model.readout(self.task).linear.weight.dtype
        cache = core.cache(rows=1, capacity=len(stream) + self.context, device=model.device, dtype=dtype)
        self._prompted = len(stream)
        self._segment = int(stream.layout.places.segment[-1]) + 1
        self._place_NA = (tokenizer.places(self.context) / torch.tensor(tokenizer.step)).to(model.device)
        last_A = stream.position_TA[-1]
        self._after_A = (last_A + 1) * last_A.new_tensor([1, 0, 0])  # one step after the last token in time, as packed
        self._first_D = model(stream, cache=cache)[-1]
        return cache
