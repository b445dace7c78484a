"""Trees over a tokenizer's ids, for decoding that may write nothing but given texts, or words of a list."""

from collections.abc import Iterable

from multimodal.tokenizer import Tokenizer


class Node:
    """A position in a tree of ids.

    children: the ids that may follow, each with the position after it. whole: whether a text ends here.
    """

    __slots__ = ("children", "whole")

    def __init__(self) -> None:
        self.children: dict[int, Node] = {}
        self.whole = False


def id_tree(texts: Iterable[str], tokenizer: Tokenizer) -> Node:
    """The root of a tree whose paths to whole nodes are the ids of the texts."""
    root = Node()
    for text in texts:
        node = root
        for symbol in tokenizer(text, empty=True).content.tolist():
            node = node.children.setdefault(symbol, Node())
        node.whole = True
    return root


State = tuple[Node, ...]
"""All positions that the ids so far may have led to: an id can go on with a word and also begin the next one."""


class WordTree:
    """Texts made of words with one blank character between them.

    The first word is encoded alone, every other one behind a blank character; so byte-pair tokens that begin with a blank
    character work as well as bytes.
    """

    def __init__(self, words: Iterable[str], tokenizer: Tokenizer) -> None:
        self.words = tuple(words)
        self.start: State = (id_tree(self.words, tokenizer),)
        self._next = id_tree((f" {word}" for word in self.words), tokenizer)

    def step(self, state: State, symbol: int) -> State | None:
        """The state after a symbol, or None where it may not be written."""
        inside = [node.children[symbol] for node in state if symbol in node.children]
        if symbol in self._next.children and self.word_ends(state):
            inside.append(self._next.children[symbol])
        return tuple(inside) or None

    def following(self, state: State) -> set[int]:
        """The symbols that may be written."""
        found = {symbol for node in state for symbol in node.children}
        return found | self._next.children.keys() if self.word_ends(state) else found

    def word_ends(self, state: State) -> bool:
        """Whether a word ends here."""
        return any(node.whole for node in state)
