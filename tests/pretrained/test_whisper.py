"""Whisper against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import multimodal as mm
from multimodal.norm import Norm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    check_mutations,
    check_round_trip,
    largest,
    logits_by_sample,
    refused,
    saved,
)

transformers = pytest.importorskip("transformers")

SECONDS, START, STOP = 2, 70, 71
SMALL = {
    "vocab_size": 80,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 64,
    "max_source_positions": 50 * SECONDS,
    "max_target_positions": 24,
    "num_mel_bins": 8,
    "decoder_start_token_id": START,
    "eos_token_id": STOP,
    "bos_token_id": STOP,
    "pad_token_id": STOP,
}
WRITING = {
    "lang_to_id": {"<|en|>": 72, "<|de|>": 73},
    "task_to_id": {"transcribe": 74, "translate": 75},
    "no_timestamps_token_id": 76,
    "is_multilingual": True,
    "suppress_tokens": [3, 4, 5],
    "begin_suppress_tokens": [6, STOP, 50256],
}
IDS = [[5, 9, 2, 60, 1, 0, 33], [60, 3, 3, 8, 11, 12, 40, 41, 7, 7, 6, 20]]


def build(**more: Any) -> Any:
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**{**SMALL, **more}))


def given(module: Any, folder: Path, **writing: Any) -> Path:
    """The folder of a model with what says how it writes and hears."""
    saved(module, folder)
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=module.config.num_mel_bins, chunk_length=module.config.max_source_positions // 50
    )
    extractor.save_pretrained(folder)
    path = folder / "generation_config.json"
    # transformers overlooks what follows from the model's own configuration
    said = {**json.loads(path.read_text(encoding="utf-8")), **writing, "_from_model_config": False}
    path.write_text(json.dumps(said), encoding="utf-8")
    return folder


def waves(seconds: float = SECONDS) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(int(16000 * seconds * part), generator=random) * 0.1 for part in (0.4, 1.0)]


def ours(loaded: Pretrained, heard: list[torch.Tensor]) -> list[torch.Tensor]:
    samples = [{"audio": (wave, 16000), "text": ids} for wave, ids in zip(heard, IDS[: len(heard)], strict=True)]
    return logits_by_sample(loaded.model(), "audio -> text", samples)


def theirs(module: Any, heard: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=module.config.num_mel_bins, chunk_length=module.config.max_source_positions // 50
    )
    found = []
    for wave, ids in zip(heard, IDS[: len(heard)], strict=True):
        features = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            logits = module(input_features=features, decoder_input_ids=torch.tensor([start + ids])).logits
        found.append(logits[0, len(start) - 1 :])
    return found


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": False, "activation_function": "relu"}])
def test_logits_are_those_of_transformers_packed_and_alone(more: dict[str, Any], tmp_path: Path) -> None:
    module, heard = build(**more), waves()
    loaded = pretrained(given(module, tmp_path / "theirs"))
    wanted = theirs(module, heard, [START])
    assert largest(ours(loaded, heard), wanted) < TOLERANCE
    assert largest(ours(loaded, heard[:1]), wanted[:1]) < TOLERANCE
    check_round_trip(tmp_path, tmp_path / "theirs")


def test_a_sound_is_heard_as_the_feature_extractor_hears_it(tmp_path: Path) -> None:
    module = build()
    tokenizer = pretrained(given(module, tmp_path)).tokenizers["audio"]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    for wave in waves():
        wanted = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]
        assert torch.allclose(tokenizer((wave, 16000)).content.reshape(-1, 8).T, wanted, rtol=0, atol=1e-5)


def test_a_sound_that_is_too_long_is_refused_where_transformers_cuts_it(tmp_path: Path) -> None:
    model = pretrained(given(build(), tmp_path)).model()
    wave = waves(2.5)[1]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    whole, cut = (extractor(x.numpy(), sampling_rate=16000).input_features[0] for x in (wave, wave[:32000]))
    assert (whole == cut).all()
    with pytest.raises(
        mm.MediaError, match=r"has 2.5 s or more, and at most 2 s are read at once; split it into pieces$"
    ):
        model.generate("audio -> text", audio=(wave, 16000), max_tokens=2)


def test_what_is_written_is_what_transformers_writes(tmp_path: Path) -> None:
    module, heard = build(), waves()
    folder = given(module, tmp_path, **WRITING)
    module = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    for language, task, start in (("en", "transcribe", [72, 74]), ("de", "translate", [73, 75])):
        loaded = pretrained(folder, language=language, task=task)
        assert loaded.tasks[0].head.start_ids == (START, *start, 76)  # type: ignore[attr-defined]
        wanted = theirs(module, heard, [START, *start, 76])
        assert largest(ours(loaded, heard), wanted) < TOLERANCE
        for wave in heard:
            features = transformers.AutoFeatureExtractor.from_pretrained(folder)(
                wave.numpy(), sampling_rate=16000, return_tensors="pt"
            ).input_features
            told = {"language": language, "task": task}
            ids = module.generate(features, **told, max_new_tokens=9, do_sample=False)[0].tolist()
            ids = ids[4:] if ids[:1] == [START] else ids
            model = loaded.model()
            found = model.generate("audio -> text", audio=(wave, 16000), max_tokens=9)
            assert found.value == [i for i in ids if i != STOP]
            assert not {3, 4, 5} & set(found.value)
            assert found.value[0] not in (6, STOP)
            free = model.packer.head("audio -> text")
            assert free.forbidden() == ((3, 4, 5), (6, STOP))
            checked = theirs(module, [wave], [START, *start, 76])[0][0].topk(3).indices.tolist()
            assert found.value[0] == next(i for i in checked if i not in (3, 4, 5, 6, STOP))


def test_options_come_back_with_the_model(tmp_path: Path) -> None:
    folder = given(build(), tmp_path / "theirs", **WRITING)
    model = pretrained(folder, language="de").model()
    model.save(tmp_path / "ours")
    again = mm.Model.load(tmp_path / "ours")
    assert again.packer.head("audio -> text") == model.packer.head("audio -> text")
    again.export("hf", tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    with pytest.raises(mm.CheckpointError, match=r"language='fr' is not among 'en', 'de'"):
        pretrained(folder, language="fr")
    with pytest.raises(mm.CheckpointError, match=r"this family has no option 'voice'; it has language, task"):
        pretrained(folder, voice="low")


def test_without_its_head_and_as_older_models_say_how_to_begin(tmp_path: Path) -> None:
    module = build()
    loaded = pretrained(saved(module.model, tmp_path))
    assert largest(ours(loaded, waves()), theirs(module, waves(), [START])) < TOLERANCE
    check_round_trip(tmp_path / "again", tmp_path)
    forced = {"forced_decoder_ids": [[2, 75], [1, None], [3, 76]]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **forced}), encoding="utf-8")
    assert pretrained(tmp_path).tasks[0].head.start_ids == (START, 75, 76)  # type: ignore[attr-defined]


def test_any_small_change_is_found(tmp_path: Path) -> None:
    module, heard = build(), waves()
    folder = given(module, tmp_path)
    wanted = theirs(module, heard, [START])

    def difference(loaded: Pretrained) -> float:
        return largest(ours(loaded, heard), wanted)

    names = [
        "model.encoder.conv1.bias",
        "model.encoder.layers.1.self_attn.v_proj.bias",
        "model.decoder.layers.0.encoder_attn.out_proj.bias",
        "model.decoder.layers.2.fc1.bias",
        "model.decoder.layer_norm.bias",
    ]
    loaded = pretrained(folder)
    norm = Norm(eps=1e-3, centred=True, bias=True)
    cores = {"reader": loaded.core.reader.replace(norm=norm), "writer": loaded.core.writer.replace(norm=norm)}  # type: ignore[union-attr]
    check_mutations(folder, difference, names, cores)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    folder = given(build(), tmp_path)
    refused({"scale_embedding": True}, folder, r"scale_embedding=True is not supported; wanted False")
    refused({"rope_theta": 1e4}, folder, r"has rope_theta, which this version does not know")
    refused({"num_mel_bins": 16}, folder, r"preprocessor_config.json: feature_size=8 is not supported; wanted 16")
    refused({"encoder_layers": 3}, folder, r"there is no tensor 'model.encoder.layers.2")


def test_an_answer_has_as_many_tokens_as_the_writer_has_places(tmp_path: Path) -> None:
    model = pretrained(given(build(), tmp_path)).model()
    sample: dict[str, Any] = {"audio": (waves()[0], 16000)}
    assert model.generate("audio -> text", **sample, max_tokens=23)
    with pytest.raises(
        mm.StreamError, match=r"a start of 1 tokens and an answer of up to 24 are more than the 24 places"
    ):
        model.generate("audio -> text", **sample, max_tokens=24)


def test_the_size_of_whisper_base(tmp_path: Path) -> None:
    """Its width, heads and half a minute of sound, at a depth of 1 and with a small vocabulary."""
    sizes = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "num_mel_bins": 80}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_layers": 1, "decoder_layers": 1}
    module = build(**sizes, **heads, max_source_positions=1500, max_target_positions=448)
    heard = waves(30)
    loaded = pretrained(given(module, tmp_path))
    assert largest(ours(loaded, heard), theirs(module, heard, [START])) < TOLERANCE


def test_a_classifier_on_the_encoder(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(**SMALL, classifier_proj_size=12, num_labels=3)
    module = transformers.WhisperForAudioClassification(config)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    model, extractor = loaded.model(), transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS)
    samples = [{"audio": (wave, 16000)} for wave in waves()]
    wanted = []
    for wave in waves():
        features = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            wanted.append(module(features).logits[0])
    with torch.inference_mode():
        stream = model.pack("audio -> label", samples, answers=False)
        found = model.logits(stream)["audio -> label"]
    assert stream.readings["audio -> label"].samples == (0, 1)
    assert largest(list(found), wanted) < TOLERANCE
    assert [x.value for x in model.predict("audio -> label", samples)] == [f"LABEL_{int(x.argmax())}" for x in wanted]
    check_round_trip(tmp_path, tmp_path / "theirs")
