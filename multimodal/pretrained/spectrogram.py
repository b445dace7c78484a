"""The Audio Spectrogram Transformer (Gong et al. 2021) and its classifiers."""

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

from multimodal.heads.pool import First, Transformed
from multimodal.pretrained.family import Blueprint, Family, Settings, same
from multimodal.pretrained.pictures import PREPROCESSOR, classes, classifier_task, vector_task
from multimodal.pretrained.vit import TOKENS, encoder_block, encoder_core, encoder_pairs
from multimodal.shapes import CheckpointError
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import ClassTokens, SpectrogramPatches

UNUSED = ("feature_extractor_type", "processor_class", "feature_size", "return_attention_mask", "padding_side")
"""Fields of preprocessor_config.json that do not change the spectrogram."""


def sound(settings: Settings, files: Mapping[str, bytes]) -> SpectrogramPatches:
    """The tokenizer that the configuration and preprocessor_config.json describe."""
    patch, stride = settings.need("patch_size"), settings.need("frequency_stride")
    settings.only("time_stride", stride)
    frames, mels = settings.need("max_length"), settings.need("num_mel_bins")
    where = f"{settings.where}, {PREPROCESSOR}"
    found = Settings(where, json.loads(files[PREPROCESSOR]) if PREPROCESSOR in files else {})
    found.ignore(*UNUSED)
    found.only("sampling_rate", SpectrogramPatches.rate_hz)
    found.only("max_length", frames)
    found.only("num_mel_bins", mels)
    found.only("do_normalize", True)
    found.only("padding_value", 0.0)
    mean, std = found.get("mean", -4.2677393), found.get("std", 4.5689974)
    found.finish()
    if not isinstance(patch, int):
        raise CheckpointError(f"{settings.where}: patch_size={patch!r} is not supported; wanted one number")
    cut = settings.option("cut", False, [False, True])
    return SpectrogramPatches(
        frames=frames, mels=mels, patch=patch, stride=stride, mean=float(mean), std=float(std), cut=cut
    )


class AST(Family):
    """Encoders of sounds of a fixed duration, with two learned tokens and learned positions.

    Options: cut, False by default. False: a longer sound raises an error. True: it is cut at its end, as transformers does.
    """

    names = ("audio-spectrogram-transformer",)
    peers: ClassVar = {"audio <-> other:audio": "AutoModel", "audio -> label": "AutoModelForAudioClassification"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        block = encoder_block(settings)
        core = encoder_core(settings, block)
        of = sound(settings, files)
        audio = ClassTokens(of, 2, 2, of.grid)
        tokenizers: dict[str, Tokenizer] = {"audio": audio}
        prefix = "" if "embeddings.cls_token" in names else "audio_spectrogram_transformer."
        if "classifier.dense.weight" in names:
            tokenizers["label"] = labels = classes(settings)
            pool = Transformed(First(2), last_norm=core.norm)
            tasks, more = classifier_task("audio", pool, labels, core.width, "classifier.dense")
            for part in ("weight", "bias"):
                more.append(same(f"readouts.label_Classify.pool.last_norm.{part}", f"classifier.layernorm.{part}"))
        else:
            tasks, more = vector_task("audio", First(2), core.width)
        pairs = encoder_pairs("audio", audio, core, block, prefix, TOKENS["deit"], 1, "of")
        return Blueprint(tokenizers, core, tasks, [*pairs, *more])
