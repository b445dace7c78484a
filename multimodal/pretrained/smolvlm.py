"""Idefics 3 (Laurencon et al. 2024) and SmolVLM (Marafioti et al. 2025): SigLIP, a pixel shuffle, and Llama."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from multimodal.pretrained.family import Blueprint, Family, Settings, nested_pairs, renamed, same
from multimodal.pretrained.llama import Llama
from multimodal.pretrained.pictures import image_processor
from multimodal.pretrained.siglip_vision import TOWER, encoder_core, vision_pairs, vision_tokens
from multimodal.pretrained.texts import text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal.tower import Linear, PixelShuffle, Tower

VISION = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}
"""The default configuration of their vision encoder."""
WORDS = {"model.": "model.text_model."}


class SmolVLM(Family):
    """Answers in text about a picture: "before:text image text -> text". All tokens are causal, including those of a picture.

    Write the special tokens around a picture yourself: `before` ends with "<fake_token_around_image><global-img>", and `text`
    begins with "<fake_token_around_image>". Tiles are not supported: if the files ask for them,
    `pretrained(.., do_image_splitting=False)` reads a picture as one image.
    """

    names = ("idefics3", "smolvlm")
    peers: ClassVar = dict.fromkeys(("before:text image text -> text", "text -> text"), "AutoModelForImageTextToText")

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        given: Any = settings.need("text_config")
        tied = settings.get("tie_word_embeddings", False)
        text = Settings(f"{settings.where}, text_config", {**given, "tie_word_embeddings": tied, **_stops(files)})
        vision = Settings(f"{settings.where}, vision_config", {**VISION, **settings.need("vision_config")})
        if text.need("model_type") != "llama":
            raise CheckpointError(
                f"{text.where}: model_type={text.need('model_type')!r} is not supported; wanted 'llama'"
            )
        # the placeholder id of a picture in their prompts; sizes that the inner configurations have too
        settings.ignore("image_token_id", "_pad_token_id", "vocab_size")
        # settings of training, and of parts that no released model has
        settings.ignore("use_reentrant_checkpointing")
        text.only("qk_layer_norms", False)
        text.only("use_resampler", False)
        text.ignore("perceiver_config", "pixel_shuffle_factor", "neftune_noise_alpha", "_flash_attn_2_enabled")
        words = Llama().read(text, files, [name.replace("model.text_model.", "model.") for name in names])

        side = settings.get("scale_factor", 2)
        default = {
            "image_processor_type": "SmolVLMImageProcessor",
            "do_image_splitting": False,
            "size": {"longest_edge": 4 * vision.need("image_size")},
            "max_image_size": {"longest_edge": vision.need("image_size")},
        }
        processor = dict(image_processor(files, default))
        if not settings.option("do_image_splitting", True, [True, False]):
            processor["do_image_splitting"] = False
        image = vision_tokens(vision, processor, "nearest")
        vision_core = encoder_core(vision)
        # image preprocessing is in preprocessor_config.json
        vision.ignore("max_image_size", "size", "use_base_siglip", "tie_word_embeddings")
        for part in (text, vision):
            part.finish()

        pairs = nested_pairs(words.pairs, {}, WORDS)
        pairs.append(same("embeds.image.connector.weight", "model.connector.modality_projection.proj.weight"))
        pairs += nested_pairs(list(vision_pairs(vision_core, image, "model.vision_model.")), TOWER, {})
        tower = Tower(image, vision_core, PixelShuffle(side, Linear(bias=False)), causal=True)
        head = words.tasks[0].head
        return Blueprint(
            {"image": tower, "text": text_tokenizer(text, files, specials=True)},
            words.core,
            [Task("before:text image text -> text", head), Task("text -> text", head)],
            pairs,
            copies={copy: renamed(name, WORDS) for copy, name in words.copies.items()},
            derived=[*words.derived, r".*position_ids"],
        )

    def peer_inputs(self, inputs: Mapping[str, Any], read: int) -> Mapping[str, Any]:
        # they want the axes (sample, picture, C, Y, X)
        return {name: x[None] if name == "pixel_values" else x for name, x in inputs.items()}


def _stops(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The stop ids, which newer models have in generation_config.json."""
    found = json.loads(files.get("generation_config.json", b"{}"))
    return {name: found[name] for name in ("eos_token_id",) if found.get(name) is not None}
