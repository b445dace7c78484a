"""A request: one answer while it is written, from its options to its prediction."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from multimodal.generate.beams import MOST_BEAMS, MOST_LENGTH_PENALTY, Beams
from multimodal.generate.ctc_prefix import CTCPrefixScores
from multimodal.generate.detokenizer import Detokenizer
from multimodal.generate.lookup import Lookup
from multimodal.generate.prefix import CachedPrefix
from multimodal.generate.samplers import AtLeast, Forbid, Greedy, Sampler, Temperature, Written
from multimodal.heads import CTC, Head, Prediction
from multimodal.heads.base import EncodedSample, encode_field
from multimodal.packer import Packer
from multimodal.positions import in_steps, on_axes, only_time
from multimodal.shapes import ConfigError, StreamError, check_number, check_seed, check_whole, did_you_mean
from multimodal.tokenizer import Tokens, no_tokens, with_next, written_tokens

MOST_LOOKUP = 64  # tokens; a pass of more costs more than one token on any machine
Copies = list[tuple[int, int, int]]  # (source, target, from which token on) among an answer's rows


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an answer is written; `Model.generate` documents each."""

    max_tokens: int = 256
    sampler: Sampler | None = None
    temperature: float | None = None
    beams: int = 1
    ctc: tuple[str, float] | None = None
    length_penalty: float = 1.0
    guidance: float = 1.0
    stop: Sequence[str] = ()
    begin: Any = None
    seed: int = 0
    lookup: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.begin, str) and not self.begin:
            object.__setattr__(self, "begin", None)  # nothing is there to begin with
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_whole("generate", max_tokens=self.max_tokens, beams=self.beams, lookup=self.lookup)
        check_number("generate", guidance=self.guidance, length_penalty=self.length_penalty)
        check_seed("generate", self.seed)
        if self.temperature is not None:
            check_number("generate", temperature=self.temperature)
        if self.max_tokens < 1 or self.beams < 1:
            raise ConfigError(f"generate: max_tokens={self.max_tokens} and beams={self.beams} must be at least 1")
        if self.beams > MOST_BEAMS:
            raise ConfigError(
                f"generate: beams={self.beams} are more than {MOST_BEAMS}, each of which is a row of memory and of every pass; "
                "use fewer: more than some tens hardly find another answer"
            )
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"generate: temperature={self.temperature} must be at least 0")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"generate: guidance={self.guidance} must be a finite number")
        if not abs(self.length_penalty) <= MOST_LENGTH_PENALTY:
            raise ConfigError(
                f"generate: length_penalty={self.length_penalty} must be from -{MOST_LENGTH_PENALTY} to {MOST_LENGTH_PENALTY}"
            )
        if self.ctc is not None:
            self._check_ctc(self.ctc)
        if self.sampler is not None and not isinstance(self.sampler, Sampler):
            raise ConfigError(f"generate: sampler={self.sampler!r} is no Sampler; give for instance TopP(0.9)")
        if self.sampler is not None and self.temperature is not None:
            raise ConfigError(
                f"generate: give temperature={self.temperature} or a sampler, not both; TopP and MinP take one"
            )
        if not isinstance(self.stop, (list, tuple)) or not all(isinstance(text, str) for text in self.stop):
            raise ConfigError(f"generate: stop={self.stop!r} must be a text, or a list of texts")
        if any(not text for text in self.stop):
            raise ConfigError("generate: a stop string is empty")
        if self.beams == 1 and self.length_penalty != 1.0:
            raise ConfigError(
                f"generate: length_penalty={self.length_penalty} ranks beams, and there is one only; give beams too, "
                "or leave it out"
            )
        if self.beams > 1 and self.guidance != 1.0:
            raise ConfigError(f"generate: beams={self.beams} with guidance={self.guidance}; use one of them")
        if not 0 <= self.lookup <= MOST_LOOKUP:
            raise ConfigError(
                f"generate: lookup={self.lookup} must be from 0 to {MOST_LOOKUP}, the most tokens guessed at once"
            )
        for name, value in {"beams": self.beams, "guidance": self.guidance}.items():
            if self.lookup and value != 1:
                raise ConfigError(
                    f"generate: lookup={self.lookup} with {name}={value}, which has several rows; use one of them"
                )
        if self.beams > 1 and self.stop:
            raise ConfigError(f"generate: beams={self.beams} with stop={self.stop!r}; use one of them")
        if self.beams > 1 and (self.temperature or (self.sampler is not None and self.sampler.draws)):
            what = "a temperature" if self.sampler is None else str(self.sampler)
            raise ConfigError(
                f"generate: beams={self.beams} look for the likeliest answer; {what} has no meaning there"
            )
        for part in self.sampler.parts() if self.sampler is not None and self.beams > 1 else ():
            if type(part) is Greedy:
                raise ConfigError(
                    f"generate: beams={self.beams} with {part}, which leaves each of them one way on; use one of them"
                )
            if part.reweighs:
                raise ConfigError(
                    f"generate: beams={self.beams} rank by the model's own log-probabilities, which {part} does not change; "
                    "use a rule that rules tokens out, such as NoRepeat(3)"
                )

    def _check_ctc(self, given: Any) -> None:
        if not isinstance(given, (tuple, list)) or len(given) != 2 or not isinstance(given[0], str):
            raise ConfigError(f"generate: ctc={given!r} must be a task and its weight, such as ('audio -> text', 0.3)")
        check_number("generate", ctc=given[1])
        if not 0 < given[1] < 1:
            raise ConfigError(
                f"generate: ctc={given!r} has a weight of {given[1]}, which must lie between 0 and 1; leave it out for 0, and call "
                f"predict({given[0]!r}) or transcribe with a Beam for 1"
            )
        if self.beams == 1:
            raise ConfigError(f"generate: ctc={given!r} ranks beams, and there is one only; give beams too")

    @cached_property
    def rule(self) -> Sampler:
        """The sampler in force."""
        if self.sampler is not None:
            return self.sampler
        if self.beams > 1:
            return Temperature(1.0)  # leaves everything as it is
        return Temperature(self.temperature) if self.temperature else Greedy()


class Request:
    """The state of one request; the engine gives it rows and states, it gives back what to feed next."""

    def __init__(
        self,
        task: str,
        sample: EncodedSample,
        name: str,
        options: Options,
        packer: Packer,
        prefix: CachedPrefix | None,
    ) -> None:
        self.ticket = -1  # until it is entered
        self.task, self.name, self.options, self.prefix = task, name, options, prefix
        self.head: Head = packer.heads[task]
        self.pattern = sample.pattern
        assert self.pattern.written is not None
        self.kind = self.pattern.written.kind
        self.tokenizer = sample.tokenizer
        self.tokens = sample.tokens
        # a pointer chooses among tokens that were read, by their number; any other head chooses ids of its kind
        self.source = self.head.source(sample)
        self.source_MD = torch.empty(0)  # the states of these, after the prefill
        self.begin: Tokens | None = None
        if options.begin is not None:
            self.begin = encode_field(self.tokenizer, options.begin, sample.where, "begin")
        self.start_count = len(sample.start.tokens)
        self.begin_count = count = 0 if self.begin is None else len(self.begin)
        self.begin_ids: list[int] = []
        if self.begin is not None:
            self.begin_ids = self._choices(self.begin)
        if (
            self.begin is not None
            and self.source is None
            and not torch.allclose(
                self.begin.position_NA, written_tokens(self.tokenizer, self.begin.content).position_NA, atol=1e-4
            )
        ):
            raise ConfigError(
                f"{name} of task {task!r}: begin is at other positions than the first {count} tokens of what is written; "
                "give its first part in full width"
            )
        self.limit = options.max_tokens if self.tokenizer.length is None else self.tokenizer.length - count
        self.prompt = self.read_count + len(sample.start.tokens) + count
        self.guided = options.guidance != 1.0
        # what is read: the sample, and with guidance one more of which nothing is read
        self.prompts = [self.tokens, dict.fromkeys(self.tokens)] if self.guided else [self.tokens]
        self.width = options.beams * (2 if self.guided else 1)
        self._check()
        if options.ctc is not None:
            self._check_ctc(packer, options.ctc[0])
        self.ctc: CTCPrefixScores | None = None  # after the prefill
        self.fixed = None if self.tokenizer.length is None else self.limit  # tokens to write, where the kind says
        # the number of logits to choose from, and the id among them that ends the answer
        self.choices, self.stop = 0, -1
        if not self.head.draws_features:
            more = 0 if self.source is None else len(self.source)
            self.choices = self.head.vocab(self.tokenizer) + more
            self.stop = self.head.stop(self.tokenizer) + more
        forbidden = self.head.forbidden()
        self.rule = Forbid(*forbidden) | options.rule if any(forbidden) else options.rule
        self.rule_key: Any = self.rule
        try:
            hash(self.rule)
        except TypeError:  # a sampler with a list in it
            self.rule_key = id(options.rule)
        self.ids: list[int] = []
        self.features: list[Tensor] = []
        self.log_p = 0.0
        self.ended = ""
        self.error: Exception | None = None
        self.random = torch.Generator().manual_seed(options.seed)
        self.beams = Beams(options.beams, options.length_penalty, self.limit) if options.beams > 1 else None
        # what each row of the cache holds of the answer
        self.hypotheses: list[list[int]] = [[] for _ in range(options.beams)]
        self.live_rows = [0]  # the row of each live hypothesis
        self.detokenizer = (
            Detokenizer(self.tokenizer, options.stop) if self.tokenizer.text and self.beams is None else None
        )
        self.pending_text = ""
        if self.detokenizer is not None and self.begin is not None:
            self.pending_text = self.detokenizer.push(self.begin.content.tolist())
            if self.detokenizer.stopped:
                raise ConfigError(f"{name} of task {task!r}: begin already holds one of stop={options.stop!r}")
        self.rows: list[int] = []
        # whose cache holds the first tokens of this prompt too, and how many
        self.shared: tuple[Request, int] | None = None
        self.cached = 0  # tokens of the prompt in the cache
        self.axes = packer.axes
        # by row, the tokens so far with those of `begin`, where contents say where the next one stands; else positions are counted
        self.so_far: list[Tokens] | None = None
        if self.source is None and self.tokenizer.placed_by_content:
            self.so_far = [no_tokens(self.tokenizer) if self.begin is None else self.begin] * options.beams
        counted = self.source is None and self.so_far is None
        self.place_NA = self.tokenizer.places(count) if counted else torch.empty(0, len(self.tokenizer.axes))
        self.lookup = Lookup([*self._read_ids(), *self.begin_ids], options.lookup) if options.lookup else None
        self.after: list[Tensor] = []  # of each prompt, the time from which the answer's places count
        self.segments: list[int] = []

    def _check(self) -> None:
        options, where = self.options, f"{self.name} of task {self.task!r}"
        self.head.check_decoding(where, options, self.prefix)
        if options.guidance != 1.0 and self.prefix is not None:
            raise ConfigError(
                f"{where}: guidance needs the task's fields themselves, not a prefix that was read before"
            )
        if options.guidance != 1.0 and not self.pattern.reads:
            raise ConfigError(
                f"{where}: guidance={options.guidance} pushes away from what is written if nothing is read, but this task reads "
                "nothing; leave it out"
            )
        if self.tokenizer.length is not None and options.length_penalty != 1.0:
            raise ConfigError(
                f"{where}: every {self.kind!r} has {self.tokenizer.length} tokens, so length_penalty={options.length_penalty} "
                "ranks nothing; leave it out"
            )
        for part in options.rule.parts():
            if isinstance(part, AtLeast) and self.tokenizer.length is not None:
                raise ConfigError(
                    f"{where}: every {self.kind!r} has {self.tokenizer.length} tokens, so {part} changes nothing; leave it out"
                )
        if options.lookup and (self.head.draws_features or self.source is not None or self.tokenizer.placed_by_content):
            raise ConfigError(
                f"{where}: lookup={options.lookup} guesses ids, but what is written here are features, pointers, or ids that say "
                "where the next one stands; leave it out"
            )
        if options.stop and not self.tokenizer.text:
            raise ConfigError(f"{where}: stop strings need a kind that is text, and {self.kind!r} is not")
        if self.limit < 1:
            raise StreamError(
                f"{where}: begin has {self.begin_count} tokens, but a value of {self.kind!r} has {self.tokenizer.length}; "
                "begin with fewer"
            )

    def _check_ctc(self, packer: Packer, task: str) -> None:
        """Raise an error unless this CTC task reads what this request reads, and writes the same symbols."""
        where = f"{self.name} of task {self.task!r}"
        packer.check_task(task)
        head, pattern = packer.heads[task], packer.patterns[task]
        if not isinstance(head, CTC):
            raise ConfigError(
                f"{where}: ctc names {task!r}, which answers by {type(head).__name__}; name a task with the head CTC()"
            )
        ours, theirs = ([(field.name, field.kind) for field in p.reads] for p in (self.pattern, pattern))
        if ours != theirs:
            raise ConfigError(
                f"{where}: ctc names {task!r}, which reads other fields; both must read the same ones, in the same order, since "
                "they are read once for both"
            )
        if self.source is not None or self.head.draws_features or packer.answer_tokenizers[task] != self.tokenizer:
            raise ConfigError(
                f"{where}: ctc names {task!r}, which writes other symbols than {self.kind!r}; both must write one kind"
            )
        if self.prefix is not None:
            raise ConfigError(
                f"{where}: ctc needs the states of what is read, which a prefix does not keep; leave one out"
            )

    def _read_ids(self) -> list[int]:
        """The ids that were read, of any kind: they only serve guesses."""
        found: list[int] = []
        for tokens in self.tokens.values():
            if tokens is not None and not tokens.content.is_floating_point() and tokens.content.dim() == 1:
                found += tokens.content.tolist()
        return found

    def guess(self) -> list[int]:
        """Ids that may be written next; each is one that can be embedded."""
        if self.lookup is None or self.ended:
            return []
        found = self.lookup.guess(self.limit - self.count)
        usable = self.tokenizer.vocab_size or 0
        return list(takewhile(lambda token: token < usable and token != self.stop, found))

    @property
    def read_count(self) -> int:
        """Number of tokens that are read."""
        return sum(len(tokens) for tokens in self.tokens.values() if tokens is not None)

    @property
    def count(self) -> int:
        """Number of tokens written, without those of `begin`."""
        if self.beams is not None:
            return len(self.beams.live[0])
        return len(self.features) if self.head.draws_features else len(self.ids)

    def start(self, query_A: Tensor, segment: int) -> None:
        """Called after the prefill for each prompt, with the position of its start and the number of the written field."""
        self.after.append(only_time(query_A + 1))
        self.segments.append(segment)

    def start_ctc(self, log_p_NV: Tensor) -> None:
        """Called after the prefill with the log-probabilities of the CTC task's rows."""
        self.ctc = CTCPrefixScores(log_p_NV)
        for symbol in self.begin_ids:
            self.ctc.extend([0], [symbol])

    def joint(self, log_p_BV: Tensor) -> Tensor:
        """Log-probabilities of the live hypotheses' next tokens, with those of the CTC task if there is one, by their weights."""
        if self.ctc is None or self.options.ctc is None:
            return log_p_BV
        weight = self.options.ctc[1]
        return (1 - weight) * log_p_BV.double() + weight * self.ctc.next_nats(self.choices, self.stop)

    def written(self, rows: int) -> list[Written]:
        """What samplers may know of each row."""
        return [Written(ids, self.tokenizer, self.stop) for ids in self.ids_by_row(rows)]

    def ids_by_row(self, rows: int) -> list[list[int]]:
        """The ids written by each row, those of `begin` first."""
        ids = self.hypotheses[:rows] if self.beams is not None else [self.ids]
        return [self.begin_ids + part for part in ids]

    def _choices(self, tokens: Tokens) -> list[int]:
        """Tokens as they are chosen: by their ids, or by their number among those read."""
        try:
            return self.head.choices(tokens, self.source)
        except StreamError as error:
            raise StreamError(f"{self.name} of task {self.task!r}, begin: {error}") from None

    def content(self, ids: Sequence[int]) -> Tensor:
        """Content of the tokens that were chosen."""
        chosen = torch.tensor(ids, dtype=torch.long)
        return chosen if self.source is None else self.source.content[chosen]

    def take(self, token: int, log_p: float) -> None:
        """Write this token, or end with it."""
        if token == self.stop:
            self.log_p += log_p
            self.ended = "stop"
            return
        if len(self.ids) == self.limit:
            self.ended = "max_tokens"
            return
        self.log_p += log_p
        self.ids.append(token)
        if self.lookup is not None:
            self.lookup.push(token)
        if self.so_far is not None:
            self.so_far = [with_next(self.tokenizer, self.so_far[0], self.content([token]))]
        if self.detokenizer is not None:
            self.pending_text += self.detokenizer.push(self.content([token]).tolist())
            if self.detokenizer.stopped:
                self.ended = "stop string"
        if not self.ended and len(self.ids) == self.fixed:
            self.ended = "length"

    def take_features(self, features_NF: Tensor) -> None:
        """Write a token with these features, as a head has drawn them."""
        if self.so_far is not None:
            self.so_far = [with_next(self.tokenizer, self.so_far[0], features_NF)]
            self.features.append(self.so_far[0].content[-1:])
        else:
            at = self.begin_count + self.count
            self.features.append(self.tokenizer.fed_back(features_NF, self.placed(at + 1)[at:]))

    def take_hypotheses(self, hypotheses: list[list[int]]) -> None:
        """Let each row of the cache hold another hypothesis, which is that of some row before and one more token."""
        if self.so_far is not None:
            before = {tuple(ids): tokens for ids, tokens in zip(self.hypotheses, self.so_far, strict=True)}
            self.so_far = [
                with_next(self.tokenizer, before[tuple(ids[:-1])], self.content(ids[-1:])) for ids in hypotheses
            ]
        self.hypotheses = hypotheses

    def ahead(self, most: int) -> Tensor:
        """Positions (N, rows, A) in steps of the newest tokens and of those after them: at most `most`, as far as known."""
        after_BA = torch.stack([self.after[i if i < len(self.after) else 0] for i in range(self.width)])
        if self.source is not None:
            place_NBA = self.source.position_NA[self.newest_ids()][None]
        elif self.so_far is not None:
            place_NBA = torch.stack([tokens.position_NA[-1] for tokens in self.so_far])[None]
        else:
            first = self.begin_count + self.count - 1
            place_NBA = self.placed(min(first + most, self.begin_count + self.limit))[first:, None]
        place_NBA = on_axes(in_steps(place_NBA, self.tokenizer.step), self.tokenizer.axes, self.axes)
        return after_BA + place_NBA.to(after_BA.device)

    def placed(self, count: int) -> Tensor:
        """Positions (count, A) of the first tokens, from those of `begin` on; made in growing parts, as max_tokens may be vast."""
        if count > len(self.place_NA):
            self.place_NA = self.tokenizer.places(min(self.begin_count + self.limit, max(64, 2 * count)))
        return self.place_NA[:count]

    def newest(self) -> Tensor:
        """Content of the newest tokens, one a row."""
        if self.head.draws_features:
            return self.features[-1].expand(self.width, -1)
        return self.content(self.newest_ids())

    def newest_ids(self) -> list[int]:
        """Ids of the newest tokens, one a row; of a pointer, their numbers among the tokens read."""
        if self.beams is not None:
            return [ids[-1] for ids in self.hypotheses]
        return self.ids[-1:] * self.width

    def new_text(self) -> str:
        """Text that has become final since the last call."""
        if self.beams is not None and self.tokenizer.text and self.ended:
            best = self.prediction()
            return "" if best is None else best.value
        if self.detokenizer is None or self.error:
            return ""
        text, self.pending_text = self.pending_text, ""
        return text + (self.detokenizer.finish() if self.ended else "")

    def prediction(self) -> Prediction | None:
        """The whole answer, once it has ended; plain tensors, whatever mode the model runs in."""
        if not self.ended or self.error:
            return None
        with torch.inference_mode(False), torch.no_grad():
            if self.beams is None:
                return self._prediction(self.ids, self.log_p, self.ended)
            cut = "max_tokens" if self.fixed is None else "length"
            found = [self._prediction(ids, log_p, "stop" if own else cut) for ids, log_p, own in self.beams.found()]
            return dataclasses.replace(found[0], others=tuple(found[1:]))

    def _prediction(self, ids: list[int], log_p: float, ended: str) -> Prediction:
        content = torch.cat(self.features) if self.head.draws_features and self.features else self.content(ids)
        if self.head.draws_features and not self.features:
            content = torch.zeros(0, self.tokenizer.feature_size or 0)
        if self.begin is not None:
            content = torch.cat([self.begin.content, content])
        if self.source is not None:
            tokens = Tokens(content, self.source.position_NA[self.begin_ids + ids])
        elif self.so_far is None:
            tokens = Tokens(content, self.placed(len(content)))
        elif self.beams is None:
            tokens = Tokens(content, self.so_far[0].position_NA.clone())  # which is no inference tensor
        else:
            tokens = written_tokens(self.tokenizer, content)
        # beams have no detokenizer: their text may change until the end
        value = self.tokenizer.decode(tokens) if self.detokenizer is None else self.detokenizer.text
        return Prediction(value, math.exp(log_p), ended=ended, tokens=tokens)


def new_request(
    packer: Packer,
    task: str,
    sample: Mapping[str, Any],
    name: str,
    prefix: CachedPrefix | None,
    options: Mapping[str, Any],
) -> Request:
    """Check and encode what is asked for."""
    packer.check_task(task, answers=True)
    if not packer.heads[task].autoregressive:
        raise ConfigError(f"task {task!r}: {type(packer.heads[task]).__name__} answers at once; use Model.predict")
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
    sample = packer.completed(task, sample, answers=False)
    packer.patterns[task].check_sample(sample, False)
    known = [field.name for field in dataclasses.fields(Options)]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{name} of task {task!r}: {option!r} is neither a field that it reads nor an option of writing"
                + did_you_mean(option, [*known, *sample])
            )
    return Request(task, packer.encoded(task, sample, name), name, Options(**options), packer, prefix)
