"""A program as users write it. test_types.py lets pyright check it strictly; it is not run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

import multimodal as mm
from multimodal import augment, data, train
from multimodal.heads import Classify, NextToken
from multimodal.train import Callback
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TableRow, TextBPE, TextBytes

names = ("circle", "square")
model = mm.Model(
    tokenizers={"image": ImagePatches(patch=4, channels=1), "label": Labels(names)},
    core=mm.Core.tiny(),
    tasks=["image -> label", mm.Task("image -> label", head=Classify(label_smoothing=0.1))],
)
samples: list[dict[str, Any]] = [{"image": np.zeros((8, 8), dtype=np.float32), "label": "circle"}]


class Stop(Callback):
    def on_step(self, view: train.View) -> None:
        print(view.step, view.row["loss"])


run = mm.fit(model, {"image -> label": samples}, steps=20, batch=2, lr=1e-3, callbacks=[Stop()], folder=Path("run"))
print(run.last("loss"), run.history[0], run.folder)
recipe = mm.Recipe(steps=10, batch=4)
recipe = mm.override(recipe, lr=1e-3)
run = mm.fit(model, {"image -> label": augment.Augmented(samples, {"image": augment.for_pictures()})}, recipe)
answer = model.predict("image -> label", image=np.zeros((8, 8), dtype=np.float32))
print(answer, answer.probability, answer.value)
for one in model.predict_each("image -> label", samples):
    print(one)
model.save("shapes")
model = mm.Model.load("shapes")
found = mm.quick("photos/", minutes=3)
print(found.model, found.evaluation, found.report, found.says)
measures = mm.evaluate(model, "image -> label", samples)
print(measures["exact"])
text = mm.Model({"text": TextBytes()}, mm.Core.tiny(), [mm.Task("text -> text", NextToken())])
print(text.generate("text -> text", text="hello", max_tokens=3).value)
for piece in text.stream("text -> text", text="hello"):
    print(piece)
stream = model.pack("image -> label", samples)
logits: dict[str, torch.Tensor] = model.logits(stream)
mixed = data.Balanced(samples, "label")
shards = mm.Shards("x.shards")
bpe = TextBPE.train(["a b c"], vocab_size=300)
row = TableRow.of([{"a": 1.0}])
sound = AudioFrames(rate_hz=8000)(np.zeros(8000, dtype=np.float32))
print(sound.content.shape)
exported = model.export("onnx", "out")


class Mine(mm.Tokenizer):
    """One of my own."""

    def encode(self, value: Any) -> mm.Tokens:
        return mm.Tokens(torch.zeros(1, 3), mm.at_times(torch.zeros(1)))
