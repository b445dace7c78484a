"""Towers of trained weights: encoders of transformers as the eyes and ears of a language model of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from multimodal.tokenizer import Places
from multimodal.tower import Dropped, MLPConnector, PixelShuffle, Tower
from tests.pretrained.compared import TOLERANCE, largest, logits_by_sample, saved, unlike_itself
from tests.pretrained.seeing import pixels, unfitted

transformers = pytest.importorskip("transformers")

EYE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 2}
TEXT = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SAMPLES = [([5, 9], pixels(16, 16, 1), [3, 60], [7, 7, 1]), ([2], pixels(8, 12, 2), [40, 12, 13], [33])]
TASK = "before:text image text -> text"


def built(tmp_path: Path, registers: int) -> tuple[Any, Any, Pretrained, Pretrained]:
    """(the encoder, the language model, both as ours)."""
    if registers:
        eye = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**EYE, num_register_tokens=registers)
        )
    else:
        eye = transformers.Dinov2Model(transformers.Dinov2Config(**EYE))
    words = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    return eye, words, pretrained(saved(eye, tmp_path / "eye")), pretrained(saved(words, tmp_path / "words"))


def with_eyes(loaded: Pretrained, words: Pretrained, dropped: int) -> mm.Model:
    connector = Dropped(dropped, PixelShuffle(2, MLPConnector(hidden=20)))
    tower = unfitted(Tower.of(loaded, connector, kind="image", causal=True))
    return words.model([mm.Task(TASK, words.tasks[0].head)], {"image": tower})


def ours(model: mm.Model, samples: Any = SAMPLES) -> list[Tensor]:
    return logits_by_sample(
        model, TASK, [{"before": b, "image": x / 2 + 0.5, "text": p, "answer": a} for b, x, p, a in samples]
    )


def theirs(eye: Any, words: Any, connector: Any, dropped: int, samples: Any = SAMPLES) -> list[Tensor]:
    """The states of the encoder, two rows of two patches after the other, through the connector between embedded texts."""
    found = []
    for before, picture, prompt, answer in samples:
        state_ND = eye(picture[None]).last_hidden_state[0, dropped:]
        rows, columns = picture.shape[1] // 4, picture.shape[2] // 4
        square = state_ND.reshape(rows, 2, columns, 2, 24).permute(0, 2, 1, 3, 4).reshape(rows * columns, 96)
        table = words.get_input_embeddings()
        parts = [table(torch.tensor(before)), connector(square), table(torch.tensor(prompt + answer))]
        logits = words(inputs_embeds=torch.cat(parts)[None]).logits[0]
        found.append(logits[-len(answer) - 1 :])
    return found


@pytest.mark.parametrize("registers", [0, 3])
def test_eyes_of_one_model_and_words_of_another_are_what_both_compute(registers: int, tmp_path: Path) -> None:
    eye, words, seeing, writing = built(tmp_path, registers)
    model = with_eyes(seeing, writing, 1 + registers)
    connector = model.embeds["image"].connector
    with torch.no_grad():
        for weight in connector.parameters():
            weight += torch.randn_like(weight) * 0.2
        wanted = theirs(eye, words, connector, 1 + registers)
        assert largest(ours(model), wanted) < TOLERANCE
        for one, alone in zip(SAMPLES, wanted, strict=True):
            assert largest(ours(model, [one]), [alone]) < TOLERANCE
        model.save(tmp_path / "saved")
        assert largest(ours(mm.Model.load(tmp_path / "saved")), wanted) < TOLERANCE
        inner: Any = model.embeds["image"].frozen_part
        inner.core.blocks[1].layers[1].body.down.bias += 1e-3 * torch.arange(24)
        assert largest(ours(model), wanted) > TOLERANCE


def test_what_is_written_is_what_the_language_model_writes(tmp_path: Path) -> None:
    eye, words, seeing, _ = built(tmp_path, 0)
    unlike_itself(words, words.model.norm.weight)
    words.save_pretrained(tmp_path / "words")
    model = with_eyes(seeing, pretrained(tmp_path / "words"), 1)
    before, picture, prompt, _ = SAMPLES[1]
    fields = {"before": before, "image": picture / 2 + 0.5, "text": prompt}
    found = model.generate(TASK, **fields, max_tokens=14).value
    written: list[int] = []
    for _ in range(14):
        samples = [(before, picture, prompt, written)]
        with torch.inference_mode():
            logits = theirs(eye, words, model.embeds["image"].connector, 1, samples)[0]
        written.append(int(logits[-1].argmax()))
    assert len(set(written)) > 2, "the case does not exercise anything"
    assert found == written


def test_the_ears_of_a_model_of_two_cores(tmp_path: Path) -> None:
    """The encoder of Whisper as a tower: its states are those of transformers."""
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=24, encoder_layers=2, encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2,
        encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=50, max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    module = transformers.WhisperForConditionalGeneration(config)
    loaded = pretrained(saved(module, tmp_path))
    kind = next(iter(loaded.tokenizers))
    tower = Tower.of(loaded, kind=kind)
    sound: Any = tower.embed(32)
    tokens = tower((torch.randn(16000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1, 16000))
    frames_NF = tower.inner_tokens(tokens).content.reshape(-1, 8)
    with torch.inference_mode():
        wanted = module.model.encoder(frames_NF.T[None]).last_hidden_state[0]
        places = Places.of([tokens], tower.step)
        found = sound.frozen_part(tokens.content, places)
    assert largest([found], [wanted]) < TOLERANCE
