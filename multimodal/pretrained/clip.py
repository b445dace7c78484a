"""Image and text encoders in one space: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023; Tschannen et al. 2025)."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from multimodal.core import Core
from multimodal.heads import Contrast
from multimodal.heads.pool import Attended, First, Last, Mean, Pool, Transformed
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, affine, same, shaped
from multimodal.pretrained.pictures import embedding_pairs, image_processor, patches, sides, vector_task
from multimodal.pretrained.siglip_vision import (
    encoder_core,
    encoder_pairs,
    vision_pairs,
    vision_tokens,
)
from multimodal.pretrained.texts import TOKENIZER, text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer
from multimodal.tower import Pooled, Tower, Unchanged
from multimodal_tokenizers import ClassTokens, Ids

PARTS = ("both", "vision", "text")
KINDS = {"vision": "image", "text": "text"}


@dataclass(frozen=True)
class Encoder:
    """One of the two encoders.

    tokenizer, core, pool: its declarations.
    most: the most tokens of a value.
    pairs: of tokenizer and core; ours are named as in a model of this encoder alone.
    pooled: of the pool; ours are named without a prefix.
    """

    tokenizer: Tokenizer
    core: Core
    pool: Pool
    most: int
    pairs: Sequence[Pair]
    pooled: Sequence[Pair]


class TwoTowers(Family):
    """An image encoder and a text encoder, trained so that the vectors of matching pairs are similar.

    Options: part, "both" by default; "vision" or "text" loads one encoder as a model of its own.
    """

    form: ClassVar[str]
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]]

    @abstractmethod
    def vision(
        self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str], prefix: str, size: int
    ) -> Encoder:
        """The image encoder. prefix: of its tensor names. size: the width of its vectors, from the outer configuration."""

    @abstractmethod
    def text(
        self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str], prefix: str, size: int
    ) -> Encoder:
        """The text encoder; the arguments are those of `vision`."""

    @abstractmethod
    def vector_width(self, settings: Settings) -> int:
        """The width of the vectors, from the outer configuration."""

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        kind = str(settings.need("model_type"))
        alone = next((part for part in KINDS if kind.endswith(f"_{part}_model")), None)
        if alone is not None:
            prefix = f"{alone}_model." if any(name.startswith(f"{alone}_model.") for name in names) else ""
            own = Settings(settings.where, {**self.defaults[alone], **settings.config})
            encoder = getattr(self, alone)(own, files, names, prefix, own.get("projection_dim", 0))
            settings.ignore(*settings.config)
            own.finish()
            return _one_encoder(alone, encoder)
        part = settings.option("part", "both", PARTS)
        size = self.vector_width(settings)
        encoders: dict[str, Encoder] = {}
        for name in KINDS:
            given = settings.inner(f"{name}_config")
            own = Settings(given.where, {**self.defaults[name], **given.config})
            encoders[name] = getattr(self, name)(own, files, names, f"{name}_model.", size)
            own.finish()
        settings.only("text_config_dict", None)
        settings.only("vision_config_dict", None)
        settings.ignore("logit_scale_init_value")  # an initial value
        derived = [r".*embeddings\.position_ids"]
        if part != "both":
            made = _one_encoder(part, encoders[part])
            unread = {name for pair in made.pairs for name in pair.theirs}
            unused = {name.replace(".", r"\."): "it belongs to the other tower" for name in names if name not in unread}
            return replace(made, derived=derived, unused=unused)
        head = Contrast(width=size, form=self.form, pool=Last(), maps=())
        tokenizers: dict[str, Tokenizer] = {}
        pairs: list[Pair] = []
        for name, encoder in encoders.items():
            kind = KINDS[name]
            if encoder.pool.width(encoder.core.width) != size:
                raise CheckpointError(
                    f"{settings.where}: the vectors of its {name} tower are not {size} wide, as those of the other tower"
                )
            tokenizers[kind] = Tower(encoder.tokenizer, encoder.core, Pooled(encoder.most, encoder.pool, Unchanged()))
            within = f"embeds.{kind}.frozen_part"
            for pair in encoder.pairs:
                ours = pair.ours.replace(f"embeds.{kind}.", "embed.", 1) if pair.ours[0] == "e" else pair.ours
                pairs.append(replace(pair, ours=f"{within}.{ours}"))
            pairs += [replace(pair, ours=f"{within}.pool.{pair.ours}") for pair in encoder.pooled]
        readout = "readouts.image__text_Contrast"
        for ours, theirs in self.scales().items():
            pairs.append(shaped(f"{readout}.{ours}", theirs, (1,), self.scale_shape))
        core = Core(width=size, depth=0, heads=1, last_norm=False)
        return Blueprint(tokenizers, core, [Task("image <-> text", head)], pairs, derived=derived)

    scale_shape: ClassVar[tuple[int, ...]] = (1,)

    def scales(self) -> dict[str, str]:
        """{our name of a scalar of the head: their name}."""
        return {"log_scale": "logit_scale", "bias": "logit_bias"}


class CLIP(TwoTowers):
    """CLIP, with a class token for pictures and causal texts.

    tokenizer.json adds a start and an end token to a text; the state of the end token becomes its vector. Without this file, texts
    are lists of ids, which must end with the end token.
    """

    names = ("clip", "clip_vision_model", "clip_text_model")
    peers: ClassVar = {
        "image <-> text": "CLIPModel",
        "image <-> other:image": "CLIPVisionModel",
        "text <-> other:text": "CLIPTextModel",
    }
    form = "softmax"
    scale_shape = ()
    defaults: ClassVar = {
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        "text": {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
        },
    }

    def vector_width(self, settings: Settings) -> int:
        return settings.get("projection_dim", 512)

    def scales(self) -> dict[str, str]:
        return {"log_scale": "logit_scale"}

    def peer(self, task: str, names: Sequence[str]) -> str | None:
        found = self.peers.get(task)
        projected = task != "image <-> text" and any(name.endswith("_projection.weight") for name in names)
        return f"{found}WithProjection" if found and projected else found

    def vision(
        self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str], prefix: str, size: int
    ) -> Encoder:
        _check_plain(settings)
        core = encoder_core(settings, "quick_gelu", 1e-5, first_norm=True, last_norm=False)
        rows, columns = sides(settings, "image_size")
        default = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": min(rows, columns)},
            "crop_size": {"height": rows, "width": columns},
        }
        of = replace(patches(settings, image_processor(files, default)), bias=False)
        image = ClassTokens(of, 1, 1, (rows // of.patch, columns // of.patch))
        settings.ignore("projection_dim")  # of one encoder; the outer configuration has the width too
        pairs = [
            shaped("embeds.image.tokens_ND", f"{prefix}embeddings.class_embedding", (1, core.width), (core.width,)),
            *embedding_pairs(
                "image", f"{prefix}embeddings.patch_embedding", core.width, of.channels, of.patch, bias=False
            ),
            same("embeds.image.positions_ND", f"{prefix}embeddings.position_embedding.weight"),
            *affine("core.first_norm", f"{prefix}pre_layrnorm"),
            *encoder_pairs(core, prefix),
        ]
        projected = "visual_projection.weight" in names
        linear: dict[str, Any] = {"dense": "linear", "out": size, "bias": False} if projected else {}
        pool = Transformed(First(), first_norm=core.norm, **linear)
        pooled = list(affine("first_norm", f"{prefix}post_layernorm"))
        if projected:
            pooled.append(same("dense.linear.weight", "visual_projection.weight"))
        return Encoder(image, core, pool, 1 + rows * columns // of.patch**2, pairs, pooled)

    def text(
        self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str], prefix: str, size: int
    ) -> Encoder:
        places = settings.need("max_position_embeddings")
        _check_plain(settings)
        core = encoder_core(settings, "quick_gelu", 1e-5, learned_times=places)
        # the pool takes the last token; older configurations have another eos_token_id
        settings.ignore("eos_token_id", "bos_token_id", "projection_dim")
        options = {"template": True} if TOKENIZER in files else {}
        tokenizer = text_tokenizer(settings, files, causal=True, **options)
        projected = "text_projection.weight" in names
        pool = Transformed(Last(), dense="linear", out=size, bias=False) if projected else Last()
        pooled = [same("dense.linear.weight", "text_projection.weight")] if projected else []
        return Encoder(tokenizer, core, pool, places, _text_pairs(core, prefix), pooled)


class SigLIP(TwoTowers):
    """SigLIP and SigLIP 2 of fixed resolution, with a sigmoid loss for each pair and an attention pool.

    Texts are padded to the number of positions, and attention does not mask the padding. SigLIP 2 was trained on lower-case texts:
    convert yours.
    """

    names = ("siglip", "siglip_vision_model", "siglip_text_model")
    peers: ClassVar = {
        "image <-> text": "SiglipModel",
        "image <-> other:image": "SiglipVisionModel",
        "text <-> other:text": "SiglipTextModel",
    }
    form = "sigmoid"
    defaults: ClassVar = {
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
        },
        "text": {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 64,
        },
    }

    def vector_width(self, settings: Settings) -> int:
        return (settings.need("vision_config") or {}).get("hidden_size", self.defaults["vision"]["hidden_size"])

    def vision(
        self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str], prefix: str, size: int
    ) -> Encoder:
        _check_plain(settings)
        core = encoder_core(settings)
        rows, columns = sides(settings, "image_size")
        default = {"image_processor_type": "SiglipImageProcessor", "size": {"height": rows, "width": columns}}
        image = vision_tokens(settings, image_processor(files, default))
        settings.only("vision_use_head", True, False)
        pairs = list(vision_pairs(core, image, prefix))
        assert image.table is not None
        most, head = image.table[0] * image.table[1], f"{prefix}head"
        if (
            f"{head}.probe" not in names
        ):  # the encoder of a vision-language model, which uses all states and has no pool
            return Encoder(image, core, Mean(), most, pairs, [])
        pool = Attended(core.heads, core.hidden, activation(settings, "hidden_act", "gelu_pytorch_tanh"), core.norm)
        pooled = [
            shaped("query", f"{head}.probe", (1, core.width), (1, 1, core.width)),
            same("attention.in_proj_weight", f"{head}.attention.in_proj_weight"),
            same("attention.in_proj_bias", f"{head}.attention.in_proj_bias"),
            *affine("attention.out_proj", f"{head}.attention.out_proj"),
            *affine("norm", f"{head}.layernorm"),
            *affine("up", f"{head}.mlp.fc1"),
            *affine("down", f"{head}.mlp.fc2"),
        ]
        return Encoder(image, core, pool, most, pairs, pooled)

    def text(
        self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str], prefix: str, size: int
    ) -> Encoder:
        places = settings.need("max_position_embeddings")
        _check_plain(settings)
        core = encoder_core(settings, "gelu_pytorch_tanh", 1e-6, learned_times=places)
        settings.ignore("eos_token_id", "bos_token_id")
        tokenizer: Tokenizer = Ids(settings.need("vocab_size"))
        if TOKENIZER in files:
            made = json.loads(files[TOKENIZER])
            named = {token["content"]: token["id"] for token in made.get("added_tokens", ())}
            tokenizer = text_tokenizer(
                settings,
                files,
                causal=False,
                template=made.get("post_processor") is not None,
                pad_to=places,
                pad_id=named.get("<pad>", settings.get("pad_token_id", 1)),
            )
        width = settings.get("projection_size", core.width)
        pool = Transformed(Last(), dense="linear", out=width)
        pooled = list(affine("dense.linear", f"{prefix}head"))
        return Encoder(tokenizer, core, pool, places, _text_pairs(core, prefix), pooled)


def _one_encoder(part: str, encoder: Encoder) -> Blueprint:
    """A model of one encoder alone, whose vectors are those of its pool."""
    kind = KINDS[part]
    tasks, more = vector_task(kind, encoder.pool, encoder.pool.width(encoder.core.width))
    before = f"readouts.{kind}__{kind}_Contrast.pool"
    pooled = [replace(pair, ours=f"{before}.{pair.ours}") for pair in encoder.pooled]
    return Blueprint({kind: encoder.tokenizer}, encoder.core, tasks, [*encoder.pairs, *pooled, *more])


def _check_plain(settings: Settings) -> None:
    """Raise a CheckpointError if an encoder has decoder features, such as cross-attention."""
    settings.only("add_cross_attention", False)
    settings.only("is_decoder", False)
    settings.only("is_encoder_decoder", False)
    settings.only("tie_encoder_decoder", False)
    settings.only("pruned_heads", {})
    settings.ignore("tie_word_embeddings", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens")


def _text_pairs(core: Core, prefix: str) -> list[Pair]:
    return [
        same("embeds.text.weight", f"{prefix}embeddings.token_embedding.weight"),
        same("core.times.weight", f"{prefix}embeddings.position_embedding.weight"),
        *affine("core.norm", f"{prefix}final_layer_norm"),
        *encoder_pairs(core, prefix),
    ]
