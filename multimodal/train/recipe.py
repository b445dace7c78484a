"""The settings of a training run besides model and data, and the device and precision for this machine."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from multimodal.declare import Declared
from multimodal.quantization import multiplies_bfloat16
from multimodal.shapes import ConfigError, check_seed, check_whole

WANTED = {float: "a number", int: "a whole number", bool: "True or False", str: "a text", tuple: "a tuple"}
PARALLEL = ("ddp", "fsdp")
PRECISIONS = ("auto", "float32", "bfloat16")
LEAST = {
    **dict.fromkeys(("steps", "batch", "accumulate", "packs", "look_ahead", "keep"), 1),
    **dict.fromkeys(("tensor_parallel", "context_parallel"), 1),
    **dict.fromkeys(("tokens", "max_bad", "workers", "evaluate_every", "checkpoint_every", "patience"), 0),
}
# settings that may differ when a run is resumed: none of them changes the samples or the mathematics
MAY_CHANGE = (
    "epochs",  # the steps that they give may not
    "accumulate",
    "max_bad",
    "activation_checkpointing",
    "compile",
    "parallel",
    "tensor_parallel",
    "context_parallel",
    "device",
    "workers",
    "evaluate_every",
    "checkpoint_every",
    "keep",
    "best",
    "patience",
    "cache",
)
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant", "one-cycle")


@dataclass(frozen=True, kw_only=True)
class Recipe(Declared):
    """How to train.

    steps: number of optimiser steps.
    epochs: how often every sample comes, such as 20 or 0.5, instead of steps, which follow from the lengths of the data.
        Of several tasks the one that takes longest decides, and the others begin again. 0: steps decide.
    batch: samples a step, all tasks together.
    accumulate: micro-batches a step in each process; the gradients are the same up to rounding, but for dropout and pairs.
    tokens: the token budget of a pack, which samples of any length fill; 0: `batch` samples a step.
    packs: packs a step, all processes together, where there is a token budget.
    look_ahead: samples among which each pack is chosen.
    max_bad: broken samples that are left out, counted and listed; one more ends the run.
    lr: the learning rate at its peak.
    warmup: the share of the steps in which the rate rises linearly to lr; the last of them has it.
    schedule: how the rate falls after the warm-up: "cosine" (half of one), "linear", "wsd" (stays, and falls linearly in the
        last steps), "constant" (stays at lr), or "one-cycle", whose warm-up is half a cosine that rises from lr / 25.
    final_lr: the share of lr in the last step.
    cooldown: the share of the steps in which the rate of "wsd" falls.
    layer_decay: a block's learning rate is this times that of the block above it; heads have lr, embeddings and what the core adds
        to them the lowest rate; 1: all have lr. About 0.75 suits a model that is already trained.
    freeze: parts that do not learn, such as ("image", "core[:6]", "head:image -> label"); they run as in evaluation. Gradients do
        not pass the first blocks if these, all kinds and "queries" (the learned tokens of heads) are frozen.
    cache: a folder for the vectors of frozen towers, which later epochs and runs read instead of computing them; "": none.
    optimizer: "adamw", or "muon": orthogonalised momentum for the core's matrices and AdamW for the rest.
    weight_decay: each step subtracts lr times weight_decay times the weight; only from matrices, not from embeddings, class
        tokens, grids and other vectors.
    betas: the decays of the means of the gradient and of its square.
    clip: a gradient with a larger norm is scaled down to this norm; 0: none is.
    spike: a step whose gradient norm is above this many times the mean is skipped, and its batch is saved; 0: none is.
    ema: the decay of averaged weights, which then become the model; 0: no average.
    precision: float32, bfloat16 (autocast), or auto: bfloat16 on a GPU that multiplies it; on a CPU that does, the one that is
        faster for the first batch, which is remembered for later runs of the same shapes on this machine.
    device: cpu, cuda, cuda:1, mps, or auto: the GPU if there is one.
    activation_checkpointing: whether blocks are recomputed in the backward pass, which saves memory.
    compile: whether torch.compile is used; it needs a C++ compiler on CPUs.
    parallel: "ddp", or "fsdp": weights, gradients and optimiser states are sharded over the processes.
    tensor_parallel: number of processes that compute each layer of the core together, some heads and some hidden units each; with
        parallel="fsdp". They hold the same samples.
    context_parallel: number of processes that compute each stream together, some rows each, and in attention some heads; with
        parallel="fsdp". They hold the same samples.
    workers: processes that read and encode data; 0: the main one does.
    evaluate_every: steps between evaluations; 0: at the end only, or with `patience` after each epoch.
    checkpoint_every: steps between checkpoints; 0: at the end only.
    keep: number of checkpoints that stay, the newest ones.
    best: a measure, such as "image -> label exact", whose best model is saved as well; "": none, or with `patience` the
        held-out loss (of several tasks their mean).
    patience: the run ends early after so many evaluations without a better value of `best`, and the given model becomes the best
        one, also if the run reaches its last step; 0: all steps are done, and the model is the last one.
    seed: decides the order of data, augmentation and dropout.

    Examples:
        >>> recipe = mm.Recipe(steps=5, batch=4, lr=1e-3)
        >>> run = mm.fit(model, {"image -> label": samples}, recipe, quiet=True)
        >>> again = mm.fit(model, {"image -> label": samples}, recipe, seed=1, quiet=True)
    """

    steps: int = 1000
    epochs: float = 0.0
    batch: int = 64
    accumulate: int = 1
    tokens: int = 0
    packs: int = 1
    look_ahead: int = 256
    max_bad: int = 0
    lr: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    final_lr: float = 0.01
    cooldown: float = 0.2
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    cache: str = ""
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    spike: float = 0.0
    ema: float = 0.0
    precision: str = "auto"
    device: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: str = "ddp"
    tensor_parallel: int = 1
    context_parallel: int = 1
    workers: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    best: str = ""
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            check_whole("Recipe", least=least, **{name: getattr(self, name)})
        # the type of the default is that of the setting; an int is a valid float, but True is no valid int
        for setting in dataclasses.fields(self):
            value, kind = getattr(self, setting.name), type(setting.default)
            if not isinstance(value, (int, float) if kind is float else kind) or (
                isinstance(value, bool) and kind is not bool
            ):
                raise ConfigError(f"Recipe: {setting.name}={value!r} is {type(value).__name__}, wanted {WANTED[kind]}")
        check_seed("Recipe", self.seed)
        if len(self.betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in self.betas):
            raise ConfigError(f"Recipe: betas={self.betas} must be two numbers from 0 to 1, such as (0.9, 0.99)")
        for name in ("epochs", "weight_decay", "clip", "final_lr", "spike"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"Recipe: {name}={getattr(self, name)} must be 0 or more")
        if 0 < self.spike <= 1:
            raise ConfigError(
                f"Recipe: spike={self.spike} must be above 1 (times the mean gradient norm), or 0 for none"
            )
        if self.batch % self.accumulate:
            raise ConfigError(f"Recipe: batch={self.batch} is not a multiple of accumulate={self.accumulate}")
        if not 0 < self.lr < math.inf or not 0 <= self.ema < 1 or not 0 <= self.warmup <= 1:
            raise ConfigError(
                f"Recipe: lr={self.lr} must be positive, ema={self.ema} and warmup={self.warmup} from 0 to 1"
            )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"Recipe: schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}")
        if not 0 <= self.cooldown <= 1:
            raise ConfigError(f"Recipe: cooldown={self.cooldown} must be from 0 to 1, a share of the steps")
        if self.schedule == "constant":
            self._refuse(("final_lr",), "schedule='constant'", "'wsd' falls at its end")
        if self.schedule != "wsd":
            self._refuse(("cooldown",), f"schedule={self.schedule!r}", "it is of 'wsd'")
        elif self.warmup + self.cooldown > 1:
            raise ConfigError(
                f"Recipe: warmup={self.warmup} and cooldown={self.cooldown} are shares of the steps, and more than 1 together"
            )
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"Recipe: layer_decay={self.layer_decay} must be above 0, and 1 at most, such as 0.75")
        if not all(isinstance(part, str) for part in self.freeze):
            raise ConfigError(f"Recipe: freeze={self.freeze} must be names of parts, such as ('image', 'core[:6]')")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"Recipe: precision={self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.parallel not in PARALLEL:
            raise ConfigError(f"Recipe: parallel={self.parallel!r} is none of {', '.join(PARALLEL)}")
        for name in ("tensor_parallel", "context_parallel"):
            if getattr(self, name) > 1 and self.parallel != "fsdp":
                raise ConfigError(
                    f"Recipe: {name}={getattr(self, name)} goes with parallel='fsdp', not {self.parallel!r}"
                )
            if getattr(self, name) > 1 and self.compile:
                raise ConfigError(f"Recipe: {name}={getattr(self, name)} is not tried with compile; use one of them")
        if self.cache and self.parallel == "fsdp":
            raise ConfigError(
                "Recipe: cache needs a whole tower in every process; use parallel='ddp', or leave cache out"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"Recipe: optimizer={self.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
        if self.tokens:
            self._refuse(
                ("batch", "accumulate"), f"tokens={self.tokens}", "packs are filled by tokens; packs=2 makes two a step"
            )
        else:
            self._refuse(("packs", "look_ahead"), "tokens=0", "give a token budget, such as tokens=4096")

    def in_steps(self, epoch: float | None) -> "Recipe":
        """This recipe with the steps that its epochs are. epoch: the number of steps of one; None: not known.

        Raises:
            ConfigError: they are not known, or steps says something else.
        """
        if not self.epochs:
            return self
        if epoch is None:
            raise ConfigError(
                f"Recipe: epochs={self.epochs:g} cannot be worked out beside tokens={self.tokens}: how many samples a pack "
                "holds depends on their lengths; give steps (`multimodal plan` says how many tokens a sample has), or batch "
                "instead of tokens"
            )
        # 0.1 * 30 is a little above 3
        steps = max(1, math.ceil(round(self.epochs * epoch, 6)))
        default = next(f.default for f in dataclasses.fields(self) if f.name == "steps")
        if self.steps not in (default, steps):
            raise ConfigError(
                f"Recipe: steps={self.steps} contradicts epochs={self.epochs:g}, which are {steps} steps of these data; give one "
                f"of them, and leave the other at its default (epochs=0, steps={default})"
            )
        return dataclasses.replace(self, steps=steps)

    def evaluated_each(self, epoch: float | None) -> "Recipe":
        """This recipe with an evaluation after each epoch, if it has `patience` and does not say when to evaluate.

        Raises:
            ConfigError: it is not known how many steps an epoch has.
        """
        if not self.patience or self.evaluate_every:
            return self
        if epoch is None:
            raise ConfigError(
                f"Recipe: patience={self.patience} counts evaluations, and beside tokens={self.tokens} it is not known when an "
                "epoch ends; give evaluate_every"
            )
        return dataclasses.replace(self, evaluate_every=max(1, math.ceil(epoch)))

    def _refuse(self, names: tuple[str, ...], beside: str, instead: str) -> None:
        """Raise a ConfigError for the first of these settings that is not at its default: beside the other one it has no effect."""
        for setting in dataclasses.fields(self):
            if setting.name in names and getattr(self, setting.name) != setting.default:
                raise ConfigError(
                    f"Recipe: {setting.name}={getattr(self, setting.name)!r} would do nothing beside {beside}: {instead}; or leave "
                    f"it at {setting.default!r}"
                )

    def check_use(self, *, folder: bool, evaluation: bool) -> None:
        """Refuse settings that would do nothing in a run without a folder or without held-out data.

        Raises:
            ConfigError: names the setting and what it needs.
        """
        if not folder:
            without = ("keep", "checkpoint_every") if self.patience else ("keep", "checkpoint_every", "best")
            self._refuse(without, "no run folder", "give folder=")
        if not evaluation:
            self._refuse(("evaluate_every", "patience"), "no held-out data", "give evaluation=")


def choose_device(wanted: str) -> torch.device:
    """The device to train on: CUDA, then Apple's, then the CPU.

    Raises:
        ConfigError: a device that is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ConfigError(
            f"device {wanted!r} is not there; use auto, cpu, or what torch calls yours (cuda, cuda:1, mps)"
        ) from error
    if found.type == "meta":
        raise ConfigError(
            "device 'meta' holds shapes without numbers, so nothing can be computed on it; use auto or cpu"
        )
    return torch.device("cpu") if found.type == "cpu" else found  # torch also takes cpu:3, which is the same device


def choose_precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type to compute in, and why in a few words."""
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    native = multiplies_bfloat16(device)
    if device.type == "cuda":
        return (torch.bfloat16, "native") if native else (torch.float32, "no native bfloat16")
    if device.type != "cpu":
        return torch.float32, "the safe choice here"
    if native:
        return torch.bfloat16, "this CPU has bfloat16 tiles (AMX)"
    return torch.float32, "no bfloat16 tiles (AMX) on this CPU"
