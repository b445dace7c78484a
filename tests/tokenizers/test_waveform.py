"""Raw samples: conformance, what a token holds by hand, what is refused, and tones that no linear classifier tells apart."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.heads import FlowMatching
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Labels, Waveform

RATE = 8000
READ = Waveform(RATE, hop=160, context=40, strides=(5, 4), channels=16)
WRITTEN = Waveform(RATE, hop=80, context=0, strides=(5, 4), channels=8, normalise="none", causal=True)
WAVES = [
    ((np.random.default_rng(i).standard_normal(n) * 0.1).astype(np.float32), RATE)
    for i, n in enumerate((900, 1300, 1300))
]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, tokenizer in enumerate((READ, WRITTEN))
        for check in tokenizer_checks(tokenizer, WAVES)
    ],
)
def test_conformance(check):
    check()


def test_a_token_is_its_samples_and_those_before():
    wave = np.linspace(-0.5, 0.5, 300, dtype=np.float32)
    raw = Waveform(RATE, hop=160, context=40, strides=(5, 4), normalise="none")
    tokens = raw((wave, RATE))
    assert torch.equal(tokens.content[0], torch.cat([torch.zeros(40), torch.from_numpy(wave[:160])]))
    assert torch.equal(tokens.content[1], torch.cat([torch.from_numpy(wave[120:300]), torch.zeros(20)]))
    assert tokens.position_NA[:, 0].tolist() == pytest.approx([0, 0.02])
    assert raw.decode(tokens)[0][:300].tolist() == wave.tolist()


def test_loudness_is_that_of_the_clip_or_none():
    loud, quiet = ((scale * np.sin(np.arange(800) * 0.3).astype(np.float32), RATE) for scale in (0.8, 0.001))
    torch.testing.assert_close(READ(loud).content, READ(quiet).content, atol=1e-4, rtol=0)
    assert READ(loud).content[0, 40:].square().mean() == pytest.approx(1.0, abs=0.1)
    assert READ((np.zeros(800, np.float32), RATE)).content.abs().max() == 0
    assert WRITTEN(loud).content.abs().max() == pytest.approx(0.8, abs=0.01)


def test_the_stem_is_its_convolutions():
    embed: Any = READ.embed(12)
    content = READ(WAVES[0]).content
    (first, second), hidden = embed.convolutions, content[:, None]
    assert (first.kernel_size, first.stride, second.kernel_size, second.stride) == ((10,), (5,), (8,), (4,))
    hidden = F.gelu(F.conv1d(hidden, first.weight, first.bias, 5))
    hidden = F.gelu(F.conv1d(F.pad(hidden, (0, 1)), second.weight, second.bias, 4))  # 39 positions, and a stride is 4
    assert hidden.shape[-1] == 40 // 4 - 1
    torch.testing.assert_close(embed(content), hidden.flatten(1) @ embed.linear.weight.T + embed.linear.bias)
    torch.testing.assert_close(embed(content)[3], embed(content[3:4])[0])


@pytest.mark.parametrize(
    "tokenizer", [READ, WRITTEN, Waveform(RATE), Waveform(RATE, hop=317, context=0, strides=(7, 3, 2))]
)
def test_the_stem_sees_every_sample(tokenizer):
    content = torch.zeros(1, tokenizer.feature_size, requires_grad=True)
    tokenizer.embed(12)(content).square().sum().backward()
    assert content.grad is not None
    assert (content.grad != 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hop": 0}, "hop=0 must be a whole number, 1 or more"),
        ({"context": -1}, "context=-1 must be a whole number, 0 or more"),
        ({"strides": (5, 0)}, "stride=0 must be a whole number, 1 or more"),
        ({"strides": ()}, r"strides=\(\) must be one or more"),
        (
            {"strides": (8, 8, 8)},
            r"strides=\(8, 8, 8\) must be one or more, and leave something of the 400 samples of hop=320 and context=80",
        ),
        ({"normalise": "fixed"}, "normalise='fixed' must be 'clip' or 'none'"),
        ({"max_seconds": 0}, "max_seconds=0 must be more than 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=f"^Waveform.*{message}"):
        Waveform(**settings)


def test_bad_values_are_refused_by_name():
    with pytest.raises(MediaError, match=r"^Waveform.encode: "):
        READ("no such file.wav")
    with pytest.raises(MediaError, match=r"^Waveform.encode: .*0.1"):
        Waveform(RATE, hop=160, context=40, strides=(5, 4), max_seconds=0.1)(WAVES[0])
    with pytest.raises(ConfigError, match="with context=40 a sound can be read but not written"):
        READ.places(2)


def test_alone_packed_and_cached_are_the_same(lively):
    tasks = ["read -> label", mm.Task("label -> written", FlowMatching(width=16, depth=1, steps=2))]
    tokenizers = {"read": READ, "written": WRITTEN, "label": Labels(("yes", "no"))}
    result = verify(lively(mm.Model(tokenizers, mm.Core(width=32, depth=2, heads=2), tasks)))
    assert result.passed, str(result)
    assert {row.check for row in result.rows} >= {"packed", "gradient", "cached"}


def tones(count: int, seed: int) -> list[dict[str, Any]]:
    """0.1 s of a tone of 400 to 700 Hz or of 1100 to 1900 Hz, at any phase, in noise."""
    random, samples = np.random.default_rng(seed), []
    for i in range(count):
        hz = random.uniform(*((400, 700), (1100, 1900))[i % 2])
        wave = np.sin(2 * np.pi * (hz * np.arange(800) / RATE + random.random())) + 0.5 * random.standard_normal(800)
        samples.append({"audio": (np.float32(wave * random.uniform(0.02, 0.2)), RATE), "label": ("low", "high")[i % 2]})
    return samples


def test_tones_are_told_apart_that_a_linear_classifier_of_samples_does_not():
    train, test = tones(192, 0), tones(128, 1)
    waves, labels = zip(*((sample["audio"][0], sample["label"]) for sample in [*train, *test]), strict=True)
    linear = LogisticRegression(max_iter=200).fit(waves[: len(train)], labels[: len(train)])
    model = mm.Model(
        {"audio": READ, "label": Labels(("low", "high"))}, mm.Core(width=32, depth=1, heads=2), ["audio -> label"]
    )
    mm.fit(model, {"audio -> label": train}, steps=60, batch=32, lr=3e-3, device="cpu", precision="float32", quiet=True)
    assert linear.score(waves[len(train) :], labels[len(train) :]) < 0.65
    assert mm.evaluate(model, "audio -> label", test)["exact"] > 0.95
