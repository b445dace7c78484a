"""What `--set` does to a recipe's job: every part is reached, values have the types of their fields, mistakes are explained."""

from typing import Literal

import pytest
import torch

import multimodal as mm
from multimodal.shapes import ConfigError
from multimodal.train.job import TrainingJob
from multimodal.train.settings import _converted, make_job
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

LABEL, TEXT = "image -> label", "image -> text"
DATA = {LABEL: [{"image": torch.zeros(1, 8, 8), "label": "a"}], TEXT: [{"image": torch.zeros(1, 8, 8), "text": "a"}]}


def recipe(patch: int = 4, rate: float = 1e-3, name: str = "a", deep: bool = False, words=None) -> TrainingJob:
    model = mm.Model(
        {"image": ImagePatches(patch=patch, channels=1), "label": Labels((name, "b")), "text": TextBytes()},
        mm.Core(width=32, depth=2 if deep else 1, heads=2, score=mm.attention.Cosine()),
        [mm.Task(LABEL, mm.Classify(label_smoothing=0.1)), TEXT],
        seed=3,
    )
    return TrainingJob(model=model, data=DATA, recipe=mm.Recipe(steps=5, lr=rate))


def job(*settings: str, make=recipe) -> TrainingJob:
    return make_job(make, settings, "recipe() of mine.py")


def tokenizer(made: TrainingJob, name: str) -> mm.Tokenizer:
    return made.model.packer.tokenizers[name]


def same_weights(a: mm.Model, b: mm.Model) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_settings_of_the_recipe_with_and_without_its_name():
    plain = job("steps=1e4", "lr=1e-4", "betas=(0.8, 0.9)", "device=cpu", "evaluate-every=5", "compile=yes")
    named = job(*(f"recipe.{s}" for s in ("steps=10000", "lr=0.0001", "betas=0.8,0.9", "device=cpu", "compile=true")))
    assert plain.recipe == mm.Recipe(
        steps=10000, lr=1e-4, betas=(0.8, 0.9), device="cpu", evaluate_every=5, compile=True
    )
    assert named.recipe == mm.override(plain.recipe, evaluate_every=0)
    assert type(plain.recipe.steps) is int


def test_a_changed_core_has_the_initial_weights_of_its_declaration():
    made = job("core.depth=3", "core.width=48", "core.heads=4", "core.kv_heads=2", "core.rotary_split=1,1,1")
    core = mm.Core(width=48, depth=3, heads=4, kv_heads=2, rotary_split=(1, 1, 1), score=mm.attention.Cosine())
    assert made.model.core.core == core
    before = recipe().model
    tasks = [mm.Task(LABEL, mm.Classify(label_smoothing=0.1)), TEXT]
    assert same_weights(made.model, mm.Model(before.packer.tokenizers, core, tasks, seed=3))
    assert job("core.kv_heads=none").model.core.core.kv_heads is None
    assert same_weights(job("core.depth=1").model, before)


def test_settings_that_fit_only_together_are_put_in_together():
    assert job("core.heads=6", "core.width=96").model.core.core.heads == 6
    assert job("batch=30", "accumulate=3").recipe.accumulate == 3


def test_tokenizers_tasks_shares_and_seed():
    made = job(
        "tokenizers.image.patch=8",
        "tokenizers.label.names=a,b,c",
        'tasks."image->label".weight=2',
        "tasks.image  ->  label.head.label_smoothing=0.2",
        "mix.image->text=3",
        "model.seed=4",
    )
    assert tokenizer(made, "image") == ImagePatches(patch=8, channels=1)
    assert tokenizer(made, "label") == Labels(("a", "b", "c"))
    assert made.model.tasks[LABEL] == mm.Task(LABEL, mm.Classify(label_smoothing=0.2), 2.0)
    assert made.model.seed == 4
    assert made.mix == {LABEL: 1.0, TEXT: 3.0}
    assert job("mix=2").mix == 2.0
    assert job("steps=3").mix is None


def test_inside_of_a_part_of_the_core():
    core = job("core.block.1.hidden=64", "core.score.sharpness=4", "core.score.learned=true").model.core.core
    assert core.block == (mm.layers.SelfAttention(), mm.layers.MLP(hidden=64))
    assert core.score == mm.attention.Cosine(sharpness=4.0, learned=True)


def test_parameters_of_the_function_come_first():
    made = job("patch=8", "rate=1e-2", "name=hello", "deep=on")
    assert tokenizer(made, "image") == ImagePatches(patch=8, channels=1)
    assert (made.recipe.lr, made.model.core.core.depth) == (1e-2, 2)
    assert tokenizer(made, "label") == Labels(("hello", "b"))

    def named_like_a_setting(steps: int = 7):
        made = recipe()
        return TrainingJob(model=made.model, data=made.data, recipe=mm.Recipe(steps=10 * steps))

    assert job("steps=3", make=named_like_a_setting).recipe.steps == 30
    assert job("recipe.steps=3", make=named_like_a_setting).recipe.steps == 3


def test_nothing_set_changes_nothing():
    given = recipe()
    made = job(make=lambda: given)
    assert made.model is given.model
    assert made == given


def loaded() -> TrainingJob:
    made = recipe()
    next(made.model.parameters()).data.add_(1)
    return made


def frozen() -> TrainingJob:
    made = recipe()
    made.model.core.requires_grad_(False)
    return made


@pytest.mark.parametrize("make", [loaded, frozen])
@pytest.mark.parametrize("setting", ["core.depth=2", "tokenizers.image.patch=8", "model.seed=1"])
def test_loaded_weights_are_not_lost(make, setting):
    with pytest.raises(ConfigError, match=r"not initial ones \(loaded, trained or frozen\), such as "):
        job(setting, make=make)
    assert job("lr=1", make=make).recipe.lr == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stpes=3", "Recipe has no setting 'stpes'; it has steps, epochs, batch"),
        ("stpes=3", "recipe() takes patch, rate, name, deep; did you mean 'steps'?"),
        ("patsh=3", "did you mean 'patch'?"),
        ("depth=8", "did you mean 'core.depth'?"),
        ("causal=yes", "did you mean 'tokenizers.text.causal'?"),
        ("weight=8", "did you mean 'tasks.image -> label.weight'?"),
        (
            "cor.depth=8",
            "there is no 'cor'; there are recipe, core, tokenizers, tasks, mix, model; did you mean 'core'?",
        ),
        ("core.dept=8", "Core has no setting 'dept'; it has width, depth"),
        ("core.dept=8", "did you mean 'depth'?"),
        ("core.depth.x=8", "no setting 'x'; it has nothing to set: it is 1"),
        ("core.score.scale.x.y=8", "--set core.score.scale.x.y=8: "),
        ("core.score=Cosine", "core.score is Cosine, which is chosen in the file; here is set what is inside of it"),
        ("core.block=MLP", "cannot be set here; it is chosen in the file"),
        ("core.block.7.x=1", "core.block has no setting '7'; it has 0, 1"),
        ("core.mask=Causal", "--set core.mask=Causal: "),
        (
            "tokenizers.imag.patch=8",
            "tokenizers has no setting 'imag'; it has image, label, text; did you mean 'image'?",
        ),
        ("tasks.image -> lable.weight=8", "did you mean 'image -> label'?"),
        ("model.sed=1", "model has no setting 'sed'; it has seed; did you mean 'seed'?"),
        ("mix.image -> label=much", "'much' is no float"),
        ("steps=few", "--set steps=few: 'few' is no int"),
        ("steps=2.5", "--set steps=2.5: '2.5' is no int"),
        ("steps=inf", "--set steps=inf: 'inf' is no int"),
        ("lr=fast", "--set lr=fast: 'fast' is no float"),
        ("betas=0.9", "--set betas=0.9: '0.9' is no tuple[float, float]"),
        ("compile=maybe", "--set compile=maybe: 'maybe' is no bool"),
        ("core.kv_heads=some", "'some' is no int or none"),
        ("deep=perhaps", "'perhaps' is no bool"),
        ("words=3", "has a parameter 'words' whose default is no number, text or yes and no"),
        ("steps", "--set steps: wanted name=value, such as --set steps=200"),
        ("core..depth=1", "wanted name=value"),
        ("=1", "wanted name=value"),
        ("batch=0", "Recipe: batch=0 must be a whole number, 1 or more"),
        ("core.heads=5", "Core: width=32 does not give heads=5 an even width each"),
    ],
)
def test_mistakes_are_explained(setting, message):
    with pytest.raises(ConfigError) as caught:
        job(setting)
    assert message in str(caught.value)


@pytest.mark.parametrize("settings", [("core=1", "core.depth=2"), ("core.depth=2", "core=1")])
def test_a_part_and_what_is_inside_of_it(settings):
    with pytest.raises(ConfigError, match="--set core=1"):
        job(*settings)


def test_a_function_without_defaults_is_an_error():
    with pytest.raises(ConfigError, match=r"recipe\(\) of mine.py needs 'size'; give that parameter a default"):
        job(make=lambda size: recipe())


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int | None, 3),
        ("None", int | None, None),
        ("3", str | int, 3),
        ("x", str | int, "x"),
        ("3", Literal["a", "b", 3], 3),
        ("a, b,", tuple[str, ...], ("a", "b")),
        ("()", tuple[int, ...], ()),
        ("[1, 2.5]", tuple[int, float], (1, 2.5)),
        ("None", str, "None"),
        ("0", bool, False),
    ],
)
def test_values_are_read_by_their_type(text, kind, value):
    found = _converted(text, kind)
    assert found == value
    assert type(found) is type(value)
