"""Relations between tokens: the table of related pairs of a stream, in which rules and priors look pairs up.

Tokens.pairs of each value --Packer--> Links of the stream --Linked, Related--> which relations one pair has

The table has a line for each related pair and none for the others, so its size does not depend on the square of the tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.declare import parts_within
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class PairTable:
    """Which tokens are related, and how: for each query its keys, in ascending order, so that a pair is found by bisection.

    Tokens that occur in a pair are numbered from 1; all others have the number 0.

    names: the relations of the model.
    start: by number of a query, the index of its first key.
    key: the numbers of the keys of all queries, end to end, and a last entry -1.
    which: by pair, the row of `sets` that holds its relations.
    sets: the sets of relations that occur, (S, R) bool; row 0 is the empty one.
    steps: the number of bisections for the query with the most keys.
    """

    names: tuple[str, ...]
    start: Tensor
    key: Tensor
    which: Tensor
    sets: Tensor
    steps: int

    def is_consistent(self, tokens: int) -> bool:
        """Whether every index of the table is within it, for tokens that are numbered up to `tokens`."""
        start, pairs = self.start.long(), len(self.key) - 1
        return (
            0 <= tokens < len(start) - 1
            and bool((start.diff() >= 0).all())
            and int(start[0]) == 0
            and int(start[-1]) == pairs
            and len(self.which) == pairs + 1
            and 0 <= int(self.which.min()) <= int(self.which.max()) < len(self.sets)
            and self.sets.shape[1:] == (len(self.names),)
            and self.steps == int(start.diff().max()).bit_length()
        )


@dataclass(frozen=True)
class Links:
    """The relations of some tokens.

    number: of each token, in the table; of any shape.
    table: the related pairs of the whole stream.
    """

    number: Tensor
    table: PairTable

    def __getitem__(self, index: Any) -> "Links":
        return Links(self.number[index], self.table)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Links":
        """The same tokens in another shape."""
        return Links(change(self.number), self.table)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Links":
        """The same, with every tensor moved to a device."""
        tensors = {name: move(x) for name, x in vars(self.table).items() if isinstance(x, Tensor)}
        return Links(move(self.number), replace(self.table, **tensors))

    def relation(self, key: "Links") -> Tensor:
        """The set of relations of each pair of these queries and a key, as a row of the table's `sets`; elementwise.

        There is no branch on values, so that FlexAttention compiles it.
        """
        table, wanted = self.table, key.number
        low, stop = table.start[self.number], table.start[self.number + 1]
        high = stop
        for _ in range(table.steps):
            middle = (low + high) // 2
            before = (table.key[middle] < wanted) & (low < high)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        found = (low < stop) & (table.key[low] == wanted)
        return torch.where(found, table.which[low], 0)

    def has_any(self, key: "Links", names: Iterable[str]) -> Tensor:
        """Whether each pair of these queries and a key has one of these relations; elementwise."""
        relation = self.relation(key)
        found = torch.zeros_like(relation, dtype=torch.bool)
        for name in names:
            if name in self.table.names:
                found = found | self.table.sets[:, self.table.names.index(name)][relation]
        return found

    def sets_of(self, names: tuple[str, ...]) -> Tensor:
        """Whether each set has each of these relations, (S, R) bool; False for relations that are not in the table."""
        return F.pad(self.table.sets, (0, 1))[:, _columns(self.table.names, names)]


@lru_cache(256)
def _columns(known: tuple[str, ...], names: tuple[str, ...]) -> list[int]:
    """The index of each name among those that are known; -1: it is not among them."""
    return [known.index(name) if name in known else -1 for name in names]


def linked(pairs: Tensor, rows: int, names: tuple[str, ...]) -> Links:
    """The relations of a stream of `rows` tokens.

    pairs: (E, 3) row of the query, row of the key, number of the relation among `names`; in any order, also several times.
    """
    takes_part = torch.zeros(rows, dtype=torch.bool)
    takes_part[pairs[:, :2].flatten()] = True
    number_T = torch.where(takes_part, takes_part.cumsum(0), 0)
    base, count = int(number_T.max()) + 1, len(names)
    query, key = number_T[pairs[:, 0]], number_T[pairs[:, 1]]
    triple = torch.unique((query * base + key) * count + pairs[:, 2])  # ascending by query, then by key
    pair, inverse, sizes = torch.unique_consecutive(triple // count, return_inverse=True, return_counts=True)
    relation = triple % count

    # row 0 is the empty set, then come the sets of one relation; few pairs have several
    sets = torch.cat([torch.zeros(1, count), torch.eye(count)]).bool()
    which = torch.zeros(len(pair), dtype=torch.long).scatter_(0, inverse, relation + 1)
    several = sizes > 1
    if bool(several.any()):
        place = several.cumsum(0) - 1
        among = several[inverse]
        rows_of = torch.zeros(int(several.sum()), count, dtype=torch.bool)
        rows_of[place[inverse[among]], relation[among]] = True
        extra, row = torch.unique(rows_of, dim=0, return_inverse=True)
        which[several] = len(sets) + row
        sets = torch.cat([sets, extra])

    keys_of = torch.bincount(pair // base, minlength=base)
    start = torch.cat([torch.zeros(1, dtype=torch.long), keys_of.cumsum(0)])
    none = torch.tensor([-1])
    table = PairTable(
        names,
        start.int(),
        torch.cat([pair % base, none]).int(),
        torch.cat([which, none + 1]).int(),
        sets,
        int(keys_of.max()).bit_length(),
    )
    return Links(number_T.int(), table)


def named_relations(part: Any) -> tuple[str, ...]:
    """The relations that the rules and priors within a declaration name, such as those of a core."""
    readers = (one for one in parts_within(part) if isinstance(one, ReadsRelations))
    return tuple(dict.fromkeys(name for one in readers for name in one.relations))


class ReadsRelations:
    """Base of the rules and priors that name relations.

    relations: the names of the relations, as a tokenizer of the model declares them.
    """

    relations: tuple[str, ...]

    def __init__(self, *names: str, relations: Iterable[str] = ()) -> None:
        object.__setattr__(self, "relations", _checked(type(self).__name__, (*names, *relations)))


def _checked(where: str, names: tuple[Any, ...]) -> tuple[str, ...]:
    """Raise a ConfigError for no name, one that is no text, or one that occurs twice."""
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"{where}: {names!r} must be one or more different names of relations, as in {where}('edge')")
    return names
