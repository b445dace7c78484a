"""Conversations: lists of turns as chat data come, with pictures and sounds in them, between the markers of a template."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from multimodal.composite import Composite
from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe

CHATML = ("<|im_start|>{role}\n", "<|im_end|>\n")
LLAMA3 = ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA = ("<start_of_turn>{role}\n", "<end_of_turn>\n")
MEDIA = {"image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio", "audio_url": "audio"}
"""By type of a part of a message, as Hugging Face's and OpenAI's data name them, the part that reads it."""


@dataclass(frozen=True)
class Chat(Composite):
    """A list of turns {"role": .., "content": ..}, up to the beginning of the assistant's next turn.

    A content is a text, or a list of parts {"type": "text", "text": ..}, {"type": "image", "image": ..}, {"type": "audio", ..},
    also in the forms "image_url" and "input_audio" of OpenAI. The kinds of the parts are those of the model by name, so that a
    pretrained text model and a tower are used as they are.

    Markers are the text kind's own tokens where it has them ("<|im_end|>"), and a content cannot hold one: its tokenizer reads
    it as plain characters, or where it cannot tell them apart the turn is refused.

    words: the name of the text kind.
    image, audio: the names of the kinds for pictures and sounds; None: there are none.
    before, after: the template: what stands before and after each turn. `CHATML`, `LLAMA3` and `GEMMA` are pairs of them.
    begin: what stands before the first turn, such as "<|begin_of_text|>".
    roles: the roles that a turn may have.
    answers: the role of those turns that a head learns and writes.
    names: (role, its name in the template), where that is another: (("assistant", "model"),), or a mapping.
    causal: always true, so that every turn of the assistant is learned in one pass.

    Examples:
        >>> kinds = {"chat": Chat(), "text": TextBytes()}
        >>> model = mm.Model(kinds, mm.Core.tiny(), ["turns:chat -> text"])
        >>> turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        >>> stream = model.pack("turns:chat -> text", [{"turns": turns}])
        >>> stream.readings["turns:chat -> text"].count  # "4" and the stop
        2
    """

    words: str = "text"
    image: str | None = None
    audio: str | None = None
    before: str = CHATML[0]
    after: str = CHATML[1]
    begin: str = ""
    roles: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")
    answers: str = "assistant"
    names: tuple[tuple[str, str], ...] = ()
    causal: bool = dataclasses.field(default=True, kw_only=True)
    marked: ClassVar[bool] = False
    said: ClassVar[str | None] = "said"

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            raise ConfigError(f"Chat: roles={self.roles!r} is one role; give a list of them, as ({self.roles!r},)")
        object.__setattr__(self, "roles", tuple(self.roles))
        named = self.names.items() if isinstance(self.names, Mapping) else self.names
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in named):
            raise ConfigError(f"Chat: names={shortened(repr(self.names), 100)} must be pairs: (role, its name)")
        object.__setattr__(self, "names", tuple((role, name) for role, name in named))
        for role, name in self.names:
            if role not in self.roles or not isinstance(name, str):
                raise ConfigError(
                    f"Chat: names has ({role!r}, {name!r}), wanted one of roles={self.roles} and a text"
                    f"{did_you_mean(str(role), self.roles)}"
                )
        for name in ("words", "image", "audio"):
            kind = getattr(self, name)
            if not isinstance(kind, str) and (kind is not None or name == "words"):
                raise ConfigError(
                    f"Chat: {name}={describe(kind)}: give the name of a kind of the model, whose tokenizer reads these parts"
                )
        if not self.causal:
            raise ConfigError(
                "Chat: causal=False would let earlier turns see later ones, and what is learned see itself; leave it out"
            )
        if not all(isinstance(text, str) for text in (self.before, self.after, self.begin)):
            raise ConfigError(
                f"Chat: before={self.before!r}, after={self.after!r} and begin={self.begin!r} must be texts; CHATML, say, has both "
                "of a turn: before=CHATML[0], after=CHATML[1]"
            )
        if "{role}" not in self.before or not self.after:
            raise ConfigError(
                f"Chat: before={self.before!r} and after={self.after!r} must hold '{{role}}', and an end of the turn"
            )
        if self.answers not in self.roles:
            raise ConfigError(f"Chat: answers={self.answers!r} is none of roles={self.roles}")

    @property
    def parts(self) -> dict[str, Tokenizer | str]:
        # two parts of one kind: the texts that are read only, and those of the assistant
        media = {name: kind for name, kind in (("image", self.image), ("audio", self.audio)) if kind is not None}
        return {"text": self.words, "said": self.words, **media}

    def opened(self, role: str) -> str:
        """What stands before a turn of this role."""
        return self.before.replace("{role}", dict(self.names).get(role, role))

    def before_answer(self, value: Any) -> tuple[Any, Any]:
        turns = self._turns(value)
        if turns[-1]["role"] != self.answers:
            return value, None
        answer = turns[-1]["content"]
        if isinstance(answer, (list, tuple)):
            contents = list(self._contents(answer, len(turns) - 1))
            if any(part != "text" for part, _ in contents):
                raise MediaError(f"Chat: turns[{len(turns) - 1}]: the answer is a text, without pictures and sounds")
            answer = "".join(text for _, text in contents)
        return turns[:-1], answer

    def pieces(self, value: Any) -> Iterator[tuple[str, Any]]:
        waiting = self.begin  # markers are joined, so that they become the tokens of one text
        for i, turn in enumerate(self._turns(value)):
            waiting += self.opened(turn["role"])
            part = "said" if turn["role"] == self.answers else "text"
            for kind, content in self._contents(turn["content"], i):
                yield "text", self._markers(waiting)
                waiting = ""
                yield (part, self._plain(content, i)) if kind == "text" else (kind, content)
            waiting += self.after
        yield "text", self._markers(waiting + self.opened(self.answers))

    def _turns(self, value: Any) -> list[Mapping[str, Any]]:
        if not isinstance(value, (list, tuple)):
            raise MediaError(
                f"Chat.encode: wanted a list of turns {{'role': .., 'content': ..}}, not {describe(value)}"
            )
        if not value:
            raise MediaError("Chat.encode: there are no turns; give one or more")
        for i, turn in enumerate(value):
            where = f"Chat.encode: turns[{i}]"
            if not isinstance(turn, Mapping) or not {"role", "content"} <= {*turn}:
                raise MediaError(f"{where}: wanted {{'role': .., 'content': ..}}, not {describe(turn)}")
            for name in turn:
                if name not in ("role", "content") and turn[name] is not None and turn[name] != []:
                    raise MediaError(f"{where}: {name!r} is not read; a turn has role and content")
            if turn["role"] not in self.roles:
                raise MediaError(
                    f"{where}: the role {turn['role']!r} is none of {', '.join(self.roles)}"
                    f"{did_you_mean(str(turn['role']), self.roles)}"
                )
            if not isinstance(turn["content"], (str, list, tuple)):
                raise MediaError(f"{where}: content is {describe(turn['content'])}, wanted a text or a list of parts")
        return list(value)

    def _contents(self, content: Any, number: int) -> Iterator[tuple[str, Any]]:
        """("text", text) or (kind of medium, value) of each part of a content, neighbouring texts as one."""
        text = ""
        for i, part in enumerate([content] if isinstance(content, str) else content):
            where = f"Chat.encode: turns[{number}].content[{i}]"
            if isinstance(part, str):
                text += part
                continue
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text += part["text"]
                continue
            name = MEDIA.get(kind) if isinstance(kind, str) else None
            if name is None:
                raise MediaError(
                    f"{where}: wanted a part with a type of text, {', '.join(MEDIA)}, and its value, not {describe(part)}"
                )
            if name not in self.parts:
                raise MediaError(
                    f"{where}: this chat has no {name}; name the kind that reads it, as Chat({name}='{name}')"
                )
            if text:
                yield "text", text
                text = ""
            yield name, _medium(part, kind, where)
        if text:
            yield "text", text

    def _text(self, specials: bool) -> Tokenizer:
        """The text kind, which reads markers as its own tokens, or as the characters they consist of."""
        tokenizer: Any = self.resolved()["text"].written
        if getattr(tokenizer, "specials", None) is (not specials):
            tokenizer = dataclasses.replace(tokenizer, specials=specials)
        return tokenizer

    def _markers(self, text: str) -> Tokens:
        """The tokens of markers, which are the text kind's own tokens where it has them."""
        return self._text(specials=True)(text, empty=True)

    def _marks(self) -> list[str]:
        """What a content must not hold: with it, a text could end its turn and begin one of another role."""
        head = self.before.split("{role}")[0].strip()
        marks = [head, self.after.strip(), self.begin.strip()]
        if not head:  # then only the end of a turn and the name of a role behind it mark a beginning
            marks += [(self.after + self.opened(role)).rstrip() for role in self.roles]
        return [mark for mark in dict.fromkeys(marks) if mark]

    def _plain(self, text: str, number: int) -> Tokens:
        """The tokens of a content, in which nothing is a marker."""
        tokenizer = self._text(specials=False)
        tokens = tokenizer(text, empty=True)
        ids, shown = {*tokens.content.tolist()}, None
        for mark in self._marks():
            plain = tokenizer(mark).content.tolist()
            own = {*self._markers(mark).content.tolist()} - {*plain}
            if not own and shown is None:  # a file may change texts, into one with a marker too
                shown = tokenizer.decode(tokens) if tokenizer.decodes else text
            if own & ids or (not own and (mark in text or mark in (shown or ""))):
                raise MediaError(
                    f"Chat.encode: turns[{number}]: the content holds the marker {mark!r}, which {type(tokenizer).__name__} "
                    "cannot tell from a real one; take it out, or choose another template"
                )
        return tokens


def _medium(part: Mapping[str, Any], kind: Any, where: str) -> Any:
    """The value of a picture or a sound in any of the usual forms."""
    found: Any = part.get(kind)
    if isinstance(found, Mapping) and isinstance(found.get("url"), str):  # OpenAI's image_url
        return found["url"]
    if kind == "input_audio" and isinstance(found, Mapping) and isinstance(found.get("data"), str):
        return f"data:audio/{found.get('format', 'wav')};base64,{found['data']}"
    for name in (kind, "path", "url", "base64"):
        if part.get(name) is not None:
            return f"data:;base64,{part[name]}" if name == "base64" else part[name]
    raise MediaError(f"{where}: a part of type {kind!r} needs its value, as {{'type': {kind!r}, {kind!r}: ..}}")


def in_turns(messages: Sequence[Mapping[str, Any]], images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Turns in which parts {"type": "image"} without a value have those of `images`, in order, as data sets keep them apart.

    Raises:
        MediaError: there are more or fewer images than such parts.
    """
    left, turns = list(reversed(images)), []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [_filled(part, left) for part in content]
        turns.append({**message, "content": content})
    if left:
        raise MediaError(f"in_turns: {len(left)} of {len(images)} images are named by no turn")
    return turns


def _filled(part: Any, left: list[Any]) -> Any:
    """A part; one of an image without a value with the last of those that are left."""
    # tables give all parts the same keys, with None where a part has no value
    if not isinstance(part, Mapping) or {k: x for k, x in part.items() if x is not None} != {"type": "image"}:
        return part
    if not left:
        raise MediaError("in_turns: the turns name more images than were given")
    return {"type": "image", "image": left.pop()}
