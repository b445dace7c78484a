"""Measures against the libraries' own on whole lists, intervals against a formula, calibration against another optimiser."""

import json
import math
from html.parser import HTMLParser
from typing import Any

import jiwer
import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.measures import MEASURES, Answered, evaluation, named
from multimodal.shapes import ConfigError, TaskError
from multimodal_tokenizers import ImagePatches, Labels, Segments, TextBytes

sklearn = pytest.importorskip("sklearn.metrics")
NAMES = ("a", "b", "c", "d", "e", "f")
TASK = "text -> label"


def answered_classes(count: int = 300, sure: float = 2.0) -> tuple[Answered, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    wanted = random.integers(len(NAMES), size=count)
    logit = random.standard_normal((count, len(NAMES))) + sure * np.eye(len(NAMES))[wanted]
    p = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    answered = Answered(NAMES)
    for y, row in zip(wanted, p, strict=True):
        best = int(row.argmax())
        probability = dict(sorted(zip(NAMES, row.tolist(), strict=True), key=lambda item: -item[1]))
        answered.add(NAMES[y], mm.Prediction(NAMES[best], float(row[best]), probability), best == y)
    return answered, wanted, p


def values(answered: Answered, sort: str) -> dict[str, float]:
    return {m.name: m.value(m.rows()) for m in named.named(answered, sort)}


def test_of_one_class_a_sample():
    answered, y, p = answered_classes()
    found = values(answered, "class")
    assert list(found) == [
        "top-3",
        "top-5",
        "balanced accuracy",
        "F1",
        "AUROC",
        "average precision",
        "calibration error",
    ]
    told = p.argmax(1)
    assert found["top-3"] == pytest.approx(sklearn.top_k_accuracy_score(y, p, k=3), abs=1e-9)
    assert found["top-5"] == pytest.approx(sklearn.top_k_accuracy_score(y, p, k=5), abs=1e-9)
    assert found["balanced accuracy"] == pytest.approx(np.mean([(told[y == c] == c).mean() for c in range(len(NAMES))]))
    assert found["F1"] == pytest.approx(sklearn.f1_score(y, told, average="macro"))
    assert found["AUROC"] == pytest.approx(sklearn.roc_auc_score(y, p, multi_class="ovr"), abs=1e-6)
    precision = sklearn.average_precision_score(np.eye(len(NAMES))[y], p, average="macro")
    assert found["average precision"] == pytest.approx(precision, abs=1e-6)
    sure, right = p.max(1).astype(np.float32), told == y
    off = 0.0
    for low in np.arange(15) / 15:
        some = (sure >= low) & ((sure < low + 1 / 15) | (low > 0.93))
        off += abs(sure[some].sum() - right[some].sum()) / len(y)
    assert found["calibration error"] == pytest.approx(off, abs=1e-6)


def test_a_class_that_no_sample_has_is_left_out_of_means():
    answered, _, _ = answered_classes()
    kept = Answered((*NAMES, "never"))
    for wanted, answer in zip(answered.wanted, answered.answers(), strict=True):
        kept.add(wanted, mm.Prediction(answer.value, answer.confidence, answer.probability | {"never": 0.0}), True)
    assert values(kept, "class")["AUROC"] == pytest.approx(values(answered, "class")["AUROC"])
    single = Answered(("a", "b"))
    single.add("a", mm.Prediction("a", 1.0, {"a": 1.0, "b": 0.0}), True)
    assert math.isnan(values(single, "class")["AUROC"])


def test_of_several_classes_a_sample():
    random = np.random.default_rng(1)
    y, answered = random.integers(2, size=(200, len(NAMES))), Answered(NAMES)
    p = np.clip(0.3 + 0.4 * y + 0.3 * random.standard_normal(y.shape), 0.01, 0.99).astype(np.float32)
    for row, share in zip(y, p, strict=True):
        told = [name for name, x in zip(NAMES, share, strict=True) if x >= 0.5]
        wanted = [name for name, x in zip(NAMES, row, strict=True) if x]
        answered.add(wanted, mm.Prediction(told, 1.0, dict(zip(NAMES, share.tolist(), strict=True))), told == wanted)
    found = values(answered, "classes")
    assert found["F1"] == pytest.approx(sklearn.f1_score(y, p >= 0.5, average="macro"))
    assert found["F1, pooled"] == pytest.approx(sklearn.f1_score(y, p >= 0.5, average="micro"))
    assert found["AUROC"] == pytest.approx(sklearn.roc_auc_score(y, p), abs=1e-6)
    assert found["average precision"] == pytest.approx(sklearn.average_precision_score(y, p), abs=1e-6)


WANTED = ["The cat sat on the mat.", "A bird sings", "", "nothing here at all today", "Über den Deich"]
TOLD = ["the cat sat on a mat", "A bird  sings!", "noise", "nothing here at all", "Uber den Deich"]


def texts() -> Answered:
    answered = Answered()
    for a, b in zip(WANTED, TOLD, strict=True):
        answered.add(a, mm.Prediction(b, 0.5), a == b)
    return answered


def test_of_texts():
    bleu, chrf = pytest.importorskip("sacrebleu.metrics.bleu"), pytest.importorskip("sacrebleu.metrics.chrf")
    pytest.importorskip("rouge_score")
    found = values(texts(), "texts")
    plain = [[jiwer.RemovePunctuation()(text.lower()).strip() for text in side] for side in (WANTED, TOLD)]
    plain = [[" ".join(text.split()) for text in side] for side in plain]
    assert found["wer"] == pytest.approx(jiwer.wer(plain[0], plain[1]))
    assert found["cer"] == pytest.approx(jiwer.cer(plain[0], plain[1]))
    assert found["BLEU"] == pytest.approx(bleu.BLEU().corpus_score(TOLD, [WANTED]).score)
    assert found["chrF"] == pytest.approx(chrf.CHRF().corpus_score(TOLD, [WANTED]).score)
    # shared words in order: 5 of 6 and 6, all 3, none, 4 of 5 and 4, and 2 of 3 with an umlaut that rouge's own words would lose
    by_hand = [5 / 6, 1.0, 0.0, 2 * (4 / 5) / (1 + 4 / 5), 2 / 3]
    assert found["ROUGE-L"] == pytest.approx(100 * np.mean(by_hand))


def test_of_numbers_and_of_rows():
    random = np.random.default_rng(2)
    y = random.standard_normal(100)
    told = y + 0.3 * random.standard_normal(100)
    answered = Answered()
    for a, b in zip(y.tolist(), told.tolist(), strict=True):
        answered.add(a, mm.Prediction(b, 1.0), a == b)
    found = values(answered, "numbers")
    assert found["mean error"] == pytest.approx(sklearn.mean_absolute_error(y, told))
    assert found["root mean square error"] == pytest.approx(sklearn.root_mean_squared_error(y, told))
    assert found["R2"] == pytest.approx(sklearn.r2_score(y, told))

    rows = Answered()
    for a, b in ((["x", "y"], ["x", "x"]), (["y", "y", "z"], ["y", "z", "z"])):
        rows.add(a, mm.Prediction(b, 1.0), a == b)
    wanted, said = ["x", "y", "y", "y", "z"], ["x", "x", "y", "z", "z"]
    assert values(rows, "rows")["F1"] == pytest.approx(sklearn.f1_score(wanted, said, average="macro"))


def test_every_measure_says_what_it_is():
    names = {
        m.name for sort in ("class", "classes", "rows", "texts", "numbers") for m in named.named(sample_of(sort), sort)
    }
    assert names == set(MEASURES)
    assert all(MEASURES.values())


def sample_of(sort: str) -> Answered:
    return texts() if sort in ("texts", "rows", "numbers") else answered_classes(5)[0]


def test_an_interval_is_as_wide_as_that_of_a_share():
    right = (np.arange(400) % 5 > 0).astype(float)[:, None]  # 80 % of 400
    found = evaluation.interval(lambda rows: float(rows.mean()), right, 2000)
    assert found is not None
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert found == pytest.approx((0.8 - half, 0.8 + half), abs=0.006)
    assert evaluation.interval(lambda rows: float(rows.mean()), right, 0) is None
    assert evaluation.interval(lambda rows: math.nan, right, 50) is None


def test_a_slow_measure_is_drawn_for_some_seconds_only(monkeypatch):
    monkeypatch.setattr(evaluation, "SECONDS", 0.0)
    calls = []
    assert evaluation.interval(lambda rows: float(len(calls.append(0) or calls)), np.zeros((3, 1)), 1000) is None
    assert len(calls) == 2


@pytest.fixture(scope="module")
def model() -> mm.Model:
    """Which of three letters comes first? Some labels are wrong, so that some answers are."""
    torch.manual_seed(0)
    made = mm.Model(
        {"text": TextBytes(), "label": Labels(("a", "b", "c"))}, mm.Core(width=16, depth=1, heads=2), [TASK], seed=0
    )
    mm.fit(made, {TASK: samples(96, 0)}, steps=25, batch=16, lr=1e-2, device="cpu", quiet=True)
    return made


def samples(count: int, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list("abc"), size=3)) for _ in range(count)]
    noise = random.random(count) < 0.25
    return [{"text": text, "label": text[-1 if wrong else 0]} for text, wrong in zip(texts, noise, strict=True)]


def test_evaluate_gives_figures_that_predict_gives(model):
    data = samples(60, 1)
    found = mm.evaluate(model, TASK, data, resamples=50)
    answers = model.predict(TASK, [{"text": sample["text"]} for sample in data])
    wanted, told = [sample["label"] for sample in data], [answer.value for answer in answers]
    right = np.mean([a == b for a, b in zip(wanted, told, strict=True)])
    assert 0.4 < right < 1
    assert found["exact"] == pytest.approx(right)
    assert found["F1"] == pytest.approx(sklearn.f1_score(wanted, told, average="macro"))
    assert found == dict(found)
    assert {"loss", "exact", "F1", "AUROC", "calibration error"} <= set(found)
    low, high = found.figures["exact"].interval
    assert low < right < high
    loss = -np.mean([np.log(answer.probability[a]) for a, answer in zip(wanted, answers, strict=True)])
    assert found["loss"] == pytest.approx(loss, abs=1e-4)
    # fit's own figures on held-out data are these two alone
    assert mm.evaluate(model, TASK, data, measures=()) == {"loss": found["loss"], "exact": found["exact"]}


def test_chosen_measures_and_a_function_of_ones_own(model):
    def surest(wanted: Any, answers: Any) -> float:
        assert len(wanted) == len(answers) == 30
        return max(answer.confidence for answer in answers)

    found = mm.evaluate(model, TASK, samples(30, 2), measures=["F1", "exact", surest], resamples=20)
    assert set(found) == {"loss", "exact", "F1", "surest"}
    assert 0 < found["surest"] <= 1
    assert found.figures["surest"].interval is not None


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (["AUORC"], r"evaluate: 'AUORC' is no measure; those of task 'text -> label' are .*did you mean 'AUROC'"),
        (["wer"], r"evaluate: 'wer' is of other answers"),
    ],
)
def test_measures_that_are_not_there(model, measures, message):
    with pytest.raises(ConfigError, match=message):
        mm.evaluate(model, TASK, samples(5, 0), measures=measures)


def test_what_a_missing_library_leaves_out_is_said(model, monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    found = mm.evaluate(model, TASK, samples(9, 0))
    assert "F1" not in found
    assert "calibration error" in found
    assert "F1 is left out: it needs the package scikit-learn: pip install 'multimodal-stream[measures]'" in str(found)
    with pytest.raises(ConfigError, match="'F1' needs the package scikit-learn"):
        mm.evaluate(model, TASK, samples(9, 0), measures=["F1"])


def test_the_worst_come_first_and_right_ones_never(model):
    found = mm.evaluate(model, TASK, samples(60, 1))
    worst, answered = found.worst(), found.answered
    assert worst
    assert not any(answered.right[i] for i in worst)
    assert len(worst) == min(24, answered.right.count(False))
    p = [answered.probability[i, answered.classes[i]] for i in worst]
    assert p == sorted(p)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_report_is_whole_escaped_and_alone(tmp_path):
    torch.manual_seed(0)
    names = ("<b>x</b>", "y & $z$")
    kinds = {"image": ImagePatches(patch=4, channels=1), "text": TextBytes(), "label": Labels(names)}
    task = "image text -> label"
    made = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [task], seed=0)
    picture = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    data = [{"image": picture, "text": "<script>alert(1)</script>", "label": names[i % 2]} for i in range(4)]
    data += [{"image": None, "text": "none", "label": names[i % 2]} for i in range(2)]
    folder = mm.evaluate(made, task, data, resamples=20).save(tmp_path / "report")
    text = (folder / "report.html").read_text("utf-8")
    parsed = Page()
    parsed.feed(text)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    addresses = [a[key] for _, a in parsed.tags for key in ("src", "href") if key in a]
    assert addresses
    assert all(str(address).startswith("data:") for address in addresses)
    assert "image: none" in text
    stored = json.loads((folder / "report.json").read_text("utf-8"))
    assert stored["samples"] == 6
    assert stored["figures"]["exact"]["value"] == 0.5
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_that_is_written_is_measured_too():
    torch.manual_seed(0)
    task = "label -> text"
    made = mm.Model(
        {"text": TextBytes(causal=True), "label": Labels(("a", "b"))}, mm.Core(width=16, depth=1, heads=2), [task]
    )
    found = mm.evaluate(
        made, task, [{"label": "a", "text": "one two"}, {"label": "b", "text": "three"}], measures=["wer", "cer"]
    )
    assert set(found) == {"loss", "exact", "wer", "cer"}
    assert found["cer"] > 0
    assert found.worst()[0] in (0, 1)


def test_calibration_finds_a_planted_temperature(model):
    import copy

    data, other = samples(200, 3), copy.deepcopy(model)
    mm.calibrate(other, TASK, data)
    with torch.no_grad():
        for weight in other.readout(TASK).linear.parameters():
            weight.mul_(4.0)
    before = mm.evaluate(other, TASK, data)
    found = mm.calibrate(other, TASK, data)
    after = mm.evaluate(other, TASK, data)
    assert found.temperature == pytest.approx(4.0, rel=1e-3)
    assert after["exact"] == before["exact"]
    assert after["loss"] == pytest.approx(found.after, abs=1e-4)
    assert before["loss"] == pytest.approx(found.before, abs=1e-4)
    assert found.after < found.before
    assert mm.calibrate(other, TASK, data).temperature == pytest.approx(1.0, abs=1e-3)
    scipy = pytest.importorskip("scipy.optimize")
    log_p, y = np.log(before.answered.probability.astype(float)), before.answered.classes

    def surprise(temperature: float) -> float:
        scaled = log_p / temperature
        log_q = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        doubt = 1 / (len(y) + 2)
        aim = np.where(np.eye(3)[y] > 0, 1 - doubt, doubt / 2)
        return -float((aim * log_q).sum())

    best = scipy.minimize_scalar(surprise, bounds=(0.05, 50), method="bounded", options={"xatol": 1e-8}).x
    assert found.temperature == pytest.approx(best, rel=1e-3)


def test_samples_that_are_all_right_do_not_make_it_sure_of_everything():
    torch.manual_seed(0)
    made = mm.Model(
        {"text": TextBytes(), "label": Labels(("a", "b"))}, mm.Core(width=16, depth=1, heads=2), [TASK], seed=0
    )
    data = [{"text": letter, "label": letter} for letter in "ab"]
    mm.fit(made, {TASK: data}, steps=40, batch=2, lr=1e-2, device="cpu", quiet=True)
    mm.calibrate(made, TASK, data * 10)
    found = mm.evaluate(made, TASK, data)
    assert found["exact"] == 1.0
    assert 0.9 < found.answered.probability.max() < 0.97  # 21 of 22, as if one more had been wrong


def test_several_classes_are_calibrated_too():
    torch.manual_seed(0)
    kinds = {"text": TextBytes(), "label": Labels(("a", "b", "c"), several=True)}
    made = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [TASK], seed=0)
    data = [{"text": s["text"], "label": sorted(set(s["text"]))} for s in samples(64, 0)]
    mm.fit(made, {TASK: data}, steps=20, batch=16, lr=1e-2, device="cpu", quiet=True)
    before = mm.evaluate(made, TASK, data)["loss"]
    found = mm.calibrate(made, TASK, data)
    assert mm.evaluate(made, TASK, data)["loss"] == pytest.approx(found.after, abs=1e-4)
    assert found.before == pytest.approx(before, abs=1e-4)
    assert found.after < before


def test_only_classifiers_are_calibrated(model):
    torch.manual_seed(0)
    written = mm.Model({"text": TextBytes(causal=True)}, mm.Core(width=16, depth=1, heads=2), ["-> text"])
    with pytest.raises(TaskError, match="NextToken is not calibrated; only Classify is"):
        mm.calibrate(written, "-> text", [{"text": "ab"}])
    small = mm.quantize(model, "int8-weights")
    with pytest.raises(TaskError, match="calibrate before it is quantized"):
        mm.calibrate(small, TASK, samples(20, 0))


@pytest.mark.parametrize("task", ["image -> map", "image* -> label", "image <-> label"])
def test_tasks_without_answers_of_their_own_and_lists_of_values_have_a_report(task, tmp_path):
    torch.manual_seed(0)
    image = ImagePatches(patch=4, channels=1)
    kinds = {"image": image, "map": Segments(("ink", "paper"), image), "label": Labels(("a", "b"))}
    head = mm.EachRow(of="image") if "map" in task else None
    made = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [mm.Task(task, head)], seed=0)
    random = np.random.default_rng(0)
    data = [
        {"image": random.random((8, 8)).astype(np.float32), "map": np.eye(8, dtype=int), "label": name} for name in "ab"
    ]
    data = [sample | {"image": [sample["image"]] * 2} for sample in data] if "*" in task else data
    found = mm.evaluate(made, task, data, resamples=20)
    assert "loss" in found
    text = (found.save(tmp_path) / "report.html").read_text("utf-8")
    if "<->" in task:
        assert "%" in str(found.figures["R@1 right"])
    if "*" in task and found.worst():
        assert text.count('alt="image"') == 2 * len(found.worst())
