"""Relations between tokens: every path against sums over Python sets of pairs, and what may depend on a pair."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import multimodal as mm
from multimodal.attention import Mechanism, Related, ScaledDotProduct, Soft, plan_attention
from multimodal.check import ConformanceError, tokenizer_checks, verify
from multimodal.declare import declaration, rebuild
from multimodal.export.programs import programs_of
from multimodal.heads.contrast import fingerprint
from multimodal.layers import MLP, SelfAttention
from multimodal.look import xray
from multimodal.masks import LAW, PREFIX_LM, Alone, Causal, Linked, Prior, Rule, SameSample, SameSegment, Window
from multimodal.packer import Packer
from multimodal.relations import linked, named_relations
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.stream import Stream
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal.train.spikes import load_stream, samples_of, save_stream
from multimodal_tokenizers import ClassTokens, Labels, TextBytes

Pair = tuple[int, int, int]


@dataclass(frozen=True)
class Graph(Tokenizer):
    """(kinds of nodes, pairs (query, key, relation))."""

    vocab_size = 6
    relations = ("edge", "twin")

    def encode(self, value: Any) -> Tokens:
        nodes, pairs = value
        position_NA = torch.zeros(len(nodes), 3)  # nodes have no order
        return Tokens(torch.tensor(nodes), position_NA, torch.tensor(pairs).reshape(-1, 3))


@dataclass(frozen=True)
class Steps(Tokenizer):
    """The same with another numbering of its relations, one of which is that of graphs; causal, so pairs look back."""

    vocab_size = 6
    causal = True
    relations = ("back", "edge")

    def encode(self, value: Any) -> Tokens:
        nodes, pairs = value
        return Tokens(torch.tensor(nodes), at_times(torch.arange(len(nodes))), torch.tensor(pairs).reshape(-1, 3))


KINDS = {"graph": Graph(), "steps": Steps(), "text": TextBytes(), "label": Labels(("a", "b", "c"))}
READ = "text graph steps -> label"


def random_graph(draw: torch.Generator, nodes: int, pairs: int, back: bool = False) -> tuple[list[int], list[Pair]]:
    def one(most: int) -> int:
        return int(torch.randint(most, (1,), generator=draw))

    found = []
    for _ in range(pairs):
        q = one(nodes)
        found.append((q, one(q + 1) if back else one(nodes), one(2)))
    return [one(6) for _ in range(nodes)], found


def samples(count: int = 6, nodes: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Samples of equal and of different shapes; one has no pairs, one has a pair twice and one with itself."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        graph = random_graph(draw, nodes + i % 3, 7 if i != 1 else 0)
        steps = random_graph(draw, 3 + i % 2, 4, back=True)
        found.append({"text": "hi"[: 1 + i % 2], "graph": graph, "steps": steps, "label": "abc"[i % 3]})
    found[0]["graph"] = ([0, 1, 2, 3, 4], [(0, 1, 0), (0, 1, 0), (0, 1, 1), (2, 2, 1), (4, 0, 0), (1, 4, 1)])
    return found


NAMES = {"graph": Graph.relations, "steps": Steps.relations}


def related(stream: Stream, batch: list[dict[str, Any]]) -> set[tuple[int, int, str]]:
    """(row of the query, row of the key, name) of every pair of a stream, from the values themselves."""
    found, start = set(), 0
    sample_of = dict(enumerate(stream.readings[READ].samples))
    for place, span in enumerate(stream.layout.spans):
        at = start
        for field in ("text", "graph", "steps"):
            value = batch[sample_of[place]][field]
            for q, k, r in value[1] if field in NAMES else ():
                found.add((at + q, at + k, NAMES[field][r]))
            at += len(value if field == "text" else value[0])
        start += span.total
    return found


def packed(batch: list[dict[str, Any]]) -> Stream:
    return Packer(KINDS, [READ])([(READ, sample) for sample in batch])


def table(stream: Stream, batch: list[dict[str, Any]], names: tuple[str, ...]) -> Tensor:
    """(T, T): whether the pair has one of these relations."""
    found = torch.zeros(len(stream), len(stream), dtype=torch.bool)
    for q, k, name in related(stream, batch):
        found[q, k] |= name in names
    return found


def test_a_pair_is_found_by_bisection_and_no_other():
    draw = torch.Generator().manual_seed(0)
    for rows in (1, 2, 7, 20):
        for count in (1, 2, 5):
            for pairs in (1, 3, 90):
                end = torch.tensor([rows, rows, count])
                pairs_E3 = (torch.rand(pairs, 3, generator=draw) * end).long()
                links = linked(pairs_E3, rows, tuple("abcde"[:count]))
                found = links.table.sets[links[:, None].relation(links[None])]
                wanted = {tuple(pair) for pair in pairs_E3.tolist()}
                got = {tuple(pair) for pair in found.nonzero().tolist()}
                assert got == wanted


RULES: dict[str, Rule] = {
    "linked": Linked("edge"),
    "several": Linked("edge", "back"),
    "or": Linked("twin") | ~SameSegment(),
    "not": SameSample() & Causal() & ~Linked("edge"),
    "window": Window(2) & (Linked("edge") | ~Linked("edge", "twin", "back")),
}


def rule_by_hand(rule: str, stream: Stream, batch: list[dict[str, Any]]) -> Tensor:
    """Which row may attend to which, (T, T)."""
    info, itself = stream.layout.info, torch.eye(len(stream), dtype=torch.bool)
    order, segment, free = info.order, info.segment, info.bidirectional != 0
    law = (info.sample[:, None] == info.sample) & ((order <= order[:, None]) | free)
    other = segment[:, None] != segment
    edge, twin, back = (table(stream, batch, (name,)) for name in ("edge", "twin", "back"))
    near = (order[:, None] - order).abs() < 2
    return (
        law
        & {
            "linked": edge | itself,
            "several": edge | back | itself,
            "or": twin | itself | other,
            "not": (order <= order[:, None]) & ~(edge | itself),
            "window": near & (edge | itself | ~(edge | twin | back | itself)),
        }[rule]
    )


def attended(stream: Stream, rule: Rule, backend: str, mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bare = mechanism.bare
    return plan_attention(rule, stream.layout, backend=backend, bare=bare).attend(q, k, v, mechanism, 0)


def plainly(prior: Prior | None = None) -> Mechanism:
    return Mechanism(ScaledDotProduct(), prior, Soft(), 4, 8)


def qkv(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, 4, 8, generator=draw) for _ in range(3))  # type: ignore[return-value]


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias_HTT: Tensor | None = None) -> Tensor:
    score = torch.einsum("thk,mhk->htm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    score = score if bias_HTT is None else score + bias_HTT
    score = score.masked_fill(~allowed, -math.inf)
    weight = score.softmax(-1).nan_to_num(0.0)  # a row that sees nothing reads nothing
    return torch.einsum("htm,mhk->thk", weight, v.double()).to(v.dtype)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("backend", ["dense", "runs", "flex"])
@pytest.mark.parametrize("rule", RULES)
def test_every_path_attends_along_the_pairs_that_were_given(rule: str, backend: str):
    batch = samples(nodes=9 if rule == "window" else 5)  # long enough for blocks
    stream = packed(batch)
    allowed = rule_by_hand(rule, stream, batch)
    assert allowed.any(1).sum() > len(stream) / 2
    q, k, v = qkv(len(stream))
    with torch.no_grad():
        found = attended(stream, RULES[rule], backend, plainly(), q, k, v)
    torch.testing.assert_close(found, softmax_by_hand(q, k, v, allowed), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize("rule", [PREFIX_LM, Linked("edge", "back") | ~SameSegment(), Window(2)])
def test_a_prior_is_a_number_for_each_relation(rule: Rule, backend: str):
    batch = samples(nodes=9)
    stream = packed(batch)
    mechanism = plainly(Related("twin", "edge", "nowhere"))
    (weights,) = mechanism.prior_weights
    assert isinstance(weights.table, nn.Parameter)
    assert torch.equal(weights.table, torch.zeros(4, 3))  # nothing is preferred at first
    number = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    weights.table.data.copy_(number)
    q, k, v = qkv(len(stream))
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    found = attended(stream, rule, backend, mechanism, q, k, v)
    (found * upstream).sum().backward()

    mine = number.double().requires_grad_()
    tables = torch.stack([table(stream, batch, (name,)) for name in ("twin", "edge", "nowhere")]).double()
    info = stream.layout.info
    allowed = (rule if rule == PREFIX_LM else LAW & Alone(rule)).allows(info[:, None], info[None])
    wanted = softmax_by_hand(q, k, v, allowed, torch.einsum("hr,rtm->htm", mine, tables))
    (wanted * upstream).sum().backward()
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)
    assert mine.grad is not None
    assert weights.table.grad is not None
    torch.testing.assert_close(weights.table.grad, mine.grad.float(), atol=1e-5, rtol=1e-4)
    assert float(mine.grad[:, :2].abs().min()) > 1e-4, "the case has both relations"
    assert float(weights.table.grad[:, 2].abs().max()) == 0


def reading(core: mm.Core, tasks: list[str | Task] | None = None) -> mm.Model:
    return mm.Model(KINDS, core, tasks or [READ]).eval()


STRICT = mm.Core(width=16, depth=2, heads=2, rotary_split=(0, 0, 0), mask=Linked("edge", "back"))


@pytest.mark.parametrize("backend", ["dense", "runs"])
def test_a_pair_that_is_removed_changes_exactly_the_rows_that_may_depend_on_it(lively, backend: str):
    batch = samples()
    model = lively(reading(STRICT))
    stream = model.packer([(READ, sample) for sample in batch])
    pairs = {(q, k) for q, k, name in related(stream, batch) if name in ("edge", "back")}
    with torch.inference_mode():
        before = model(stream, backend=backend)
    checked = 0
    order_of = stream.readings[READ].samples
    for number, sample in enumerate(batch):
        for i, (q, k, r) in enumerate(sample["graph"][1]):
            nodes, own = sample["graph"]
            fewer = [pair for j, pair in enumerate(own) if j != i]
            if (q, k, r) in fewer:
                continue  # given twice
            other = [*batch[:number], {**sample, "graph": (nodes, fewer)}, *batch[number + 1 :]]
            with torch.inference_mode():
                after = model(model.packer([(READ, one) for one in other]), backend=backend)
            changed = {int(row) for row in (before != after).any(1).nonzero()}
            # in two layers: the query itself, and the queries that attend to it
            start = sum(span.total for span in stream.layout.spans[: order_of.index(number)]) + len(sample["text"])
            wanted: set[int] = set()
            if r == 0 and q != k:
                wanted = {start + q} | {a for a, b in pairs if b == start + q}
            assert changed == wanted, (number, i)
            checked += len(wanted) > 1
    assert checked > 3


def test_states_depend_on_the_tokens_that_are_linked_to_them_and_on_no_others(lively):
    batch = samples()
    model = lively(reading(STRICT))
    stream = model.packer([(READ, sample) for sample in batch])
    one = table(stream, batch, ("edge", "back")) | torch.eye(len(stream), dtype=torch.bool)
    info = stream.layout.info
    one &= LAW.allows(info[:, None], info[None])
    two = (one.float() @ one.float()) > 0  # two layers
    rows_TD = model.rows(stream).detach().requires_grad_()
    states = model.core(rows_TD, stream.position_TA, stream.layout)
    direction = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(4))
    depends = torch.stack(
        [torch.autograd.grad((s * direction).sum(), rows_TD, retain_graph=True)[0].abs().sum(1) > 0 for s in states]
    )
    assert torch.equal(depends, two)


MIXED = mm.Core(
    width=16,
    depth=2,
    heads=2,
    kv_heads=1,
    block=(
        SelfAttention(mask=Linked("edge", "back") | ~SameSegment()),
        SelfAttention(prior=Related("twin", "edge")),
        MLP(),
    ),
)
WRITE = "text graph -> answer:text"
NODES = "text graph -> classes:label"
TASKS = [READ, WRITE, Task(NODES, mm.EachRow(of="graph"))]


def answered() -> dict[str, list[dict[str, Any]]]:
    batch = samples(4)
    for sample in batch:
        sample["answer"] = "on" * len(sample["text"])
        sample["classes"] = ["abc"[n % 3] if n else None for n in sample["graph"][0]]
    return {READ: batch, WRITE: batch, NODES: batch}


def test_packed_is_alone_is_cached_is_saved(lively, tmp_path):
    model = lively(reading(MIXED, TASKS))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prior_weights" in name:
                weight.normal_(generator=torch.Generator().manual_seed(5))
    given = answered()
    report = verify(model, given)
    assert report.passed, str(report)
    model.save(tmp_path / "model")
    loaded = mm.Model.load(tmp_path / "model")
    assert loaded.core.core == MIXED
    for task in (READ, WRITE):
        assert loaded.predict(task, given[task]) == model.predict(task, given[task])
    assert rebuild(declaration(Linked("a", "b"))) == Linked("a", "b")
    assert named_relations(MIXED) == ("edge", "back", "twin")


@pytest.mark.parametrize("length", [1, 4])
def test_what_follows_a_cached_prefix_has_its_relations(lively, length: int):
    """With one token more the cache takes a step, with several it appends; the token has a pair with itself."""
    core = MIXED.replace(block=(SelfAttention(mask=Linked("back") | ~SameSegment(), prior=Related("edge")), MLP()))
    model = lively(reading(core, ["text steps -> answer:text"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prior_weights" in name:
                weight.fill_(2.0)
    steps = (list(range(length)), [(i, j, (i + j + length) % 2) for i in range(length) for j in range(i + 1)])
    prefix = model.read("text steps -> answer:text", text="hey")
    sample = {"text": "hey", "steps": steps}
    plain = model.generate("text steps -> answer:text", [sample], max_tokens=4)[0]
    cached = model.generate("text steps -> answer:text", [{"steps": steps}], prefix=prefix, max_tokens=4)[0]
    assert cached.tokens is not None
    assert plain.tokens is not None
    assert cached.tokens.content.tolist() == plain.tokens.content.tolist()
    assert cached.confidence == pytest.approx(plain.confidence, rel=1e-5)

    stream = model.pack("text steps -> answer:text", [sample], answers=False)
    whole = model(stream)
    cache = model.core.core.cache(rows=1, capacity=32)
    cut = len("hey")

    def part(rows: slice, total: int) -> Tensor:
        layout = replace(stream.layout, spans=(mm.attention.Span(0, total),), info=stream.layout.info[rows])
        return model.core(model.rows(stream)[rows], stream.position_TA[rows], layout, cache=cache)

    with torch.inference_mode():
        part(slice(0, cut), cut)
        again = part(slice(cut, cut + length), length)
    torch.testing.assert_close(again, whole[cut : cut + length], atol=1e-5, rtol=0)


def test_no_matrix_of_the_whole_pack_is_made(lively):
    model = lively(reading(MIXED.replace(kv_heads=None)))
    batch = samples(200)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return out

    with Largest(), torch.no_grad():
        stream = model.packer([(READ, sample) for sample in batch])
        model(stream)
    assert largest < len(stream) ** 2 / 8
    links = stream.layout.info.links
    assert links is not None
    pairs = len(related(stream, batch))
    numbers = [x.numel() for x in vars(links.table).values() if isinstance(x, Tensor)]
    assert sum(numbers) < 3 * (len(stream) + pairs) + 200


def test_the_xray_shows_what_the_pairs_do(lively):
    model = lively(reading(MIXED))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prior_weights" in name:
                weight.copy_(torch.tensor([[1.0, 10.0], [2.0, 20.0]]))
    (sample,) = samples(1)
    ray = xray(model, READ, sample)
    n = {name: f.row_N for name, f in ray.fields.items()}
    masked, biased = ray.layers[:2]
    graph = n["graph"]
    edges = {(q, k) for q, k, r in sample["graph"][1] if r == 0} | {(i, i) for i in range(len(graph))}
    seen = masked.share_HTM[0][graph][:, graph] > 0
    assert {tuple(pair) for pair in seen.nonzero().tolist()} == edges
    prior = biased.log_prior_HTM[:, graph][:, :, graph]
    both = {(q, k): [0.0, 0.0] for q in range(5) for k in range(5)}
    for q, k, r in set(sample["graph"][1]):
        both[q, k] = [x + (10.0, 1.0)[r] * (h + 1) for h, x in enumerate(both[q, k])]
    for (q, k), wanted in both.items():
        assert prior[:, q, k].tolist() == pytest.approx(wanted)


def test_a_stream_with_pairs_is_saved_and_taken_apart(lively, tmp_path):
    model = lively(reading(MIXED))
    batch = samples()
    stream = model.packer([(READ, sample) for sample in batch])
    save_stream(tmp_path / "stream.safetensors", stream)
    again = load_stream(tmp_path / "stream.safetensors")
    with torch.inference_mode():
        assert torch.equal(model(again), model(stream))
        for task, number, alone in samples_of(again):
            wanted = model(model.packer([(task, batch[number])]))
            torch.testing.assert_close(model(alone), wanted, atol=1e-5, rtol=0)
    links = stream.layout.info.links
    assert links is not None
    broken = replace(links, table=replace(links.table, which=links.table.which + 99))
    info = replace(stream.layout.info, links=broken)
    save_stream(tmp_path / "broken.safetensors", replace(stream, layout=replace(stream.layout, info=info)))
    with pytest.raises(CheckpointError, match="its parts do not fit each other"):
        load_stream(tmp_path / "broken.safetensors")
    moved = stream.to("meta").layout.info.links
    assert moved is not None
    assert {x.device.type for x in (moved.number, *vars(moved.table).values()) if isinstance(x, Tensor)} == {"meta"}


def test_tokens_that_are_left_out_or_put_before_take_their_pairs_along():
    tokens = Graph()(([0, 1, 2, 3], [(0, 3, 1), (3, 2, 0), (1, 3, 0)]))
    kept = tokens.kept(torch.tensor([True, False, True, True]))
    assert kept.pairs is not None
    assert kept.content.tolist() == [0, 2, 3]
    assert kept.pairs.tolist() == [[0, 2, 1], [2, 1, 0]]
    around = ClassTokens(Graph(), count=2)
    assert around.relations == ("edge", "twin")
    pairs = around(([0, 1], [(0, 1, 1)])).pairs
    assert pairs is not None
    assert pairs.tolist() == [[2, 3, 1]]
    assert Graph()(([0, 1], [])).pairs is None
    # two graphs that differ in an edge are two things that belong to two captions
    assert tokens.pairs is not None
    assert fingerprint([tokens]) != fingerprint([replace(tokens, pairs=tokens.pairs[:2])])


def test_hidden_tokens_leave_the_pairs_of_the_others():
    task = Task("graph -> graph", mm.Masked(share=0.4))
    packer = Packer({"graph": Graph()}, [task])
    value = ([0, 1, 2, 3, 4], [(i, j, 0) for i in range(5) for j in range(5)])
    (part,) = packer.prepare("graph -> graph", {"graph": value}, "", random=False).parts
    visible = part.segments[0].tokens
    assert 0 < len(visible) < 5
    assert visible.pairs is not None
    assert {tuple(p) for p in visible.pairs.tolist()} == {
        (i, j, 0) for i in range(len(visible)) for j in range(len(visible))
    }


@dataclass(frozen=True)
class Chain(Steps):
    """Written token by token."""

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()


def test_what_is_written_has_no_pairs():
    packer = Packer({"steps": Chain()}, ["steps -> answer:steps"])
    sample = {"steps": ([0, 1], [(1, 0, 0)]), "answer": ([2, 3], [(1, 0, 0)])}
    stream = packer([("steps -> answer:steps", sample)])
    links = stream.layout.info.links
    assert links is not None
    assert links.number.tolist() == [1, 2, 0, 0, 0]


def parents(seed: int, count: int, told: bool = True) -> list[dict[str, Any]]:
    """Nodes whose class is the kind of the node that they point at: only the pairs say which that is.

    told: whether the pairs are those of the classes; else they point anywhere.
    """
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        kinds, parent, other = (torch.randint(n, (5,), generator=draw).tolist() for n in (3, 5, 5))
        pairs = [(i, p, 0) for i, p in enumerate(parent if told else other)]
        found.append({"graph": (kinds, pairs), "classes": ["abc"[kinds[p]] for p in parent]})
    return found


@pytest.mark.parametrize("core", [{"mask": SameSample() & Linked("edge")}, {"prior": Related("edge")}])
def test_a_model_learns_what_only_the_pairs_say(core: dict[str, Any]):
    task = "graph -> classes:label"
    made = mm.Core(width=16, depth=2, heads=2, **core)
    model = mm.Model({k: KINDS[k] for k in ("graph", "label")}, made, [Task(task, mm.EachRow(of="graph"))])
    mm.fit(model, {task: parents(0, 300)}, steps=60, batch=24, lr=5e-2, quiet=True)
    assert mm.evaluate(model, task, parents(1, 40))["rows"] > 0.93
    assert mm.evaluate(model, task, parents(1, 40, told=False))["rows"] < 0.6


def test_bad_pairs_and_names_are_refused():
    for names in ((), ("a", "a"), (1,), (("a", "b"),)):
        with pytest.raises(
            ConfigError, match=r"Linked: .* must be one or more different names of relations, as in Linked\('"
        ):
            Linked(*names)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"Related: .* must be one or more different names"):
            Related(*names)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"the core names the relation 'edges', .* there are 'edge', 'twin'; did you mean 'e"
    ):
        mm.Model(
            {"graph": Graph(), "text": TextBytes()}, mm.Core.tiny().replace(prior=Related("edges")), ["graph -> text"]
        )
    with pytest.raises(
        ConfigError, match="which no tokenizer declares; there are none: a tokenizer declares `relations`"
    ):
        mm.Model({"text": TextBytes()}, STRICT, ["text -> text"])
    with pytest.raises(
        ConfigError, match="Tower: its core names the relations edge, back, but a tower's content has no"
    ):
        mm.Tower(Graph(), STRICT)

    @dataclass(frozen=True)
    class Raw(Tokenizer):
        vocab_size = 3
        relations = ("edge",)

        def encode(self, value: Any) -> Tokens:
            return Tokens(torch.tensor([0, 1]), torch.zeros(2, 3), value)

    pair = torch.tensor([[0, 1, 0]])
    for pairs, message in (
        (pair.int(), r"Raw.encode: pairs is torch.int32 \(1, 3\), wanted int64 \(E, 3\): query, key, relation"),
        (pair[:, :2], r"Raw.encode: pairs is torch.int64 \(1, 2\), wanted int64 \(E, 3\)"),
        ([(0, 1, 0)], r"Raw.encode: pairs is list .*, wanted int64 \(E, 3\)"),
        (pair + 1, "Raw.encode: pairs name tokens from 1 to 2, but there are 2"),
        (torch.tensor([[0, -1, 0]]), "Raw.encode: pairs name tokens from -1 to 0, but there are 2"),
        (torch.tensor([[0, 1, 1]]), "Raw.encode: pairs name relations from 1 to 1, but there are 1"),
    ):
        with pytest.raises(MediaError, match=message):
            Raw()(pairs)
    undeclared = dataclass(frozen=True)(type("Undeclared", (Raw,), {"relations": ()}))
    with pytest.raises(
        MediaError, match="pairs name relations from 0 to 0, but there are 0; declare `relations`, their"
    ):
        undeclared()(pair)


def test_kernels_and_programs_that_know_no_pairs_are_refused(lively):
    model = lively(reading(MIXED))
    stream = model.packer([(READ, sample) for sample in samples()])
    for backend in ("varlen", "flex"):
        with pytest.raises(
            ConfigError, match=f"attention backend '{backend}' runs bare scores only, and this core has a pri"
        ):
            model(stream, backend=backend)
    strict = lively(reading(STRICT))
    with pytest.raises(ConfigError, match="attention backend 'varlen' runs only the default rule"):
        strict(stream, backend="varlen")
    with pytest.raises(
        ConfigError, match=r"export of .* the core reads the relations edge, twin of 'graph', and a program"
    ):
        programs_of(model, READ)
    both = lively(reading(MIXED, [READ, "text -> label"]))
    assert programs_of(both, "text -> label")  # no pairs are read there


_calls: list[int] = []


@dataclass(frozen=True)
class Bent(Graph):
    """Graphs with a fault."""

    fault: str = ""

    def encode(self, value: Any) -> Tokens:
        tokens = super().encode(value)
        assert tokens.pairs is not None
        if self.fault == "far":
            return replace(tokens, pairs=tokens.pairs + torch.tensor([1, 0, 0]))
        if self.fault == "lost":
            return replace(tokens, pairs=None)
        if self.fault == "counted":
            _calls.append(0)
            return replace(tokens, pairs=tokens.pairs[len(_calls) % 2 :])
        return tokens

    def answered(self, tokens: Tokens) -> Tensor:
        return tokens.content if self.fault == "numbers" else super().answered(tokens)


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        ("far", "relations_as_declared", "Bent.encode: pairs name tokens from 0 to 2, but there are 2"),
        ("numbers", "relations_as_declared", r"Bent.answered gave torch.int64 \(3,\), wanted bool \(3,\)"),
        ("counted", "deterministic", "gives other tokens the next time"),
        ("lost", "nothing_lost", "which ends differently, give the same 3 tokens"),
    ],
)
def test_the_checks_know_pairs(fault: str, check: str, message: str):
    values = [
        ([0, 1, 2], [(0, 1, 0), (1, 2, 1)]),
        ([3, 4], [(0, 1, 0), (1, 0, 1)]),
        ([5, 0, 1], [(2, 0, 1), (0, 2, 0)]),
    ]

    def found(kind: Bent) -> Any:
        return next(bound for bound in tokenizer_checks(kind, values) if str(bound) == check)

    found(Bent())()
    with pytest.raises(ConformanceError, match=message):
        found(Bent(fault=fault))()
