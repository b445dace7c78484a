"""The X-ray against sums written out in Python and second passes without a key; its pictures against what they must hold."""

import math
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import spatial

import multimodal as mm
from multimodal.attention import (
    Additive,
    ALiBi,
    Gaussian,
    Gumbel,
    Hard,
    MixingWeights,
    PredictedWindow,
    RelativeBias,
    Trace,
)
from multimodal.attention.mechanism import Mechanism
from multimodal.heads import Prediction
from multimodal.heads.pointer import Pointer
from multimodal.layers import MLP, CrossAttention, PersistentMemory, Recurrent, SelfAttention
from multimodal.look import Evidence, attention_rollout, mixture, usage, xray
from multimodal.look.answers import answer_line
from multimodal.look.attention_xray import token_labels
from multimodal.look.drawing import READOUTS, left_out, panels
from multimodal.look.evidence import _distance, _shrunk
from multimodal.look.layer_xray import counted, percent
from multimodal.look.layers import states
from multimodal.look.lens import lens
from multimodal.look.page import page
from multimodal.masks import Pairs
from multimodal.tokenizer import Tokens, at_times
from multimodal.zoo.fact_editing import edit_fact, second_moment
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

CLASSIFY, WRITE = "image text -> label", "text -> answer:text"
SAMPLE = {"image": np.random.default_rng(0).random((4, 6), dtype=np.float32), "text": "why"}
SMALL = mm.Core(width=16, depth=1, heads=2)


def model_of(core, task: str = CLASSIFY, seed: int = 0) -> mm.Model:
    """Weights so large that heads differ and posteriors are not even."""
    tokenizers = {"image": ImagePatches(patch=2, channels=1), "text": TextBytes(), "label": Labels(("a", "b"))}
    model = mm.Model(tokenizers, core, [task], seed=seed).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.4 * torch.randn(weight.shape, generator=draw)
    return model


def with_block(*layers, **changes) -> mm.Core:
    return mm.Core(width=16, depth=1, heads=2, block=layers, **changes)


WRITER = with_block(SelfAttention(), CrossAttention(), MLP())
CASES = {
    "plain": (SMALL, CLASSIFY),
    "two layers, grouped": (mm.Core(width=16, depth=2, heads=4, kv_heads=2), CLASSIFY),
    "gaussian, sum of priors": (SMALL.replace(score=Gaussian(2.0), prior=ALiBi() + mm.masks.Window(4)), CLASSIFY),
    "additive": (SMALL.replace(score=Additive(8), prior=RelativeBias(3)), CLASSIFY),
    "window renormalised": (SMALL.replace(prior=PredictedWindow(1.5)), CLASSIFY),
    "window as a factor": (SMALL.replace(prior=PredictedWindow(1.5, renormalise=False)), CLASSIFY),
    "hard": (SMALL.replace(read=Hard()), CLASSIFY),
    "relaxed": (SMALL.replace(read=Gumbel(0.5)), CLASSIFY),
    "one choice": (SMALL.replace(read=Gumbel(0.5, straight_through=True)), CLASSIFY),
    "memory": (with_block(PersistentMemory(slots=5, prior=MixingWeights(5)), MLP()), CLASSIFY),
    "causal writer": (SMALL, WRITE),
    "two cores": (mm.EncoderDecoder(reader=SMALL, writer=WRITER), WRITE),
    "two cores, last states": (mm.EncoderDecoder(reader=SMALL, writer=WRITER, last=2), WRITE),
}


def xray_of(case: str):
    core, task = CASES[case]
    model = model_of(core, task)
    sample, answer = (SAMPLE, None) if task == CLASSIFY else ({"text": "some"}, "other")
    return model, xray(model, task, sample, answer=answer)


@dataclass(frozen=True)
class Brute:
    """One query of one head, with plain sums over the keys it may see."""

    keys: list[int]
    r: dict[int, float]
    evidence: float
    joint: dict[int, float]

    @classmethod
    def of(cls, score_M: list[float], prior_M: list[float]) -> "Brute":
        keys = [j for j, p in enumerate(prior_M) if p > -math.inf]
        joint = {j: score_M[j] + prior_M[j] for j in keys}
        total = sum(math.exp(x) for x in joint.values())
        return cls(keys, {j: math.exp(x) / total for j, x in joint.items()}, math.log(total), joint)


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / len(values)


@pytest.mark.parametrize("case", CASES)
def test_read_outs_are_the_plain_sums(case):
    _, ray = xray_of(case)
    for layer in ray.layers:
        score, prior = layer.score_HTM.tolist(), layer.log_prior_HTM.tolist()
        value = layer.value_MHK.numpy()
        usage_HM = np.zeros(layer.usage_HM.shape)
        assert layer.heads == len(score) >= 2
        for h in range(layer.heads):
            for t in range(len(score[h])):
                b = Brute.of(score[h][t], prior[h][t])
                factor = dict.fromkeys(b.keys, 1.0)
                if layer.factored:
                    factor = {j: float(layer.weight_HTM[h, t, j]) / b.r[j] for j in b.keys}
                mass = sum(b.r[j] * factor[j] for j in b.keys)
                share = {j: b.r[j] * factor[j] / mass for j in b.keys}
                mean = sum(share[j] * value[j, h] for j in b.keys)
                spread = sum(share[j] * float(((value[j, h] - mean) ** 2).sum()) for j in b.keys)
                entropy = -sum(p * math.log(p) for p in share.values() if p)
                log_prior = [prior[h][t][j] + math.log(factor[j]) for j in b.keys]
                for j in b.keys:
                    usage_HM[h, j] += b.r[j] * factor[j]
                found = {
                    "effective": (layer.effective_HT, math.exp(entropy)),
                    "evidence": (layer.evidence_HT, b.evidence),
                    "price": (layer.price_HT, b.evidence - max(b.joint.values())),
                    "prior": (layer.prior_variance_HT, variance(log_prior)),
                    "score": (layer.score_variance_HT, variance([score[h][t][j] for j in b.keys])),
                    "spread": (layer.spread_HT, spread),
                    "mass": (layer.mass_HT, mass),
                }
                loose = 2e-4 if layer.factored else 1e-9  # a factor is known as far as float32 tells
                for name, (have_HT, want) in found.items():
                    assert math.isclose(float(have_HT[h, t]), want, rel_tol=loose, abs_tol=loose), (name, h, t)
        np.testing.assert_allclose(layer.usage_HM, usage_HM, rtol=2e-4 if layer.factored else 1e-9, atol=1e-9)


def test_the_cases_hold_what_they_are_meant_to():
    layers = {case: xray_of(case)[1].layers for case in CASES}
    assert float(layers["window as a factor"][0].mass_HT.max()) < 1
    assert all(bool((layer.mass_HT - 1).abs().max() < 1e-9) for layer in layers["plain"])
    assert [layer.name for layer in layers["two cores"]] == [
        "reader block 1 self",
        "writer block 1 self",
        "writer block 1 cross",
    ]
    assert layers["memory"][0].key_M is None
    chosen = layers["hard"][0].chosen_HT
    assert chosen is not None
    torch.testing.assert_close(layers["hard"][0].weight_HTM.argmax(-1), chosen)
    torch.testing.assert_close(layers["hard"][0].posterior_HTM.argmax(-1), chosen)
    assert float(layers["hard"][0].effective_HT.max()) > 1.2  # of the posterior, whatever was chosen
    assert float(layers["plain"][0].change_HTM.nan_to_num().max()) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_what_the_layer_read(case):
    _, ray = xray_of(case)
    for layer in ray.layers:
        torch.testing.assert_close(layer.answer_HTK.transpose(0, 1), layer.read_THK, atol=1e-5, rtol=1e-4)


class Without(Pairs):
    """The same pairs with one key closed, and the count of keys as it was: the key is absent, its place is not."""

    @property
    def count(self):
        return super().count + 1


@pytest.mark.parametrize("case", CASES)
def test_leave_one_out_is_a_second_pass_without_the_key(case):
    core, task = CASES[case]
    model = model_of(core, task)
    calls = []
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.register_forward_pre_hook(lambda m, inputs: calls.append((m, inputs[:4])))
    sample, answer = (SAMPLE, None) if task == CLASSIFY else ({"text": "some"}, "other")
    ray = xray(model, task, sample, answer=answer)
    assert len(calls) == len(ray.layers)
    compared = 0
    for layer, (mechanism, (q, k, v, pairs)) in zip(ray.layers, calls.copy(), strict=True):
        open_TM = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if pairs.closed is not None:
            open_TM = ~pairs.closed.expand(1, *open_TM.shape)[0]
        out = torch.stack([layer.without(h) for h in range(layer.heads)])
        for j in range(k.shape[1]):
            gone = open_TM.clone()
            gone[:, j] = False
            sees_T = gone.any(-1) & layer.seen_HTM[0, :, j]
            if case == "gaussian, sum of priors":  # the prior closes more than the pairs do
                sees_T &= layer.seen_HTM[0].sum(-1) > 1
            with torch.inference_mode():
                read = mechanism(q, k, v, Without(pairs.q, pairs.k, gone[None]), Trace())[0].transpose(0, 1).double()
            torch.testing.assert_close(out[:, sees_T, j], read[:, sees_T], atol=2e-5, rtol=2e-4)
            torch.testing.assert_close(
                layer.change_HTM[:, sees_T, j], (read - layer.answer_HTK)[:, sees_T].norm(dim=-1), atol=5e-5, rtol=1e-3
            )
            compared += int(sees_T.sum())
    assert compared > 30


def test_leaving_out_keeps_its_digits_where_one_key_is_nearly_all():
    _, ray = xray_of("plain")
    layer = ray.layers[0]
    sharp = replace(layer, score_HTM=60 * layer.score_HTM)
    assert float((1 - sharp.posterior_HTM.amax(-1)).min()) < 1e-12
    for h in range(sharp.heads):
        for t, j in ((t, int(sharp.log_joint_HTM[h, t].argmax())) for t in range(sharp.score_HTM.shape[1])):
            rest = [i for i in range(sharp.score_HTM.shape[2]) if i != j and sharp.seen_HTM[h, t, i]]
            weight = sharp.log_joint_HTM[h, t, rest].softmax(0)
            torch.testing.assert_close(sharp.without(h)[t, j], weight @ sharp.value_MHK[rest, h], atol=1e-12, rtol=1e-9)


def test_leaving_out_by_blocks_of_queries_changes_nothing(monkeypatch):
    layer = xray_of("window as a factor")[1].layers[0]
    whole = layer.change_HTM
    assert whole.shape == (2, 10, 10)
    monkeypatch.setattr("multimodal.look.layer_xray.BLOCK", 3 * layer.value_MHK[:, 0].numel())
    torch.testing.assert_close(replace(layer).change_HTM, whole, atol=1e-12, rtol=1e-9)
    assert layer.only(torch.tensor([2, 4])).query_T.tolist() == [2, 4]


def test_a_query_that_sees_one_key_has_no_leave_one_out():
    ray = xray(model_of(SMALL, "-> text"), "-> text", {}, answer="abc")
    layer = ray.layers[0]  # causal: the first row sees itself alone
    assert bool(layer.change_HTM[:, 0, 0].isnan().all())
    assert not bool(layer.change_HTM[:, 1:].isnan().any())
    assert float(layer.change_HTM[:, 0, 1:].abs().max()) == 0
    assert torch.equal(layer.effective_HT[:, 0], torch.ones(2, dtype=torch.float64))
    others = layer.change_HTM[:, 1:, 0].square().sum(0).sqrt().mean()
    assert dict(ray.influential_keys(layer))["start"] == pytest.approx(float(others))


def test_a_query_that_sees_nothing_has_zeros():
    core = SMALL.replace(prior=~mm.masks.Window(100))
    layer = xray(model_of(core), CLASSIFY, SAMPLE).layers[0]
    assert float(layer.effective_HT.max()) == float(layer.mass_HT.max()) == float(layer.answer_HTK.abs().max()) == 0
    assert bool((layer.evidence_HT == -math.inf).all())


def test_one_layers_heat_is_its_attention_rollout():
    model = model_of(SMALL)
    ray = xray(model, CLASSIFY, SAMPLE)
    shares = attention_rollout(model, CLASSIFY, SAMPLE)
    heats = {}
    for name in shares:
        heat_HN = ray.heat(ray.layers[0], name)
        assert heat_HN is not None
        heats[name] = heat_HN.mean(0)
    total = sum(float(h.sum()) for h in heats.values())
    for name, share_N in shares.items():
        torch.testing.assert_close((heats[name] / total).float(), share_N, atol=1e-5, rtol=0)
    assert [len(f) for f in ray.reads] == [6, 3]
    assert ray.fields["text"].labels == ("w", "h", "y")
    assert ray.fields["image"].labels[4] == "row 1, column 1"
    assert ray.key_label(ray.layers[0], 7) == "text 'h' (token 1)"


def test_keys_of_cross_attention_are_the_last_states():
    _, ray = xray_of("two cores, last states")
    cross = ray["writer block 1 cross"]
    assert cross.key_M is not None
    assert cross.key_M.tolist() == [2, 3]
    part_HTN = ray.onto(cross, "text")
    assert part_HTN is not None
    assert part_HTN.shape == (2, 6, 4)
    torch.testing.assert_close(part_HTN[..., 2:].sum(-1), torch.ones(2, 6).double())
    assert float(part_HTN[..., :2].abs().max()) == 0
    heat_HN = ray.heat(cross, "text")
    assert heat_HN is not None
    torch.testing.assert_close(heat_HN[:, 2:], cross.posterior_HTM.mean(1))
    assert ray.onto(ray["writer block 1 self"], "text") is None
    assert ray.written_labels == ["o", "t", "h", "e", "r", "[stop]"]
    with pytest.raises(
        mm.ConfigError, match=r"no layer 'block 1 cross'; there are reader block 1 self, .* did you mean"
    ):
        ray["block 1 cross"]


def test_the_xray_shows_the_models_own_answer():
    model = model_of(SMALL, WRITE)
    said = model.predict(WRITE, [{"text": "some"}])[0]
    own = xray(model, WRITE, {"text": "some"})
    assert own.prediction.value == said.value
    given = xray(model, WRITE, {"text": "some"}, answer=said.tokens)
    torch.testing.assert_close(own.layers[0].posterior_HTM, given.layers[0].posterior_HTM)
    assert len(own.asked_N) == len(said.tokens) + 1


def test_the_prediction_is_that_of_predict():
    model = model_of(SMALL)
    ray, said = xray(model, CLASSIFY, SAMPLE), model.predict(CLASSIFY, [SAMPLE])[0]
    assert ray.prediction.value == said.value
    assert ray.prediction.probability == pytest.approx(said.probability, abs=1e-5)
    assert "head" in str(ray)
    assert len(str(ray).splitlines()) == 3


def test_errors_say_what_is_wrong():
    with pytest.raises(mm.ConfigError, match="no layer of this model attends"):
        xray(model_of(with_block(Recurrent(), MLP())), CLASSIFY, SAMPLE)
    with pytest.raises(mm.ConfigError, match="answered at once by Classify"):
        xray(model_of(SMALL), CLASSIFY, SAMPLE, answer="a")
    with pytest.raises(mm.TaskError, match="there is no task 'image -> labels'"):
        xray(model_of(SMALL), "image -> labels", SAMPLE)
    with pytest.raises(mm.TaskError, match="text"):
        xray(model_of(SMALL), CLASSIFY, {"image": SAMPLE["image"]})


def pictures(count: int, seed: int, *, scale: float = 1.0) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [{"image": (scale * draw.random((4, 6))).astype(np.float32), "text": "why"} for _ in range(count)]


def test_evidence_finds_unusual_inputs_at_the_promised_rate():
    model = model_of(SMALL)
    known = Evidence.fit(model, CLASSIFY, pictures(120, 1), quiet=True)
    usual = [known.judge(xray(model, CLASSIFY, s), alpha=0.1) for s in pictures(60, 2)]
    unusual = [known.judge(xray(model, CLASSIFY, s), alpha=0.1) for s in pictures(10, 3, scale=0.05)]
    assert sum(n.unusual for n in usual) <= 12  # 6 expected; 13 or more happen once in 200 runs
    assert all(n.unusual for n in unusual)
    assert np.mean([n.p for n in usual]) == pytest.approx(0.5, abs=0.12)  # p is uniform, which is what calibrated means
    first = [known.judge(xray(model, CLASSIFY, s)) for s in pictures(120, 1)[::2]]
    z = torch.stack([n.z["block 1 self"] for n in first])
    torch.testing.assert_close(z.mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(2).double())
    assert sorted(float(n.percentile["block 1 self"][0]) for n in first) == pytest.approx(np.arange(60) / 60)
    percentile = torch.stack([n.percentile["block 1 self"] for n in first])
    assert torch.equal(percentile[:, 1].argsort(), z[:, 1].argsort())
    assert unusual[0].p == pytest.approx(1 / 61)
    assert "unusual" in str(unusual[0])


def test_the_threshold_is_where_the_verdict_changes():
    model = model_of(SMALL)
    known = Evidence.fit(model, CLASSIFY, pictures(60, 1), quiet=True)
    held_out = known.distance_B.tolist()
    for alpha in (0.04, 0.1, 0.5):
        at = known.threshold(alpha)
        assert sum(d > at for d in held_out) <= alpha * 31 - 1 < sum(d >= at for d in held_out)
    assert known.threshold(0.03) == math.inf  # 1 of 31 is more than that
    rays = [xray(model, CLASSIFY, s) for s in pictures(20, 2) + pictures(5, 3, scale=0.3)]
    verdicts = [known.judge(ray, alpha=0.1) for ray in rays]
    assert {n.unusual for n in verdicts} == {True, False}
    assert [n.unusual for n in verdicts] == [n.distance > n.threshold for n in verdicts]
    for alpha in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(mm.ConfigError, match="give a number between 0 and 1"):
            known.judge(rays[0], alpha=alpha)


@pytest.mark.parametrize(("count", "width"), [(10, 32), (200, 8), (30, 30)])
def test_correlations_are_shrunk_as_scikit_learn_does_it(count, width):
    covariance = pytest.importorskip("sklearn.covariance")
    draw = np.random.default_rng(0)
    z_BN = draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) / width**0.5
    wanted, share = covariance.ledoit_wolf(z_BN, assume_centered=True)
    assert 0 < share < 1
    np.testing.assert_allclose(_shrunk(torch.tensor(z_BN)), wanted, atol=1e-5)


def test_heads_that_are_usual_alone_and_not_together_are_far():
    draw = np.random.default_rng(0)
    z_BN = torch.tensor(draw.normal(size=(300, 1)) + 0.1 * draw.normal(size=(300, 2)))
    precision_NN = torch.linalg.inv(_shrunk(z_BN))
    together, apart = _distance(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), precision_NN)
    assert apart > 5 * together
    wanted = spatial.distance.mahalanobis([1.0, -1.0], [0.0, 0.0], precision_NN.numpy()) / 2**0.5
    assert float(apart) == pytest.approx(wanted)


def test_length_alone_is_not_unusual():
    model = model_of(SMALL)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("qkv.weight"):
                weight[:16] = 0.0  # queries: all scores are 0, so evidence is the logarithm of the number of keys
    samples = [{**SAMPLE, "text": "x" * (1 + i)} for i in range(20)]
    known = Evidence.fit(model, CLASSIFY, samples, quiet=True)
    assert float(known.mean_N.abs().max()) < 1e-5
    assert float(xray(model, CLASSIFY, samples[4]).layers[0].evidence_HT.min()) == pytest.approx(math.log(11), abs=1e-5)


def test_evidence_refuses_what_it_was_not_fitted_on():
    model = model_of(SMALL)
    with pytest.raises(mm.StreamError, match="give 20 or more"):
        Evidence.fit(model, CLASSIFY, pictures(5, 0), quiet=True)
    known = Evidence.fit(model, CLASSIFY, pictures(20, 0), quiet=True)
    with pytest.raises(mm.ConfigError, match="fitted on task"):
        known.judge(xray(model_of(SMALL, WRITE), WRITE, {"text": "some"}))


def test_usage_of_slots_adds_up_and_finds_the_dead():
    model = model_of(CASES["memory"][0])
    samples = pictures(4, 0)
    before = usage(model, CLASSIFY, samples, quiet=True)["block 1 memory"]
    each = [xray(model, CLASSIFY, s).layers[0].usage_HM for s in samples]
    torch.testing.assert_close(before.usage_HM, torch.stack(each).sum(0))
    assert before.queries == 4 * 10
    torch.testing.assert_close(before.usage_HM.sum(-1), torch.full((2,), 40.0).double())
    memory = next(m for m in model.modules() if isinstance(m, Mechanism))
    with torch.no_grad():
        memory.prior_weights[0].table[:, 3] = -60.0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    assert usage(model, CLASSIFY, samples, quiet=True)["block 1 memory"].dead().tolist() == [False] * 3 + [True, False]
    with pytest.raises(mm.ConfigError, match="no PersistentMemory"):
        usage(model_of(SMALL), CLASSIFY, samples, quiet=True)


def test_the_mixture_view_shows_responsibilities_evidence_and_slots():
    model = model_of(CASES["memory"][0])
    memory = next(m for m in model.modules() if isinstance(m, Mechanism))
    with torch.no_grad():
        memory.prior_weights[0].table[:, 3] = -60.0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    known, new = pictures(30, 0), pictures(1, 9)[0]
    seen = mixture(model, CLASSIFY, new, known, alpha=0.1, quiet=True)
    ray = xray(model, CLASSIFY, new)
    assert seen.droppable() == {"block 1 memory": [3]}
    rows = seen.rows()
    assert len(rows) == sum(layer.heads for layer in ray.layers)
    for row in rows:
        layer = ray[row["layer"]]
        wanted = layer.posterior_HTM[row["head"]][ray.asked(layer)].mean(0).sort(descending=True)
        assert [share for _, share in row["largest"]] == pytest.approx(wanted.values[:3].tolist())
        assert row["largest"][0][0] == ray.key_label(layer, int(wanted.indices[0]))
        assert row["components"] == layer.posterior_HTM.shape[-1]
    judged = Evidence.fit(model, CLASSIFY, known, quiet=True).judge(ray, alpha=0.1)
    assert (seen.novelty.p, seen.novelty.threshold) == (judged.p, judged.threshold)
    text = str(seen)
    assert "block 1 memory: 1 of 5 slots could be dropped, as known samples hardly read them: 3" in text
    assert f"distance {judged.distance:.2f}" in text
    few = mixture(model, CLASSIFY, ray, known, alpha=0.01, quiet=True)
    assert not few.novelty.unusual
    assert few.to_json()["threshold"] is None
    assert "nothing can be unusual at alpha 0.01 with 30 known samples" in str(few)


class Page(HTMLParser):
    """Every tag closed in its turn, everything inside the file."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.said = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            value = value or ""
            assert name not in ("src", "href") or value.startswith("data:image/png;base64,")
            assert not name.startswith("on")
            if name == "title":
                self.titles.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


@pytest.mark.parametrize("case", ["plain", "window as a factor", "memory", "causal writer", "two cores"])
def test_the_page_is_whole_and_holds_all(case, tmp_path):
    _, ray = xray_of(case)
    ray.page(tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    for layer in ray.layers:
        assert layer.name in page.said
    assert ("mass" in page.said.split("What if")[0]) == (case == "window as a factor")
    assert "Where the parameters are" in page.said
    assert "Logit lens" in page.said
    if case == "plain":
        answer_M = ray.layers[0].posterior_HTM.mean(0)[9]  # six patches and three letters come before it
        assert f"row 1, column 2: {float(answer_M[5]):.1%}" in page.titles
    if case == "two cores":
        assert f"t ← m: {float(ray.layers[-1].posterior_HTM.mean(0)[1, 2]):.1%}" in page.titles


def test_a_text_that_looks_like_a_page_is_only_text():
    model = model_of(SMALL, WRITE)
    ray = xray(model, WRITE, {"text": "<b>&\n$x$"}, answer="<i>")
    whole = Page(page(ray))
    assert any(title.startswith("<: ") for title in whole.titles)
    assert any(title.startswith("⏎: ") for title in whole.titles)


@pytest.mark.parametrize("case", ["plain", "memory", "two cores"])
def test_the_picture_is_drawn(case, tmp_path):
    from PIL import Image

    _, ray = xray_of(case)
    ray.draw(tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert pixels.shape[1] == 1210
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_heat_lies_on_its_patch():
    from multimodal.look.drawing import overlay

    heat_N = torch.zeros(6)
    heat_N[4] = 1.0  # row 1, column 1 of 2 x 3
    pixels = overlay(torch.full((4, 6, 1), 0.5), heat_N, (2, 3), longer=6).astype(int)
    bright = pixels.sum(2)
    assert pixels.shape == (4, 6, 3)
    assert (bright[2:, 2:4] > 500).all()
    bright[2:, 2:4] = 0
    assert (bright < 400).all()


def test_sound_and_pictures_that_are_written_token_by_token(tmp_path):
    tokenizers = {
        "audio": AudioFrames(rate_hz=8000, mels=16),
        "image": ImagePatches(patch=2, channels=1),
        "text": TextBytes(),
    }
    model = mm.Model(tokenizers, SMALL, ["audio image -> text"]).eval()
    draw = np.random.default_rng(0)
    sample = {"audio": (draw.standard_normal(4000).astype(np.float32) / 9, 8000), "image": SAMPLE["image"]}
    ray = xray(model, "audio image -> text", sample, answer="a $ b")
    sound = ray.fields["audio"]
    assert sound.picture_YXC is not None
    assert not sound.flat
    assert all(float(a.split()[1]) < float(b.split()[1]) for a, b in pairwise(sound.labels))
    ray.draw(tmp_path / "x.png")
    ray.page(tmp_path / "x.html")
    Page((tmp_path / "x.html").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Points(mm.Tokenizer):
    """Points of the plane, one token each."""

    feature_size = 2

    def encode(self, value):
        return Tokens(torch.tensor(value), at_times(torch.arange(len(value))))

    def decode(self, tokens):
        return tokens.content.tolist()


POINTS, HULL = [[0.125, 0.5], [0.75, 1 / 3], [0.5, 0.875], [0.25, 0.25]], "points -> hull:points"
POINTING = {
    "one core": SMALL,
    "two cores": mm.EncoderDecoder(reader=SMALL, writer=WRITER),
}


def pointing(core) -> mm.Model:
    model = mm.Model({"points": Points()}, core, [mm.Task(HULL, Pointer())]).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    return model


@pytest.mark.parametrize("core", POINTING)
def test_a_model_that_points_is_seen_with_its_own_and_a_given_answer(core, tmp_path):
    model = pointing(POINTING[core])
    own = xray(model, HULL, {"points": POINTS})
    said = model.predict(HULL, [{"points": POINTS}])[0]
    assert own.prediction.value == said.value
    given = xray(model, HULL, {"points": POINTS}, answer=[POINTS[2], POINTS[1]])
    assert given.written_labels == ["at 2", "at 1", "[stop]"]  # what was pointed at, by its name
    for ray in (own, given):
        ray.draw(tmp_path / "x.png")
        ray.page(tmp_path / "x.html")
        Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "→ (0.5, 0.875), (0.75, 0.3333)" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("core", POINTING)
def test_the_lens_of_a_model_that_points_ends_at_its_logits(core):
    model = pointing(POINTING[core])
    sample = {"points": POINTS, "hull": [POINTS[2], POINTS[1]]}
    found = lens(model, HULL, sample)
    assert found.classes == ("at 0", "at 1", "at 2", "at 3", "[4]")
    with torch.no_grad():
        stream = model.pack(HULL, [sample])
        torch.testing.assert_close(found.probability_LNV[-1], model.logits(stream)[HULL].softmax(-1))
        r, layers = stream.readings[HULL], states(model, HULL, [sample], answers=True).layers
        state_TD = model.core.norm(layers[0]) if core == "one core" else model(stream)
        if core == "two cores":  # what was read is read to the end before anything is written
            state_TD[r.row_N] = model.core.get_submodule("writer.norm")(layers[-2][r.row_N])
        logits = model.packer.head(HULL).logits(
            model.readout(HULL), state_TD[r.row_N], r.lengths, **model.packer.head(HULL).inputs(r, state_TD)
        )
    torch.testing.assert_close(found.probability_LNV[0 if core == "one core" else -2], logits.softmax(-1))


def test_a_fact_of_a_model_that_points_can_be_edited():
    model = pointing(SMALL)
    sample = {"points": POINTS, "hull": [POINTS[1]]}
    moment_FF = second_moment(model, HULL, [sample])
    edit = edit_fact(model, HULL, sample, moment_FF=moment_FF, steps=1)
    assert float(edit.left_D.norm()) > 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([0.5, 1 / 3], "0.5, 0.3333"),
        (["a", "b"], "a, b"),
        ([], "(none)"),
        (1 / 3, "0.3333"),
        (np.array([[0.5, 0.25]], dtype=np.float32), "(0.5, 0.25)"),
        (torch.tensor([2, 3]), "2, 3"),
        (np.zeros((3, 4, 4)), "a label"),
    ],
)
def test_an_answer_is_summarised_in_a_line(value, said):
    ray = xray_of("plain")[1]
    assert answer_line(replace(ray, prediction=Prediction(value, math.nan))) == f"→ {said}"


def test_a_wrong_sample_is_refused_like_predict_refuses_it():
    model = model_of(SMALL, WRITE)
    with pytest.raises(mm.TaskError, match="has no field 'text'; it has 'b'"):
        xray(model, WRITE, {"b": "x"})
    with pytest.raises(mm.ConfigError, match="xray: give one sample, not a list of them"):
        xray(model, WRITE, [{"text": "x"}])  # pyright: ignore[reportArgumentType]
    # as samples of a data set are
    given = xray(model, WRITE, {"text": "x", "answer": "other", "number": 3}, answer="y")
    assert given.written_labels == ["y", "[stop]"]


def test_pictures_say_how_strong_their_strongest_is():
    ray = xray_of("plain")[1]
    heat_HN = ray.heat(ray.layers[0], "image")
    assert heat_HN is not None
    assert ray.even(ray.layers[0]) == pytest.approx(1 / 10)  # six patches, three letters and the start
    said = f"up to {100 * float(heat_HN.max()):.0f} %, even would be 10 %"
    titles = [panel.title for panel in panels(ray)]
    assert titles[0].endswith(said)
    text = page(ray)
    assert said in text
    assert f"head 1 {100 * float(heat_HN[1].sum()):.0f} %, up to {100 * float(heat_HN[1].max()):.0f} %" in text
    heat_HN = ray.heat(ray.layers[0], "text")
    assert heat_HN is not None
    assert titles[1].endswith(f"up to {100 * float(heat_HN.mean(0).max()):.0f} %, even would be 10 %")
    assert [percent(x) for x in (0, 0.0042, 0.06, 0.1, 1)] == ["0 %", "0.42 %", "6 %", "10 %", "100 %"]
    causal = xray_of("causal writer")[1]
    rows = range(5, 11)  # four letters are read; the start sees five keys, the last of five letters ten
    assert causal.even(causal.layers[0]) == pytest.approx(sum(1 / n for n in rows) / 6)


def test_pictures_of_each_written_token_carry_the_share_that_fell_on_the_field():
    task = "image -> answer:text"
    ray = xray(model_of(SMALL, task), task, {"image": SAMPLE["image"]}, answer="ab")
    part_HTN = ray.onto(ray.layers[0], "image")
    assert part_HTN is not None
    share_T = part_HTN.mean(0).sum(-1).tolist()
    for label, share in zip(("a", "b", "[stop]"), share_T, strict=True):
        assert f"<figcaption>{label} {100 * share:.0f} %, up to" in page(ray)


def test_one_head_is_shown_once():
    ray = xray(model_of(mm.Core(width=16, depth=1, heads=1), WRITE), WRITE, {"text": "some"}, answer="other")
    text = page(ray)
    assert text.count('class="matrix"') == 1
    assert "<details>" not in text
    assert "mean of the heads" not in text.split("token by token")[1]
    assert "1 attention layer, 1 head." in text
    (alignment,) = [panel.title for panel in panels(ray) if panel.title.startswith("what is written")]
    assert "its one head" in alignment
    assert "below" not in alignment
    several = page(xray_of("two cores")[1])
    assert several.count('class="matrix"') == 2 * (
        2 * 1 + 1
    )  # of the reader and across, the mean and each of two heads
    assert [counted(1, "query"), counted(2, "query"), counted(1, "key")] == ["1 query", "2 queries", "1 key"]


def test_of_many_heads_the_picture_shows_the_last_block_and_the_sharpest(tmp_path):
    ray = xray(model_of(mm.Core(width=16, depth=6, heads=4)), CLASSIFY, SAMPLE)
    chosen = ray.chosen_heads()
    assert chosen["block 6 self"] == (0, 1, 2, 3)
    others = {(name, h) for name, heads in chosen.items() for h in heads if name != "block 6 self"}
    entropy = {
        (layer.name, h): float(layer.effective_HT[h, ray.asked(layer)].log().mean())
        for layer in ray.layers[:-1]
        for h in range(4)
    }
    assert others == set(sorted(entropy, key=lambda head: entropy[head])[:16])  # all see the same ten keys
    assert left_out(ray) == "20 of 24 heads: the last block and the sharpest; the page has all"
    ray.draw(tmp_path / "x.png")
    assert page(ray).count("<figcaption>head ") == 24
    few = xray(model_of(mm.Core(width=16, depth=4, heads=4)), CLASSIFY, SAMPLE)
    assert set(few.chosen_heads().values()) == {(0, 1, 2, 3)}
    assert left_out(few) == ""


def test_columns_have_one_name_everywhere():
    ray = xray_of("plain")[1]
    for name in ("prior variance", "score variance"):
        assert name in str(ray).splitlines()[0]
        assert name in READOUTS.values()
        assert f">{name}</th>" in page(ray)


def test_the_page_explains_itself():
    text = page(xray_of("two cores")[1])
    assert 'alt=""' not in page(xray_of("plain")[1])
    assert text.index("How to read this") < text.index("<h2>")
    assert "a mask is a prior probability of 0" in text
    assert '<div class="scroll"><table><thead><tr><th>layer' in text
    caption = text.index("<h3>writer block 1 cross, mean of the heads: up to ")
    assert text.index("answer, token by token") < caption < text.index('class="matrix"', caption - 300)
    assert "(token 1)" in text.split("What if a token")[1]


def test_labels_are_numbers_and_seconds():
    class Number(Points):
        feature_size = 1

    assert token_labels(Number(), Number()([[0.5], [1 / 3]])) == ["0.5", "0.3333"]
    assert token_labels(Points(), Points()(POINTS[:2])) == ["at 0", "at 1"]
    sound = AudioFrames(rate_hz=8000, mels=16)
    tokens = sound((np.zeros(4000, dtype=np.float32), 8000))
    assert token_labels(sound, tokens)[1] == f"at {sound.step[0]:.4g} s"


def test_a_layer_is_shown_in_a_line():
    assert repr(xray_of("plain")[1].layers[0]) == "LayerXRay('block 1 self', 2 heads, 10 queries, 10 keys)"


def test_places_that_cannot_be_written_to_are_refused(tmp_path):
    ray = xray_of("plain")[1]
    with pytest.raises(mm.ConfigError, match=r"XRay.draw: 'x.foo' does not end in .png or .* name it x.png"):
        ray.draw(tmp_path / "x.foo")
    with pytest.raises(mm.ConfigError, match=r"XRay.page: 'x.png' does not end in .html"):
        ray.page(tmp_path / "x.png")
    for write in (ray.draw, ray.page):
        ending = "png" if write == ray.draw else "html"
        with pytest.raises(mm.ConfigError, match=r"there is no folder '.*looks' to write x.*make it first"):
            write(tmp_path / "looks" / f"x.{ending}")
