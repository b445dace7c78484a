"""Programs as they are written: a core with a layer for every rule, score and prior that factors, at sizes that were not traced."""

import json

import pytest
import torch

import multimodal as mm
from multimodal.export.compare import padded_inputs
from multimodal.export.formats import FORMATS
from multimodal.export.programs import NEXT, read_fields
from multimodal.layers import MLP, PersistentMemory, SelfAttention

CLOSE = 1e-5
A, M = mm.attention, mm.masks
LAYERS = (
    SelfAttention(mask=M.Window(9)),
    SelfAttention(score=A.DotProduct(0.3), prior=A.ALiBi(), mask=M.Chunked(4)),
    SelfAttention(score=A.General(), prior=A.RelativeBias(3), mask=M.SameSegment() | M.Causal()),
    SelfAttention(score=A.Cosine(learned=True), prior=A.BucketedBias(8, 16), mask=~M.Window(2)),
    SelfAttention(score=A.Gaussian(), prior=A.PredictedWindow(2.0)),
    SelfAttention(score=A.LocationBased(64), prior=A.MixingWeights(64)),
    PersistentMemory(slots=5, score=A.Bernoulli(), prior=A.MixingWeights(5)),
    MLP(),
)
CORE = mm.Core(width=32, depth=1, heads=4, kv_heads=2, learned_times=64, learned_fields=2, block=LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("to", [pytest.param("pt2", marks=pytest.mark.training), "onnx"])
def test_every_part_that_factors_is_written_and_writes_what_the_model_writes(tokenizers, lively, values, tmp_path, to):
    if to == "onnx":
        for name in FORMATS["onnx"].needs:
            pytest.importorskip(name, reason="the extra `export` is not installed")
    task = "image story -> text"
    model = lively(mm.Model(tokenizers, CORE, [task]))
    folder = model.export(to, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["difference"]["largest"] <= CLOSE
    assert manifest["most_tokens"] == 64
    run = FORMATS[to].read({name: folder / entry["file"] for name, entry in manifest["programs"].items()})
    for samples in ([values(0)], [{**values(i), "image": None} if i == 1 else values(i) for i in range(5)]):
        tokens = [
            {n: None if s[n] is None else model.packer.tokenizers[n](s[n]) for n in ("image", "story")} for s in samples
        ]
        out = run("prefill", padded_inputs(model, read_fields(model, task), tokens))
        written, state = [], {}
        for place_A in tokenizers["text"].places(6):
            state |= {name.removesuffix(NEXT): x for name, x in out.items() if name.endswith(NEXT)}
            written.append(out["logits"][:, :256].argmax(-1))
            out = run("step", {"token": written[-1], "token.place": place_A.expand(len(samples), 3), **state})
        answers = model.generate(task, samples, max_tokens=6, sampler=mm.generate.AtLeast(6) | mm.generate.Greedy())
        assert [answer.tokens.content.tolist() for answer in answers] == torch.stack(written, 1).tolist()
    one = {
        name: x[:, :1] if x.dim() > 1 else x.clamp(max=1)
        for name, x in padded_inputs(model, read_fields(model, task), tokens[:1]).items()
    }
    first = {name: mm.Tokens(x.content[:1], x.position_NA[:1]) for name, x in tokens[0].items()}
    wanted = model.logits(model.packer([(task, first)], answers=False))[task]
    torch.testing.assert_close(run("prefill", one)["logits"], wanted, atol=CLOSE * 10, rtol=0)
