"""Beams that are ranked by a CTC task too: prefixes against all paths, answers against all short strings, for one core and two."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal.generate.ctc_prefix import CTCPrefixScores
from multimodal.heads import Prediction
from multimodal.shapes import ConfigError, TaskError
from multimodal.transcription import error_rates
from multimodal_tokenizers import ImagePatches
from tests.generate.test_beams import CORES, Code, listed, log_p_of

TASK, BY_CTC = "image code -> code", "image code -> said:code"
SIZE = 2


def every_text(log_p_NV: Tensor) -> dict[tuple[int, ...], float]:
    """p of every text that some path writes."""
    rows, blank = log_p_NV.exp().tolist(), log_p_NV.shape[1] - 1
    p: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(blank + 1), repeat=len(rows)):
        text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)
        p[text] += math.prod(row[symbol] for row, symbol in zip(rows, path, strict=True))
    return p


@pytest.mark.parametrize(("rows", "symbols"), [(5, 3), (6, 2), (1, 2), (0, 2)])
def test_prefixes_have_the_probability_of_all_paths_that_begin_so(rows: int, symbols: int):
    generator = torch.Generator().manual_seed(rows)
    log_p_NV = (1.5 * torch.randn(rows, symbols + 1, generator=generator, dtype=torch.float64)).log_softmax(-1)
    texts, scores = every_text(log_p_NV), CTCPrefixScores(log_p_NV)

    def begun(text: Sequence[int]) -> float:
        return sum(p for other, p in texts.items() if other[: len(text)] == tuple(text))

    live: list[tuple[int, ...]] = [()]
    compared = 0
    for _ in range(4):
        found = scores.next_nats(symbols + 2, symbols)  # an id that the CTC task does not write, and an end before it
        assert not found.isnan().any()
        assert found[:, symbols + 1].tolist() == [-math.inf] * len(live)
        for text, nats in zip(live, found.exp().tolist(), strict=True):
            if not begun(text):
                continue
            for symbol in range(symbols):
                assert nats[symbol] == pytest.approx(begun((*text, symbol)) / begun(text), abs=1e-12)
            assert nats[symbols] == pytest.approx(texts.get(text, 0.0) / begun(text), abs=1e-12)
            compared += 1
        grown = [(i, symbol) for i in range(len(live)) for symbol in range(symbols)]
        scores.extend([i for i, _ in grown], [symbol for _, symbol in grown])
        live = [(*live[i], symbol) for i, symbol in grown]
    assert compared >= {5: 40, 6: 15, 1: 3, 0: 1}[rows]


def test_long_sounds_lose_no_precision():
    log_p_NV = (3 * torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    scores, text = CTCPrefixScores(log_p_NV), [0, 1, 1, 3, 2, 2, 0]
    for symbol in text:
        scores.extend([0], [symbol])
    nats = float(scores.next_nats(5, 4)[0, 4] + scores._prefix_B)
    wanted = -F.ctc_loss(
        log_p_NV.double()[:, None], torch.tensor([text]), (3000,), (len(text),), blank=4, reduction="sum"
    )
    assert nats == pytest.approx(float(wanted), rel=1e-12)


@pytest.fixture
def make(lively):
    def made(core: str = "one core") -> mm.Model:
        tokenizers = {"code": Code(SIZE), "image": ImagePatches(patch=4, channels=1)}
        model = lively(mm.Model(tokenizers, CORES[core], [TASK, mm.Task(BY_CTC, mm.CTC())]))
        with torch.no_grad():
            for readout in model.readouts.values():
                readout.linear.weight *= 1.5
        return model

    return made


def sample(seed: int) -> dict:
    size = (4, 8) if seed % 2 else (8, 8)
    return {"image": torch.rand(*size, generator=torch.Generator().manual_seed(seed)), "code": [seed % 2]}


def by_ctc(model: mm.Model, given: dict) -> dict[tuple[int, ...], float]:
    """p of every text by the CTC task, which reads the sample by itself."""
    with torch.no_grad():
        logits_NV = model.logits(model.pack(BY_CTC, [given], answers=False))[BY_CTC]
    return every_text(logits_NV.double().log_softmax(-1))


def everything(model: mm.Model, given: dict, limit: int, weight: float, penalty: float) -> list[tuple]:
    """(score, joint log p, answer) of every answer that CTC can write, the best first."""
    texts, found = by_ctc(model, given), []
    for count in range(limit + 1):
        for answer in itertools.product(range(SIZE), repeat=count):
            if texts.get(answer, 0.0) > 0:
                joint = (1 - weight) * log_p_of(model, given, answer) + weight * math.log(texts[answer])
                found.append((joint / (count + 1) ** penalty, joint, list(answer)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("weight", "penalty"), [(0.3, 1.0), (0.9, 0.0)])
def test_wide_beams_find_what_trying_everything_finds(make, core: str, weight: float, penalty: float):
    model, best = make(core), []
    for seed in range(2):
        given = sample(seed)
        expected = everything(model, given, 3, weight, penalty)
        answer = model.generate(
            TASK, [given], beams=15, max_tokens=3, ctc=(BY_CTC, weight), length_penalty=penalty, batch=1
        )[0]
        assert [a.value for a in listed(answer)] == [ids for *_, ids in expected]
        for found, (_, joint, _) in zip(listed(answer), expected, strict=True):
            assert math.log(found.confidence) == pytest.approx(joint, abs=1e-4)
        alone = model.generate(TASK, [given], beams=15, max_tokens=3, length_penalty=penalty, batch=1)[0]
        best.append(answer.value == alone.value)
        assert [a.value for a in listed(answer)] != [a.value for a in listed(alone)]  # CTC matters


def test_in_a_batch_with_others_as_alone(make):
    model = make()
    options = {"beams": 3, "max_tokens": 4, "ctc": (BY_CTC, 0.5)}
    alone = [model.generate(TASK, [sample(i)], **options)[0] for i in range(5)]
    engine = mm.Engine(model, rows=7, capacity=64)
    tickets = [engine.submit(TASK, sample(i), **options) for i in range(5)]
    other = engine.submit(TASK, sample(1), max_tokens=4)
    found: dict[int, Prediction] = {p.ticket: p.prediction for p in engine.run() if p.prediction}
    assert found[other].value == model.generate(TASK, [sample(1)], max_tokens=4)[0].value
    for ticket, wanted in zip(tickets, alone, strict=True):
        assert [a.value for a in listed(found[ticket])] == [a.value for a in listed(wanted)]
        assert found[ticket].confidence == pytest.approx(wanted.confidence, rel=1e-4)


def test_what_an_answer_begins_with_is_a_part_of_what_ctc_reads(make):
    model = make()
    given, begin, weight = sample(0), [1], 0.4
    texts = by_ctc(model, given)
    begun = sum(p for text, p in texts.items() if text[:1] == (1,))
    wanted = []
    for count in range(3):
        for rest in itertools.product(range(SIZE), repeat=count):
            nats = log_p_of(model, given, [1, *rest]) - log_p_of(model, given, [1], stop=False)
            joint = (1 - weight) * nats + weight * math.log(texts[(1, *rest)] / begun)
            wanted.append((joint / (count + 1), [1, *rest]))
    found = model.generate(TASK, [given], beams=7, max_tokens=2, begin=begin, ctc=(BY_CTC, weight))[0]
    assert [a.value for a in listed(found)] == [ids for _, ids in sorted(wanted, reverse=True)]


def test_the_context_is_read_once(make, monkeypatch):
    model = make("two cores")
    rows = []
    forward = type(model.core).forward
    monkeypatch.setattr(
        type(model.core), "forward", lambda self, x, *a, **k: rows.append(len(x)) or forward(self, x, *a, **k)
    )
    model.generate(TASK, [sample(0)], beams=2, max_tokens=3, ctc=(BY_CTC, 0.5))
    assert rows[0] == 6  # four patches, a code and the start; then one row a beam
    assert set(rows[1:]) == {2}


def test_what_cannot_be_is_refused_by_name(make):
    tokenizers = {"code": Code(SIZE), "other": Code(3), "image": ImagePatches(patch=4, channels=1)}
    tasks = [TASK, mm.Task(BY_CTC, mm.CTC()), mm.Task("image -> code", mm.CTC())]
    tasks += [mm.Task("image code -> other", mm.CTC()), "image -> said:code"]
    model = mm.Model(tokenizers, CORES["one core"], tasks).eval()

    def refused(problem: str, error: type = ConfigError, task: str = TASK, **options) -> None:
        given = {name: value for name, value in sample(0).items() if name in task.split("->")[0]}
        with pytest.raises(error, match=problem):
            model.generate(task, [given], **{"beams": 2, **options})

    refused("must be a task and its weight", ctc=BY_CTC)
    refused("must be a task and its weight", ctc=(BY_CTC,))
    refused(r"weight of 1\.0, which must lie between 0 and 1", ctc=(BY_CTC, 1.0))
    refused("weight of -1", ctc=(BY_CTC, -1))
    refused("ctc ranks beams|ranks beams, and there is one only", ctc=(BY_CTC, 0.5), beams=1)
    refused("is unknown|no task|there is no", TaskError, ctc=("a -> b", 0.5))
    refused(r"answers by NextToken; name a task with the head CTC\(\)", ctc=("image -> said:code", 0.5))
    refused("reads other fields; both must read the same ones", ctc=("image -> code", 0.5))
    refused("writes other symbols than 'code'; both must write one kind", ctc=("image code -> other", 0.5))
    refused("CTC answers at once, so .*ctc has no meaning", task=BY_CTC, beams=1, ctc=(BY_CTC, 0.5))
    causal = mm.Model(
        {"code": Code(SIZE, causal=True)}, CORES["one core"], ["code -> x:code", mm.Task("code -> y:code", mm.CTC())]
    ).eval()
    prefix = causal.read("code -> x:code", code=[1, 0])
    with pytest.raises(ConfigError, match="which a prefix does not keep; leave one out"):
        causal.generate("code -> x:code", [{}], prefix=prefix, beams=2, ctc=("code -> y:code", 0.5))


@pytest.mark.slow
def test_both_together_err_less_than_either_alone():
    """Symbols that are held for one to three tokens each, of which one in ten is heard wrong: 200 steps, so that both still err."""
    said, by_ctc = "heard -> code", "heard -> said:code"
    tokenizers = {"heard": Code(6), "code": Code(5)}
    model = mm.Model(tokenizers, mm.Core(width=24, depth=2, heads=2), [said, mm.Task(by_ctc, mm.CTC())])

    def spoken(seed: int) -> dict[str, list[int]]:
        random = np.random.default_rng(seed)
        ids = random.integers(0, 5, random.integers(3, 7)).tolist()
        heard = [i for s in ids for i in [s] * random.integers(1, 4) + [5] * random.integers(1, 3)]
        heard = [int(random.integers(0, 6)) if random.random() < 0.1 else i for i in heard]
        return {"heard": heard, "code": ids, "said": ids}

    samples = [spoken(i) for i in range(2000)]
    settings = {"steps": 200, "batch": 12, "lr": 0.02, "optimizer": "muon", "quiet": True}
    mm.fit(model, {by_ctc: samples, said: samples}, **settings)
    held_out = [spoken(10_000 + i) for i in range(100)]
    heard = [{"heard": sample["heard"]} for sample in held_out]

    def errors(answers: Sequence[Prediction]) -> float:
        texts = ([" ".join(map(str, ids)) for ids in every] for every in zip(*pairs(answers), strict=True))
        return error_rates(*texts)["wer"]

    def pairs(answers: Sequence[Prediction]) -> list[tuple[list[int], list[int]]]:
        return [(sample["code"], answer.value) for sample, answer in zip(held_out, answers, strict=True)]

    ctc = errors(model.predict(by_ctc, heard))
    attention = errors(model.generate(said, heard, max_tokens=8, beams=4))
    both = errors(model.generate(said, heard, max_tokens=8, beams=4, ctc=(by_ctc, 0.5)))
    assert both < 0.9 * min(ctc, attention) < max(ctc, attention) < 0.6  # 0.196 of 0.261 and 0.333
