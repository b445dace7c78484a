"""`multimodal pretrained check`: it passes what is right, and finds what is not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.cli import main
from multimodal.pretrained import gate
from multimodal.shapes import CheckpointError
from tests.pretrained.compared import saved

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 71, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 16}
SPEECH = {
    "vocab_size": 90,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 3,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, "model.norm.weight"),
    "bert": ("BertModel", "BertConfig", TEXT, "encoder.layer.1.output.LayerNorm.weight"),
    "vit": ("ViTModel", "ViTConfig", {**PICTURE, "image_size": 224}, "layernorm.weight"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, "model.decoder.layer_norm.weight"),
}


def folder_of(name: str, folder: Path) -> Path:
    kind, config, settings, _ = MODELS[name]
    return saved(getattr(transformers, kind)(getattr(transformers, config)(**settings)), folder / name)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_passes_what_is_right_and_finds_what_is_not(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(name, tmp_path)
    assert main(["pretrained", "check", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok") == 2
    assert printed.endswith("passed\n")
    real = gate._theirs

    def theirs(*given: Any) -> Any:
        module = real(*given)
        dict(module.named_parameters())[MODELS[name][3]].data[::2] += 0.05
        return module

    monkeypatch.setattr(gate, "_theirs", theirs)
    assert main(["pretrained", "check", str(folder)]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_what_was_not_checked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama", tmp_path)
    monkeypatch.setattr(gate, "PROBES", gate.PROBES[1:])
    with pytest.raises(
        CheckpointError, match=r"not checked: there is no comparison for models of type 'llama'; there is one for"
    ):
        gate.compare(folder)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"not checked: the comparison needs transformers"):
        gate.compare(folder)


def test_differences_are_of_the_right_sample(tmp_path: Path) -> None:
    """Samples of other lengths lie in another order in the stream than they were given."""
    loaded = gate.pretrained(folder_of("llama", tmp_path))
    model, text = loaded.model(), loaded.tokenizers["text"]
    samples = [{"text": list(range(1, n)), "answer": [1, 2]} for n in (12, 4, 9)]
    with torch.inference_mode():
        for states in (False, True):
            given = [{"text": s["text"], **({} if states else {"answer": s["answer"]})} for s in samples]
            together = gate.computed(model, "text -> text", given, states)
            for sample, found in zip(given, together, strict=True):
                (alone,) = gate.computed(model, "text -> text", [sample], states)
                torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    assert text.vocab_size == 71
