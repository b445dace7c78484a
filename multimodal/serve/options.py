"""Turns parameters of a request into options of `Model.generate`."""

import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from multimodal.generate import Repetition
from multimodal.generate.beams import MOST_LENGTH_PENALTY
from multimodal.generate.samplers import combined_sampler
from multimodal.model import Model
from multimodal.serve.bodies import Params
from multimodal.serve.errors import REFUSED, bad
from multimodal.texts import shortened

MOST_STOPS, MOST_LETTERS = 16, 20_000  # stop strings; characters of all `only` words, or of all `one_of` answers
NOTHING = {"n": (1,), "temperature": (0, 0.0), "top_p": (1, 1.0), "presence_penalty": (0, 0.0)} | {
    "frequency_penalty": (0, 0.0),
    "beams": (1,),
}
"""{parameter: values that have no effect}."""
SAMPLERS = {"TopP": "top_p", "TopK": "top_k", "MinP": "min_p", "Repetition": "repetition", "NoRepeat": "no_repeat"} | {
    "rows at once": "beams"
}
"""By words of errors, such as the class of a sampler, the parameter that asks for it."""
OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "beams", "length_penalty", "guidance", "stop", "begin"),
    *("seed", "no_repeat", "repetition", "presence_penalty", "frequency_penalty", "only", "one_of", "n"),
)


@dataclass(frozen=True)
class WritingOptions:
    """How the answers of a request are generated.

    options: of `Model.generate`, without the seed.
    max_tokens: None: the client sets no limit.
    seeds: one for each answer. drawn: whether the answers depend on the seeds.
    sent: the names of the parameters that the client sent.
    """

    options: dict[str, Any]
    max_tokens: int | None
    seeds: tuple[int, ...]
    drawn: bool
    sent: frozenset[str] = frozenset()


def writing_options(params: Params, model: Model, task: str, most_answers: int) -> WritingOptions:
    """Take the options of generation from the parameters. most_answers: the largest allowed `n`.

    Raises:
        ApiError: an option has a wrong type or value.
        ConfigError: options contradict one another or the task, or have no effect.
    """
    head, tokenizer = model.packer.heads[task], model.packer.answer_tokenizers[task]
    max_tokens = params.whole("max_tokens", low=1)
    temperature = params.number("temperature", low=0)
    top_p = params.number("top_p")
    presence, frequency = params.number("presence_penalty", 0.0), params.number("frequency_penalty", 0.0)
    penalty = params.number("repetition")
    if penalty is not None and (presence or frequency):
        raise bad(
            "repetition and presence_penalty or frequency_penalty both penalise repeated tokens; give one", "repetition"
        )
    if penalty is not None:
        repetition = Repetition(penalty)
    else:
        repetition = Repetition(presence, frequency, last=0) if presence or frequency else None
    only, one_of = (_words(params, name, tokenizer, task) for name in ("only", "one_of"))
    if only and one_of:
        raise bad("only lists words and one_of whole answers; give one of them", "only")
    beams = params.whole("beams", 1, low=1)
    with option_named(params.sent):
        sampler = combined_sampler(
            repetition=repetition,
            no_repeat=params.whole("no_repeat", low=1),
            only=only,
            one_of=one_of,
            temperature=temperature,
            top_k=params.whole("top_k", low=1),
            top_p=None if top_p == 1 else top_p,
            min_p=params.number("min_p"),
            beams=beams,
        )
    stop = params.texts("stop")
    if len(stop) > MOST_STOPS or sum(map(len, stop)) > MOST_LETTERS:
        raise bad(
            f"stop has {len(stop)} texts of {sum(map(len, stop))} characters; give at most {MOST_STOPS} texts", "stop"
        )
    begin = params.text("begin")
    if begin and not tokenizer.text:
        raise bad(f"begin is a text, and task {task!r} writes no text", "begin")
    options = {
        "sampler": sampler,
        "temperature": temperature if sampler is None else None,
        "beams": beams,
        "length_penalty": params.number("length_penalty", 1.0, -MOST_LENGTH_PENALTY, MOST_LENGTH_PENALTY),
        "guidance": params.number("guidance", 1.0),
        "stop": stop,
        "begin": begin or None,
    }
    drawn = head.draws_features or bool(temperature) or (sampler is not None and sampler.draws)
    seed, count = params.whole("seed", low=0), params.whole("n", 1, low=1, high=most_answers)
    if count > 1 and not drawn:
        raise bad(f"n={count}: nothing is sampled, so all answers would be the same; give a temperature", "n")
    first = seed if seed is not None else secrets.randbelow(2**31) if drawn else 0
    return WritingOptions(options, max_tokens, tuple((first + i) % 2**63 for i in range(count)), drawn, params.sent)


@contextmanager
def option_named(sent: Collection[str]) -> Iterator[None]:
    """What is refused inside names the parameter that its message speaks of, if the client sent it."""
    try:
        yield
    except REFUSED as error:
        text = str(error)
        words = {**{name: name for name in OPTIONS}, **SAMPLERS}
        matches = ((re.search(rf"\b{word}\b", text), name) for word, name in words.items() if name in sent)
        found = [(match.start(), name) for match, name in matches if match]
        raise bad(shortened(text, 1000), min(found)[1] if found else None) from error


def refuse_options(params: Params, task: str) -> None:
    """Raise an error if options of generation are given for a task that answers in one pass."""
    why = f"task {task!r} answers at once, not token by token"
    params.without(why, **{name: NOTHING.get(name, ()) for name in OPTIONS})


def _words(params: Params, name: str, tokenizer: Any, task: str) -> tuple[str, ...]:
    """A parameter that lists words or answers, each checked by the tokenizer."""
    words = params.texts(name)
    if sum(map(len, words)) > MOST_LETTERS:
        raise bad(f"{name} has more than {MOST_LETTERS} characters", name)
    for word in words if tokenizer.text or tokenizer.classes else ():
        try:
            tokenizer(word)
        except ValueError as error:
            raise bad(f"{name} {shortened(repr(word), 60)}: {shortened(error, 500)}", name) from None
    if words and not (tokenizer.text or tokenizer.classes):
        raise bad(f"{name} lists texts, and task {task!r} writes none", name)
    return words
