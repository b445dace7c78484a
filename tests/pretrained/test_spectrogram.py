"""The Audio Spectrogram Transformer against transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    changed,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    largest,
    refused,
    saved,
    states_or_logits,
)
from tests.pretrained.pictured import LABELS

transformers = pytest.importorskip("transformers")

RATE = 16000  # Hz
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_length": 96,
    "num_mel_bins": 32,
    "patch_size": 8,
    "frequency_stride": 5,
    "time_stride": 5,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("ASTModel", {}),
    "classes": ("ASTForAudioClassification", {"id2label": LABELS, "layer_norm_eps": 1e-6}),
    "several classes": (
        "ASTForAudioClassification",
        {"id2label": LABELS, "qkv_bias": False, "problem_type": "multi_label_classification"},
    ),
}
# one is padded, the other one cut
SOUNDS = [np.random.default_rng(i).uniform(-0.5, 0.5, n).astype(np.float32) for i, n in enumerate([9000, 23456])]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, settings = CASES[name]
    return getattr(transformers, kind)(transformers.ASTConfig(**{**SMALL, **settings, **more}))


def extractor(module: Any, **settings: Any) -> Any:
    sizes = {"max_length": module.config.max_length, "num_mel_bins": module.config.num_mel_bins}
    return transformers.ASTFeatureExtractor(**sizes, **settings)


def theirs(module: Any, sounds: list[np.ndarray], **settings: Any) -> list[Tensor]:
    """Its states, or the logits of a classifier."""
    read = extractor(module, **settings)
    with torch.inference_mode():
        found = [module(**read(x, sampling_rate=RATE, return_tensors="pt")) for x in sounds]
    return [x.logits[0] if hasattr(x, "logits") else x.last_hidden_state[0] for x in found]


def ours(loaded: Pretrained, sounds: list[np.ndarray]) -> list[Tensor]:
    audio: Any = loaded.tokenizers["audio"]
    cut = replace(audio, of=replace(audio.of, cut=True))
    loaded = replace(loaded, tokenizers={**loaded.tokenizers, "audio": cut})
    return states_or_logits(loaded, "audio", [(x, RATE) for x in sounds])


@pytest.mark.parametrize("name", CASES)
def test_equal_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    wanted = theirs(module, SOUNDS)
    check_packed_and_alone(loaded, SOUNDS, ours, wanted)
    check_round_trip(tmp_path, tmp_path / "theirs")
    again = type(module).from_pretrained(tmp_path / "out").eval()
    assert largest(theirs(again, SOUNDS), wanted) < 1e-6


def test_vectors_and_answers(tmp_path: Path) -> None:
    module = build("encoder")
    loaded = pretrained(saved(module, tmp_path / "encoder"), cut=True)
    read = extractor(module)(SOUNDS, sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        wanted = F.normalize(module(**read).pooler_output, dim=-1)
    samples = [{"audio": (x, RATE), "other": None} for x in SOUNDS]
    found = loaded.model().vectors("audio <-> other:audio", samples, side="left")
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)

    module = build("several classes")
    loaded = pretrained(saved(module, tmp_path / "classes"))
    probability = theirs(module, SOUNDS[:1])[0].sigmoid()
    answer = loaded.model().predict("audio -> label", [{"audio": (SOUNDS[0], RATE)}])[0]
    assert answer.value == [f"class {i}" for i in range(5) if probability[i] >= 0.5]


def test_a_sound_that_is_too_long_is_refused_or_cut_as_theirs_if_one_says_so(tmp_path: Path) -> None:
    module = build("encoder")
    given, samples = saved(module, tmp_path / "theirs"), [{"audio": (SOUNDS[1], RATE)}]
    task, message = "audio <-> other:audio", r"at most 0.954937 s are read at once; split it .* alone: cut=True"
    with pytest.raises(mm.MediaError, match=message):
        pretrained(given).model().vectors(task, samples)
    loaded = pretrained(given, cut=True)
    with torch.inference_mode():
        read = extractor(module)(SOUNDS[1], sampling_rate=RATE, return_tensors="pt")
        wanted = F.normalize(module(**read).pooler_output, dim=-1)
    torch.testing.assert_close(loaded.model().vectors(task, samples), wanted, atol=TOLERANCE, rtol=0)
    loaded.model().export("hf", tmp_path / "out")
    assert pretrained(tmp_path / "out", cut=True).tokenizers == loaded.tokenizers


def test_the_preprocessor_of_a_folder_is_read(tmp_path: Path) -> None:
    module = build("classes")
    given = saved(module, tmp_path)
    extractor(module, mean=-6.5, std=3.0).save_pretrained(given)
    loaded = pretrained(given)
    assert largest(ours(loaded, SOUNDS), theirs(module, SOUNDS, mean=-6.5, std=3.0)) < TOLERANCE
    assert largest(ours(loaded, SOUNDS), theirs(module, SOUNDS)) > TOLERANCE
    for settings, message in (
        ({"sampling_rate": 8000}, "sampling_rate=8000 is not supported; wanted 16000"),
        ({"do_normalize": False}, "do_normalize=False is not supported; wanted True"),
        ({"max_length": 100}, "max_length=100 is not supported; wanted 96"),
    ):
        read = transformers.ASTFeatureExtractor(**{"max_length": 96, "num_mel_bins": 32, **settings})
        read.save_pretrained(given)
        refused({}, given, f"preprocessor_config.json: {message}")


def test_any_small_change_is_found(tmp_path: Path) -> None:
    for name, tensors in (
        ("encoder", ["encoder.layer.1.attention.attention.value.bias"]),
        ("classes", ["classifier.layernorm.weight", "classifier.dense.bias"]),
    ):
        module = build(name)
        given = saved(module, tmp_path / name)
        wanted = theirs(module, SOUNDS)
        core = {"norm": mm.core.Norm(eps=1e-3, centred=True, bias=True)}
        check_mutations(given, lambda loaded, w=wanted: largest(ours(loaded, SOUNDS), w), tensors, core)
        # norms do not see one number that is added to all features
        prefix = "" if name == "encoder" else "audio_spectrogram_transformer."
        for token in ("distillation_token", "position_embeddings"):
            with changed(given, f"{prefix}embeddings.{token}", 1e-2 * torch.tensor([1.0, -1.0]).repeat(16)):
                assert largest(ours(pretrained(given), SOUNDS), wanted) > TOLERANCE, token


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("encoder"), tmp_path)
    refused({"extra": 4}, given, r"has extra, which this version does not know")
    refused({"time_stride": 4}, given, r"time_stride=4 is not supported; wanted 5")
    refused({"max_length": 101}, given, r"position_embeddings \(1, 92, 32\): the configuration needs .* \(97, 32\)")


def test_the_width_of_the_released_model(tmp_path: Path) -> None:
    """Its width, heads and grid of 12 x 101 patches, at a depth of 1."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 1}
    whole = {"max_length": 1024, "num_mel_bins": 128, "patch_size": 16, "frequency_stride": 10, "time_stride": 10}
    module = build("classes", **sizes, **whole)
    loaded = pretrained(saved(module, tmp_path))
    assert loaded.tokenizers["audio"].table == (12, 101)  # type: ignore[attr-defined]
    worst = largest(ours(loaded, SOUNDS), theirs(module, SOUNDS))
    print(worst)
    assert worst < TOLERANCE
