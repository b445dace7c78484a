"""Transcribes a sound while it is recorded: each chunk of tokens passes through the core once, with the KV cache of the past."""

import sys

import torch
from torch import Tensor

from multimodal.attention import Cache, Layout, Span
from multimodal.core import Transformer
from multimodal.masks import And, Causal, Chunked, MaskInfo, Or, Rule
from multimodal.model import Model
from multimodal.positions import in_steps, on_axes
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal.tokenizer import Tokenizer
from multimodal.transcription.alignment import WordDecoder
from multimodal.transcription.ctc import Decoder, GreedyCTC, log_probabilities
from multimodal.transcription.recordings import TranscriptionTask
from multimodal.transcription.transcript import Word

_FARTHEST = 16  # the most tokens before or after a token from which its content may come
_CAPACITY = 512  # tokens of the first cache; its size doubles when it is full
_AT_ONCE = 128  # the most tokens of one pass, or one chunk; whatever is pushed at once, memory depends on this


class Listener:
    """Transcribes a sound while it is recorded, by a CTC task, with the logits that the whole sound would give.

    Tokens must see no later chunk: either the sound's tokenizer is causal, or the core's mask is `SameSample() & Chunked(n)`,
    with a `Window` to limit how far it looks back. The text lags the sound by one chunk, and by the samples after a token
    on which its content depends.

        listener = Listener(model, "audio -> text")
        for wave_S in microphone:
            print(*(word.text for word in listener.push(wave_S)))
        print(listener.finish(), listener.text)

    Where the core's mask has a `Window`, the KV cache holds the tokens within its reach and no more, so that hours take no more
    memory than a minute; the final words are stored. Without one it grows by about 2 * depth * width numbers a token.

    chunk: number of tokens that are read together.
    reach: number of the newest tokens that the cache has to hold; None: all of them.
    decoder: decodes the rows, `GreedyCTC` unless given. patience_s: after this time a `Beam`'s best text becomes final at the next
    sure blank.

    Raises:
        ConfigError: this model cannot transcribe a stream; the message says what to change.
    """

    def __init__(self, model: Model, task: str, *, decoder: Decoder | None = None, patience_s: float = 2.0) -> None:
        self.spec = TranscriptionTask.of(model, task)
        if not self.spec.ctc:
            raise ConfigError(
                f"Listener: task {task!r} writes after the whole sound; give the model a task with the head CTC()"
            )
        self.model, tokenizer = model, self.spec.tokenizer
        if not isinstance(model.core, Transformer):
            raise ConfigError("Listener: an EncoderDecoder has no cache of what it reads; use Core")
        mask = model.core.core.mask
        chunk = 1 if tokenizer.causal else _chunk(mask)
        if chunk is None:
            raise ConfigError(
                f"Listener: under the core's mask {mask}, a sound's tokens look at what comes later; train with "
                f"{type(tokenizer).__name__}(causal=True) or with Core(mask=SameSample() & Chunked(n))"
            )
        self.chunk = chunk
        self.left, self.right = _reach(tokenizer, self.spec.rate_hz, self.spec.unit)
        longest = (
            tokenizer.max_tokens - self.left - self.right - chunk - 1
        )  # with the samples around the tokens of one pass
        self._at_once = max(min(_AT_ONCE, longest) // chunk, 1) * chunk
        self.reach = model.core.reach
        # twice the reach, so that moving the tokens within reach costs a constant time a token
        self._most = sys.maxsize if self.reach is None else 2 * self.reach + self._at_once + chunk + self.right + 1
        self._cache = self._new_cache(min(_CAPACITY, self._most))
        passage = max(round(patience_s / self.spec.step_s), 1)
        self.decoder = WordDecoder(decoder or GreedyCTC(), self.spec.writes, self.spec.step_s, passage)
        self._wave_S = torch.empty(0)
        self._start = 0  # tokens before the first stored sample
        self._fed = 0  # tokens that the core has read
        self._returned = 0  # words returned by `push`
        self._samples = 0
        self._finished = False

    @property
    def text(self) -> str:
        """The final text so far."""
        return " ".join(word.text for word in self.decoder.words)

    @property
    def guess(self) -> str:
        """The best text of what is not final yet."""
        return self.decoder.guess()

    @property
    def seconds(self) -> float:
        """Seconds of sound that were pushed."""
        return self._samples / self.spec.rate_hz

    @property
    def tokens(self) -> int:
        """Number of tokens that the model has read."""
        return self._fed

    @property
    def wanted(self) -> int:
        """Number of samples that are still wanted until the next chunk is read; `push` of fewer only stores them."""
        return max((self._fed + self.chunk + self.right) * self.spec.unit - self._samples, 1)

    def push(self, wave_S: Tensor) -> list[Word]:
        """Take more samples, in -1..1 at the tokenizer's rate, and return the words that became final.

        Raises:
            MediaError: not one channel of finite floats. StreamError: after `finish`.
        """
        if self._finished:
            raise StreamError("Listener.push: this sound is finished; make a new Listener for another")
        wave_S = torch.as_tensor(wave_S)
        if wave_S.dim() != 1 or not wave_S.is_floating_point() or not torch.isfinite(wave_S).all():
            raise MediaError(
                f"Listener.push: the samples are {wave_S.dtype} {tuple(wave_S.shape)}; wanted one channel (S,) of finite floats "
                f"at {self.spec.rate_hz} Hz"
            )
        for part_S in wave_S.detach().float().cpu().split(self._at_once * self.spec.unit):
            self._wave_S = torch.cat([self._wave_S, part_S])
            self._samples += len(part_S)
            # whole chunks only: a token of an unfinished chunk may still look at samples that are to come
            ready = self._samples // self.spec.unit - self.right  # tokens that no later sample changes
            self._feed(ready // self.chunk * self.chunk)
        self.decoder.settle()
        return self._new_words()

    def finish(self) -> list[Word]:
        """The sound is over: return the remaining words."""
        if not self._finished:
            self._finished = True
            self._feed(-(-self._samples // self.spec.unit))
            self.decoder.finish()
            self._wave_S = self._wave_S[:0]
        return self._new_words()

    def _new_words(self) -> list[Word]:
        words = self.decoder.words[self._returned :]
        self._returned = len(self.decoder.words)
        return words

    def _feed(self, until: int) -> None:
        """Encode and decode the tokens up to number `until`."""
        if until <= self._fed:
            return
        spec = self.spec
        tokens = spec.tokenizer((self._wave_S, spec.rate_hz))
        fresh = slice(self._fed - self._start, until - self._start)
        content, position_NA = tokens.content[fresh], tokens.position_NA[fresh]
        if len(content) != until - self._fed:
            raise StreamError(
                f"Listener: {type(spec.tokenizer).__name__} gave {len(tokens)} tokens for {len(self._wave_S)} samples; "
                f"wanted one for every {spec.unit}"
            )
        position_TA = in_steps(position_NA, spec.tokenizer.step)
        position_TA[:, 0] += self._start
        position_TA = on_axes(position_TA, spec.tokenizer.axes, self.model.packer.axes)
        log_p_NV = self._log_p(content, position_TA)
        self.decoder.push(log_p_NV, position_TA[:, 0].double().round(decimals=3) * spec.step_s)
        self._fed = until
        # later tokens depend on the samples of `left` earlier ones
        keep = max(until - self.left, 0)
        self._wave_S = self._wave_S[(keep - self._start) * spec.unit :].clone()
        self._start = keep

    def _log_p(self, content: Tensor, position_TA: Tensor) -> Tensor:
        model, spec, count = self.model, self.spec, len(content)
        self._make_room(count)
        order_T = torch.arange(self._fed, self._fed + count, dtype=torch.int32, device=model.device)
        nothing, bidirectional = torch.zeros_like(order_T), not spec.tokenizer.causal
        places = MaskInfo(sample=nothing, order=order_T, bidirectional=nothing + int(bidirectional), segment=nothing)
        layout = Layout((Span(count if bidirectional else 0, count),), places)
        with model.inference_mode():
            rows_TD = model.embed(spec.kind, content.to(model.device))
            state_TD = model.core(rows_TD, position_TA.to(model.device), layout, cache=self._cache)
            readout = model.readout(spec.task)
            return log_probabilities(model.packer.head(spec.task).logits(readout, state_TD, [count]))

    def _make_room(self, count: int) -> None:
        """Make the cache larger or, once it is as large as it may be, drop the tokens out of reach, for `count` more tokens."""
        while self._cache.stored(0) + count > self._cache.capacity:
            if self.reach is not None and self._cache.capacity == self._most:
                self._cache.drop(0, self._cache.stored(0) - self.reach)
                return
            # doubling, so that copying costs a constant time a token
            larger = self._new_cache(min(max(2 * self._cache.capacity, self._cache.stored(0) + count), self._most))
            larger.copy(0, 0, of=self._cache)
            self._cache = larger

    def _new_cache(self, capacity: int) -> Cache:
        model = self.model
        return model.core.core.cache(rows=1, capacity=capacity, device=model.device, dtype=model.dtype)


def _chunk(rule: Rule) -> int | None:
    """The size n of chunks such that bidirectional tokens see nothing past the end of their chunk; None: there is no known n."""
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
    """The number of tokens before and after a token from whose samples it comes, found by encoding parts of a noise.

    Raises:
        ConfigError: tokens depend on the whole sound.
    """
    third = 2 * _FARTHEST * unit  # samples
    noise_S = torch.randn(3 * third, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    # beside quiet samples, loud ones show even where the window of the spectrogram is nearly 0
    noise_S[third : 2 * third] *= 1e-4

    def changed(part_S: Tensor, skip: int) -> list[int]:
        """Indices of a part's tokens that differ from those of the whole."""
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
