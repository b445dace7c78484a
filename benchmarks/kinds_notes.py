"""Chorales to write, nodes of graphs to classify and words to tag, each beside a usual method.

    uv run benchmarks/kinds_notes.py [--only chorales nodes words] [--seeds 0 1 2] [--write]    about 14 CPU-minutes on one thread
    uv run benchmarks/kinds_notes.py --tune [--only ..]                                       on a part of the training data alone

chorales: the first 32 beats of Bach's chorales in four voices, as the package music21 ships them (pip install music21; without
it the row is skipped), in nats a note, beside an n-gram of the same tokens with backoff (Witten & Bell 1991). Both learn from
transpositions too, the n-gram if they help it. nodes: graphs that are drawn, since no package here ships real ones: a class shows
weakly in the numbers of its nodes (the contextual stochastic block model, Deshpande et al. 2018), friends are mostly of the same
class and rivals of a neighbouring one; beside logistic regression on a node, and on it with the means of its friends and rivals,
of theirs, and so on in up to four rounds, as many as our model has blocks. words: after which words of Wikipedia, in lower
case and without marks, does a comma or a full stop belong? Beside logistic regression on the words around and their ends.
"""

import functools
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import text_of
from multimodal.attention import DotProduct
from multimodal.layers import MLP, SelfAttention
from multimodal.masks import Linked, SameSegment, Window
from multimodal_tokenizers import Events, Graph, Labels, Words

PLAIN: dict[str, Any] = {"device": "cpu", "precision": "float32", "quiet": True}
Found = dict[str, float]  # by way, what it reaches
Melody = list[tuple[float, int, float, int]]

# chorales
NOTES = Events(resolution=4, longest=32, voices=4)
BEATS = 32
WRITE = "-> notes"
SHIFTS = range(-5, 7)  # semitones


def music(part: ElementTree.Element, voice: int) -> Iterator[tuple[Fraction, int, Fraction, int]]:
    """The notes of one part of MusicXML, in beats; tied ones are one."""
    time, beat, tied = Fraction(0), 1, None
    for element in part.iter():
        if element.tag == "divisions":
            beat = int(element.text or 1)
        if element.tag in ("backup", "forward", "chord", "grace"):
            raise ValueError("more than one voice in a part")
        if element.tag != "note":
            continue
        duration = Fraction(int(element.findtext("duration") or 0), beat)
        step = element.findtext("pitch/step")
        if step is not None:
            alter = int(element.findtext("pitch/alter") or 0)
            pitch = 12 * (int(element.findtext("pitch/octave") or 0) + 1) + "C D EF G A B".index(step) + alter
            kinds = {tie.get("type") for tie in element.findall("tie")}
            if tied is not None and tied[1] == pitch and "stop" in kinds:
                tied = (tied[0], pitch, tied[2] + duration, voice)
            else:
                if tied is not None:
                    yield tied
                tied = (time, pitch, duration, voice)
        time += duration
    if tied is not None:
        yield tied


def chorales() -> list[Melody]:
    """Those of four parts whose notes lie on sixteenths, each once."""
    spec = find_spec("music21")
    assert spec is not None
    found: dict[tuple[Any, ...], Melody] = {}
    for file in sorted((Path(spec.origin or "").parent / "corpus" / "bach").glob("*.mxl")):
        with zipfile.ZipFile(file) as archive:
            name = next(
                name for name in archive.namelist() if name.endswith("xml") and not name.startswith(("META-INF", "__"))
            )
            score = ElementTree.fromstring(archive.read(name))
        if len(parts := score.findall("part")) != 4:
            continue
        try:
            notes = [note for voice, part in enumerate(parts) for note in music(part, voice) if note[0] < BEATS]
        except ValueError:
            continue
        if len(notes) < 60 or any((4 * note[0]) % 1 or (4 * note[2]) % 1 or not note[2] for note in notes):
            continue
        melody = [
            (float(a), pitch, float(b), voice) for a, pitch, b, voice in sorted(notes, key=lambda n: (n[0], n[3]))
        ]
        found.setdefault(tuple(melody), melody)
    return [*found.values()]


def transposed(melody: Melody, semitones: int) -> Melody:
    return [(onset, pitch + semitones, duration, voice) for onset, pitch, duration, voice in melody]


class Transposed:
    """Melodies, each time by another number of semitones."""

    def __init__(self, melodies: Sequence[Melody]) -> None:
        self.melodies = melodies

    def __len__(self) -> int:
        return len(self.melodies)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"notes": transposed(self.melodies[index], int(script.random().choice(SHIFTS)))}


class Backoff:
    """An n-gram of ids, whose probability is mixed with that of ever shorter contexts as Witten & Bell (1991) have it."""

    def __init__(self, rows: Sequence[Sequence[int]], size: int, order: int) -> None:
        self.size, self.order = size, order
        self.counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in rows:
            for i, token in enumerate(row):
                for n in range(min(order, i + 1)):
                    self.counts[tuple(row[i - n : i])][token] += 1
        self.totals = {context: counts.total() for context, counts in self.counts.items()}

    def nats(self, row: Sequence[int]) -> float:
        total = 0.0
        for i, token in enumerate(row):
            p = 1 / self.size
            for n in range(min(self.order, i + 1)):
                counts = self.counts.get(context := tuple(row[i - n : i]))
                if not counts:
                    break
                p = (counts[token] + len(counts) * p) / (self.totals[context] + len(counts))
            total -= float(np.log(p))
        return total


def of_ngrams(train: list[Melody], dev: list[Melody], test: list[Melody]) -> tuple[float, str]:
    """Nats a note, by the order that is best on dev, with or without transpositions."""

    def rows(melodies: Sequence[Melody]) -> list[list[int]]:
        return [[*NOTES(melody).content.tolist(), NOTES.vocab_size] for melody in melodies]

    made, best = {}, (float("inf"), "")
    for said, some in (("", train), (", transposed too", [transposed(m, s) for m in train for s in SHIFTS])):
        ids = rows(some)
        for order in (3, 4, 6):
            name = f"{order}-gram with backoff{said}"
            made[name] = Backoff(ids, NOTES.vocab_size + 1, order)
            best = min(best, (sum(map(made[name].nats, rows(dev))), name))
            if best[1] != name:
                del made[name]
    return sum(map(made[best[1]].nats, rows(test))) / sum(map(len, test)), best[1]


def written(train: list[Melody], test: list[Melody], seed: int, steps: int = 500) -> float:
    """Nats a note of a model that writes them."""
    core = mm.Core(width=96, depth=3, heads=4, dropout=0.1, axes=NOTES.axes)
    model = mm.Model({"notes": NOTES}, core, [WRITE], seed=seed)
    mm.fit(model, {WRITE: Transposed(train)}, seed=seed, steps=steps, batch=12, lr=2e-3, ema=0.99, **PLAIN)
    nats = 0.0
    for melody in test:
        stream = model.pack(WRITE, [{"notes": melody}])
        with torch.no_grad():
            log_p_NV = model.eval().logits(stream)[WRITE].log_softmax(-1)
        target_N = stream.readings[WRITE].target
        assert target_N is not None
        nats -= float(log_p_NV.gather(1, target_N[:, None]).sum())
    return nats / sum(map(len, test))


@functools.cache
def divided(tune: bool) -> tuple[list[Melody], list[Melody], str, float]:
    """The chorales to train and to test on, and the n-gram's name and nats a note, which no seed changes."""
    melodies = chorales()
    melodies = [melodies[i] for i in np.random.default_rng(0).permutation(len(melodies))]
    train, dev, test = melodies[80:], melodies[40:80], melodies[:40]
    test = dev if tune else test
    nats, name = of_ngrams(train, dev, test)
    return train, test, name, nats


def run_chorales(seed: int, tune: bool) -> Found:
    train, test, name, nats = divided(tune)
    return {name: nats, "Events": written(train, test, seed)}


# nodes
CLASSES = ("a", "b", "c", "d")
SORTS = ("friend", "rival")
NODES = "graph -> kinds:kind"
SIZE, FEATURES, DEPTH = 48, 8, 4


def drawn(count: int, seed: int) -> list[dict[str, Any]]:
    """Graphs with about three friends and three rivals a node."""
    means = np.random.default_rng(7).standard_normal((len(CLASSES), FEATURES)) * 0.45
    draw, samples = np.random.default_rng([seed, count]), []
    for _ in range(count):
        kind = draw.integers(len(CLASSES), size=SIZE)
        distance = (kind[:, None] - kind) % len(CLASSES)
        likely = {"friend": np.where(distance == 0, 0.16, 0.03), "rival": np.where(distance % 2 == 1, 0.1, 0.02)}
        edges = [
            (int(a), int(b), sort)
            for sort, p in likely.items()
            for a, b in np.argwhere(np.triu(draw.random((SIZE, SIZE)) < p, 1))
        ]
        numbers = (means[kind] + draw.standard_normal((SIZE, FEATURES))).astype(np.float32)
        samples.append({"graph": {"nodes": numbers, "edges": edges}, "kinds": [CLASSES[k] for k in kind]})
    return samples


def neighbourhood(graph: dict[str, Any], hops: int) -> np.ndarray:
    """The numbers of each node beside the means of its friends and rivals, of theirs, and so on, and how many they are."""
    links = {sort: np.zeros((SIZE, SIZE)) for sort in SORTS}
    for a, b, sort in graph["edges"]:
        links[sort][a, b] = links[sort][b, a] = 1
    found = last = graph["nodes"]
    for _ in range(hops):
        last = np.concatenate([link @ last / np.maximum(link.sum(1, keepdims=True), 1) for link in links.values()], 1)
        found = np.concatenate([found, last], 1)
    return found


def run_nodes(seed: int, tune: bool) -> Found:
    from sklearn.linear_model import LogisticRegression

    train, test = drawn(300, seed), drawn(100, seed)
    if tune:
        train, test = train[:240], train[240:]
    found: Found = {}
    y, y_test = (np.concatenate([sample["kinds"] for sample in part]) for part in (train, test))
    for hops in range(DEPTH + 1):
        name = f"logistic regression, {hops} rounds of neighbours"
        x, x_test = (np.concatenate([neighbourhood(s["graph"], hops) for s in part]) for part in (train, test))
        found[name] = float(LogisticRegression(max_iter=1000).fit(x, y).score(x_test, y_test))
    # attention that weighs neighbours by content overfits; with so small a scale it begins as their mean and stays close to it
    along = tuple(SelfAttention(mask=Linked(sort) | ~SameSegment(), score=DotProduct(0.01)) for sort in SORTS)
    core = mm.Core(
        width=48, depth=DEPTH, heads=4, axes=Graph.axes, rotary_split=(0, 0, 0, 0), dropout=0.3, block=(*along, MLP())
    )
    kinds = {"graph": Graph(features=FEATURES, edges=SORTS, hidden=32), "kind": Labels(CLASSES)}
    model = mm.Model(kinds, core, [mm.Task(NODES, mm.EachRow(of="graph"))], seed=seed)
    mm.fit(model, {NODES: train}, seed=seed, steps=400, batch=16, lr=2e-3, ema=0.99, **PLAIN)
    found["Graph"] = float(mm.evaluate(model, NODES, test)["rows"])
    return found


# words
MARKS = {",": "comma", ".": "stop"}
TAGS = ("none", "comma", "stop")
TAG = "words -> tags:tag"
PIECE = 48  # words


def tagged() -> list[dict[str, Any]]:
    """Pieces of running text."""
    words: list[str] = []
    tags: list[str] = []
    for token in text_of("wikitext2_valid.txt.gz").lower().split():
        if token in MARKS and tags:
            tags[-1] = MARKS[token]
        elif any(c.isalnum() for c in token):
            words.append(token)
            tags.append("none")
    return [{"words": words[i : i + PIECE], "tags": tags[i : i + PIECE]} for i in range(0, len(words) - PIECE, PIECE)]


def around(words: Sequence[str], i: int) -> dict[str, int]:
    """What the regression knows of a word: the words around it, and how they begin and end."""
    found = {}
    for at in range(-2, 4):
        word = words[i + at] if 0 <= i + at < len(words) else "<>"
        found[f"{at} {word}"] = 1
        if -1 <= at <= 2:
            found |= {f"{at} {word[:2]}-": 1, f"{at} -{word[-3:]}": 1}
    return found


def run_words(seed: int, tune: bool) -> Found:
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    pieces = tagged()
    cut = len(pieces) * 4 // 5
    train, test = pieces[:cut], pieces[cut:]
    if tune:
        train, test = train[: cut * 4 // 5], train[cut * 4 // 5 :]
    told = np.concatenate([piece["tags"] for piece in test])

    def score(answer: Any) -> float:
        return float(f1_score(told, answer, labels=TAGS[1:], average="macro"))

    places = DictVectorizer()
    x, x_test = (
        make([around(piece["words"], i) for piece in part for i in range(PIECE)])
        for make, part in ((places.fit_transform, train), (places.transform, test))
    )
    regression = LogisticRegression(max_iter=100, C=0.5).fit(x, np.concatenate([piece["tags"] for piece in train]))
    found = {"logistic regression": score(regression.predict(x_test))}
    kinds = {"words": Words(buckets=2048), "tag": Labels(TAGS)}
    # few features of a word are not 0, so that the norm before the first block is what lets them count from the start
    core = mm.Core(
        width=96, depth=2, heads=4, dropout=0.4, first_norm=True, block=(SelfAttention(mask=Window(4)), MLP())
    )
    model = mm.Model(kinds, core, [mm.Task(TAG, mm.EachRow(of="words"))], seed=seed)
    mm.fit(model, {TAG: train}, seed=seed, steps=400, batch=32, lr=2e-3, ema=0.99, weight_decay=0.3, **PLAIN)
    answers = model.eval().predict(TAG, [{"words": piece["words"]} for piece in test])
    return {**found, "Words": score(np.concatenate([answer.value for answer in answers]))}


ROWS: dict[str, tuple[str, str, Callable[[int, bool], Found]]] = {
    "chorales": ("Chorales of Bach", "nats a note, on 40 held out", run_chorales),
    "nodes": ("Nodes of drawn graphs", "nodes right, in 100 other graphs", run_nodes),
    "words": ("Commas and full stops of Wikipedia", "mean F1 of both, on the last fifth", run_words),
}


def main() -> None:
    options = script.parser(__doc__, "seeds", "write", seeds=[0, 1, 2])
    options.add_argument("--only", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    options.add_argument("--tune", action="store_true", help="compare on a part of the training data, and test nothing")
    args = script.parsed(options)
    for name in args.only:
        title, measure, run = ROWS[name]
        if name == "chorales" and find_spec("music21") is None:
            print("chorales: skipped, since music21 is not installed: pip install music21")
            continue
        found: dict[str, list[float]] = {}
        with script.cpu_time(f"{name}:"):
            for seed in args.seeds:
                for way, value in run(seed, args.tune).items():
                    found.setdefault(way, []).append(value)
                    print(f"  {name}, seed {seed}: {way} {value:.4f}", flush=True)
        lines = [[way, *(f"{x:.3f}" for x in values), f"{np.mean(values):.3f}"] for way, values in found.items()]
        body = script.table([measure, *(f"seed {seed}" for seed in args.seeds), "mean"], lines)
        print(f"{name}\n{body}", flush=True)
        if args.write and not args.tune:
            report.keep(f"kinds_{name}", title, f"uv run benchmarks/kinds_notes.py --only {name} --write", body)


if __name__ == "__main__":
    main()
