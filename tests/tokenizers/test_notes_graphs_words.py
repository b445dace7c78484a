"""Notes, graphs and words with tags: every check, what is written and saved, and data whose answer is known."""

import dataclasses
import io
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.layers import MLP, SelfAttention
from multimodal.masks import Linked, SameSegment
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Events, Graph, Labels, TextBytes, Words

DRAW = np.random.default_rng(0)
CHORD = [(0, 60, 1, 100, 0), (0, 64, 2, 64, 1), (1.5, 60, 0.5, 1, 0), (20, 0, 0.25, 2, 0), (20, 127, 30, 127, 3)]
CHECKED = [
    (Events(), None),
    (Events(resolution=4, longest=6, velocities=127, voices=4, causal=True), [CHORD, CHORD[:2], CHORD[2:]]),
    (
        Events(resolution=2, velocities=8, lossy=True),
        [[(0, 60, 1, 90), (0.6, 64, 0.1, 64)], [(0, 62, 1, 90)], [(1, 60, 2, 12)]],
    ),
    (Graph(features=3), None),
    (Graph(features=2, edges=("likes", "knows"), directed=True, hidden=8), None),
    (Words(buckets=256), None),
    (Words(causal=True), ["a text of words", "another One", "ünd 1 Wort"]),
]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{type(kind).__name__}{i}-{check}")
        for i, (kind, values) in enumerate(CHECKED)
        for check in tokenizer_checks(kind, kind.examples() if values is None else values)
        if str(check) not in ("fresh_process", "worker_process") or i == 5  # the others have no hash of their own
    ],
)
def test_every_check_passes(check):
    check()


# notes


def test_each_token_stands_where_its_note_sounds():
    kind = Events(resolution=4, longest=6, velocities=127, voices=2)
    tokens = kind([(0.5, 60, 0.25, 100, 1), (0.5, 62, 2, 1, 1), (3, 60, 1, 127, 0)])
    names = [
        "wait 1/2 beat",
        "C4, voice 1",
        "1/4 beat",
        "velocity 100",
        "D4, voice 1",
        "3/2 beats",
        "1/2 beat",
        "velocity 1",
    ]
    assert kind.token_names(tokens) == [
        *names,
        "wait 3/2 beats",
        "wait 1 beat",
        "C4, voice 0",
        "1 beat",
        "velocity 127",
    ]
    wanted = [
        [0.5, 0, 0, 0],
        [0.5, 60, 1, 1],
        [0.5, 60, 2, 1],
        [0.5, 60, 3, 1],
        [0.5, 62, 1, 1],
        [0.5, 62, 2, 1],
        [0.5, 62, 3, 1],
    ]
    wanted += [[0.5, 62, 4, 1], [2, 62, 0, 1], [3, 62, 0, 1], [3, 60, 1, 0], [3, 60, 2, 0], [3, 60, 3, 0]]
    assert tokens.position_NA.tolist() == wanted


@pytest.mark.parametrize(
    "settings", [{}, {"velocities": 1}, {"velocities": 32, "voices": 4}, {"longest": 1, "voices": 1}], ids=str
)
def test_any_ids_are_notes_that_encode_to_tokens_of_the_same_notes(settings: dict[str, int]):
    kind = Events(resolution=3, **settings)
    draw = torch.Generator().manual_seed(0)
    for count in (1, 7, 40, 200):
        ids = torch.randint(kind.vocab_size, (count,), generator=draw)
        notes = kind.decode(mm.Tokens(ids, kind.places(count)))
        ordered = sorted(notes, key=lambda note: (note[0], note[-1] if kind.voices else 0, note[1]))
        assert kind.decode(kind(notes, empty=True)) == ordered


def by_ticks(path: Path) -> list[tuple[float, int, float, int, int]]:
    """The notes of a file with one track, read byte by byte: (onset, pitch, duration, velocity, channel)."""
    data = path.read_bytes()
    assert data[:4] == b"MThd"
    assert data[14:18] == b"MTrk"
    beat, i, time, found, begun = int.from_bytes(data[12:14]), 22, 0, [], {}
    status = 0
    while True:
        delta = 0
        while True:
            delta, more, i = delta * 128 + data[i] % 128, data[i] > 127, i + 1
            if not more:
                break
        time += delta
        if data[i] > 127:
            status, i = data[i], i + 1
        if status == 0xFF:
            return sorted(found)
        key = (status % 16, data[i])
        if status // 16 == 9:
            begun[key] = (time, data[i + 1])
        else:
            start, velocity = begun.pop(key)
            found.append((start / beat, key[1], (time - start) / beat, velocity, key[0]))
        i += 2


def test_a_file_holds_the_notes_as_midi_has_them(tmp_path):
    pytest.importorskip("mido")
    kind = Events(resolution=4, velocities=127, voices=4)
    path = kind.write(CHORD, tmp_path / "song")
    assert path.name == "song.mid"
    assert by_ticks(path) == sorted(CHORD)
    for value in (str(path), path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert kind.decode(kind(value)) == CHORD
    again = kind.write([(0, 60, 2, 9, 0), (1, 60, 2, 8, 0)], tmp_path / "struck.mid")
    assert by_ticks(again) == [(0, 60, 1, 9, 0), (1, 60, 2, 8, 0)]
    # without voices the longest of equal notes counts, and loudness is left out
    assert Events(resolution=4).decode(Events(resolution=4)(path))[0] == (0, 60, 1)


def test_files_of_other_programs_are_read(tmp_path):
    """Two tracks, notes that end by a velocity of 0, one that never ends, and times that are off the grid."""
    mido = pytest.importorskip("mido")
    tracks = []
    for channel, pitch in ((0, 60), (1, 67)):
        on = mido.Message("note_on", note=pitch, velocity=80, channel=channel, time=97)
        off = mido.Message("note_on", note=pitch, velocity=0, channel=channel, time=95)
        tracks.append(mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=300000), on, off, on.copy(note=1)]))
    mido.MidiFile(type=1, ticks_per_beat=96, tracks=tracks).save(tmp_path / "a.mid")
    rounded = Events(resolution=4, voices=2, lossy=True)
    assert rounded.decode(rounded(tmp_path / "a.mid")) == [(1, 60, 1, 0), (1, 67, 1, 1)]
    with pytest.raises(
        MediaError, match=r"a\.mid': onset is 1\.01.*, wanted a multiple of 1/4 beat; use another resolution, or lossy"
    ):
        Events(resolution=4, voices=2)(tmp_path / "a.mid")
    with pytest.raises(MediaError, match=r"a\.mid' has a note in channel 1, but voices=1; use more, or 0"):
        Events(voices=1, lossy=True)(tmp_path / "a.mid")


def test_files_that_are_damaged_are_refused_and_never_crash(tmp_path):
    pytest.importorskip("mido")
    whole = Events(resolution=4, velocities=127, voices=4).write(CHORD, tmp_path / "a").read_bytes()
    draw, refused = np.random.default_rng(0), 0
    for case in range(300):
        broken = bytearray(whole[: draw.integers(len(whole))] if case % 2 else whole)
        for at in draw.integers(0, max(len(broken), 1), 3 if broken else 0):
            broken[at] = draw.integers(256)
        try:
            Events(voices=16, lossy=True)(bytes(broken))
        except MediaError as error:
            refused += "no MIDI file that can be read" in str(error)
    assert refused > 50


def test_without_mido_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mido", None)
    with pytest.raises(MediaError, match=re.escape("pip install 'multimodal-stream[midi]'")):
        Events()(b"MThd")
    with pytest.raises(MediaError, match=re.escape("pip install 'multimodal-stream[midi]'")):
        Events().write([(0, 60, 1)], "a.mid")
    assert len(Events()([(0, 60, 1)])) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([(1, 60, 1), (0, 60, 1)], "note 1 begins before note 0; sort the notes by their onsets"),
        ([(1, 60, 1), (1, 60, 2)], "note 1, C4, has the onset, pitch and voice of a note before; leave one out"),
        ([(0, 60)], r"note 0 is tuple .*, wanted \(onset, pitch, duration\)"),
        ([(0.3, 60, 1)], "note 0: onset is 0.3, wanted a multiple of 1/12 beat; use another resolution, or lossy=True"),
        ([(0, 128, 1)], "note 0: pitch is 128, wanted 0 to 127"),
        ([(0, 60.5, 1)], "note 0: pitch is 60.5, wanted a whole number"),
        ([(0, 60, 0)], "note 0: duration is 0, wanted 0.08.* beats"),
        ([(float("nan"), 60, 1)], "note 0: onset is float nan, wanted a number"),
        ([("x", 60, 1)], "note 0: onset is str 'x', wanted a number"),
        ([(0, "60", 1)], "note 0: pitch is str '60', wanted a number"),
        ([(0, True, 1)], "note 0: pitch is bool True, wanted a number"),
        (7, r"wanted a list of notes \(onset, pitch, duration\), or a MIDI file, not int 7"),
        ("none.mid", "there is no file 'none.mid'"),
    ],
)
def test_bad_notes_are_refused_by_name(value: Any, message: str):
    with pytest.raises(MediaError, match=f"^Events.encode: {message}"):
        Events()(value)


def test_a_velocity_between_levels_is_refused_or_rounded():
    with pytest.raises(
        MediaError, match="velocity is 50, which is none of the 4 levels; use velocities=127, or lossy=True"
    ):
        Events(velocities=4)([(0, 60, 1, 50)])
    rounded = Events(velocities=4, lossy=True)
    assert rounded.decode(rounded([(0, 60, 1, 50)])) == [(0, 60, 1, 43)]
    whole = Events(resolution=1, lossy=True)
    assert whole.decode(whole([(0.6, 60, 0.2)])) == [(1, 60, 1)]
    for number in range(1, 128):
        assert Events(velocities=127)._velocity(Events(velocities=127)._level(number)) == number


# graphs


def test_pairs_are_both_ways_by_their_names():
    nodes = np.zeros((3, 1))
    one = Graph(features=1, edges=("a", "b"))({"nodes": nodes, "edges": [(0, 2, "b"), (1, 1, "a")]})
    assert one.pairs is not None
    assert one.pairs.tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0], [1, 1, 0]]
    kind = Graph(features=1, edges=("a", "b"), directed=True)
    other = kind({"nodes": nodes, "edges": [(0, 2, "b"), (2, 0, "b")]})
    assert other.pairs is not None
    assert [(q, k, kind.relations[r]) for q, k, r in other.pairs.tolist()] == [
        (0, 2, "b"), (2, 0, "b back"), (2, 0, "b"), (0, 2, "b back")
    ]  # fmt: skip
    assert kind.decode(other)["edges"] == [(0, 2, "b"), (2, 0, "b")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"nodes": [[1.0]]}, 'wanted {"nodes": .., "edges": ..}, not dict'),
        (
            {"nodes": [[1.0, 2.0]], "edges": []},
            r"nodes: wanted an array, tensor or list \(nodes, 1\) of numbers, not list",
        ),
        ({"nodes": [[1.0]], "edges": [(0, 1)]}, r"edge 0 is tuple .*, wanted two nodes, numbers from 0 to 0"),
        ({"nodes": [[1.0]], "edges": [(0, 0, "x")]}, r"edge 0 is tuple .*, wanted \(from, to\)"),
        (
            {"nodes": [[1.0], [2.0]], "edges": [(0, 1), (1, 0)]},
            "edge 1, tuple .*, is there already, as edge 0; .* unless directed=True",
        ),
    ],
)
def test_bad_graphs_are_refused_by_name(value: Any, message: str):
    with pytest.raises(MediaError, match=f"^Graph.encode: {message}"):
        Graph(features=1)(value)


def test_an_unknown_type_of_edges_is_refused_by_name():
    with pytest.raises(MediaError, match=r"edge 0 has type str 'frend', not one of friend, foe; did you mean"):
        Graph(features=1, edges=("friend", "foe"))({"nodes": [[1.0]], "edges": [(0, 0, "frend")]})


GRAPH_CORE = mm.Core(
    width=32,
    depth=1,
    heads=2,
    axes=Graph.axes,
    rotary_split=(2, 1, 1, 0),
    block=(SelfAttention(mask=Linked("edge") | ~SameSegment()), MLP()),
)
REACHED = "graph -> kinds:label"


def trees(seed: int, count: int = 48) -> list[dict[str, Any]]:
    """Random trees in which one node is marked; those at its edges are near."""
    draw, samples = np.random.default_rng(seed), []
    for _ in range(count):
        order = draw.permutation(10)
        edges = [(int(order[i]), int(order[draw.integers(i)])) for i in range(1, 10)]
        mark = int(draw.integers(10))
        near = {mark, *(b for a, b in edges if a == mark), *(a for a, b in edges if b == mark)}
        nodes = np.zeros((10, 1), dtype=np.float32)
        nodes[mark] = 1
        kinds = ["near" if i in near else "far" for i in range(10)]
        samples.append({"graph": {"nodes": nodes, "edges": edges}, "kinds": kinds})
    return samples


@pytest.fixture(scope="module")
def model() -> mm.Model:
    kinds = {"graph": Graph(features=1), "label": Labels(("near", "far"))}
    return mm.Model(kinds, GRAPH_CORE, [mm.Task(REACHED, mm.EachRow(of="graph"))], seed=0)


def test_edges_are_learned_and_order_is_not(model: mm.Model):
    """What a node has in itself says it of the marked one alone."""
    train, test = trees(0, 200), trees(1)
    mm.fit(model, {REACHED: train}, steps=100, batch=16, lr=1e-2, quiet=True, device="cpu")
    model.eval()
    right = mm.evaluate(model, REACHED, test)["rows"]
    counts = Counter(kind for sample in test for kind in sample["kinds"])
    assert counts["far"] / counts.total() < 0.8, "the commonest answer would not do"
    assert right > 0.97
    for sample in test[:8]:
        nodes, edges = sample["graph"]["nodes"], sample["graph"]["edges"]
        order = np.random.default_rng(2).permutation(len(nodes))
        new = np.argsort(order)
        moved = {"nodes": nodes[order], "edges": [(int(new[a]), int(new[b])) for a, b in edges]}
        answers = [model.predict(REACHED, graph=graph) for graph in (sample["graph"], moved)]
        assert [answers[0].value[i] for i in order] == answers[1].value
        assert answers[0].confidence == pytest.approx(answers[1].confidence, rel=1e-3)
    without = [{**sample, "graph": {**sample["graph"], "edges": []}} for sample in test]
    assert mm.evaluate(model, REACHED, without)["rows"] < right - 0.1


# words


def test_words_alike_have_features_alike_and_no_two_are_the_same():
    kind = Words()
    x = torch.nn.functional.normalize(kind(["walking", "talking", "walked", "xylem", "Walking"]).content, dim=1)
    likeness = x @ x.T
    assert likeness[0, 1] > likeness[0, 3] + 0.1
    assert likeness[0, 2] > likeness[0, 3] + 0.1
    assert float(likeness[0, 4]) < 0.9
    texts = [f"w{i}" for i in range(500)]
    assert len(kind(texts).content.unique(dim=0)) == 500
    assert torch.equal(kind("two words").content, kind(["two", "words"]).content)
    for value, message in (
        (["a", ""], "word 1 is str ''"),
        (3, "not int 3"),
        (["a", 1], "word 1 is int 1, wanted a text"),
    ):
        with pytest.raises(MediaError, match=f"Words.encode: .*{message}"):
            kind(value)


def test_words_never_seen_are_tagged_by_their_endings():
    """The tag is that of the ending; no word of the test was seen."""
    draw = np.random.default_rng(0)

    def sentence(letters: str) -> dict[str, Any]:
        stems = ["".join(draw.choice(list(letters), 4)) for _ in range(6)]
        ends = draw.choice(["ing", "ed", "ly"], 6).tolist()
        return {"words": [stem + end for stem, end in zip(stems, ends, strict=True)], "tags": ends}

    kinds = {"words": Words(), "tag": Labels(("ing", "ed", "ly"))}
    task = "words -> tags:tag"
    model = mm.Model(kinds, mm.Core(width=32, depth=1, heads=2), [mm.Task(task, mm.EachRow(of="words"))], seed=0)
    train = [sentence("abcdefgh") for _ in range(400)]
    mm.fit(model, {task: train}, steps=100, batch=16, lr=3e-3, quiet=True, device="cpu")
    test = [sentence("mnopqrst") for _ in range(30)]
    assert mm.evaluate(model.eval(), task, test)["rows"] > 0.95


# all three in one model


def test_packed_is_alone_is_cached_is_saved(lively, tmp_path):
    notes = Events(resolution=4, longest=6, velocities=3, voices=2, lossy=True)
    kinds = {
        "notes": notes,
        "graph": Graph(features=3),
        "words": Words(buckets=128),
        "text": TextBytes(),
        "label": Labels(("x", "y")),
    }
    tasks = ["words graph -> notes", "notes graph -> text", mm.Task("words -> tags:label", mm.EachRow(of="words")),
             mm.Task("notes graph -> kinds:label", mm.EachRow(of="graph"))]  # fmt: skip
    core = mm.Core(
        width=32,
        depth=2,
        heads=2,
        axes=(*Graph.axes, "voice"),
        block=(SelfAttention(mask=Linked("edge") | ~SameSegment()), MLP()),
    )
    model = lively(mm.Model(kinds, core, tasks))
    samples = []
    for i, (played, graph) in enumerate(zip(notes.examples(), kinds["graph"].examples(), strict=True)):
        words = ["a", "few", "more", "Words", ",", "5"][: 2 + i]
        answers = {
            "tags": ["xy"[j % 2] for j in range(len(words))],
            "kinds": ["xy"[j % 2] for j in range(len(graph["nodes"]))],
        }
        samples.append({"notes": played, "graph": graph, "words": words, "text": "abcd"[: 1 + i], **answers})
    found = verify(model, {task if isinstance(task, str) else task.pattern: samples for task in tasks})
    assert found.passed, str(found)
    model.save(tmp_path / "model")
    again = mm.Model.load(tmp_path / "model").eval()
    read = {"words": samples[0]["words"], "graph": samples[0]["graph"]}
    first, second = (m.generate("words graph -> notes", [read], max_tokens=12)[0] for m in (model, again))
    assert first.tokens is not None
    assert dataclasses.astuple(first)[:2] == dataclasses.astuple(second)[:2]
    assert torch.equal(first.tokens.position_NA, notes._positions(first.tokens.content.tolist()))


def test_a_melody_is_written_and_its_probability_is_that_of_one_pass(lively):
    """A scale is learned by heart, and transposed where the first note says so."""
    kind = Events(resolution=2, longest=4)
    scales = [[(i / 2, 50 + start + i, 0.5) for i in range(4)] for start in range(12)]
    core = mm.Core(width=32, depth=2, heads=2)
    model = mm.Model({"notes": kind}, core, ["-> notes"], seed=0)
    mm.fit(
        model,
        {"-> notes": [{"notes": s} for s in scales]},
        steps=150,
        batch=12,
        lr=5e-3,
        optimizer="muon",
        quiet=True,
        device="cpu",
    )
    model.eval()
    for scale in scales[::4]:
        answer = model.generate("-> notes", begin=scale[:1], max_tokens=20, temperature=0.0)
        assert answer.value == scale
    stream = model.pack("-> notes", [{"notes": answer.value}])
    with torch.no_grad():
        log_p_NV = model.logits(stream)["-> notes"].log_softmax(-1)
    target_N = stream.readings["-> notes"].target
    assert target_N is not None
    nats = float(log_p_NV[2:].gather(1, target_N[2:, None]).sum())
    assert math.log(answer.confidence) == pytest.approx(nats, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Events(resolution=0), "Events: resolution=0 must be a whole number from 1 to 960"),
        (lambda: Events(voices=17), "Events: voices=17 must be a whole number from 0 to 16"),
        (lambda: Graph(features=0), "Graph: features=0 must be a whole number, 1 or more"),
        (
            lambda: Graph(features=1, edges="edge"),
            r"Graph: edges='edge' is one name; give a list of names, as \('edge',\)",
        ),
        (
            lambda: Graph(features=1, edges=("a", "a back"), directed=True),
            "Graph: two relations along edges have the name 'a back'",
        ),
        (lambda: Words(shortest=3, longest=2), "Words: longest=2 must be at least shortest=3"),
    ],
)
def test_bad_settings_are_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
