"""PaliGemma against transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from multimodal.tower import Tower
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
    unlike_itself,
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

TASK = "image text -> text"
SAMPLES = [(pixels(16, 16, 1), [2, 5, 9, 3], [33, 1, 0, 7]), (pixels(16, 16, 2), [2, 60, 8, 8, 40, 3], [12])]


def build(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    text = {"model_type": "gemma", "head_dim": 8, **TEXT, "num_key_value_heads": 1, **(text or {})}
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION, **(vision or {})},
        text_config=text,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        vocab_size=text["vocab_size"],
        image_token_index=PLACEHOLDER,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def ours(loaded: Pretrained, samples: Any = SAMPLES) -> list[Tensor]:
    return logits_by_sample(
        loaded.model(), TASK, [{"image": image_tokens(loaded, x), "text": p, "answer": a} for x, p, a in samples]
    )


def inputs(module: Any, picture: Tensor, prompt: list[int], answer: list[int]) -> dict[str, Tensor]:
    """What their processor makes: one placeholder a patch, then the prompt, which is read freely, and the causal answer."""
    side = module.config.vision_config.image_size // module.config.vision_config.patch_size
    ids = [PLACEHOLDER] * side**2 + prompt + answer
    kinds = [0] * (len(ids) - len(answer)) + [1] * len(answer)
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": picture[None],
        "token_type_ids": torch.tensor([kinds]),
        "attention_mask": mask,
    }


def theirs(module: Any, samples: Any = SAMPLES) -> list[Tensor]:
    with torch.inference_mode():
        return [answer_logits(module(**inputs(module, *x)).logits[0], x[2]) for x in samples]


def test_logits_are_those_of_transformers_packed_and_alone(tmp_path: Path) -> None:
    module = build()
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, SAMPLES, ours, theirs(module))
    check_round_trip(tmp_path, tmp_path / "theirs")


def test_what_is_written_is_what_transformers_writes(tmp_path: Path) -> None:
    module = build()
    saved(module, tmp_path)
    unlike_itself(module, module.model.language_model.norm.weight)
    module.save_pretrained(tmp_path)
    loaded = pretrained(tmp_path)
    picture, prompt, _ = SAMPLES[1]
    given = inputs(module, picture, prompt, [])
    fields = {"image": image_tokens(loaded, picture), "text": prompt}
    check_writing(module, given, loaded, TASK, fields)


def test_any_small_change_is_found(tmp_path: Path) -> None:
    module = build()
    given = saved(module, tmp_path)
    wanted = theirs(module)

    def difference(loaded: Pretrained) -> float:
        return largest(ours(loaded), wanted)

    names = [
        "vision_tower.encoder.layers.0.self_attn.v_proj.bias",
        "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
        "multi_modal_projector.linear.bias",
        "language_model.model.layers.1.post_attention_layernorm.weight",
    ]
    check_mutations(given, difference, names, {"rotary_base": (9000.0, 100.0, 100.0)})
    loaded = pretrained(given)
    positions = "embeds.image.frozen_part.embed.positions_ND"
    shifted = {**loaded.weights, positions: loaded.weights[positions].roll(1, 0)}
    assert difference(replace(loaded, weights=shifted)) > TOLERANCE
    tower: Any = loaded.tokenizers["image"]
    assert isinstance(tower, Tower)
    eye = tower.core.replace(norm=replace(tower.core.norm, eps=1e-3))
    changes: list[dict[str, mm.Tokenizer]] = [
        {"image": replace(tower, core=eye)},
        {"image": replace(tower, causal=True)},
        {"text": replace(loaded.tokenizers["text"], causal=True)},  # type: ignore[type-var]
        {"text": replace(loaded.tokenizers["text"], scale=1.0)},  # type: ignore[type-var]
    ]
    for change in changes:
        assert difference(replace(loaded, tokenizers={**loaded.tokenizers, **change})) > TOLERANCE, change


def test_the_names_of_older_files_are_read_and_written_again(tmp_path: Path) -> None:
    module = build()
    given = saved(module, tmp_path / "theirs")
    path = given / "model.safetensors"
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in load_file(path).items()}
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    assert largest(ours(pretrained(given)), theirs(module)) < TOLERANCE
    check_round_trip(tmp_path, given)


def test_the_head_that_it_does_not_use_is_reported(tmp_path: Path) -> None:
    module = build()
    given = saved(module, tmp_path / "theirs")
    path, name = given / "model.safetensors", "vision_tower.head.layernorm.weight"
    save_file({**load_file(path), name: torch.ones(24)}, path, {"format": "pt"})
    loaded = pretrained(given)
    assert loaded.unused == {name: "the pooling head of SigLIP, which PaliGemma does not use"}
    assert largest(ours(loaded), theirs(module)) < TOLERANCE
    loaded.model().export("hf", tmp_path / "out")
    assert name not in load_file(tmp_path / "out" / "model.safetensors")


def test_the_widths_of_released_parts(tmp_path: Path) -> None:
    """SigLIP-so400m's width, heads and patch with a small picture, and Gemma-2B's heads at a quarter of its width; depth 1."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 1}
    vision |= {"patch_size": 14, "image_size": 56}
    text = {
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "head_dim": 256,
        "num_hidden_layers": 1,
    }
    module = build(vision, text)
    torch.manual_seed(0)
    with torch.no_grad():  # no bias of 0, and no norm of 1
        for weight in module.parameters():
            weight.copy_(weight * 0.3 if weight.dim() > 1 else weight + torch.randn_like(weight) * 0.1)
    module.eval().save_pretrained(tmp_path)
    samples = [(pixels(56, 56, 1), [2, 5, 9, 3], [33, 1]), (pixels(56, 56, 2), [2, 60, 3], [12])]
    assert largest(ours(pretrained(tmp_path), samples), theirs(module, samples)) < TOLERANCE


def test_pictures_and_prompts_are_those_of_the_processor(tmp_path: Path) -> None:
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16}, image_seq_length=64)
    tokenizer = text_tokenizer("<pad>", "<eos>", "<bos>", "<image>")
    both = transformers.PaliGemmaProcessor(processor, tokenizer)
    given = saved(build(text={"vocab_size": len(both.tokenizer)}), tmp_path)
    both.save_pretrained(given)
    loaded = pretrained(given)
    prompt = "where is the cat?"
    wanted_ids = both(images=levels(40, 23), text="<image>" + prompt)["input_ids"][0]
    found_ids = loaded.tokenizers["text"](f"<bos>{prompt}\n").content.tolist()
    assert [both.image_token_id] * 64 + found_ids == wanted_ids
    tower: Any = loaded.tokenizers["image"]
    for value in (levels(40, 23), levels(16, 16, seed=1), levels(9, 61, seed=2)):
        wanted_CYX = processor(value, return_tensors="pt")["pixel_values"][0]
        check_pixels(tower, value, wanted_CYX)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build(), tmp_path)
    config = json.loads((given / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    refused({"image_splitting": 4}, given, r"has image_splitting, which this version does not know")
    refused({"tie_word_embeddings": False}, given, r"tie_word_embeddings=False is not supported")
    refused(
        {"text_config": {**text, "model_type": "gemma2"}}, given, r"text_config: model_type='gemma2' is not supported"
    )
    refused({"text_config": {**text, "sliding": 3}}, given, r"text_config: its configuration has sliding")
    refused({"text_config": {**text, "attention_bias": True}}, given, r"attention_bias=True is not supported")
    refused({"vision_config": {**vision, "num_channels": 1}}, given, r"num_channels=1 is not supported")
    refused({"vision_config": {**vision, "windows": 2}}, given, r"vision_config: its configuration has windows")
    refused({"projection_dim": 48}, given, r"projection_dim=48 is not supported; wanted 32")
