"""States by layer, probes, steering and the lens: against the model itself run by hand, and against scikit-learn."""

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.look.layers import START, layer_names, states
from multimodal.look.lens import lens
from multimodal.look.probes import direction, fit_linear, probe
from multimodal.look.steering import random_like, steer
from multimodal_tokenizers import Labels, TextBytes

READ, WRITE = "text -> label", "text -> answer:text"
SAMPLES = [{"text": "a long one"}, {"text": "hi"}, {"text": "three"}]
TWO = mm.EncoderDecoder(reader=mm.Core(width=32, depth=1, heads=2), writer=mm.Core(width=32, depth=2, heads=2))


def make(core: mm.Core | mm.EncoderDecoder | None = None) -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("yes", "no", "maybe"))}
    model = mm.Model(tokenizers, core or mm.Core(width=32, depth=3, heads=2), [READ, WRITE])
    with torch.no_grad():  # fresh weights hardly change the stream, which would hide a mix-up of layers
        for weight in model.core.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return model.eval()


def hooks(model: mm.Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_states_are_those_of_each_sample_alone():
    model = make()
    found = states(model, READ, SAMPLES, batch=2)
    assert found.names == ("embedding", "block 1", "block 2", "block 3")
    assert found.fields == ("text", START)
    for i, sample in enumerate(SAMPLES):
        alone = states(model, READ, [sample])
        row_N = found.rows(sample=i)
        assert len(row_N) == len(sample["text"]) + 1
        for layer, there in zip(alone.layers, found.layers, strict=True):
            torch.testing.assert_close(there[row_N], layer, atol=1e-5, rtol=1e-4)
    assert found.rows("text").tolist() == [r for r in range(len(found.sample_T)) if r not in found.reading_N.tolist()]
    assert hooks(model) == 0


def test_the_first_layer_is_the_embedding_and_the_last_makes_the_logits():
    model = make()
    stream = model.pack(READ, SAMPLES, answers=False)
    found = states(model, READ, SAMPLES)
    with torch.no_grad():
        torch.testing.assert_close(found.layers[0], model.rows(stream))
        logits = model.readout(READ).linear(model.core.norm(found.layers[-1][found.reading_N]))
        torch.testing.assert_close(logits, model.logits(stream)[READ])


@pytest.mark.parametrize(
    ("pool", "pick"), [("first", lambda x: x[0]), ("last", lambda x: x[-1]), ("mean", torch.Tensor.mean)]
)
def test_one_state_a_sample_is_in_the_order_given(pool, pick):
    model = make()
    found = states(model, READ, SAMPLES)
    for i, state_D in enumerate(found.of(2, "text", pool=pool)):
        rows_ND = found.layers[2][found.rows("text", i)]
        expected = rows_ND.mean(0) if pool == "mean" else pick(rows_ND)
        torch.testing.assert_close(state_D, expected)


def test_a_field_that_is_none_shifts_no_other():
    model = mm.Model({"text": TextBytes()}, mm.Core(width=32, depth=1, heads=2), ["text b:text -> c:text"]).eval()
    samples = [{"text": "abc", "b": None, "c": "x"}, {"text": None, "b": "de", "c": "yz"}]
    found = states(model, "text b:text -> c:text", samples, answers=True)
    sizes = {f: [len(found.rows(f, i)) for i in range(2)] for f in found.fields}
    assert sizes == {"text": [3, 0], "b": [0, 2], START: [1, 1], "c": [1, 2]}
    with pytest.raises(mm.StreamError, match="sample 1 has no rows of field 'text'"):
        found.of(0, "text")
    with pytest.raises(mm.ConfigError, match="no field 'd'; there are text, b, start, c"):
        found.rows("d")


def test_two_cores_have_their_own_rows():
    model = make(TWO)
    sample = {"text": "hallo", "answer": "yo"}
    found = states(model, WRITE, [sample], answers=True)
    assert found.names == layer_names(model)
    assert found.names[2] == "writer embedding"
    for name, layer in zip(found.names, found.layers, strict=True):
        read = name.startswith("reader")
        assert layer.isnan().any(1).tolist() == [not read] * 5 + [read] * 3, name
    with torch.no_grad():
        state_ND = model.core.writer.norm(found.layers[-1][found.reading_N])
        torch.testing.assert_close(
            model.readout(WRITE).linear(state_ND), model.logits(model.pack(WRITE, [sample]))[WRITE]
        )
    assert lens(model, WRITE, sample).layers == ("writer embedding", "writer block 1", "writer block 2")


def blobs(count: int = 300) -> tuple[torch.Tensor, list[str]]:
    random = np.random.default_rng(0)
    label = random.integers(3, size=count)
    centres = random.normal(size=(3, 6)) * 0.7
    states_ND = (centres[label] + random.normal(size=(count, 6))) * np.array([1, 5, 0.1, 1, 1, 1]) + 3
    return torch.tensor(states_ND, dtype=torch.float32), [("a", "b", "c")[i] for i in label]


def test_the_line_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    state_ND, labels = blobs()
    decay = 0.01
    target = np.array(["abc".index(x) for x in labels])
    weight_VD, bias_V = fit_linear(state_ND, torch.tensor(target), 3, decay=decay)
    scaled = StandardScaler().fit_transform(state_ND.numpy())
    theirs = LogisticRegression(C=1 / (decay * len(target)), tol=1e-8, max_iter=1000).fit(scaled, target)
    ours = (state_ND @ weight_VD.T + bias_V).softmax(-1)
    np.testing.assert_allclose(ours, theirs.predict_proba(scaled), atol=2e-3)


def test_a_probe_reads_what_is_there_and_its_control_only_types():
    state_ND, labels = blobs(600)
    found = probe(state_ND, labels, control=range(600))
    assert found.accuracy > found.majority + 0.2
    assert found.control < found.majority + 0.15  # a type of its own for each row: nothing can be learned
    assert found.selectivity == found.accuracy - found.control
    right = [a == b for a, b in zip(found.predict(state_ND), labels, strict=True)]
    assert abs(np.mean(right) - found.accuracy) < 0.1
    types = [f"{label}" for label in labels]
    assert probe(state_ND, labels, control=types, seed=1).control > 0.6  # a line separates three types


def test_groups_stay_on_one_side():
    group = np.repeat(np.arange(40), 5)
    state_ND = torch.nn.functional.one_hot(torch.tensor(group), 40).float()
    labels = [int(i % 2) for i in group]
    assert probe(state_ND, labels).accuracy > 0.9  # each group is seen in training, and by heart
    assert probe(state_ND, labels, groups=group.tolist()).accuracy < 0.8


def test_probes_refuse_what_teaches_nothing():
    state_ND, labels = blobs(20)
    with pytest.raises(mm.ShapeError, match="labels has 3 entries for 20 states"):
        probe(state_ND, labels[:3])
    with pytest.raises(mm.StreamError, match="all 20 labels are 'a'"):
        probe(state_ND, ["a"] * 20)
    with pytest.raises(mm.StreamError, match="not finite"):
        probe(state_ND * float("nan"), labels)
    with pytest.raises(mm.StreamError, match="leaves one side empty"):
        probe(state_ND, labels, groups=["one"] * 20)


@pytest.mark.parametrize("layer", [0, 2, "block 3", -1])
def test_steering_adds_to_one_layer_and_leaves_nothing_behind(layer):
    model = make()
    push_D = torch.randn(32)
    number = {"block 3": 3, -1: 3}.get(layer, layer)
    before = states(model, READ, SAMPLES)
    with steer(model, layer, push_D, 2.0):
        steered = states(model, READ, SAMPLES)
    shifts = [
        bool(((b - a) - 2 * push_D).abs().max() < 1e-4) for a, b in zip(before.layers, steered.layers, strict=True)
    ]
    # the recording hook of the embedding was there after steer's, so it sees the push as well
    assert shifts == [i == number for i in range(4)]
    after = states(model, READ, SAMPLES)
    assert all(torch.equal(a, b) for a, b in zip(before.layers, after.layers, strict=True))
    with pytest.raises(RuntimeError, match="inside"), steer(model, layer, push_D):
        raise RuntimeError("inside")
    assert hooks(model) == 0


@pytest.mark.parametrize("core", [None, TWO])
def test_what_is_written_under_steering_is_the_same_with_and_without_a_cache(core):
    model = make(core)
    push_D = torch.randn(32) * 3
    plain = model.generate(WRITE, text="hi", max_tokens=6)
    with steer(model, -1, push_D), model.inference_mode():
        cached = model.generate(WRITE, text="hi", max_tokens=6).tokens.content.tolist()
        whole: list[int] = []
        for _ in range(len(cached)):
            tokens = mm.Tokens(torch.tensor(whole, dtype=torch.long), TextBytes().places(len(whole)))
            stream = model.packer([(WRITE, {"text": "hi"})], answers=False, begins=[tokens if whole else None])
            whole.append(int(model.logits(stream)[WRITE][-1].argmax()))
    assert cached == whole
    assert plain.tokens.content.tolist() != cached


def test_steering_refuses_wrong_layers_and_widths():
    model = make()
    with (
        pytest.raises(mm.ConfigError, match=r"no layer 'block 9'; there are 0 to 3: embedding, block 1"),
        steer(model, "block 9", torch.zeros(32)),
    ):
        pass
    with pytest.raises(mm.ShapeError, match="D=32 was wanted"), steer(model, 1, torch.zeros(8)):
        pass


def test_directions_lead_from_one_mean_to_the_other():
    a_ND, b_ND = torch.randn(5, 4), torch.randn(7, 4)
    torch.testing.assert_close(b_ND.mean(0) + direction(a_ND, b_ND), a_ND.mean(0))
    push_D = torch.randn(50)
    other_D = random_like(push_D, seed=3)
    torch.testing.assert_close(other_D.norm(), push_D.norm())
    assert abs(float(torch.cosine_similarity(push_D, other_D, dim=0))) < 0.5


def test_the_lens_ends_at_the_models_own_answer():
    model = make()
    found = lens(model, READ, SAMPLES[0])
    assert found.probability_LNV.shape == (4, 1, 3)
    answer = model.predict(READ, **SAMPLES[0])
    assert found.best()[-1] == [answer.value]
    assert found.classes == ("yes", "no", "maybe")
    assert abs(float(found.probability_LNV[-1, 0].max()) - answer.confidence) < 1e-5
    sample = {"text": "hi", "answer": "you"}
    written = lens(model, WRITE, sample)
    with torch.no_grad():
        logits = model.logits(model.pack(WRITE, [sample]))[WRITE]
        torch.testing.assert_close(written.probability_LNV[-1], logits.softmax(-1))
        found_states = states(model, WRITE, [sample], answers=True)
        second = model.readout(WRITE).linear(model.core.norm(found_states.layers[1][found_states.reading_N]))
    torch.testing.assert_close(written.probability_LNV[1], second.softmax(-1))
    p = written.probability_LNV.double().numpy()
    np.testing.assert_allclose(written.entropy_LN, -(p * np.log(p)).sum(-1), atol=1e-4)
    assert len(lens(model, WRITE, {"text": "hi"}).best()[0]) == 1
    assert hooks(model) == 0


def test_a_stream_that_grows_is_looked_at_where_it_can_be(tmp_path):
    block = (mm.layers.SelfAttention(out=8, merge=mm.layers.Concat()), mm.layers.MLP())
    model = make(mm.Core(width=32, depth=2, heads=2, block=block))
    assert [layer.shape[1] for layer in states(model, READ, SAMPLES).layers] == [32, 40, 48]
    found = lens(model, READ, SAMPLES[0])
    assert found.layers == ("block 2",)
    assert found.best() == [[model.predict(READ, **SAMPLES[0]).value]]
    with steer(model, 1, torch.zeros(40)):
        pass
    found.draw(tmp_path / "lens.png")
    assert (tmp_path / "lens.png").stat().st_size > 1000
