"""nanoVLM (Wiedmann et al. 2025): the vision tower of SigLIP, a pixel shuffle, and SmolLM2, with tensor names of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from multimodal.core import Core
from multimodal.heads import NextToken
from multimodal.layers import MLP, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import (
    Blueprint,
    Family,
    Pair,
    Settings,
    affine,
    attention_names,
    attention_pairs,
    nested_pairs,
    same,
)
from multimodal.pretrained.llama import decoder_block
from multimodal.pretrained.pictures import embedding_pairs, positions_pair
from multimodal.pretrained.siglip_vision import BIASES, TOWER
from multimodal.pretrained.texts import text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal.tower import Linear, PixelShuffle, Tower
from multimodal_tokenizers import ClassTokens, ImagePatches
from multimodal_tokenizers.fit import Fit

RENAMED = {
    ".self_attn.o_proj.": ".attn.out_proj.",
    ".self_attn.": ".attn.",
    ".input_layernorm.": ".norm1.",
    ".post_attention_layernorm.": ".norm2.",
}
"""{part of a tensor name of Llama: the same part in nanoVLM}."""


class NanoVLM(Family):
    """Answers in text about a picture: "image text -> text", or "before:text image text -> text" with the picture in the prompt.

    All tokens are causal, including those of a picture.

    The folder has no tokenizer: put the tokenizer.json of its `lm_tokenizer` beside the weights, or pass lists of ids. Later
    versions split a picture into tiles; `pretrained(.., do_image_splitting=False)` reads it as one image. For texts longer than the
    language model was trained on, nanoVLM divides positions by a factor that depends on the length; our model does not.
    """

    names = ("nanovlm",)

    def reads(self, config: Mapping[str, Any]) -> bool:
        # its configuration has no model_type
        return "model_type" not in config and {"vit_hidden_dim", "lm_hidden_dim"} <= set(config)

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        # the origin of its parts, training, and how it is stored
        settings.ignore(
            "vit_model_type", "lm_model_type", "lm_tokenizer", "lm_chat_template", "vlm_load_backbone_weights"
        )
        settings.ignore("vlm_checkpoint_path", "hf_repo_name", "vit_dropout", "lm_dropout", "lm_max_length")
        # summands of sizes that other fields have as a sum; names of special tokens in prompts
        settings.ignore("lm_base_vocab_size", "extra_token_amount", "vlm_extra_tokens", "mp_image_token_length")
        settings.ignore("lm_max_position_embeddings", "resize_to_max_side_len")
        settings.only("vit_cls_flag", False)
        settings.only("lm_use_tokens", False)
        settings.only("lm_attn_scaling", 1.0)
        if settings.get("max_img_size") is not None and settings.option("do_image_splitting", True, [True, False]):
            raise CheckpointError(
                f"{settings.where}: max_img_size={settings.get('max_img_size')} splits pictures into tiles, which is not "
                "supported; pretrained(.., do_image_splitting=False) reads a picture as one image"
            )
        image, vision = self._tokens(settings), self._vision_core(settings)
        core, tied = self._text_core(settings), settings.get("lm_tie_weights", True)
        text = text_tokenizer(
            Settings(settings.where, {"vocab_size": settings.need("lm_vocab_size")}), files, specials=True
        )
        side, biased = settings.need("mp_pixel_shuffle_factor"), "MP.proj.bias" in names
        tower = Tower(image, vision, PixelShuffle(side, Linear(bias=biased)), causal=True)
        # the folder has no tokenizer; in that of SmolLM2, id 2 ends a turn of a chat, and id 0 a text
        end = 2 if "<|im_end|>" in settings.get("lm_chat_template", "") else 0
        head = NextToken(start_ids=(), stop_id=end, tied=tied, bias=False)
        words, logits = "decoder.token_embedding.weight", "decoder.head.weight"
        if tied and words not in names:  # a file has only one of two tied tensors
            words, logits = logits, words
        pairs: list[Pair] = [same("embeds.text.weight", words), same("core.norm.weight", "decoder.norm.weight")]
        if not tied:
            pairs.append(same("readouts.text_NextToken.linear.weight", logits))
        for i in range(core.depth):
            for pair in decoder_block(core, i, f"decoder.blocks.{i}"):
                pairs.append(replace(pair, theirs=tuple(map(_renamed, pair.theirs))))
        pairs += [
            same(f"embeds.image.connector.{kind}", f"MP.proj.{kind}") for kind in ("weight", "bias")[: 1 + biased]
        ]
        pairs += nested_pairs(list(self._vision_pairs(vision, image)), TOWER, {})
        return Blueprint(
            {"image": tower, "text": text},
            core,
            [Task("image text -> text", head), Task("before:text image text -> text", head)],
            pairs,
            copies={logits: words} if tied else {},
            spare=[r"decoder\.rotary_embd\.inv_freq"],
        )

    def _tokens(self, settings: Settings) -> ClassTokens:
        patch, side = settings.need("vit_patch_size"), settings.need("vit_img_size")
        # pixels are divided by 255 and not normalised
        fit = Fit(size=(side, side), filter="bilinear", by="pillow")
        of = ImagePatches(patch=patch, position="rotary", mean=0.0, std=1.0, edge="cut", fit=fit)
        return ClassTokens(of, count=0, table=(side // patch, side // patch))

    def _vision_core(self, settings: Settings) -> Core:
        return Core(
            width=settings.need("vit_hidden_dim"),
            depth=settings.need("vit_n_blocks"),
            heads=settings.need("vit_n_heads"),
            mlp_width=settings.need("vit_inter_dim"),
            norm=Norm(eps=settings.get("vit_ln_eps", 1e-6), centred=True, bias=True),
            qk_norm=False,
            rotary_split=(0, 0, 0),
            block=(SelfAttention(bias=BIASES), MLP(activation="gelu_tanh", gated=False, bias=True)),
        )

    def _text_core(self, settings: Settings) -> Core:
        return Core(
            width=settings.need("lm_hidden_dim"),
            depth=settings.need("lm_n_blocks"),
            heads=settings.need("lm_n_heads"),
            kv_heads=settings.need("lm_n_kv_heads"),
            mlp_width=settings.need("lm_inter_dim"),
            norm=Norm(eps=settings.get("lm_rms_eps", 1e-5)),
            qk_norm=False,
            rotary_split=(1, 0, 0),
            rotary_base=(float(settings.get("lm_re_base", 100000)), 100.0, 100.0),
        )

    def _vision_pairs(self, core: Core, tokens: ClassTokens) -> Iterator[Pair]:
        assert tokens.table is not None
        of: Any = tokens.of
        theirs, width = "vision_encoder", core.width
        yield from embedding_pairs("image", f"{theirs}.patch_embedding.conv", width, 3, of.patch)
        table = f"{theirs}.patch_embedding.position_embedding"
        yield positions_pair("image", table, tokens.table[0] * tokens.table[1], width)
        for i in range(core.depth):
            ours, block = f"core.blocks.{i}.layers", f"{theirs}.blocks.{i}"
            qkv, out = f"{block}.attn.qkv_proj", f"{block}.attn.out_proj"
            yield from attention_pairs(attention_names(i), [qkv], out, [width] * 3, BIASES)
            for layer in range(2):
                yield from affine(f"{ours}.{layer}.norm", f"{block}.ln{layer + 1}")
            yield from affine(f"{ours}.1.body.up", f"{block}.mlp.fc1")
            yield from affine(f"{ours}.1.body.down", f"{block}.mlp.fc2")
        yield from affine("core.norm", f"{theirs}.layer_norm")


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
