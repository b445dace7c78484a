"""PaliGemma (Beyer et al. 2024): the vision tower of SigLIP, a linear layer, and Gemma 1, bidirectional over picture and prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from multimodal.core import Core
from multimodal.heads import NextToken
from multimodal.layers import MLP, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, affine, nested_pairs
from multimodal.pretrained.llama import decoder_pairs, rotary_of, stop_of
from multimodal.pretrained.pictures import image_processor
from multimodal.pretrained.siglip_vision import TOWER, encoder_core, vision_pairs, vision_tokens
from multimodal.pretrained.texts import text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal.tower import Linear, Tower

VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
"""The default configuration of SigLIP."""


class PaliGemma(Family):
    """Answers in text about a picture: "image text -> text", where the input text is "<bos>" + the prompt + "\\n".

    Attention over picture and prompt is bidirectional.
    """

    names = ("paligemma",)
    peers: ClassVar = {"image text -> text": "AutoModelForImageTextToText"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        given = settings.need("text_config"), settings.need("vision_config")
        ends = {"eos_token_id": settings.get("eos_token_id", 1), "bos_token_id": settings.get("bos_token_id", 2)}
        text = Settings(f"{settings.where}, text_config", {**ends, **given[0]})
        vision = Settings(f"{settings.where}, vision_config", {**VISION, **given[1]})
        # the placeholder id of a patch in their prompts; a setting of their loss; sizes that the inner configurations have too
        settings.ignore("image_token_index", "image_token_id", "ignore_index", "vocab_size", "hidden_size")
        settings.only("tie_word_embeddings", True)

        core = self._text_core(text)
        settings.only("projection_dim", core.width)
        head = NextToken(start_ids=(), stop_id=stop_of(text), tied=True, bias=False)
        reads = text_tokenizer(text, files, causal=False, scale=core.width**0.5, specials=True)

        size = vision.get("image_size", 224)
        default = {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}
        processor = dict(image_processor(files, default))
        # the number of tokens of a picture, which we compute from its size
        processor.pop("image_seq_length", None)
        image, vision_core = vision_tokens(vision, processor), encoder_core(vision)
        # settings of other models; a number that we compute; the projector uses no activation
        vision.ignore("num_image_tokens", "projection_dim", "projector_hidden_act", "vision_use_head", "vocab_size")
        for part in (text, vision):
            part.finish()

        text_prefix, vision_prefix = "language_model.model.", "vision_tower."
        if any(
            name.startswith(f"{vision_prefix}vision_model.") for name in names
        ):  # transformers before version 5 writes it so
            vision_prefix += "vision_model."
        pairs: list[Pair] = [*decoder_pairs(core, text_prefix, tied=True)]
        pairs += affine("embeds.image.connector", "multi_modal_projector.linear")
        pairs += nested_pairs(list(vision_pairs(vision_core, image, vision_prefix)), TOWER, {})
        return Blueprint(
            {"image": Tower(image, vision_core, Linear()), "text": reads},
            core,
            [Task("image text -> text", head)],
            pairs,
            copies=dict.fromkeys(
                ("language_model.lm_head.weight", "lm_head.weight"), f"{text_prefix}embed_tokens.weight"
            ),
            derived=[r".*rotary_emb\.inv_freq", r".*position_ids"],
            unused={
                r"vision_tower\.(vision_model\.)?head\..*": "the pooling head of SigLIP, which PaliGemma does not use"
            },
        )

    def peer_inputs(self, inputs: Mapping[str, Any], read: int) -> Mapping[str, Any]:
        # 0: bidirectional, 1: causal
        kinds = (torch.arange(inputs["input_ids"].shape[1]) >= read).long()
        return {**inputs, "token_type_ids": kinds[None]}

    def _text_core(self, text: Settings) -> Core:
        """Gemma 1."""
        if (kind := text.need("model_type")) != "gemma":
            raise CheckpointError(
                f"{text.where}: model_type={kind!r} is not supported; wanted 'gemma', as PaliGemma 1 has it"
            )
        text.only("attention_bias", False)
        text.only("tie_word_embeddings", True)
        # transformers sets it if it is missing
        text.only("use_bidirectional_attention", True)
        # the size of their position tables; a number that we compute
        text.ignore("max_position_embeddings", "num_image_tokens")
        # hidden_act is the older name; Gemma 1 was trained with the tanh approximation, although files say "gelu"
        named = "hidden_activation" if text.get("hidden_activation") else "hidden_act"
        text.ignore("hidden_act", "hidden_activation")
        act: Any = "gelu_tanh" if text.get(named) == "gelu" else activation(text, named, "gelu_pytorch_tanh")
        base, rotary = rotary_of(text)
        width, heads = text.need("hidden_size"), text.need("num_attention_heads")
        key_width = text.get("head_dim", 256)
        own_width = None if key_width * heads == width else key_width
        return Core(
            width=width,
            depth=text.need("num_hidden_layers"),
            heads=heads,
            kv_heads=text.need("num_key_value_heads"),
            mlp_width=text.need("intermediate_size"),
            norm=Norm(eps=text.get("rms_norm_eps", 1e-6), around_one=True),
            qk_norm=False,
            rotary_split=(1, 0, 0),
            rotary_base=(base, 100.0, 100.0),
            block=(SelfAttention(rotary=rotary, key_width=own_width), MLP(activation=act)),
        )
