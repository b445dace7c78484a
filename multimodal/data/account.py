"""Counts the files, rows or members that a reader saw, used and left out, with reasons; used plus left out is seen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from multimodal.notebook import tables_html
from multimodal.texts import shortened

FIRST = 3  # number of names shown for each reason
# the largest number of reasons; further ones are counted together, since every file may have another suffix
REASONS = 40


@dataclass(frozen=True)
class LeftOut:
    """The items left out for one reason.

    count: their number.
    names: the names of the first few.
    """

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Account:
    """Counts of a reader: `saw` is `yields` plus the items that were left out.

    unit: what is counted: "files", "rows", "members".
    saw: the number of items.
    yields: the number that is used.
    left_out: the others, by reason.
    samples: the number of samples, if several items make one; None: each item is a sample.
    notes: decisions of the reader that may be wrong, such as quotation marks that were read literally.
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

    def _repr_html_(self) -> str:
        """For notebooks: the counts, and the reasons with the first names."""
        left = [(reason, out.count, ", ".join(out.names)) for reason, out in self.left_out.items()]
        tables = {"left out": left, "notes": [(note,) for note in self.notes]}
        return tables_html(str(self).partition("\n")[0], tables)

    def __str__(self) -> str:
        left = self.saw - self.yields
        made = "" if self.samples is None else f" in {self.samples:,} samples"
        lines = [f"saw {self.saw:,} {self.unit}: {self.yields:,} are used{made}, {left:,} left out"]
        for reason, out in self.left_out.items():
            more = ", ..." if out.count > len(out.names) else ""
            lines.append(f"  {reason}: {out.count:,} ({', '.join(out.names)}{more})")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class Tally:
    """A mutable account. start: the account to continue; None: nothing is counted yet."""

    def __init__(self, unit: str, start: Account | None = None) -> None:
        self.unit, self.used = unit, start.yields if start else 0
        self.left = {reason: [out.count, *out.names] for reason, out in start.left_out.items()} if start else {}

    def leave(self, reason: str, name: object) -> None:
        """Count an item that is left out."""
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
