"""Idefics 3 and SmolVLM against transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from multimodal.tower import PixelShuffle, Tower
from tests.pretrained.compared import (
    TOLERANCE,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    check_writing,
    largest,
    logits_by_sample,
    refused,
    saved,
)
from tests.pretrained.seeing import (
    PLACEHOLDER,
    TEXT,
    VISION,
    answer_logits,
    check_pixels,
    image_tokens,
    levels,
    pixels,
    text_tokenizer,
)

transformers = pytest.importorskip("transformers")

TASK = "before:text image text -> text"
SAMPLES = [
    (pixels(16, 16, 1), [2, 5, 9, 3], [33, 1], [0, 7]),
    (pixels(8, 8, 2), [2, 60], [8, 8, 40, 3], [12, 13, 1]),
    (pixels(24, 24, 3), [2], [8], [12, 60]),
]


def build(name: str = "SmolVLM", vision: dict[str, Any] | None = None, **text: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION, **(vision or {})},
        text_config={"model_type": "llama", **TEXT, **text},
        scale_factor=2,
        image_token_id=PLACEHOLDER,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def ours(loaded: Pretrained, samples: Any = SAMPLES) -> list[Tensor]:
    return logits_by_sample(
        loaded.model(),
        TASK,
        [{"before": b, "image": image_tokens(loaded, x), "text": p, "answer": a} for x, b, p, a in samples],
    )


def inputs(
    picture: Tensor, before: list[int], prompt: list[int], answer: list[int], patch: int = 2
) -> dict[str, Tensor]:
    """What their processor makes: a placeholder for each square of 2 x 2 patches."""
    count = picture.shape[1] * picture.shape[2] // (2 * patch) ** 2
    ids = torch.tensor([before + [PLACEHOLDER] * count + prompt + answer])
    return {"input_ids": ids, "pixel_values": picture[None, None], "attention_mask": torch.ones_like(ids)}


def theirs(module: Any, samples: Any = SAMPLES, patch: int = 2) -> list[Tensor]:
    with torch.inference_mode():
        return [answer_logits(module(**inputs(*x, patch=patch)).logits[0], x[3]) for x in samples]


@pytest.mark.parametrize("name", ["SmolVLM", "Idefics3"])
def test_logits_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path) -> None:
    module = build(name)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, SAMPLES, ours, theirs(module))
    check_round_trip(tmp_path, tmp_path / "theirs")


def test_its_text_is_read_without_a_picture_too(tmp_path: Path) -> None:
    module = build()
    loaded = pretrained(saved(module, tmp_path))
    ids = [5, 9, 2, 33]
    with torch.inference_mode():
        wanted = module(torch.tensor([ids])).logits[0]
    found = logits_by_sample(loaded.model(), "text -> text", [{"text": ids[:1], "answer": ids[1:]}])
    assert largest(found, [wanted]) < TOLERANCE


def test_what_is_written_is_what_transformers_writes(tmp_path: Path) -> None:
    module = build()
    loaded = pretrained(saved(module, tmp_path))
    picture, before, prompt, _ = SAMPLES[1]
    given = inputs(picture, before, prompt, [])
    fields = {"before": before, "image": image_tokens(loaded, picture), "text": prompt}
    check_writing(module, given, loaded, TASK, fields)


def test_any_small_change_is_found(tmp_path: Path) -> None:
    module = build()
    given = saved(module, tmp_path)
    wanted = theirs(module)

    def difference(loaded: Pretrained) -> float:
        return largest(ours(loaded), wanted)

    names = [
        "model.vision_model.encoder.layers.0.self_attn.v_proj.bias",
        "model.connector.modality_projection.proj.weight",
        "model.text_model.layers.1.post_attention_layernorm.weight",
    ]
    check_mutations(given, difference, names, {"rotary_base": (9000.0, 100.0, 100.0)})
    loaded = pretrained(given)
    tower: Any = loaded.tokenizers["image"]
    assert isinstance(tower, Tower)
    eye = tower.core.replace(norm=replace(tower.core.norm, eps=1e-3))
    for change in (
        replace(tower, core=eye),
        replace(tower, causal=False),
        replace(tower, tokenizer=replace(tower.tokenizer, resample="bilinear")),  # type: ignore[type-var]
    ):
        assert difference(replace(loaded, tokenizers={**loaded.tokenizers, "image": change})) > TOLERANCE, change
    connector = "embeds.image.connector.weight"
    width = tower.core.width
    turned = loaded.weights[connector].unflatten(1, (2, 2, width)).transpose(1, 2).flatten(1)
    assert difference(replace(loaded, weights={**loaded.weights, connector: turned})) > TOLERANCE


def test_the_widths_of_a_released_model(tmp_path: Path) -> None:
    """SmolVLM-256M: SigLIP-base with patches of 16 and SmolLM2-135M, each of depth 1, with a small picture."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
    vision |= {"patch_size": 16, "image_size": 128}
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    module = build(
        "Idefics3", vision, **text, num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    module.eval().save_pretrained(tmp_path)
    samples = [(pixels(128, 128, 1), [2, 5], [9, 3], [33, 1]), (pixels(64, 64, 2), [2], [60, 3], [12])]
    loaded = pretrained(tmp_path)
    wanted = theirs(module, samples, 16)
    assert largest(ours(loaded, samples), wanted) < TOLERANCE


def test_a_configuration_as_released_is_understood(tmp_path: Path) -> None:
    """With what its training noted, without what equals the defaults, and with the end of what is written in a file of its own."""
    given = saved(build("Idefics3"), tmp_path)
    path = given / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"] |= {
        "_flash_attn_2_enabled": True,
        "is_llama_config": True,
        "neftune_noise_alpha": 0.0,
        "perceiver_config": {"resampler_depth": 6},
        "pixel_shuffle_factor": 2,
        "qk_layer_norms": False,
        "rope_interleaved": False,
        "use_resampler": False,
    }
    config["vision_config"] |= {"max_image_size": {"longest_edge": 16}, "size": {"longest_edge": 64}}
    path.write_text(json.dumps(config), encoding="utf-8")
    (given / "generation_config.json").write_text('{"eos_token_id": 66}', encoding="utf-8")
    head: Any = pretrained(given).tasks[0].head
    assert head.stop_id == 66
    refused(
        {"text_config": {**config["text_config"], "qk_layer_norms": True}},
        given,
        "qk_layer_norms=True is not supported",
    )
    refused(
        {"text_config": {**config["text_config"], "use_resampler": True}}, given, "use_resampler=True is not supported"
    )


@pytest.mark.parametrize("name", ["SmolVLM", "Idefics3"])
def test_pictures_are_those_of_the_processor_without_tiles(name: str, tmp_path: Path) -> None:
    from transformers.models import idefics3, smolvlm

    found_in = {"SmolVLM": smolvlm.image_processing_smolvlm, "Idefics3": idefics3.image_processing_idefics3}[name]
    processor = getattr(found_in, f"{name}ImageProcessor")(
        size={"longest_edge": 61}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    given = saved(build(name), tmp_path)
    processor.save_pretrained(given)
    tower: Any = pretrained(given).tokenizers["image"]
    assert tower.connector == PixelShuffle(2)
    for value in (levels(40, 23), levels(16, 16, seed=1), levels(9, 61, seed=2), levels(200, 80, seed=3)):
        wanted_CYX = processor(value, return_tensors="pt")["pixel_values"][0, 0]
        check_pixels(tower, value, wanted_CYX)
    tiled = given / "preprocessor_config.json"
    settings = json.loads(tiled.read_text(encoding="utf-8"))
    tiled.write_text(json.dumps({**settings, "do_image_splitting": True}), encoding="utf-8")
    with pytest.raises(
        mm.CheckpointError, match=r"do_image_splitting=True of .* is not known.*do_image_splitting=False"
    ):
        pretrained(given)
    whole = pretrained(given, do_image_splitting=False)
    assert whole.tokenizers["image"] == tower
    whole.model().export("hf", tmp_path / "out")
    assert pretrained(tmp_path / "out", do_image_splitting=False).tokenizers["image"] == tower
    with pytest.raises(mm.CheckpointError, match=r"do_image_splitting=7 is not among True, False"):
        pretrained(given, do_image_splitting=7)


def test_prompts_are_those_of_the_processor(tmp_path: Path) -> None:
    # that of SmolVLM wants a package that spells out numbers, for videos; it writes the same around a picture
    around, whole = "<fake_token_around_image>", "<global-img>"
    tokenizer = text_tokenizer("<pad>", "<eos>", around, "<image>", whole, "<end_of_utterance>")
    pictures = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 61}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    both = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=16)
    given = saved(build("Idefics3", vocab_size=len(both.tokenizer)), tmp_path)
    both.save_pretrained(given)
    loaded = pretrained(given)
    text = loaded.tokenizers["text"]
    wanted = both(images=[levels(40, 23)], text="where<image>what is the dog<end_of_utterance>")["input_ids"][0]
    before = text(f"where{around}{whole}").content.tolist()
    after = text(f"{around}what is the dog<end_of_utterance>").content.tolist()
    count = len(loaded.tokenizers["image"](levels(40, 23)))
    assert count == 16
    assert before + [both.image_token_id] * count + after == wanted


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build(), tmp_path)
    config = json.loads((given / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    refused({"image_splitting": 4}, given, r"has image_splitting, which this version does not know")
    refused(
        {"text_config": {**text, "model_type": "qwen2"}}, given, r"text_config: model_type='qwen2' is not supported"
    )
    refused({"text_config": {**text, "sinks": 3}}, given, r"text_config: its configuration has sinks")
    refused({"vision_config": {**vision, "num_channels": 1}}, given, r"num_channels=1 is not supported")
    refused({"vision_config": {**vision, "windows": 2}}, given, r"vision_config: its configuration has windows")
    refused(
        {"scale_factor": 4},
        given,
        r"modality_projection.proj.weight \(32, 96\): the configuration needs .* \(32, 384\)",
    )
