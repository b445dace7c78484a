"""Transcription while a sound comes in: whole chunks of tokens go through the core once, and the cache keeps the rest."""

import torch
from torch import Tensor

from multimodal.attention import Cache, Layout, Span
from multimodal.masks import And, Causal, Chunked, Or, Places, Rule
from multimodal.model import Model
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal.tokenizer import Tokenizer
from multimodal.transcription.ctc import Decoder, Greedy, log_p_of
from multimodal.transcription.long import Hearing
from multimodal.transcription.reader import Reader
from multimodal.transcription.transcript import Word

_FARTHEST = 16  # tokens around a token that its samples may reach
_CAPACITY = 512  # tokens the cache begins with; it doubles when full


class Listener:
    """Reads a sound while it is recorded, by a CTC task, with the answers that the whole sound would get.

    Tokens see no later chunk: either the sound's tokenizer is causal, or the core's mask is `SameSample() & Chunked(n)`, with a
    `Window` where memory of the past should end. A text comes out one chunk (and what a token's samples reach) after the sound.

        listener = Listener(model, "audio -> text")
        for wave_S in microphone:
            print(*(word.text for word in listener.push(wave_S)))
        print(listener.finish(), listener.text)

    What was heard stays in its cache, which grows with the recording: about 2 * depth * width numbers a token.

    patience_s: how long a `Beam` may change its mind; then its best text is taken for good at the next sure blank.

    Raises:
        ConfigError: this model cannot listen; says what to change.
    """

    def __init__(self, model: Model, task: str, *, decoder: Decoder | None = None, patience_s: float = 2.0) -> None:
        self.hearing = Hearing.of(model, task)
        if not self.hearing.ctc:
            raise ConfigError(
                f"Listener: task {task!r} writes after the whole sound; give the model a task with the head CTC()"
            )
        self.model, tokenizer = model, self.hearing.tokenizer
        self._cache = self._room(_CAPACITY)
        if self._cache.memory is not None:
            raise ConfigError("Listener: a core that reads and writes apart keeps no sound in its cache; use Core")
        mask = model.core.core.mask
        chunk = 1 if tokenizer.causal else _chunk(mask)
        if chunk is None:
            raise ConfigError(
                f"Listener: under the core's mask {mask}, a sound's tokens look at what comes later; train with "
                f"{type(tokenizer).__name__}(causal=True) or with Core(mask=SameSample() & Chunked(n))"
            )
        self.chunk = chunk
        self.left, self.right = _reach(tokenizer, self.hearing.rate_hz, self.hearing.unit)
        passage = max(round(patience_s / self.hearing.step_s), 1)
        self.reader = Reader(decoder or Greedy(), self.hearing.writes, self.hearing.step_s, passage)
        self._wave_S = torch.empty(0)
        self._start = 0  # tokens before the first sample that is held
        self._fed = 0  # tokens that the core has read
        self._told = 0  # words given out
        self._samples = 0
        self._over = False

    @property
    def text(self) -> str:
        """What is final so far."""
        return " ".join(word.text for word in self.reader.words)

    @property
    def guess(self) -> str:
        """What is not final yet, as it looks now."""
        return self.reader.guess()

    @property
    def seconds(self) -> float:
        """How much was pushed."""
        return self._samples / self.hearing.rate_hz

    def push(self, wave_S: Tensor) -> list[Word]:
        """Hear more samples, in -1..1 at the tokenizer's rate, and give the words that became final.

        Raises:
            MediaError: not one channel of finite floats. StreamError: after `finish`.
        """
        if self._over:
            raise StreamError("Listener.push: this sound is finished; make a new Listener for another")
        wave_S = torch.as_tensor(wave_S)
        if wave_S.dim() != 1 or not wave_S.is_floating_point() or not torch.isfinite(wave_S).all():
            raise MediaError(
                f"Listener.push: the samples are {wave_S.dtype} {tuple(wave_S.shape)}; wanted one channel (S,) of finite floats "
                f"at {self.hearing.rate_hz} Hz"
            )
        self._wave_S = torch.cat([self._wave_S, wave_S.detach().float().cpu()])
        self._samples += len(wave_S)
        ready = self._samples // self.hearing.unit - self.right  # tokens that no later sample changes
        self._feed(ready // self.chunk * self.chunk)
        self.reader.settle()
        return self._new()

    def finish(self) -> list[Word]:
        """The sound is over: the rest of the words."""
        if not self._over:
            self._over = True
            self._feed(-(-self._samples // self.hearing.unit))
            self.reader.finish()
            self._wave_S = self._wave_S[:0]
        return self._new()

    def _new(self) -> list[Word]:
        words = self.reader.words[self._told :]
        self._told = len(self.reader.words)
        return words

    def _feed(self, until: int) -> None:
        """Bring the tokens up to `until` through the core."""
        if until <= self._fed:
            return
        hearing = self.hearing
        tokens = hearing.tokenizer((self._wave_S, hearing.rate_hz))
        fresh = slice(self._fed - self._start, until - self._start)
        content, position_NA = tokens.content[fresh], tokens.position_NA[fresh]
        if len(content) != until - self._fed:
            raise StreamError(
                f"Listener: {type(hearing.tokenizer).__name__} gave {len(tokens)} tokens for {len(self._wave_S)} samples; "
                f"wanted one for every {hearing.unit}"
            )
        position_TA = position_NA / torch.tensor(hearing.tokenizer.step)
        position_TA[:, 0] += self._start
        log_p_NV = self._log_p(content, position_TA)
        self.reader.push(log_p_NV, position_TA[:, 0].double().round(decimals=3) * hearing.step_s)
        self._fed = until
        keep = max(until - self.left, 0)
        self._wave_S = self._wave_S[(keep - self._start) * hearing.unit :].clone()
        self._start = keep

    def _log_p(self, content: Tensor, position_TA: Tensor) -> Tensor:
        model, hearing, count = self.model, self.hearing, len(content)
        if self._fed + count > self._cache.capacity:
            larger = self._room(max(2 * self._cache.capacity, self._fed + count))
            larger.copy(0, 0, of=self._cache)
            self._cache = larger
        order_T = torch.arange(self._fed, self._fed + count, dtype=torch.int32, device=model.device)
        nothing, free = torch.zeros_like(order_T), not hearing.tokenizer.causal
        places = Places(sample=nothing, order=order_T, free=nothing + int(free), segment=nothing)
        layout = Layout((Span(count if free else 0, count),), places)
        with model.resting():
            rows_TD = model.embed(hearing.kind, content.to(model.device))
            state_TD = model.core(rows_TD, position_TA.to(model.device), layout, cache=self._cache)
            readout = model.readout(hearing.task)
            return log_p_of(model.packer.head(hearing.task).logits(readout, state_TD, [count]))

    def _room(self, capacity: int) -> Cache:
        weight = self.model.readout(self.hearing.task).linear.weight
        return self.model.core.core.cache(rows=1, capacity=capacity, device=weight.device, dtype=weight.dtype)


def _chunk(rule: Rule) -> int | None:
    """Tokens read freely see nothing past the end of their chunk of this many; None: no such end is known."""
    if isinstance(rule, Chunked):
        return rule.size
    if isinstance(rule, Causal):
        return 1
    if isinstance(rule, And):
        sizes = [size for size in (_chunk(rule.left), _chunk(rule.right)) if size is not None]
        return min(sizes, default=None)
    if isinstance(rule, Or):
        left, right = _chunk(rule.left), _chunk(rule.right)
        return max(left, right) if left and right and not max(left, right) % min(left, right) else None
    return None


def _reach(tokenizer: Tokenizer, rate_hz: int, unit: int) -> tuple[int, int]:
    """How many tokens before and after a token its samples come from, found by encoding parts of a noise.

    Raises:
        ConfigError: tokens depend on the whole sound.
    """
    third = 2 * _FARTHEST * unit  # samples
    noise_S = torch.randn(3 * third, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    noise_S[third : 2 * third] *= 1e-4  # beside it, what is loud shows even where a window is nearly closed

    def changed(part_S: Tensor, skip: int) -> list[int]:
        """Tokens of a part that are others than those of the whole."""
        part, same = tokenizer((part_S, rate_hz)).content, whole[skip:]
        near = torch.isclose(part, same[: len(part)], rtol=1e-5, atol=1e-5)
        return (~near.flatten(1).all(1)).nonzero()[:, 0].tolist()

    whole = tokenizer((noise_S, rate_hz)).content
    right = 4 * _FARTHEST - min(changed(noise_S[: 2 * third], 0), default=4 * _FARTHEST)
    left = max(changed(noise_S[third:], 2 * _FARTHEST), default=-1) + 1
    if right > _FARTHEST or left > _FARTHEST:
        raise ConfigError(
            f"Listener: what {type(tokenizer).__name__} makes of a sound's start depends on all of it; train with a tokenizer that "
            "looks at each part alone, such as AudioFrames(normalise='fixed')"
        )
    return left, right
