"""CTC decoding, priors, word lists and alignment against brute force over all alignments in float64."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.masks import PREFIX_LM, Chunked, SameSample, Window
from multimodal.shapes import CheckpointError, ConfigError, StreamError
from multimodal.transcription import Beam, GreedyCTC, Lexicon, ModelLM, NGramLM, align
from multimodal_tokenizers import TextBPE, TextBytes


def collapsed(path: Sequence[int], blank: int) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def every_text(log_p_NV: Tensor) -> dict[tuple[int, ...], float]:
    """log p(text) of every text that some alignment writes."""
    rows = log_p_NV.double().tolist()
    blank = len(rows[0]) - 1
    p: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(blank + 1), repeat=len(rows)):
        p[collapsed(path, blank)] += math.exp(sum(row[symbol] for row, symbol in zip(rows, path, strict=True)))
    return {text: math.log(value) for text, value in p.items()}


def rows(count: int, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).log_softmax(-1)


@pytest.fixture(scope="module")
def ngram() -> NGramLM:
    return NGramLM.train([[0, 1, 2], [0, 1], [1, 0, 2, 2], [2]], order=3, vocab=3)


@dataclass(frozen=True)
class Endless:
    """A prior without an end."""

    ends: bool = False
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def log_p(self, history: Sequence[int]) -> Tensor:
        self.asked.append(tuple(history))
        return torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).roll(history[-1] if history else 0).log()


def fused(text: tuple[int, ...], prior, weight: float, bonus: float) -> float:
    nats = sum(float(prior.log_p(text[:i])[symbol]) for i, symbol in enumerate(text))
    end = float(prior.log_p(text)[-1]) if prior.ends else 0.0
    return weight * (nats + end) + bonus * len(text)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_the_likeliest_path(seed: int):
    log_p_NV = rows(6, 4, seed)
    path = max(
        itertools.product(range(4), repeat=6),
        key=lambda path: sum(float(log_p_NV[n, symbol]) for n, symbol in enumerate(path)),
    )
    assert GreedyCTC()(log_p_NV) == list(collapsed(path, 3))


@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_has_every_text_with_its_probability(seed: int):
    log_p_NV = rows(5, 4, seed)
    wanted = every_text(log_p_NV)
    search = Beam(width=10_000, cutoff=math.inf).search()
    search.push(log_p_NV)
    found = {tuple(ids): score for ids, score in search.ranked()}
    assert found.keys() == wanted.keys()
    assert any(len(text) > 1 and text[0] == text[1] for text in wanted)  # a repeat, which needs a blank
    for text, score in found.items():
        assert score == pytest.approx(wanted[text], abs=1e-9)
    assert search.commit(last=True) == list(max(wanted, key=lambda text: wanted[text]))


def test_a_narrow_beam_differs_from_greedy_where_alignments_add_up():
    log_p_NV = torch.tensor([[0.4, 0.0, 0.6], [0.4, 0.0, 0.6]]).log()  # 'a' in three ways: 0.64, nothing: 0.36
    assert GreedyCTC()(log_p_NV) == []
    assert Beam(width=3)(log_p_NV) == [0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("weight", "bonus"), [(0.8, 0.0), (1.5, 1.2)])
@pytest.mark.parametrize("ends", [True, False])
def test_shallow_fusion_is_brute_force(ngram: NGramLM, seed: int, weight: float, bonus: float, ends: bool):
    prior = ngram if ends else Endless()
    log_p_NV = rows(5, 4, seed)
    wanted = {text: nats + fused(text, prior, weight, bonus) for text, nats in every_text(log_p_NV).items()}
    search = Beam(width=10_000, prior=prior, weight=weight, bonus=bonus, cutoff=math.inf).search()
    search.push(log_p_NV)
    ranked = search.ranked()
    assert len(ranked) == len(wanted)
    for ids, score in ranked:
        assert score == pytest.approx(wanted[tuple(ids)], abs=1e-9)
    assert search.commit(last=True) == list(max(wanted, key=lambda text: wanted[text]))


def test_a_language_model_is_called_once_for_each_history():
    prior = Endless()
    Beam(width=50, prior=prior, cutoff=math.inf)(rows(6, 4, 0))
    assert len(prior.asked) == len(set(prior.asked)) > 10


@pytest.mark.parametrize("decoder", [GreedyCTC(), Beam(width=8), Beam(width=8, prior=Endless(), weight=0.5)])
def test_pieces_read_as_the_whole(decoder):
    log_p_NV = rows(40, 4, 1)
    whole, parts = decoder.search(), decoder.search()
    whole.push(log_p_NV)
    for part in log_p_NV.split([1, 0, 7, 32]):
        parts.push(part)
    assert whole.ids() == parts.ids()
    assert len(whole.ids()) > 5
    assert whole.commit(last=True) == parts.commit(last=True)


def test_settled_symbols_do_not_change():
    log_p_NV = rows(60, 4, 3) * 2
    search = Beam(width=6, cutoff=math.inf).search()
    before: list[int] = []
    longest = 0
    for row in log_p_NV.log_softmax(-1):
        search.push(row[None])
        ids = search.ids()
        assert ids[: len(before)] == before
        before = ids[: search.settled()]
        longest = max(longest, len(before))
    assert longest > 5
    assert search.commit(last=True)[: len(before)] == before


def test_a_commit_goes_on_from_its_state():
    a, b, blank = (torch.eye(3)[i] * 20 for i in range(3))
    for decoder in (GreedyCTC(), Beam(width=4)):
        search = decoder.search()
        search.push(torch.stack([a, a]).log_softmax(-1))
        assert search.commit() == [0]
        search.push(torch.stack([a, b, blank, b]).log_softmax(-1))  # the first is still the same 'a'
        assert search.commit(last=True) == [1, 1]


def test_a_lexicon_is_brute_force_over_its_texts():
    text = TextBytes()
    lexicon = Lexicon(["a", "ab", "b"], text)
    letters = [ord("a"), ord("b"), ord(" ")]
    for seed in range(4):
        small_NV = rows(6, 4, seed)
        log_p_NV = torch.full((6, 257), -math.inf, dtype=torch.float64)
        log_p_NV[:, [*letters, 256]] = small_NV
        allowed = {
            ids: nats
            for ids, nats in every_text(small_NV).items()
            if not ids or all(w in ("a", "ab", "b") for w in "".join("ab "[i] for i in ids).split(" "))
        }
        assert any(2 in ids for ids in allowed)
        search = Beam(width=10_000, lexicon=lexicon, cutoff=math.inf).search()
        search.push(log_p_NV)
        found = {tuple(letters.index(i) for i in ids): nats for ids, nats in search.ranked()}
        assert found == pytest.approx(allowed, abs=1e-9)


def test_a_lexicon_of_byte_pair_pieces():
    text = TextBPE.train(["cat dog cat dog bird", "dog cat"], vocab_size=270)
    lexicon = Lexicon(["cat", "dog"], text)
    spelled = text("dog cat cat").content.tolist()
    state = lexicon.start
    for symbol in spelled:
        state = lexicon.step(state, symbol)
        assert state is not None
    assert lexicon.complete(state)
    wrong = text("dog bird").content.tolist()
    state = lexicon.start
    for symbol in wrong:
        state = state and lexicon.step(state, symbol)
    assert state is None


def test_a_text_that_ends_within_a_word_is_cut_back():
    text = TextBytes()
    log_p_NV = torch.full((6, 257), -30.0)
    for n, symbol in enumerate(b"ab cde"):
        log_p_NV[n, symbol] = 0.0
    beam = Beam(width=1, lexicon=Lexicon(["ab", "cdef"], text))
    assert beam(log_p_NV) == list(b"ab")


@pytest.mark.parametrize("words", [[], [""], ["two words"], "text"])
def test_a_lexicon_needs_words(words):
    with pytest.raises(ConfigError, match="Lexicon: "):
        Lexicon(words, TextBytes())


def test_witten_bell_by_hand():
    ngram = NGramLM.train([[0, 1]], order=2, vocab=2)  # 0, 1, end once each; the start is followed by 0
    base = [(1 + 3 / 3) / 6] * 3
    assert ngram.log_p([]).exp().tolist() == pytest.approx([(1 + base[0]) / 2, base[1] / 2, base[2] / 2])
    assert ngram.log_p([0]).exp().tolist() == pytest.approx([base[0] / 2, (1 + base[1]) / 2, base[2] / 2])
    ngram = NGramLM.train([[0, 0, 1, 2], [0]], order=1, vocab=4)  # 0 three times, end twice, 1 and 2 once: 4 kinds of 7
    assert ngram.log_p([3]).exp().tolist() == pytest.approx([(n + 4 / 5) / 11 for n in (3, 1, 1, 0, 2)])


def test_ngrams_are_probabilities_and_survive_json(ngram: NGramLM, tmp_path):
    ngram.save(tmp_path / "prior.json")
    again = NGramLM.load(tmp_path / "prior.json")
    for length in range(4):
        for history in itertools.product(range(3), repeat=length):
            assert float(ngram.log_p(history).exp().sum()) == pytest.approx(1)
            assert torch.equal(ngram.log_p(history), again.log_p(history))
            assert torch.equal(ngram.log_p(history), ngram.log_p(history[-2:]) if length > 1 else ngram.log_p(history))
    assert not torch.equal(ngram.log_p([0]), ngram.log_p([1, 0]))  # the start of a text is a place of its own
    with pytest.raises(CheckpointError, match="not made by to_dict"):
        NGramLM.from_dict({"order": 2})
    with pytest.raises(ConfigError, match=r"ids run from 0 to 5, outside 0\.\.2"):
        NGramLM.train([[0, 5]], order=2, vocab=3)


@pytest.fixture(scope="module", params=["one core", "two cores"])
def writer(request: pytest.FixtureRequest) -> mm.Model:
    core = mm.Core(width=16, depth=2, heads=2)
    both = EncoderDecoder(reader=core, writer=core) if request.param == "two cores" else core
    model = mm.Model({"text": TextBytes()}, both, ["-> text", "text -> answer:text"])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(len(weight)))
    return model.eval()


def test_the_models_own_language_model_is_its_loss(writer: mm.Model):
    prior = ModelLM(writer, "-> text")
    for text in ("abcab", "abd", "xyz"):  # the second shares a part with the first, and is shorter
        ids = list(text.encode())
        nats = sum(float(prior.log_p(ids[:i])[symbol]) for i, symbol in enumerate([*ids, 256]))
        with torch.no_grad():
            stream = writer.pack("-> text", [{"text": text}])
            wanted = -float(writer.losses(stream)["-> text"])
        assert nats == pytest.approx(wanted, abs=1e-3)


def test_the_models_own_language_model_jumps_between_histories(writer: mm.Model):
    prior, fresh = ModelLM(writer, "-> text"), ModelLM(writer, "-> text", remembered=1)
    histories = [b"", b"abcdef", b"abx", b"ab", b"abcdeg", b"q", b""]
    for history in histories:
        alone = ModelLM(writer, "-> text").log_p(list(history))
        assert prior.log_p(list(history)).tolist() == pytest.approx(alone.tolist(), abs=1e-4)
        assert fresh.log_p(list(history)).tolist() == pytest.approx(alone.tolist(), abs=1e-4)


def test_the_models_own_language_model_forgets_what_is_far(writer: mm.Model):
    prior = ModelLM(writer, "-> text", context=6)
    assert torch.equal(prior.log_p(list(b"abcdefgh")), prior.log_p(list(b"defgh")))
    assert prior.log_p(list(b"abcdefghijklmnop")).shape == (257,)


def test_the_models_own_language_model_writes_from_nothing(writer: mm.Model):
    with pytest.raises(ConfigError, match=r"'text -> answer:text' must write from nothing"):
        ModelLM(writer, "text -> answer:text")


@pytest.mark.parametrize("seed", range(6))
def test_alignment_is_the_likeliest_path_of_a_text(seed: int):
    log_p_NV = rows(6, 4, seed).float()
    for ids in ([0], [1, 1], [0, 2, 1], [2, 2, 0]):
        path = max(
            (p for p in itertools.product(range(4), repeat=6) if collapsed(p, 3) == tuple(ids)),
            key=lambda path: sum(float(log_p_NV[n, symbol]) for n, symbol in enumerate(path)),
        )
        wanted, row = [], 0
        for symbol, run in itertools.groupby(path):
            count = len(list(run))
            if symbol != 3:
                nats = sum(float(log_p_NV[n, symbol]) for n in range(row, row + count))
                wanted.append((symbol, 5 + 0.1 * row, 5 + 0.1 * (row + count), nats))
            row += count
        spoken = align(log_p_NV, ids, 5 + 0.1 * torch.arange(6, dtype=torch.float64), 0.1)
        found = [(s.symbol, s.start_s, s.end_s, s.nats) for s in spoken]
        assert len(found) == len(ids)
        for one, other in zip(found, wanted, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_text_that_does_not_fit_is_named():
    with pytest.raises(StreamError, match=r"3 symbols need 5 rows .* but there are 4"):
        align(rows(4, 3, 0), [1, 1, 1], torch.zeros(4), 0.1)


@pytest.mark.parametrize(
    ("settings", "problem"), [({"width": 0}, "width=0 keeps nothing"), ({"cutoff": 0.0}, "cutoff=0.0 nats tries no")]
)
def test_a_beam_that_cannot_work_is_refused(settings, problem: str):
    with pytest.raises(ConfigError, match=problem):
        Beam(**settings)


def test_chunks_see_themselves_and_the_past(lay):
    places = lay([[(5, True)], [(4, True)]]).info
    allowed = Chunked(2).allows(places[:, None], places[None]) & SameSample().allows(places[:, None], places[None])
    assert allowed[:5, :5].int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0]] * 2 + [[1, 1, 1, 1, 1]]
    assert allowed[5:, 5:].int().tolist() == [[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2
    assert not allowed[:5, 5:].any()
    with pytest.raises(ConfigError, match="Chunked: size=0 makes no chunks"):
        Chunked(0)
    assert SameSample() & Chunked(2) & Window(4) != PREFIX_LM
