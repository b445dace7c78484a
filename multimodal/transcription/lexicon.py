"""A list of words that alone may be written, as a tree over a tokenizer's ids."""

from collections.abc import Iterable

from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer


class State:
    """A place in the tree: which ids may follow, and whether a word ends here."""

    __slots__ = ("children", "whole")

    def __init__(self, whole: bool = False) -> None:
        self.children: dict[int, State] = {}
        self.whole = whole


class Lexicon:
    """Texts made of the given words with one blank character between them.

    The first word is spelled as the tokenizer spells it alone, every other one as it spells it behind a blank character; so
    byte-pair pieces that begin with a blank character work as well as bytes.

    Raises:
        ConfigError: no words, or a word that is empty or has a blank character in it.
    """

    def __init__(self, words: Iterable[str], tokenizer: Tokenizer) -> None:
        if isinstance(words, str):
            raise ConfigError("Lexicon: words is one text; give a list of words")
        self.words = tuple(dict.fromkeys(words))
        if not self.words:
            raise ConfigError("Lexicon: the list of words is empty, so that nothing could be written; give some words")
        self.start, self._next = State(whole=True), State()
        for word in self.words:
            if not word or word.split() != [word]:
                raise ConfigError(f"Lexicon: {word!r} is not one word; words have letters and no blank characters")
            _insert(self.start, tokenizer(word).content.tolist())
            _insert(self._next, tokenizer(" " + word).content.tolist())

    def step(self, state: State, symbol: int) -> State | None:
        """Where a symbol leads, or None where it may not be written."""
        inside = state.children.get(symbol)
        if inside is None and state.whole and state is not self.start:
            return self._next.children.get(symbol)
        return inside

    def complete(self, state: State) -> bool:
        """Whether a text may end here."""
        return state.whole


def _insert(state: State, ids: list[int]) -> None:
    for symbol in ids:
        state = state.children.setdefault(symbol, State())
    state.whole = True
