"""Counts what a reader saw, used and left out, with reasons: used and left out add up to seen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from multimodal.texts import shortened

FIRST = 3  # names that are shown for each reason
REASONS = 40  # the most reasons; further ones are counted together, since each file may have a suffix of its own


@dataclass(frozen=True)
class LeftOut:
    """How many were left out for one reason, and the names of the first few."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Account:
    """`saw` == `yields` + what was left out, counted in `unit` ("files", "rows", "members").

    yields: the number that is used. samples: the number of samples, if several make one. left_out: by reason. notes: decisions of
    the reader that may be wrong, such as quotation marks that were read literally.
    """

    unit: str
    saw: int
    yields: int
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    samples: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        left = sum(reason.count for reason in self.left_out.values())
        assert self.saw == self.yields + left, f"{self.saw} {self.unit} seen, {self.yields} used, {left} left out"

    def without(self, reason: str, names: Iterable[str]) -> "Account":
        """A copy of the account in which `names`, which were counted as used, are left out."""
        tally = Tally(self.unit, self)
        for name in names:
            tally.leave(reason, name)
            tally.used -= 1
        return tally.account(self.samples, self.notes)

    def __str__(self) -> str:
        left = self.saw - self.yields
        made = "" if self.samples is None else f" in {self.samples:,} samples"
        lines = [f"saw {self.saw:,} {self.unit}: {self.yields:,} are used{made}, {left:,} left out"]
        for reason, out in self.left_out.items():
            more = ", ..." if out.count > len(out.names) else ""
            lines.append(f"  {reason}: {out.count:,} ({', '.join(out.names)}{more})")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class Tally:
    """Counts for an account."""

    def __init__(self, unit: str, begun: Account | None = None) -> None:
        self.unit, self.used = unit, begun.yields if begun else 0
        self.left = {reason: [out.count, *out.names] for reason, out in begun.left_out.items()} if begun else {}

    def leave(self, reason: str, name: object) -> None:
        """Count one that is left out."""
        if reason not in self.left and len(self.left) >= REASONS:
            reason = "for other reasons"
        entry = self.left.setdefault(reason, [0])
        entry[0] += 1
        if len(entry) <= FIRST:
            entry.append(shortened(str(name), 100))

    def account(self, samples: int | None = None, notes: Iterable[str] = ()) -> Account:
        left = {reason: LeftOut(count, tuple(names)) for reason, (count, *names) in self.left.items()}
        saw = self.used + sum(out.count for out in left.values())
        return Account(unit=self.unit, saw=saw, yields=self.used, left_out=left, samples=samples, notes=tuple(notes))
