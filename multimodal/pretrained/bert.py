"""BERT (Devlin et al. 2019) and models with its tensor names, such as MiniLM and most sentence encoders."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from multimodal.core import Core
from multimodal.heads import EachRow
from multimodal.heads.pool import First, Mean, Transformed
from multimodal.layers.base import PostNorm
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, affine, same
from multimodal.pretrained.pictures import EncoderBlock, classes, classifier_task, vector_task
from multimodal.pretrained.texts import mlm_head_pairs, text_tokenizer, transformed_pairs
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer

MLM_HEAD = "cls.predictions"  # the masked-language-modelling head


class Bert(Family):
    """Text encoders with learned positions and post-norm layers.

    Tasks: "text -> label" if there is a classifier. Else "text <-> other:text", whose vector is the mean of all states, as for
    sentence encoders, and "text -> text" if there is a masked-language-modelling head.
    """

    names = ("bert",)
    peers: ClassVar = {
        "text <-> other:text": "AutoModel",
        "text -> text": "AutoModelForMaskedLM",
        "text -> label": "AutoModelForSequenceClassification",
    }

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        settings.only("position_embedding_type", "absolute")
        settings.only("is_decoder", False)
        settings.only("add_cross_attention", False)
        settings.ignore("bos_token_id", "eos_token_id")  # an encoder generates no text
        settings.ignore("tie_word_embeddings")  # about the masked-language-modelling head, which not every file has
        block = EncoderBlock(
            width=settings.need("hidden_size"),
            heads=settings.need("num_attention_heads"),
            hidden=settings.need("intermediate_size"),
            activation=activation(settings, "hidden_act", "gelu"),
            bias=("query", "key", "value", "out"),
            merge=PostNorm(),
            projections=("attention.self.query", "attention.self.key", "attention.self.value"),
            up=("intermediate.dense",),
            down="output.dense",
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
        )
        core = Core(
            width=block.width,
            depth=settings.need("num_hidden_layers"),
            heads=block.heads,
            mlp_width=block.hidden,
            norm=Norm(eps=settings.get("layer_norm_eps", 1e-12), centred=True, bias=True),
            first_norm=True,
            last_norm=False,
            qk_norm=False,
            rotary_split=(0, 0, 0),
            learned_times=settings.need("max_position_embeddings"),
            learned_fields=settings.need("type_vocab_size"),
            block=block.layers,
        )
        tokenizers: dict[str, Tokenizer] = {"text": text_tokenizer(settings, files, causal=False, template=True)}
        prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
        pairs = list(self._pairs(core, block, prefix))
        spare: list[str] = []
        copies: dict[str, str] = {}
        if "classifier.weight" in names:
            tokenizers["label"] = labels = classes(settings)
            pool = Transformed(First(), dense="tanh")
            tasks, more = classifier_task("text", pool, labels, core.width, "classifier")
            more += transformed_pairs(pool, "readouts.label_Classify.pool", f"{prefix}pooler.dense", "")
        else:
            tasks, more = vector_task("text", Mean(), core.width)
            # the pooler was trained for next-sentence prediction, which has no task here
            spare = [rf"{prefix}pooler\.dense\.(weight|bias)", r"cls\.seq_relationship\.(weight|bias)"]
            if f"{MLM_HEAD}.transform.dense.weight" in names:
                transform = Transformed(First(), dense=activation(settings, "hidden_act", "gelu"), last_norm=core.norm)
                settings.only("tie_word_embeddings", True)
                head = EachRow(transform=transform, tied=True)
                tasks.append(Task("text -> text", head))
                dense, norm = f"{MLM_HEAD}.transform.dense", f"{MLM_HEAD}.transform.LayerNorm"
                more += mlm_head_pairs(head, dense, norm, f"{MLM_HEAD}.decoder.weight", f"{MLM_HEAD}.bias")
                copies = {
                    f"{MLM_HEAD}.decoder.bias": f"{MLM_HEAD}.bias",
                    f"{MLM_HEAD}.decoder.weight": f"{prefix}embeddings.word_embeddings.weight",
                }
        pairs += more
        if any(name.endswith("LayerNorm.gamma") for name in names):  # the original release names them so
            pairs = [replace(pair, theirs=tuple(map(old_name, pair.theirs))) for pair in pairs]
        derived = [r".*embeddings\.(position_ids|token_type_ids)"]
        return Blueprint(tokenizers, core, tasks, pairs, copies, derived, spare=spare)

    def _pairs(self, core: Core, block: EncoderBlock, prefix: str) -> Iterator[Pair]:
        theirs = f"{prefix}embeddings"
        yield same("embeds.text.weight", f"{theirs}.word_embeddings.weight")
        yield same("core.times.weight", f"{theirs}.position_embeddings.weight")
        yield same("core.fields.weight", f"{theirs}.token_type_embeddings.weight")
        yield from affine("core.first_norm", f"{theirs}.LayerNorm")
        for i in range(core.depth):
            yield from block.pairs(i, f"{prefix}encoder.layer.{i}")


def old_name(name: str) -> str:
    """The name of a tensor in the original release of BERT."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
