"""Whisper (Radford et al. 2022): speech to text with an encoder and a decoder, and classifiers on its encoder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from multimodal.core import Core
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.heads import NextToken
from multimodal.heads.pool import Mean, Transformed
from multimodal.layers import MLP, CrossAttention, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, affine, attention_pairs, same
from multimodal.pretrained.pictures import classes, classifier_task
from multimodal.pretrained.texts import check_head, text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal_tokenizers import WhisperFrames

BIAS = ("query", "value", "out")  # keys have none
NORM = Norm(eps=1e-5, centred=True, bias=True)


class Whisper(Family):
    """Speech to text.

    Options: language, the code of the spoken language ("en" by default), and task, "transcribe" (the default) or "translate" into
    English. English-only models have neither. Answers have no timestamps.
    """

    names = ("whisper",)
    peers: ClassVar = {
        "audio -> text": "AutoModelForSpeechSeq2Seq",
        "audio -> label": "AutoModelForAudioClassification",
    }

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        width, mels = settings.need("d_model"), settings.need("num_mel_bins")
        frames, written = settings.get("max_source_positions", 1500), settings.get("max_target_positions", 448)
        settings.only("scale_embedding", False)
        settings.only("is_encoder_decoder", True)
        settings.only("use_weighted_layer_sum", False)
        # settings of word times, initial weights and training; a depth that encoder_layers and decoder_layers have too
        settings.ignore("median_filter_width", "init_std", "num_hidden_layers")
        settings.ignore("encoder_layerdrop", "decoder_layerdrop", "apply_spec_augment")
        settings.ignore(*(name for name in settings.config if name.startswith(("mask_time_", "mask_feature_"))))
        mlp = MLP(activation=activation(settings, "activation_function", "gelu"), gated=False, bias=True)
        reader, writer = (
            Core(
                width=width,
                depth=settings.need(f"{part}_layers"),
                heads=settings.need(f"{part}_attention_heads"),
                mlp_width=settings.need(f"{part}_ffn_dim"),
                norm=NORM,
                qk_norm=False,
                rotary_split=(0, 0, 0),
                learned_times=times,
                block=(SelfAttention(bias=BIAS), *crossed, mlp),
            )
            for part, times, crossed in (("encoder", frames, ()), ("decoder", written, (CrossAttention(bias=BIAS),)))
        )
        _check_sound(settings.where, files, mels)
        audio = WhisperFrames(mels=mels, pad_seconds=frames * WhisperFrames.step[0])
        if "classifier.weight" in names:
            return self._classifier(settings, reader, audio)
        settings.ignore("classifier_proj_size")
        tokenizers = {"audio": audio, "text": text_tokenizer(settings, files)}
        bare = not any(name.startswith("model.") for name in names)  # saved without its head
        tied = settings.get("tie_word_embeddings", True)
        check_head(settings, tied=tied, bare=bare)
        prefix = "" if bare else "model."
        return Blueprint(
            tokenizers,
            EncoderDecoder(reader=reader, writer=writer),
            [Task("audio -> text", self._head(settings, files, tied))],
            list(self._pairs(reader, writer, prefix, tied)),
            copies={"proj_out.weight": f"{prefix}decoder.embed_tokens.weight"} if tied else {},
        )

    def _classifier(self, settings: Settings, reader: Core, audio: WhisperFrames) -> Blueprint:
        """A classifier on the encoder: the mean of its states, a linear layer, and the linear layer of the classes."""
        writing = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "decoder_start_token_id")
        settings.ignore(*writing, "eos_token_id", "bos_token_id", "vocab_size", "tie_word_embeddings")
        width, labels = settings.get("classifier_proj_size", 256), classes(settings)
        # they apply the linear layer before the mean, which gives the same vector
        pool = Transformed(Mean(), dense="linear", out=width)
        tasks, more = classifier_task("audio", pool, labels, reader.width, "classifier")
        more += affine("readouts.label_Classify.pool.dense.linear", "projector")
        pairs = [*_stem("encoder."), *_blocks("core", "encoder", reader, crosses=False)]
        return Blueprint({"audio": audio, "label": labels}, reader, tasks, [*pairs, *more])

    def _head(self, settings: Settings, files: Mapping[str, bytes], tied: bool) -> NextToken:
        # newer models have these fields in generation_config.json, which overrides config.json
        names = (
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_decoder_ids",
            "decoder_start_token_id",
            "eos_token_id",
        )
        writing = {name: settings.get(name) for name in names}
        writing |= {name: value for name, value in _json(files, "generation_config.json").items() if value is not None}
        settings.ignore("bos_token_id")
        vocab = settings.need("vocab_size")
        start, stop = writing["decoder_start_token_id"], writing["eos_token_id"]
        if start is None or stop is None:
            raise CheckpointError(
                f"{settings.where}: decoder_start_token_id or eos_token_id is missing in config.json and generation_config.json"
            )

        def allowed(name: str) -> tuple[int, ...]:
            return tuple(i for i in writing.get(name) or () if 0 <= i < vocab)

        return NextToken(
            start_ids=(start, *_prompt_ids(settings, writing)),
            stop_id=stop[0] if isinstance(stop, list) else stop,
            tied=tied,
            bias=False,
            never=allowed("suppress_tokens"),
            never_first=allowed("begin_suppress_tokens"),
        )

    def _pairs(self, reader: Core, writer: Core, prefix: str, tied: bool) -> Iterator[Pair]:
        yield from _stem(f"{prefix}encoder.")
        yield same("embeds.text.weight", f"{prefix}decoder.embed_tokens.weight")
        if not tied:
            yield same("readouts.text_NextToken.linear.weight", "proj_out.weight")
        yield from _blocks("core.reader", f"{prefix}encoder", reader, crosses=False)
        yield from _blocks("core.writer", f"{prefix}decoder", writer, crosses=True)


def _stem(theirs: str) -> Iterator[Pair]:
    for i, name in ((1, "first"), (2, "second")):
        yield from affine(f"embeds.audio.{name}", f"{theirs}conv{i}")


def _blocks(ours: str, theirs: str, core: Core, *, crosses: bool) -> Iterator[Pair]:
    """The pairs of the encoder, or with `crosses` of the decoder."""
    yield same(f"{ours}.times.weight", f"{theirs}.embed_positions.weight")
    yield from affine(f"{ours}.norm", f"{theirs}.layer_norm")
    for i in range(core.depth):
        block, layers = f"{theirs}.layers.{i}", f"{ours}.blocks.{i}.layers"
        last = 2 if crosses else 1
        yield from _attention(f"{layers}.0", f"{block}.self_attn", core)
        yield from affine(f"{layers}.0.norm", f"{block}.self_attn_layer_norm")
        if crosses:
            yield from _attention(f"{layers}.1", f"{block}.encoder_attn", core)
            yield from affine(f"{layers}.1.norm", f"{block}.encoder_attn_layer_norm")
        yield from affine(f"{layers}.{last}.norm", f"{block}.final_layer_norm")
        yield from affine(f"{layers}.{last}.body.up", f"{block}.fc1")
        yield from affine(f"{layers}.{last}.body.down", f"{block}.fc2")


def _attention(ours: str, theirs: str, core: Core) -> Iterator[Pair]:
    """The pairs of a self-attention or cross-attention layer."""
    projections = [f"{theirs}.{part}_proj" for part in "qkv"]
    return attention_pairs(f"{ours}.body.attention", projections, f"{theirs}.out_proj", [core.width] * 3, BIAS)


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return json.loads(files[name]) if name in files else {}


def _prompt_ids(settings: Settings, writing: Mapping[str, Any]) -> list[int]:
    """The ids after the start token: language, task and "no timestamps", as far as the model has them."""
    forced = dict(writing.get("forced_decoder_ids") or ())
    languages = {name.strip("<|>"): i for name, i in (writing.get("lang_to_id") or {}).items()}
    tasks = writing.get("task_to_id") or {}
    if not languages:  # an English-only model, or one with a fixed prompt
        return [forced[place] for place in sorted(forced) if forced[place] is not None]
    language = settings.option("language", "en" if "en" in languages else next(iter(languages)), list(languages))
    task = settings.option("task", "transcribe", list(tasks))
    untimed = writing.get("no_timestamps_token_id")
    return [languages[language], tasks[task], *([] if untimed is None else [untimed])]


def _check_sound(where: str, files: Mapping[str, bytes], mels: int) -> None:
    """Raise a CheckpointError if the preprocessor differs from `WhisperFrames`."""
    settings = Settings(f"{where}, preprocessor_config.json", _json(files, "preprocessor_config.json"))
    for name, value in (("sampling_rate", 16000), ("hop_length", 160), ("n_fft", 400), ("feature_size", mels)):
        settings.only(name, value)
    settings.only("padding_value", 0.0)
    settings.only("do_normalize", False)
    settings.only("dither", 0.0)
    # the duration follows from the number of positions; older files contain the mel filters, which we compute
    settings.ignore("feature_extractor_type", "processor_class", "chunk_length", "n_samples", "nb_max_frames")
    settings.ignore("padding_side", "return_attention_mask", "mel_filters")
    settings.finish()
