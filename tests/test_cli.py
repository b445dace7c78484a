"""Every command from start to end, in this process, on a model that a recipe file trains for three steps."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multimodal as mm
from multimodal import declare
from multimodal.attention import DensePlan
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

soundfile = pytest.importorskip("soundfile")  # GPU machines may lack these, and run the tests marked cuda alone
pytest.importorskip("cyclopts")

from multimodal.cli import main  # noqa: E402
from multimodal.cli.typed import changed, value_from  # noqa: E402

RECIPE = '''
from dataclasses import dataclass

import numpy as np

import multimodal as mm
from multimodal.train.job import TrainingJob
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class Grey(ImagePatches):
    """A kind of this file's own."""

    patch: int = 4
    channels: int = 1


def recipe():
    model = mm.Model(
        {
            "image": Grey(),
            "text": TextBytes(),
            "sound": AudioFrames(rate_hz=8000, mels=8),
            "label": Labels(("dark", "light")),
        },
        mm.Core(width=32, depth=1, heads=2),
        ["image -> label", "image -> text", "sound my_words:text -> label"],
    )
    data = [
        {"image": np.full((8, 8), i % 2, np.float32), "label": ("dark", "light")[i % 2], "text": "ab"} for i in range(8)
    ]
    return TrainingJob(
        model=model,
        data={"image -> label": data, "image -> text": data},
        evaluation={"image -> label": data},
        recipe=mm.Recipe(steps=9, batch=4, precision="float32", device="cpu"),
    )
'''

COMMANDS = ["train", "predict", "generate", "transcribe", "check", "verify"]


@contextmanager
def forgotten_imports():
    """What a command imports from a temporary folder, adds to the path or learns as a class is forgotten again."""
    modules, classes = set(sys.modules), set(declare._defined)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield
    for name in set(sys.modules) - modules:
        if "pytest-of" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for name in set(declare._defined) - classes:
        if not name.startswith("multimodal"):
            del declare._defined[name]


@pytest.fixture(autouse=True)
def _clean_imports():
    with forgotten_imports():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a recipe, its trained run, and files to ask about."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "drawn.py").write_text(RECIPE)
    Image.fromarray(np.full((8, 8), 230, np.uint8)).save(folder / "light.png")
    np.save(folder / "light.npy", np.full((8, 8), 0.9, np.float32))
    soundfile.write(folder / "beep.wav", np.sin(np.arange(2000) / 5).astype(np.float32), 8000)
    with forgotten_imports():
        assert main(["train", str(folder / "drawn.py"), "--set", "steps=3", "--folder", str(folder / "run")]) == 0
    mm.Model(
        {"image": ImagePatches(patch=4, channels=1), "label": Labels(tuple("abcdefg"))},
        mm.Core(width=32, depth=1, heads=2),
        ["image -> label"],
    ).save(folder / "plain")
    return folder


@pytest.fixture
def say(capsys, home, monkeypatch):
    """say("predict", ...) -> (exit code, stdout, stderr), with the folder `home` as the current one."""
    monkeypatch.chdir(home)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(say):
    """The one message on stderr of a command that ends with exit code 2."""

    def run(*arguments: str) -> str:
        code, out, err = say(*arguments)
        assert code == 2, out + err
        assert "Traceback" not in err
        assert err.startswith("multimodal: ")
        return err

    return run


PLUGIN = ("--plugin", "drawn.py")
ASK = ("predict", "run", *PLUGIN, "--task", "image -> label")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(say, command) -> None:
    code, out, _ = say(command, "--help")
    assert code == 0
    assert f"Example: multimodal {command} " in out


def test_help_lists_the_commands(say) -> None:
    code, out, _ = say("--help")
    assert code == 0
    assert all(f" {command} " in out for command in COMMANDS)
    assert "--debug" in out


def test_version(say) -> None:
    from multimodal.checkpoint import package_version

    assert say("--version")[:2] == (0, package_version() + "\n")


def test_train_saves_and_says_where(say, tmp_path) -> None:
    folder = tmp_path / "other"
    code, out, _ = say("train", "drawn.py", "--set", "steps=2", "--set", "betas=0.8,0.9", "--folder", str(folder))
    assert code == 0
    assert f"model   {folder / 'model'}" in out
    assert "exactly right on held-out data: image -> label" in out
    facts = json.loads((folder / "recipe.json").read_text())["recipe"]
    assert (facts["steps"], facts["batch"], facts["betas"]) == (2, 4, [0.8, 0.9])


def test_train_resumes_only_when_told(say, refused, tmp_path) -> None:
    folder = str(tmp_path / "twice")
    assert say("train", "drawn.py", "--set", "steps=2", "--folder", folder)[0] == 0
    assert "already holds a training run; go on with it (--resume)" in refused(
        "train", "drawn.py", "--set", "steps=2", "--folder", folder
    )
    code, out, _ = say("train", "drawn.py", "--set", "steps=2", "--folder", folder, "--resume")
    assert code == 0
    assert "resuming at step 2" in out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stpes=3", "Recipe has no setting 'stpes'; it has steps, batch"),
        ("stpes=3", "did you mean 'steps'?"),
        ("steps=few", "--set steps=few: 'few' is no int"),
        ("steps=2.5", "--set steps=2.5: '2.5' is no int"),
        ("lr=fast", "--set lr=fast: 'fast' is no float"),
        ("steps", "--set steps: wanted name=value, such as --set steps=200"),
        ("batch=0", "Recipe: batch=0 must be a whole number, 1 or more"),
    ],
)
def test_train_refuses_settings(refused, setting, message) -> None:
    assert message in refused("train", "drawn.py", "--set", setting)


def test_settings_are_converted() -> None:
    recipe = changed(mm.Recipe(), ["steps=1e4", "lr=1e-4", "betas=(0.8, 0.9)", "device=cpu", "evaluate-every=5"])
    assert recipe == mm.Recipe(steps=10000, lr=1e-4, betas=(0.8, 0.9), device="cpu", evaluate_every=5)
    assert type(recipe.steps) is int


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none", None, "there is no file none.py"),
        ("lacks", "def recpie(): pass", "defines no function recipe(); did you mean 'recpie'?"),
        ("returns", "def recipe(): return 3", "recipe() of returns.py returned int; wanted a TrainingJob or a mapping"),
        ("typo", "def recipe(): return {'modle': 1}", "returned an unknown 'modle'; known are model, data"),
        ("part", "def recipe(): return {'data': {}}", "recipe() of part.py returned no 'model'; it returned data"),
        ("kind", "def recipe(): return {'model': 1, 'data': {}}", "TrainingJob: model is int, wanted a Model"),
        ("breaks", "x = 1\nimport nothing_there", "breaks.py, line 2: ModuleNotFoundError: No module named"),
        ("json", "", "json.py: a module cannot be imported under the name 'json', or another has it; rename the file"),
    ],
)
def test_train_refuses_files(refused, monkeypatch, tmp_path, name, text, message) -> None:
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert message in refused("train", f"{name}.py")


def test_a_mapping_is_a_job_too(say, tmp_path) -> None:
    text = RECIPE.replace("return TrainingJob(", "return dict(").replace("mm.Recipe(", "dict(")
    (tmp_path / "as_mapping.py").write_text(text)
    assert say("train", str(tmp_path / "as_mapping.py"), "--set", "steps=1", "--folder", str(tmp_path / "run"))[0] == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_loss_that_is_not_finite_is_one_message(refused, tmp_path) -> None:
    text = RECIPE.replace("    data = [", "    next(model.parameters()).data.fill_(float('inf'))\n    data = [")
    (tmp_path / "diverges.py").write_text(text)
    err = refused("train", str(tmp_path / "diverges.py"), "--folder", str(tmp_path / "run"))
    assert "fit: the loss is nan (gradient norm nan) at step 0; lower lr" in err


def test_predict_shows_classes_as_bars(say, home) -> None:
    code, out, _ = say("predict", "plain", "--image", "light.png")
    answer = mm.Model.load(home / "plain").predict("image -> label", image=str(home / "light.png"))
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == answer.value
    assert len(lines) == 1 + 5 + 1  # the answer, the likeliest five of seven, and what was left out
    assert lines[1].split() == [
        answer.value,
        "█" * round(24 * answer.confidence),
        f"{100 * answer.confidence:.1f}",
        "%",
    ]
    assert lines[-1] == "  and 2 more"


def test_predict_as_json(say, home) -> None:
    code, out, _ = say(*ASK, "--image", "light.png", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["task"] == "image -> label"
    assert facts["answer"] == max(facts["probability"], key=facts["probability"].get)
    assert sum(facts["probability"].values()) == pytest.approx(1)


def test_predict_takes_the_run_or_the_model_folder_and_arrays(say) -> None:
    first = say(*ASK, "--image", "light.npy", "--json")[1]
    assert say("predict", "run/model", *ASK[2:], "--image", "light.npy", "--json")[1] == first
    assert say("predict", "run", *PLUGIN, "--task", "image->label", "--image", "light.npy", "--json")[1] == first


def test_predict_finds_the_task_by_its_fields(say) -> None:
    code, out, _ = say("predict", "run", *PLUGIN, "--sound", "beep.wav", "--my-words", "hello", "--json")
    assert code == 0
    assert json.loads(out)["task"] == "sound my_words:text -> label"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("--imge", "light.png"), ["--imge: task 'image -> label' reads --image; did you mean 'image'?"]),
        ((), ["task 'image -> label' also reads --image; give it too"]),
        (("--image", "dark.png"), ["--image: ", "encode: there is no file 'dark.png'"]),
        (("--image", "drawn.py"), ["--image: ", "cannot read 'drawn.py' as a picture"]),
    ],
)
def test_predict_refuses_fields(refused, arguments, messages) -> None:
    err = refused(*ASK, *arguments)
    assert all(message in err for message in messages), err


def test_predict_refuses_tasks(refused) -> None:
    ask = ("predict", "run", *PLUGIN)
    assert "there is no task 'image -> lable'; there are 'image -> label'" in refused(*ask, "--task", "image -> lable")
    err = refused(*ask, "--image", "light.png")
    assert "several tasks read image; choose one with --task: 'image -> label', 'image -> text'" in err
    err = refused(*ask, "--imag", "light.png")
    assert "no task reads just imag; did you mean 'image'?; there are 'image -> label'" in err


def test_missing_checkpoints(refused) -> None:
    assert "there is no folder runn; did you mean 'run'?" in refused("predict", "runn", "--image", "light.png")
    assert "run/state holds no model: neither config.json nor model/config.json" in refused("verify", "run/state")


def test_a_class_of_ones_own_needs_its_file(refused) -> None:
    err = refused("predict", "run", "--image", "light.png")
    assert "'drawn:Grey' is not installed" in err
    assert "Here: --plugin FILE.py, the file that defines it." in err


def test_a_class_saved_by_a_script_is_found_in_its_file(say, refused, home) -> None:
    script = home / "as_script"
    mm.Model.load(home / "plain").save(script)
    config = json.loads((script / "config.json").read_text())
    config["tokenizers"]["image"]["type"] = "__main__:Grey"
    (script / "config.json").write_text(json.dumps(config))
    assert "a script that was run; it is the file to give" in refused("predict", "as_script", "--image", "light.png")
    assert say("predict", "as_script", *PLUGIN, "--image", "light.png")[0] == 0


def test_generate_writes_the_same_for_the_same_seed(say, home) -> None:
    ask = ("generate", "run", *PLUGIN, "--image", "light.png", "--max-tokens", "6", "--temperature", "0.8", "--json")
    answers = [json.loads(say(*ask, "--seed", seed)[1])["answer"] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]
    model = mm.Model.load(home / "run" / "model")
    sample = {"image": str(home / "light.png")}
    wanted = model.generate("image -> text", [sample], max_tokens=6, temperature=0.8, seed=1)[0]
    assert answers[0] == wanted.value


def test_generate_says_when_it_was_cut(say) -> None:
    _, out, err = say("generate", "run", *PLUGIN, "--image", "light.png", "--max-tokens", "2")
    assert "(stopped at --max-tokens 2, before its end)" in err
    assert out.strip()


def test_generate_needs_a_task_that_writes(refused) -> None:
    err = refused("generate", "plain", "--image", "light.png")
    assert "no task of this model writes token by token; use predict. There are 'image -> label'" in err


def test_verify_passes(say) -> None:
    code, out, _ = say("verify", "run", *PLUGIN, "--image", "light.png")
    assert code == 0
    assert "ok  image -> text" in out
    assert "invented: image (ndarray values, beside what was given), text (str values), sound (tuple values)" in out
    assert out.endswith("passed\n")


def test_verify_fails_on_a_leak(say, monkeypatch) -> None:
    leak = mm.Causal() | mm.Prefix()
    monkeypatch.setattr("multimodal.core.plan_attention", lambda rule, layout, **_: DensePlan(leak, layout))
    code, out, _ = say("verify", "plain", "--json")
    result = json.loads(out)
    assert code == 1
    assert not result["passed"]
    assert "gradient" in {row["check"] for row in result["rows"] if not row["passed"]}
    assert say("verify", "plain")[1].endswith("FAILED\n")


def test_verify_refuses_unknown_fields(refused) -> None:
    err = refused("verify", "run", *PLUGIN, "--lable", "dark")
    assert (
        "--lable: no task has such a field; there are --image --label --my_words --sound --text; did you mean 'label'?"
        in err
    )


@pytest.mark.slow
def test_check_passes_for_ours_and_for_a_file(say) -> None:
    code, out, _ = say("check", "drawn.py:Grey", "--config", '{"patch": 8}')
    assert code == 0, out
    assert "Grey(patch=8" in out
    assert "packed_is_alone" in out


@pytest.mark.slow
def test_check_fails_by_name(say, home) -> None:
    (home / "early.py").write_text(
        "from dataclasses import dataclass\nimport torch\nfrom multimodal import Tokenizer, Tokens, at_times\n\n"
        "@dataclass(frozen=True)\nclass Early(Tokenizer):\n    feature_size = 2\n\n"
        "    def encode(self, value):\n"
        "        count = int(value)\n"
        "        return Tokens(torch.ones(count, 2), at_times(torch.arange(float(count)) - 5))\n"
    )
    code, out, _ = say("check", "early.py:Early", "--value", "3", "--value", "5")
    assert code == 1
    assert "FAILED   time_from_zero" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drawn",), "'drawn' is not module:Class or path/to/file.py:Class"),
        (("no_such_module:Class",), "cannot import 'no_such_module'"),
        (("drawn.py:Gray",), "drawn.py has no tokenizer 'Gray'; it has Grey"),
        (("multimodal_tokenizers:Labels",), "Labels cannot be made from --config {}: "),
        (("multimodal_tokenizers:Labels", "--config", "{"), "--config {: this is no JSON"),
        (("multimodal_tokenizers:Labels", "--config", "[]"), "--config []: wanted a JSON object"),
        (("multimodal_tokenizers:ImagePatches", "--config", '{"pach": 1}'), "did you mean 'patch'?"),
        (("multimodal_tokenizers:ImagePatches", "--value", "no.png"), "--value: ImagePatches.encode: there is no file"),
        (("multimodal_tokenizers:Labels", "--config", '{"names": ["a"]}'), "Labels accepted 1 of the pictures"),
    ],
)
def test_check_refuses(refused, arguments, message) -> None:
    assert message in refused("check", *arguments)


def test_values_are_texts_files_or_json(tmp_path) -> None:
    text = TextBytes()
    assert value_from(text, "[1, 2]", "--text") == "[1, 2]"
    image = ImagePatches(patch=2, channels=1)
    (tmp_path / "x.json").write_text("[[0.5, 0.5], [0.5, 0.5]]")
    for given in (str(tmp_path / "x.json"), "[[0.5, 0.5], [0.5, 0.5]]"):
        assert np.array_equal(value_from(image, given, "--image"), np.full((2, 2), 0.5, np.float32))
    assert value_from(Labels(("a", "b"), several=True), '["a"]', "--tags") == ["a"]


def test_wrong_commands_and_options(refused) -> None:
    assert 'Unknown command "predcit". Did you mean "predict"?' in refused("predcit")
    assert "CHECKPOINT requires an argument" in refused("predict")
    assert "--max-tokens" in refused("generate", "plain", "--max-tokens", "many")


def test_debug_shows_where(say) -> None:
    code, _, err = say("predict", "runn", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "CheckpointError: there is no folder runn" in err


def test_bugs_keep_their_traceback(say, monkeypatch) -> None:
    monkeypatch.setattr(mm.Model, "predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        say("predict", "plain", "--image", "light.png")


def test_ctrl_c_is_no_traceback(say, monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mm.Model, "predict", interrupted)
    code, _, err = say("predict", "plain", "--image", "light.png")
    assert (code, err) == (130, "interrupted\n")
