"""The rules of the quick path, all of them: which data get which tokens, core, head and recipe, and why.

`RULES` is the table that docs/quick.md prints; the numbers in it are those that `choose` uses.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multimodal.augment import Augmentation, LongestSide, SeriesJitter, for_pictures, for_sounds
from multimodal.augment.pictures import MAX_PIXELS
from multimodal.core import Core
from multimodal.declare import override
from multimodal.heads import Classify, Head, NextToken, Regress
from multimodal.heads.pool import Mean, Parts
from multimodal.shapes import ConfigError
from multimodal.start.code import code_of
from multimodal.start.data_report import DataReport
from multimodal.start.trained import Trained
from multimodal.tokenizer import Tokenizer
from multimodal.tower import Tower
from multimodal.train import Recipe
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, Number, Series, TableRow, TextBPE, TextBytes

PATCHES = ((20, 2), (40, 4), (math.inf, 8))
"""(longest usual side in pixels up to, side of a patch): of larger pictures LARGEST_SIDE is the longest side."""
LARGEST_SIDE = 64
RATES = (8000, 16000)
MELS, HOP_MS, STACKS, MOST_FRAMES = 40, 10.0, (2, 4, 8, 16, 32, 64, 128), 40
WORD_S, TRIM_DB, STEM_CHANNELS = 2.0, 20.0, 16
"""Sounds that usually last up to WORD_S are words and the like: of them the silence at both ends is left out."""
SERIES_TOKENS, SERIES_PARTS = 25, 8
BYTES_BELOW, BPE = 20_000, ((200_000, 1000), (2_000_000, 4000), (math.inf, 8000))
"""A text kind of bytes below so many bytes of text; else (bytes up to, pieces of byte-pair encoding)."""
CORES = ((1_000, 48, 2), (20_000, 64, 4), (math.inf, 128, 6))
"""(training samples below, width, depth)."""
ROW_CORES = ((2_000, 32, 2), (20_000, 64, 3), (math.inf, 96, 4))
"""The same where only rows of a table are read."""
LINEAR_BELOW, FOLDS = 1_000, 3
"""Of fewer training rows a model without blocks is tried too, by cross-validation in so many parts."""
HEADS = 4
LEARNING_RATES = ((48, 3e-3), (64, 2e-3), (math.inf, 1e-3))
"""(width up to, learning rate)."""
EPOCHS = {"row": 20, "text": 20, "image": 60, "audio": 60, "series": 60}
PLURALS = {"row": "rows", "text": "texts", "image": "pictures", "audio": "sounds", "series": "series"}
LEAST_STEPS = {"row": 300, "text": 300, "image": 600, "audio": 600, "series": 400}
MOST_STEPS = 3000
BATCHES = ((1_000, 32), (math.inf, 64))
AVERAGES = ((600, 0.98), (1500, 0.99), (math.inf, 0.998))
"""(steps up to, decay of the averaged weights)."""
DROPOUT, WEIGHT_DECAY, SMOOTHING, GAPS = 0.1, 0.1, 0.1, 0.4
GAPS_FOR_NUMBERS = 0.1
"""The share of missing cells where a number is answered."""
GAPS_OF_LINEAR = 10
"""Without blocks the share is this by the number of training rows, and at most that of numbers: missing cells act as a ridge
penalty that grows with the rows (Wager et al. 2013), where that of ridge regression does not."""
FEWEST = 0.34  # of the steps wanted: if the minutes do not allow so many, a smaller core is taken
GAPS_BELOW = 5_000  # rows
STRENGTH = 0.3
"""Of the augmentation of pictures: the whole of it needs more steps than some minutes allow."""
EVALUATIONS, PATIENCE = 10, 4
"""How often held-out samples are measured, and after how many measurements without a lower loss training ends."""
PHOTOGRAPH = 0.25
"""The share of different colours among the pixels of a picture from which on it is a photograph; drawings have fewer."""
SIDED = re.compile(r".|[-+]?\d+([.,]\d+)?|(.*[\W_])?(left|right)([\W_].*)?", re.IGNORECASE | re.DOTALL)
"""Names of classes that a mirror image may not have: characters, numbers, left and right."""


@dataclass(frozen=True)
class Rule:
    """A line of the table: for which data, what is chosen, and why."""

    data: str
    chosen: str
    why: str


def _steps_of(table: Sequence[tuple[float, Any]], unit: str) -> str:
    """((20, 2), (inf, 8)) as words: "2 up to 20 px, else 8"."""
    return ", ".join(
        f"{value:g} up to {limit:,.0f} {unit}" if limit < math.inf else f"else {value:g}" for limit, value in table
    )


def _cores_of(table: Sequence[tuple[float, int, int]]) -> str:
    parts = [
        f"{width} x {depth} below {limit:,.0f}" if limit < math.inf else f"else {width} x {depth}"
        for limit, width, depth in table
    ]
    return ", ".join(parts)


RULES = (
    Rule(
        "pictures",
        f"`ImagePatches`, a patch of {_steps_of(PATCHES, 'px')} (the middle of the longest sides); longest side {LARGEST_SIDE} px",
        "100 tokens a picture at most: attention costs their square",
    ),
    Rule("pictures, all grey", "one channel", "three equal ones say nothing more"),
    Rule("pictures", "mean and deviation of the training part", "pixels enter with unit variance"),
    Rule(
        "sounds",
        f"`AudioFrames` at {RATES[0]:,} Hz if the usual rate is not above it, else {RATES[1]:,}; {MELS} bands, every {HOP_MS:g} "
        f"ms; as many frames a token as make {MOST_FRAMES} tokens of the usual sound",
        "what is not in the files is not computed; tokens stay few",
    ),
    Rule(
        f"sounds of up to {WORD_S:g} s (the middle one), and the answer is names or whole numbers",
        f"`trim_db={TRIM_DB:g}`: without the silence at both ends; `stem_channels={STEM_CHANNELS}`: convolutions over time and "
        "frequency embed the frames",
        "people who were never heard pause elsewhere, and speak higher or lower",
    ),
    Rule("series", f"`Series`, as many steps a token as make {SERIES_TOKENS} tokens", "the same"),
    Rule(
        "texts",
        f"bytes below {BYTES_BELOW:,} bytes of training text; else byte-pair encoding: pieces {_steps_of(BPE, 'bytes')}",
        "pieces need texts to learn them from, and make texts three to four times shorter",
    ),
    Rule(
        "`--start NAME`, and one kind is read",
        "the pretrained encoder as a `Tower` whose weights stay as they are; the mean of its states is one token; no augmentation",
        "each value passes it once: its vectors are kept in the folder",
    ),
    Rule(
        "columns of numbers and categories",
        "one `TableRow`, a token a column; unseen categories are read",
        "no order among columns",
    ),
    Rule(
        "answer: names, or up to 20 whole numbers",
        f"`Classify`, label smoothing {SMOOTHING}",
        "small data are learned by heart less",
    ),
    Rule("answer: lists of names", "`Classify` with `Labels(several=True)`", "independent decisions"),
    Rule("answer: numbers", "`Regress` of a `Number`", "least squares of the standardised number"),
    Rule("answer: texts, nearly all different or long", "`NextToken`", "what is not one of a set is written"),
    Rule("rows, texts and series", "the head reads the mean of all tokens", "each token can add what it says"),
    Rule(
        "one series and nothing else",
        f"the head reads the means of {SERIES_PARTS} parts, one beside the other",
        "it matters when something happens",
    ),
    Rule(
        "all",
        f"core, width x depth: {_cores_of(CORES)} training samples",
        "few samples are learned by heart by a large core",
    ),
    Rule("rows alone", f"core, width x depth: {_cores_of(ROW_CORES)} training samples", "the same"),
    Rule(
        f"rows alone, fewer than {LINEAR_BELOW:,}, without --group and --time, and the answer is no text",
        "a core of depth 0 without a norm, and no bins of numbers, if that has the lower loss in "
        f"{FOLDS}-fold cross-validation of the training part, for which the minutes must be enough",
        "the columns then add up as in a linear model, which is often better on some hundred rows",
    ),
    Rule("all", f"learning rate {_steps_of(LEARNING_RATES, 'wide')}", "wide cores need smaller steps"),
    Rule(
        "all",
        f"dropout {DROPOUT}, weight decay {WEIGHT_DECAY}, averaged weights with decay {_steps_of(AVERAGES, 'steps')}",
        "against noise of small data",
    ),
    Rule(
        "sounds, and the answer is no number",
        "augmentation: `augment.for_sounds()`",
        "speaker and microphone do not decide; a number to answer may be one of loudness or speed",
    ),
    Rule(
        "series, and the answer is no number",
        "augmentation: `augment.SeriesJitter()`",
        "noise, a factor near 1 and a shift of a few steps do not decide",
    ),
    Rule(
        f"photographs in colour ({PHOTOGRAPH:.0%} of the pixels of the middle picture or more differ in colour), and the answer "
        "is no number",
        f"augmentation: `augment.for_pictures(strength={STRENGTH})`, behind the shrinking of large ones",
        "size, angle, light and noise do not decide; grey digits were learned worse with it in some minutes",
    ),
    Rule(
        "photographs in colour, one picture and nothing else is read, and the answer is classes of which none is called by one "
        "character, a number, left or right",
        "augmentation also by mirror images",
        "digits, letters and signs are others in a mirror, and questions and captions may say left and right",
    ),
    Rule(
        f"rows of a table, fewer than {GAPS_BELOW:,}",
        f"{GAPS:.0%} of the cells are missing, other ones each time; {GAPS_FOR_NUMBERS:.0%} if a number is answered; of a core of "
        f"depth 0 a share of {GAPS_OF_LINEAR} by the number of training samples, and at most {GAPS_FOR_NUMBERS:.0%}",
        "no few columns decide alone; sums of columns become too large where more is there than in training",
    ),
    Rule("rows alone, and numbers to answer", "float32", "bfloat16 would round them to three digits"),
    Rule("all", f"batch {_steps_of(BATCHES, 'samples')}", "small data need more steps of fewer samples"),
    Rule(
        "all",
        f"steps for {', '.join(f'{count} epochs of {PLURALS[kind]}' for kind, count in EPOCHS.items())}, at least "
        f"{min(LEAST_STEPS.values())} to {max(LEAST_STEPS.values())}, at most {MOST_STEPS:,}; and as many as fit in the minutes",
        "the time of a step is measured here, before training",
    ),
    Rule(
        "a part is held out",
        f"it is measured {EVALUATIONS} times; training ends after {PATIENCE} times without a lower loss, and the model with the "
        "lowest is taken",
        "a model that begins to learn by heart gets worse on what it has not seen",
    ),
    Rule(
        "too few minutes for a third of the steps",
        "the next smaller core",
        "a small model that was trained beats a large one that was not",
    ),
)


def table() -> str:
    """The rules as a table in Markdown."""
    lines = [f"| {rule.data} | {rule.chosen} | {rule.why} |" for rule in RULES]
    return "\n".join(["| data | chosen | why |", "|---|---|---|", *lines])


@dataclass
class Choice:
    """What was chosen.

    task: the pattern.
    tokenizers: by name of a kind.
    code: by name of a kind, the Python expression that makes its tokenizer of `train`.
    gaps: the share of cells that are missing in training; 0: none.
    changes: by name of a field, its augmentations.
    changes_code: by name of a field, the Python expression that makes them.
    says: the choices, a line each.
    """

    task: str
    tokenizers: dict[str, Tokenizer]
    code: dict[str, str]
    core: Core
    head: Head
    recipe: Recipe
    gaps: float = 0.0
    changes: dict[str, tuple[Augmentation, ...]] = field(default_factory=dict)
    changes_code: dict[str, str] = field(default_factory=dict)
    says: list[str] = field(default_factory=list)


def first(table: Sequence[tuple[Any, ...]], value: float, *, below: bool = False) -> tuple[Any, ...]:
    """What the first line of a table says whose limit is not under the value, or is above it."""
    return next(rest for limit, *rest in table if (value < limit if below else value <= limit))  # type: ignore[return-value]


def may_be_linear(report: DataReport) -> bool:
    """Whether a model without blocks is compared, by the rule in `RULES`."""
    kinds = {seen["kind"] for seen in report.fields.values()}
    return kinds == {"row"} and report.answer["kind"] != "text" and report.parts["train"] < LINEAR_BELOW


def choose(
    report: DataReport,
    train: Any,
    *,
    seed: int = 0,
    smaller: int = 0,
    augment: bool = True,
    linear: bool = False,
    start: Trained | None = None,
) -> Choice:
    """Apply the rules to what was seen.

    train: the training samples. smaller: by how many sizes the core is smaller than its rule says.
    augment: whether there is augmentation. linear: whether the model of a table has no blocks and no bins. start: an encoder with
    trained weights.
    """
    kinds = {seen["kind"] for seen in report.fields.values()}
    count, answer = report.parts["train"], report.answer
    tokenizers, code, says = {}, {}, []
    for kind in sorted(kinds):
        names = [name for name, seen in report.fields.items() if seen["kind"] == kind]
        facts = [report.fields[name] for name in names]
        if start is not None:
            tokenizers[kind], code[kind] = start.tower, start.code
        else:
            tokenizers[kind], code[kind] = _TOKENIZERS[kind](names, facts, train, answer)
        if linear:
            tokenizers[kind], code[kind] = _row(names, facts, train, answer, bins=0)
        says.append(f"{kind}: {_short(tokenizers[kind])}")
    head, written, kind = _answer(report, train, kinds)
    if kind == "text" and "text" in tokenizers:  # one kind reads and writes
        if start is not None:
            raise ConfigError("--start is for an encoder of texts, and the answers are texts too; leave it out")
    else:
        tokenizers[kind], code[kind] = written
    pattern = f"{' '.join(_place(name, seen['kind']) for name, seen in report.fields.items())} -> {_place(answer['name'], kind)}"
    # the core
    cores = ROW_CORES if kinds == {"row"} else CORES
    at = next(i for i, (limit, _, _) in enumerate(cores) if count < limit)
    _, width, depth = cores[max(0, at - smaller)]
    more: dict[str, Any] = {"rotary_split": (0, 0, 0)} if kinds == {"row"} else {}
    if linear:
        depth = 0
        more |= {"last_norm": False}
    core = Core(width=width, depth=depth, heads=HEADS, dropout=DROPOUT, **more)
    says.append(
        f"core: {width} wide, {depth} deep, for {count:,} training samples"
        + (f"; {smaller} size{'s' if smaller > 1 else ''} smaller, for the time" if smaller else "")
    )
    # the recipe
    (batch,) = first(BATCHES, count)
    batch = min(batch, count)
    epochs, least = max(EPOCHS[kind] for kind in kinds), max(LEAST_STEPS[kind] for kind in kinds)
    steps = int(min(MOST_STEPS, max(least, math.ceil(epochs * count / batch))))
    (rate,), (average,) = first(LEARNING_RATES, width), first(AVERAGES, steps)
    stop: dict[str, Any] = {"patience": PATIENCE} if report.parts.get("held_out") else {}
    exact: dict[str, Any] = {"precision": "float32"} if kinds == {"row"} or kind == "number" else {}
    recipe = Recipe(
        steps=steps, batch=batch, lr=rate, weight_decay=WEIGHT_DECAY, ema=average, seed=seed, **stop, **exact
    )
    few = kinds == {"row"} and count < GAPS_BELOW and len(report.fields["row"]["columns"]) > 2
    gaps = GAPS_FOR_NUMBERS if kind == "number" else GAPS
    if linear:
        gaps = min(GAPS_FOR_NUMBERS, round(GAPS_OF_LINEAR / count, 3))
    if not few:
        gaps = 0.0
    if gaps:
        says.append(f"{gaps:.0%} of the cells of a row are missing in training, other ones each time")
    if start is not None:
        recipe = override(recipe, freeze=(f"{start.kind}.frozen_part",))
    found = Choice(pattern, tokenizers, code, core, head, recipe, gaps, says=says)
    if augment and start is None:
        _augment(found, report)
    return found


def _augment(choice: Choice, report: DataReport) -> None:
    """Add the augmentations of pictures, sounds and series to a choice."""
    if report.answer["kind"] == "number":
        return
    for name, seen in report.fields.items():
        if seen["kind"] == "audio":
            choice.changes[name], choice.changes_code[name] = for_sounds(), "augment.for_sounds()"
            choice.says.append(f"augmentation of {name}: other speakers, microphones and noise (--no-augment)")
        if seen["kind"] == "series":
            choice.changes[name], choice.changes_code[name] = (SeriesJitter(),), "augment.SeriesJitter()"
            choice.says.append(f"augmentation of {name}: noise, another scale and a shift (--no-augment)")
        # one that is larger than augmentation reads would end the training
        if seen["kind"] == "image" and seen["pixels"] <= MAX_PIXELS and _is_photograph(seen):
            kind: Any = choice.tokenizers["image"]
            smallest, flip = 2 * kind.patch, may_mirror(report)
            changes = for_pictures(smallest=smallest, flip=flip, strength=STRENGTH)
            code = f"augment.for_pictures(smallest={smallest}, flip={flip}, strength={STRENGTH})"
            if kind.max_side is not None:
                changes = (LongestSide(kind.max_side, smallest), *changes)
                code = f"(augment.LongestSide({kind.max_side}, {smallest}), *{code})"
            choice.changes[name], choice.changes_code[name] = changes, code
            mirrored = ", mirror images" if flip else ""
            choice.says.append(f"augmentation of {name}: other sizes, angles, light and noise{mirrored} (--no-augment)")


def _is_photograph(seen: Mapping[str, Any]) -> bool:
    return not seen["grey"] and seen["colours"] >= PHOTOGRAPH


def may_mirror(report: DataReport) -> bool:
    """Whether a picture and its mirror image have the same answer, by the rule in `RULES`."""
    seen, *others = report.fields.values()
    return (
        not others
        and seen["kind"] == "image"
        and _is_photograph(seen)
        and report.answer["kind"] in ("label", "labels")
        and not any(SIDED.fullmatch(name) for name in report.answer["classes"])
    )


def with_steps(choice: Choice, steps: int) -> Recipe:
    """The recipe with fewer steps."""
    (average,) = first(AVERAGES, steps)
    return override(choice.recipe, steps=steps, ema=average)


def _place(name: str, kind: str) -> str:
    return kind if name == kind else f"{name}:{kind}"


def _short(part: Any) -> str:
    text = (
        code_of(part, set())
        if not isinstance(part, (Tower, TableRow, TextBPE, Labels, Series))
        else type(part).__name__
    )
    if isinstance(part, Tower):
        return "an encoder with trained weights, which stay as they are"
    if isinstance(part, TextBPE):
        return f"TextBPE, {part.vocab_size:,} pieces"
    if isinstance(part, TableRow):
        return f"TableRow, {len(part.columns)} columns"
    if isinstance(part, Series):
        return f"Series, {part.patch} steps a token"
    return text


def _picture(
    names: Sequence[str], facts: Sequence[Mapping[str, Any]], train: Any, answer: Mapping[str, Any]
) -> tuple[Tokenizer, str]:
    side = max(seen["longest"]["middle"] for seen in facts)
    (patch,) = first(PATCHES, min(side, LARGEST_SIDE))
    patch = max(1, min(patch, *(seen["shortest"] for seen in facts)))
    grey = all(seen["grey"] for seen in facts)
    mean, std = facts[0]["mean"], facts[0]["std"]
    largest = max(seen["longest"]["most"] for seen in facts)
    pixels = max(seen["pixels"] for seen in facts)
    found = ImagePatches(
        patch=patch,
        channels=1 if grey else 3,
        mean=mean[0] if grey else tuple(mean),
        std=std[0] if grey else tuple(std),
        max_side=LARGEST_SIDE if largest > LARGEST_SIDE else None,
        max_pixels=max(2**24, 2 ** math.ceil(math.log2(max(pixels, 1)))),
    )
    return found, code_of(found, set())


def _sound(
    names: Sequence[str], facts: Sequence[Mapping[str, Any]], train: Any, answer: Mapping[str, Any]
) -> tuple[Tokenizer, str]:
    rate = RATES[0] if max(seen["rate"] for seen in facts) <= RATES[0] else RATES[1]
    frames = max(seen["seconds"]["middle"] for seen in facts) * 1000 / HOP_MS
    stack = next((stack for stack in STACKS if frames / stack <= MOST_FRAMES), STACKS[-1])
    longest = max(seen["seconds"]["most"] for seen in facts)
    short = max(seen["seconds"]["middle"] for seen in facts) <= WORD_S
    more: dict[str, Any] = {"max_seconds": float(math.ceil(longest))} if longest > 3600 else {}
    if short and answer["kind"] in ("label", "labels"):
        more |= {"trim_db": TRIM_DB, "stem_channels": STEM_CHANNELS}
    found = AudioFrames(rate_hz=rate, mels=MELS, hop_ms=HOP_MS, stack=stack, **more)
    return found, code_of(found, set())


def _series(
    names: Sequence[str], facts: Sequence[Mapping[str, Any]], train: Any, answer: Mapping[str, Any]
) -> tuple[Tokenizer, str]:
    patch = max(1, math.ceil(max(seen["steps"]["middle"] for seen in facts) / SERIES_TOKENS))
    values = [sample[name] for sample in _each(train) for name in names if sample[name] is not None]
    return Series.of(values, patch=patch), f"Series.of([{_cells('train', names)}], patch={patch})"


def _text(
    names: Sequence[str], facts: Sequence[Mapping[str, Any]], train: Any, answer: Mapping[str, Any]
) -> tuple[Tokenizer, str]:
    names = [*names, *([answer["name"]] if answer["kind"] == "text" else [])]
    total = sum(len(text.encode()) for sample in _each(train) for name in names if (text := sample[name]) is not None)
    if total < BYTES_BELOW:
        return TextBytes(), "TextBytes()"
    (pieces,) = first(BPE, total)
    texts = [sample[name] for sample in _each(train) for name in names if sample[name] is not None]
    return TextBPE.train(texts, vocab_size=pieces), f"TextBPE.train([{_cells('train', names)}], vocab_size={pieces})"


def _row(
    names: Sequence[str], facts: Sequence[Mapping[str, Any]], train: Any, answer: Mapping[str, Any], **more: Any
) -> tuple[Tokenizer, str]:
    (name,), (seen,) = names, facts
    categories = tuple(column for column, about in seen["columns"].items() if about["kind"] == "category")
    more = {"categories": categories, "unseen": True, **more}
    found = TableRow.of([sample[name] for sample in _each(train)], **more)
    given = ", ".join(f"{setting}={value!r}" for setting, value in more.items())
    return found, f"TableRow.of([sample[{name!r}] for sample in train], {given})"


_TOKENIZERS = {"image": _picture, "audio": _sound, "series": _series, "text": _text, "row": _row}


def _cells(source: str, names: Sequence[str]) -> str:
    """The expression of all values of some fields, without missing ones."""
    if len(names) == 1:
        return f"sample[{names[0]!r}] for sample in {source} if sample[{names[0]!r}] is not None"
    return f"sample[name] for sample in {source} for name in {tuple(names)!r} if sample[name] is not None"


def _each(samples: Any) -> Any:
    return (samples[i] for i in range(len(samples)))


def _answer(report: DataReport, train: Any, kinds: set[str]) -> tuple[Head, tuple[Tokenizer, str], str]:
    """The head, the tokenizer of the answer with its code, and the name of its kind."""
    pool = Mean() if kinds <= {"row", "text", "series"} else None
    if [seen["kind"] for seen in report.fields.values()] == ["series"]:
        pool = Parts(SERIES_PARTS)
    kind, name = report.answer["kind"], report.answer["name"]
    if kind in ("label", "labels"):
        found = Labels(tuple(report.answer["classes"]), several=kind == "labels")
        smoothing = 0.0 if kind == "labels" else SMOOTHING
        return Classify(label_smoothing=smoothing, pool=pool), (found, code_of(found, set())), "label"
    if kind == "number":
        values = [sample[name] for sample in _each(train)]
        return Regress(pool=pool), (Number.of(values), f"Number.of([sample[{name!r}] for sample in train])"), "number"
    return NextToken(), _text([], [], train, report.answer), "text"
