"""BERT (Devlin et al. 2019) and what has its layout, such as MiniLM and most encoders of sentences."""

from collections.abc import Iterator, Mapping, Sequence

from multimodal.core import Core
from multimodal.heads.pool import First, Mean, Transformed
from multimodal.layers.base import PostNorm
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, same
from multimodal.pretrained.pictures import EncoderBlock, classes, classifier, norm_pairs, vectors
from multimodal.pretrained.texts import text_tokenizer
from multimodal.tokenizer import Tokenizer


class Bert(Family):
    """Encoders of texts with learned positions and the norms behind the layers.

    Without a classifier it offers the pair "text <-> other:text", whose vectors are the mean of all states, as encoders of
    sentences are trained to give it.
    """

    names = ("bert",)

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        settings.only("position_embedding_type", "absolute")
        settings.only("is_decoder", False)
        settings.only("add_cross_attention", False)
        # they end no text; the head that they tie has no part in these models
        settings.ignore("bos_token_id", "eos_token_id", "tie_word_embeddings")
        block = EncoderBlock(
            width=settings.need("hidden_size"),
            heads=settings.need("num_attention_heads"),
            hidden=settings.need("intermediate_size"),
            activation=activation(settings, "hidden_act", "gelu"),
            bias=("query", "key", "value", "out"),
            merge=PostNorm(),
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
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
        if "classifier.weight" in names:
            tokenizers["label"] = labels = classes(settings)
            tasks, more = classifier("text", Transformed(First(), dense="tanh"), labels, core.width, "classifier")
            dense = "readouts.label_Classify.pool.dense.linear"
            more += [same(f"{dense}.{part}", f"{prefix}pooler.dense.{part}") for part in ("weight", "bias")]
        else:
            tasks, more = vectors("text", Mean(), core.width)
            # made for telling whether two sentences follow each other, which is no task of an encoder of sentences
            spare = [rf"{prefix}pooler\.dense\.(weight|bias)"]
        derived = [r".*embeddings\.(position_ids|token_type_ids)"]
        return Blueprint(tokenizers, core, tasks, pairs + more, derived=derived, spare=spare)

    def _pairs(self, core: Core, block: EncoderBlock, prefix: str) -> Iterator[Pair]:
        theirs = f"{prefix}embeddings"
        yield same("embeds.text.weight", f"{theirs}.word_embeddings.weight")
        yield same("core.times.weight", f"{theirs}.position_embeddings.weight")
        yield same("core.fields.weight", f"{theirs}.token_type_embeddings.weight")
        yield from norm_pairs("core.first_norm", f"{theirs}.LayerNorm")
        for i in range(core.depth):
            yield from block.pairs(i, f"{prefix}encoder.layer.{i}")
