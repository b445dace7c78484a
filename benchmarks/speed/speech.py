"""Clips of 0.3 to 5 seconds, heard and written down, against Whisper, which hears 30 seconds of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.row import Job, Place, Row
from benchmarks.speed.work import ids, parameter_count

TASK = "audio -> ids"
RATE_HZ = 16000
VOCAB = 51865  # Whisper's; of ours the last one is the stop


@dataclass(frozen=True)
class Shape:
    """Whisper tiny's: the same width and depth in both halves; `hidden` of a plain MLP, two thirds of it in our gated one."""

    width: int = 384
    depth: int = 4  # of each half
    heads: int = 6
    hidden: int = 1536
    mels: int = 80
    vocab: int = VOCAB
    clips: int = 16


def clips(shape: Shape, seed: int) -> tuple[list[Any], list[int]]:
    """Noise of evenly spread lengths, and how many tokens are written of each: 3 a second, 2 at least."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    seconds = torch.linspace(0.3, 5.0, shape.clips).tolist()
    waves = [torch.randn(round(s * RATE_HZ), generator=draw) * 0.1 for s in seconds]
    return [wave.numpy() for wave in waves], [max(2, round(3 * s)) for s in seconds]


def ours(place: Place) -> Job:
    import torch

    import multimodal as mm
    from multimodal_tokenizers import AudioFrames

    shape = place.sizes
    half = mm.Core(width=shape.width, depth=shape.depth, heads=shape.heads, mlp_width=shape.hidden * 2 // 3)
    frames = AudioFrames(rate_hz=RATE_HZ, mels=shape.mels, stack=2)  # 20 ms a token, as behind Whisper's convolutions
    core = mm.EncoderDecoder(reader=half, writer=half)
    model = (
        mm.Model({"audio": frames, "ids": ids(shape.vocab - 1)}, core, [TASK], seed=place.seed).to(place.device).eval()
    )
    with torch.no_grad():
        model.readout(TASK).linear.bias[-1] = -1e9  # nothing stops by itself
    waves, counts = clips(shape, place.seed)

    def run() -> list[Any]:
        engine = mm.Engine(model, rows=len(waves), capacity=300)  # 5 s and what is written
        for wave, count in zip(waves, counts, strict=True):
            engine.submit(TASK, {"audio": (wave, RATE_HZ)}, max_tokens=count)
        found = [piece.prediction.value for piece in engine.run() if piece.prediction is not None]
        assert sorted(map(len, found)) == counts
        return found

    return job(run, model, counts)


def theirs(place: Place) -> Job:
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    shape = place.sizes
    torch.manual_seed(place.seed)
    start = shape.vocab - 1
    config = WhisperConfig(
        vocab_size=shape.vocab,
        d_model=shape.width,
        encoder_layers=shape.depth,
        decoder_layers=shape.depth,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.hidden,
        decoder_ffn_dim=shape.hidden,
        num_mel_bins=shape.mels,
        pad_token_id=start,
        bos_token_id=start,
        eos_token_id=start,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model: Any = WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.eval().to(place.device)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, eos_token_id=None, pad_token_id=start, use_cache=True, do_sample=False
    )
    extract: Any = WhisperFeatureExtractor(feature_size=shape.mels, sampling_rate=RATE_HZ)
    waves, counts = clips(shape, place.seed)

    def run() -> list[Any]:
        features = extract(waves, sampling_rate=RATE_HZ, return_tensors="pt").input_features.to(place.device)
        written: Any = model.generate(features, max_new_tokens=max(counts))
        assert written.shape[-1] >= max(counts)
        return [row[:count] for row, count in zip(written, counts, strict=True)]

    return job(run, model, counts)


def job(run: Callable[[], Any], model: Any, counts: list[int]) -> Job:
    facts = {"parameters": parameter_count(model), "tokens written": sum(counts)}
    return Job(run, units=len(counts), unit="clips", facts=facts)


ROWS = (
    Row(
        name="whisper",
        what="16 clips of 0.3 to 5 s, from samples to 2 to 15 tokens each, fp32; ours reads as long as each clip is, in tokens of "
        "20 ms too, by an EncoderDecoder; random weights in layouts of their own, and their batch writes to its longest answer",
        peer="transformers Whisper (tiny's shape, sdpa)",
        needs=("transformers",),
        goal=8.0,
        sizes=Shape(),
        quick={"width": 48, "depth": 1, "heads": 2, "hidden": 96, "vocab": 100, "clips": 3},
        ours=ours,
        theirs=theirs,
    ),
)
