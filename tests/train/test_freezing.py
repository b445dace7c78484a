"""Frozen parts of a model: what their names mean, that they cost nothing, and that everything learns again afterwards."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.core import recompute
from multimodal.model_parts import weights_of
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.train.freezing import frozen, set_modes
from multimodal.train.settings import make_job
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

TASK = "text -> label"
PLAIN = {"steps": 6, "batch": 6, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True}
CORE = mm.Core(width=16, depth=3, heads=2)
DROPPING = CORE.replace(dropout=0.3, drop_path=0.3)
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in WORDS]


def make(core: Any = CORE, tasks=(TASK, "image -> label", "image -> text")) -> mm.Model:
    tokenizers = {
        "text": TextBytes(),
        "label": Labels(("with a", "without")),
        "image": ImagePatches(patch=4, channels=1),
    }
    return mm.Model(tokenizers, core, tasks)


def two_cores() -> mm.Model:
    return make(mm.EncoderDecoder(reader=CORE, writer=CORE.replace(depth=2)))


def names_in(module: torch.nn.Module, model: mm.Model) -> set[str]:
    own = {id(p) for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ONE_CORE: dict[str, Callable[[mm.Model], list[torch.nn.Module]]] = {
    "image": lambda m: [m.embeds["image"]],
    "core": lambda m: [m.core],
    "core[:2]": lambda m: [*m.core.blocks[:2]],
    "core[-1]": lambda m: [m.core.blocks[2]],
    "core[0]": lambda m: [m.core.blocks[0]],
    "core[::2]": lambda m: [m.core.blocks[0], m.core.blocks[2]],
    "core.norm": lambda m: [m.core.norm],
    "core.blocks.1": lambda m: [m.core.blocks[1]],
    "embeds": lambda m: [m.embeds],
    "head:image -> label": lambda m: [m.readout("image -> label")],
    "head:image->text": lambda m: [m.readout("image -> text")],
    "queries": lambda m: [torch.nn.ParameterList([m.readout(task).query for task in m.tasks])],
    "head:label_Classify": lambda m: [m.readout(TASK)],
}
TWO_CORES: dict[str, Callable[[mm.Model], list[torch.nn.Module]]] = {
    "core": lambda m: [m.core],
    "reader": lambda m: [m.core.reader],
    "writer": lambda m: [m.core.writer],
    "reader[1:]": lambda m: [*m.core.reader.blocks[1:]],
    "writer[-2:]": lambda m: [*m.core.writer.blocks],
}


@pytest.mark.parametrize(
    ("build", "part", "modules"),
    [(make, *pair) for pair in ONE_CORE.items()] + [(two_cores, *pair) for pair in TWO_CORES.items()],
)
def test_a_name_means_the_weights_of_its_modules(build, part, modules):
    model = build()
    wanted = set().union(*(names_in(module, model) for module in modules(model)))
    assert wanted
    assert weights_of("freeze", model, [part]) == wanted


def test_a_block_is_not_another_whose_number_begins_alike():
    model = make(CORE.replace(depth=11))
    assert weights_of("freeze", model, ["core.blocks.1"]) == names_in(model.core.blocks[1], model)
    assert weights_of("freeze", model, ["core[1]"]) == names_in(model.core.blocks[1], model)


@pytest.mark.parametrize(
    ("build", "part", "wanted"),
    [
        (
            make,
            "imaeg",
            r"'imaeg' is no part .* there are 'text', 'label', 'image', 'core', 'core\[:3\]', 'head:text -> ",
        ),
        (make, "imaeg", r"did you mean 'image'\?"),
        (make, "head:text -> labels", r"did you mean 'head:text -> label'\?"),
        (make, "core[3:]", r"'core\[3:\]' names no block; there are 3, counted from 0"),
        (make, "core[7]", r"names no block"),
        (make, "core[:4]", r"'core\[:4\]': 4 is beyond the 3 blocks of 'core'; all of them are 'core\[:\]'"),
        (make, "core[-4:]", r"-4 is beyond the 3 blocks"),
        (two_cores, "writer[:3]", r"3 is beyond the 2 blocks of 'core.writer'; all of them are 'writer\[:\]'"),
        (make, "core[a]", r"names no block"),
        (make, "reader[0]", r"names blocks of 'reader', and this model has blocks in core"),
        (two_cores, "core[0]", r"names blocks of 'core', and this model has blocks in reader, writer"),
        (make, "label", r"'label' is no part of this model with weights; it has no weights"),
        (make, "", r"'' is no part"),
    ],
)
def test_what_names_nothing_is_refused(build, part, wanted):
    model = build()
    if part == "label":
        model.embeds["label"] = torch.nn.Identity()
    with pytest.raises(ConfigError, match=wanted):
        mm.fit(model, {TASK: DATA}, **PLAIN, freeze=(part,))
    assert all(p.requires_grad for p in model.parameters())


def test_a_kind_called_core_is_told_from_the_core():
    model = mm.Model({"core": TextBytes(), "label": Labels(("a", "b"))}, CORE, ["core -> label"])
    with pytest.raises(
        ConfigError, match=r"'core' is a kind of this model and also the name of core; write 'embeds\.core'"
    ):
        weights_of("freeze", model, ["core"])
    assert weights_of("freeze", model, ["embeds.core"]) == names_in(model.embeds["core"], model)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_stay_and_the_others_learn_as_if_a_user_had_frozen_them(optimizer):
    """`requires_grad_(False)` by hand is the oracle: the same bits, as there is no dropout."""
    model, by_hand = make(), make()
    parts = ("text", "core[:2]")
    settings = {**PLAIN, "optimizer": optimizer, "weight_decay": 0.1}
    still = weights_of("freeze", model, parts)
    before = copy.deepcopy(model.state_dict())
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(name not in still)
    mm.fit(model, {TASK: DATA}, **settings, freeze=parts)
    mm.fit(by_hand, {TASK: DATA}, **settings)
    assert same(model.state_dict(), by_hand.state_dict())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # the kinds and heads that no sample used stay too
    assert moved
    assert moved == {
        n for n, _ in model.named_parameters() if n not in still and n.startswith(("core", "readouts.label"))
    }
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if name in still)


def test_gradients_of_earlier_training_do_not_count_in_the_norm():
    model = make()
    mm.fit(model, {TASK: DATA}, **PLAIN)
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.core.parameters())
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    assert mm.fit(model, {TASK: DATA}, **PLAIN, freeze=("core",)).history[0]["grad_norm"] == pytest.approx(
        mm.fit(fresh, {TASK: DATA}, **PLAIN, freeze=("core",)).history[0]["grad_norm"], rel=1e-6
    )


def test_what_was_frozen_by_hand_stays_frozen_and_all_is_as_before_after_an_error():
    model = make().train()
    model.embeds["text"].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def fails(row: Any) -> None:
        assert not model.core.blocks[0].layers[0].training
        assert model.core.blocks[2].layers[0].training
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == weights_of(
            "freeze", model, ("text", "core[:1]")
        )
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        mm.fit(model, {TASK: DATA}, **PLAIN, freeze=("text", "core[:1]"), trackers=[fails])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())


def test_the_first_line_says_how_many_learn(capsys):
    model = make()
    learning = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("core."))
    for freeze, said in ((("core",), f", of which {learning:,} learn, 6 steps"), ((), "parameters, 6 steps")):
        mm.fit(model, {TASK: DATA}, **{**PLAIN, "quiet": False}, freeze=freeze)
        assert said in capsys.readouterr().out.splitlines()[0]


def test_freezing_everything_is_refused():
    model = make()
    with pytest.raises(ConfigError, match=r"freeze=\('embeds', 'core', 'readouts'\) leaves nothing to learn"):
        mm.fit(model, {TASK: DATA}, **PLAIN, freeze=("embeds", "core", "readouts"))
    model.readouts.requires_grad_(False)
    with pytest.raises(ConfigError, match="leaves nothing to learn"):
        mm.fit(model, {TASK: DATA}, **PLAIN, freeze=("embeds", "core"))


def saved_by(model: mm.Model, module: torch.nn.Module, parts: tuple[str, ...]) -> int:
    """The number of tensors that a forward pass of a module saves for the backward pass, while parts are frozen."""
    counts = [0]

    def count(tensor: Tensor) -> Tensor:
        counts[0] += 1
        return tensor

    hooks: list[Any] = []

    def enter(*_: Any) -> None:
        hooks.append(torch.autograd.graph.saved_tensors_hooks(count, lambda t: t))
        hooks[-1].__enter__()

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(lambda *_: hooks[-1].__exit__()),
    ]
    with frozen(model, parts):
        set_modes(model, parts)
        model.loss(model.pack(TASK, DATA)).backward()
    for handle in handles:
        handle.remove()
    assert len(hooks) == 1
    return counts[0]


def test_blocks_above_which_alone_is_learned_save_nothing():
    model = make(DROPPING)
    first, second, last = model.core.blocks
    parts = ("text", "queries", "core[:2]")
    assert saved_by(model, first, ()) > 5
    assert saved_by(model, first, parts) == 0
    assert saved_by(model, second, parts) == 0
    assert saved_by(model, last, parts) > 5
    # where something below learns, the gradient has to pass
    assert saved_by(model, second, ("text", "core[:2]")) > 5  # the head's learned token lies below
    assert saved_by(model, second, ("queries", "core[:2]")) > 5


def test_a_frozen_block_is_still_recomputed_where_the_gradient_passes_it():
    model = make(DROPPING)
    whole = saved_by(model, model.core.blocks[1], ("core",))
    recompute(model)
    assert 0 < saved_by(model, model.core.blocks[1], ("core",)) < whole / 2


def test_frozen_parts_have_no_dropout():
    """With all of the core frozen, the loss of a step is that of evaluation."""
    model = make(DROPPING)
    samples = DATA[:6]
    with model.inference_mode():
        wanted = float(model.loss(model.pack(TASK, samples)))
    settings = {**PLAIN, "steps": 1}
    assert mm.fit(copy.deepcopy(model), {TASK: samples}, **settings).history[0]["loss"] != pytest.approx(
        wanted, abs=1e-4
    )
    found = mm.fit(model, {TASK: samples}, **settings, freeze=("core",)).history[0]["loss"]
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"optimizer": "muon", "layer_decay": 0.7}], ids=["ema", "muon"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, settings):
    settings = {**PLAIN, **settings, "freeze": ("text", "core[0]")}
    straight, cut = make(DROPPING), make(DROPPING)
    mm.fit(straight, {TASK: DATA}, **settings, folder=tmp_path / "straight")
    stop = [lambda row: row["step"] == 3 and signal.raise_signal(signal.SIGINT)]
    run = mm.fit(cut, {TASK: DATA}, **settings, folder=tmp_path / "cut", trackers=stop)
    assert (run.finished, run.last("step")) == (False, 3)
    state = json.loads((tmp_path / "cut/checkpoints/step-00000003/state.json").read_text())
    assert state["recipe"]["freeze"] == ["text", "core[0]"]
    moments = {name.split("/", 2)[2] for name in state["tensors"] if name.startswith("optimizer/")}
    assert moments
    assert not moments & weights_of("freeze", cut, settings["freeze"])

    with pytest.raises(CheckpointError, match=r"recipe\.freeze was \['text', 'core\[0\]'\] and is \['text'\]"):
        mm.fit(make(DROPPING), {TASK: DATA}, **{**settings, "freeze": ("text",)}, folder=tmp_path / "cut", resume=True)
    resumed = make(DROPPING)
    assert mm.fit(resumed, {TASK: DATA}, **settings, folder=tmp_path / "cut", resume=True).finished
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(mm.Model.load(tmp_path / "cut").state_dict(), straight.state_dict())


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("freeze=core[:6]", ("core[:6]",)),
        ("freeze=image, core[:6]", ("image", "core[:6]")),
        ("freeze=(core[:6], head:text -> label)", ("core[:6]", "head:text -> label")),
        ("freeze=[image,core[0]]", ("image", "core[0]")),
    ],
)
def test_parts_are_frozen_on_the_command_line(typed, wanted):
    def recipe() -> mm.TrainingJob:
        return mm.TrainingJob(model=make(), data={TASK: DATA})

    assert make_job(recipe, [typed], "recipe()").recipe.freeze == wanted


def test_settings_of_the_wrong_kind_are_refused():
    with pytest.raises(ConfigError, match="freeze='core' is str, wanted a tuple"):
        mm.Recipe(freeze="core")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"freeze=\(1,\) must be names of parts"):
        mm.Recipe(freeze=(1,))  # type: ignore[arg-type]
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"layer_decay=.* must be above 0, and 1 at most"):
            mm.Recipe(layer_decay=value)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_freeze_as_one_does(tmp_path: Path, program, parallel):
    settings = {"steps": 4, "batch": 4, "accumulate": 4, "freeze": ["text", "core[:1]"], "layer_decay": 0.8}
    program("tests/programs/ranks.py", tmp_path / "one", json.dumps(settings), ranks=1)
    program(
        "tests/programs/ranks.py",
        tmp_path / "two",
        json.dumps({**settings, "parallel": parallel, "accumulate": 2}),
        ranks=2,
    )
    one, two = (mm.Model.load(tmp_path / name) for name in ("one", "two"))
    still = weights_of("freeze", one, ("text", "core[:1]"))
    untouched = one.state_dict().keys() & still
    moved = 0
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, atol=1e-4, rtol=0)
        if name in untouched:
            assert torch.equal(two.state_dict()[name], weight)
        moved += name not in still
    assert moved
