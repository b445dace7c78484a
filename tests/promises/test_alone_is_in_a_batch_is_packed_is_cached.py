"""Promise 3: alone = in a batch = packed = cached: the same greedy answers, and logits within 1e-5."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import multimodal as mm
from tests import test_model
from tests import test_stream as stream
from tests.generate import test_engine as engine
from tests.generate import test_generate as generate

model, batch, model_of_texts = stream.model, stream.batch, test_model.model  # fixtures
prompts, make = generate.prompts, engine.make


@stream.quiet_flex
@pytest.mark.parametrize("backend", ["dense", "runs", "flex"])
def test_packed_and_alone_give_the_same_logits(model, batch, backend):
    packed = stream.logits_by_sample(model, batch, backend)
    for sample, together in zip(batch, packed, strict=True):
        (alone,) = stream.logits_by_sample(model, [sample])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        assert alone.std() > 0.1  # they could differ


def test_ctc_rows_packed_and_alone(model, values):
    batch = [("sound -> story", {"sound": values(i)["sound"], "story": "ab"}) for i in range(4)]
    packed = stream.logits_by_sample(model, batch)
    assert len({len(rows) for rows in packed}) > 1
    for sample, together in zip(batch, packed, strict=True):
        torch.testing.assert_close(together, stream.logits_by_sample(model, [sample])[0], atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=stream.mixes())
def test_any_mix_packed_is_any_mix_alone(batch, core, lively):
    model = lively(mm.Model(stream.SMALL, core, stream.TASKS))
    packed = model.packer(batch)
    assert len(packed) == sum(len(model.packer([sample])) for sample in batch)
    assert sorted(s for r in packed.readings.values() for s in r.samples) == list(range(len(batch)))
    for sample, together in zip(batch, stream.logits_by_sample(model, batch), strict=True):
        torch.testing.assert_close(together, stream.logits_by_sample(model, [sample])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("task", ["text -> label", "sound -> story", "text -> story"])
def test_any_batch_size_gives_the_same_answers(model_of_texts, values, task):
    samples = [values(i) for i in range(7)]
    whole = model_of_texts.predict(task, samples)
    for batch in (1, 3):
        parts = model_of_texts.predict(task, samples, batch=batch)
        assert [p.value for p in parts] == [p.value for p in whole]
        assert [p.confidence for p in parts] == pytest.approx([p.confidence for p in whole], rel=1e-3)
    assert model_of_texts.predict(task, []) == []


@pytest.mark.parametrize("task", generate.TASKS)
@pytest.mark.parametrize("core", generate.CORES)
def test_cached_greedy_is_the_whole_pass_made_anew(lively, prompts, core, task):
    model = generate.make(generate.CORES[core], lively)
    samples = prompts(6)
    expected = [generate.without_cache(model, task, s, 8) for s in samples]
    batch = model.generate(task, samples, max_tokens=8)
    for sample, answer, (written, log_p, complete) in zip(samples, batch, expected, strict=True):
        assert answer.value == written
        assert answer.complete == complete
        assert answer.confidence == pytest.approx(torch.tensor(log_p).exp().item(), rel=1e-3)
        alone = model.generate(task, [sample], max_tokens=8)[0]
        assert (alone.value, alone.complete) == (written, complete)
        assert alone.confidence == pytest.approx(answer.confidence, rel=1e-4)


@pytest.mark.parametrize("core", engine.CORES)
@pytest.mark.parametrize("task", [engine.MIXED, engine.NOTHING])
def test_at_every_length_the_cache_gives_the_logits_of_a_whole_pass(make, core, task):
    """60 tokens, two steps apart: many windows long."""
    model = make(core)
    with torch.no_grad():
        model.readout(task).linear.bias[engine.STOP] = -40.0
    rows = engine.heard(model, task)
    answer = model.generate(task, [engine.sample(task, 4)], max_tokens=60, temperature=1.0, seed=1)[0]
    cached = torch.cat(rows)
    assert len(answer.value) == 60
    assert len(set(answer.value)) > 3
    whole = engine.uncached(model, task, engine.sample(task, 4), answer.value)
    assert cached.shape == whole.shape == (61, 7)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=0)
    for length in (0, 1, 4, 5, 6, 7, 30, 59):  # and passes over no more than that
        short = engine.uncached(model, task, engine.sample(task, 4), answer.value[:length])
        torch.testing.assert_close(cached[: length + 1], short, atol=1e-5, rtol=0)
    assert float(whole.std(0).max()) > 0.1  # not the same all the time
