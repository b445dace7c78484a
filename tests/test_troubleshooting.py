"""docs/troubleshooting.md quotes messages as they are today: each is provoked here, and the page quotes no others."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.cli import main
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "troubleshooting.md"
PICTURE = np.zeros((8, 8), np.float32)
SAMPLE = {"image": PICTURE, "label": "cat"}
TASK = "image -> label"
DEFINITION = '''
from dataclasses import dataclass
from multimodal_tokenizers import Labels

@dataclass(frozen=True)
class Mine(Labels):
    """Labels of a file of one's own."""
'''


def model() -> mm.Model:
    kinds = {"image": ImagePatches(patch=4, channels=1), "audio": AudioFrames(), "text": TextBytes()}
    core = mm.Core(width=16, depth=1, heads=2)
    return mm.Model({**kinds, "label": Labels(("cat", "dog"))}, core, [TASK, "audio -> text", "text -> text"])


def fit(*samples: Any, **settings: Any) -> mm.Run:
    return mm.fit(model(), {TASK: list(samples)}, quiet=True, **settings)


def again(folder: str) -> None:
    fit(SAMPLE, steps=1, batch=1, folder=folder)
    fit(SAMPLE, steps=2, batch=1, folder=folder, resume=True)


def finished_again() -> None:
    Path("job.py").write_text(
        "import numpy as np, multimodal as mm\nfrom multimodal_tokenizers import ImagePatches, Labels\n"
        "def recipe():\n    kinds = {'image': ImagePatches(patch=4, channels=1), 'label': Labels(('cat', 'dog'))}\n"
        "    model = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), ['image -> label'])\n"
        "    data = {'image -> label': [{'image': np.zeros((8, 8), np.float32), 'label': 'cat'}]}\n"
        "    return mm.TrainingJob(model=model, data=data, recipe=mm.Recipe(steps=1, batch=1))\n"
    )
    assert main(["train", "job.py", "--folder", "run"]) == 0
    from multimodal.cli.loading import import_recipe
    from multimodal.train.settings import make_job

    make_job(import_recipe(Path("job.py")), [], "recipe()").run(Path("run"))


def without_plugin() -> None:
    from multimodal.cli.loading import import_file, load

    Path("mine_of_troubleshooting.py").write_text(DEFINITION)
    module = import_file(Path("mine_of_troubleshooting.py"))
    kinds = {"image": ImagePatches(patch=4, channels=1), "label": module.Mine(("cat", "dog"))}
    mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [TASK]).save("mine")
    config = Path("mine/config.json")
    config.write_text(config.read_text().replace("mine_of_troubleshooting:Mine", "gone_of_troubleshooting:Mine"))
    load(Path("mine"), None, "cpu")


MESSAGES: dict[str, Callable[[], Any]] = {
    "the sample has no field 'image'; it has 'picture'": lambda: model().predict(TASK, picture=PICTURE),
    "a sample is a mapping of fields, not ndarray": lambda: model().predict(TASK, [PICTURE]),
    "has no '->'; write the fields that are read, '->', and the field that is written": lambda: mm.Model(
        {"image": ImagePatches()}, mm.Core.tiny(), ["image - > label"]
    ),
    "not a Tokenizer made by its constructor": lambda: mm.Model({"image": ImagePatches}, mm.Core.tiny(), [TASK]),
    "is not one of the 2 classes": lambda: fit({"image": PICTURE, "label": "cow"}, steps=1, batch=1),
    "an array alone does not say its rate": lambda: model().predict("audio -> text", audio=np.zeros(1600)),
    "floats are wanted in 0..1, so divide by the largest value": lambda: model().predict(TASK, image=PICTURE + 300),
    "smaller than one patch=4; enlarge it first": lambda: model().predict(TASK, image=PICTURE[:2, :2]),
    "gave no tokens; to leave a field out of a sample, give None": lambda: model().predict("text -> text", text=""),
    "samples are broken": lambda: fit(
        *({"image": f"{name}.png", "label": "cat"} for name in "ab"), SAMPLE, steps=2, batch=3, max_bad=1
    ),
    "is 401 tokens long, and a pack holds tokens=64": lambda: fit(
        {"image": np.zeros((80, 80)), "label": "cat"}, steps=1, tokens=64
    ),
    "this run was made with other settings": lambda: again("other"),
    "holds a training run that went to its end": finished_again,
    "if no sample is to blame": lambda: fit(SAMPLE, {**SAMPLE, "label": "dog"}, steps=60, batch=2, lr=1e30, clip=0.0),
    "device 'cuda' is not there": lambda: fit(SAMPLE, steps=1, batch=1, device="cuda"),
    "a checkpoint is a folder that Model.save wrote": lambda: mm.Model.load("nowhere"),
    "Here: --plugin FILE.py, the file that defines it": without_plugin,
}


@pytest.mark.parametrize("words", MESSAGES, ids=lambda words: words[:30])
def test_a_message_of_the_page_is_raised(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FloatingPointError)) as caught:
        MESSAGES[words]()
    assert words in str(caught.value)


def test_the_page_quotes_nothing_else():
    quoted = re.findall(r"^> (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert quoted == list(MESSAGES)
