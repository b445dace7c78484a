"""LoRA adapters (low-rank, made by the package peft): attach them to linear layers, train, save them alone, merge.

mm.lora.LoRA(rank=8, alpha=16).attach(model)     each linear layer of the core gets an adapter; only adapters are trained
mm.fit(model, data, steps=500)
mm.lora.save(model, "adapters")                  only the adapters; mm.lora.load(model, "adapters") attaches them again
mm.lora.merge(model)                             adds them to the weights; the outputs stay the same
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multimodal.checkpoint import (
    FORMAT,
    check_tensors,
    put_weights,
    read_header,
    read_tensors,
    weights_hash,
    write_tensors,
)
from multimodal.declare import Declared, declaration, rebuild
from multimodal.files import check_fields, file_hash, read_json
from multimodal.model_parts import topmost, weights_of
from multimodal.network import Network, _seeded
from multimodal.saving import SHA256, Saving, check_names, stored
from multimodal.shapes import CheckpointError, ConfigError, check_whole
from multimodal.texts import short_repr
from multimodal.versions import package_version

CONFIG, WEIGHTS = "adapters.json", "adapters.safetensors"
BASE = "base_layer"  # peft's name of the layer that an adapter is added to


@dataclass(frozen=True, kw_only=True)
class LoRA(Declared):
    """Replaces a linear layer x W by x W + alpha / rank * x A B (Hu et al. 2021, equation 3). B is 0 at first.

    rank: the number of columns of A and of rows of B.
    alpha: the scale of the adapters is alpha / rank.
    parts: the parts of the model whose linear layers get adapters: "core", "core[-4:]" (its last four blocks), "image".
    learn: parts that are trained in full, such as a new head: ("head:image -> label",).
    dropout: the probability of dropout on the inputs of adapters.
    """

    rank: int = 8
    alpha: float = 16.0
    parts: tuple[str, ...] = ("core",)
    learn: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_whole("LoRA", least=1, rank=self.rank)
        if not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA: alpha={self.alpha} must be above 0, and dropout={self.dropout} from 0 to below 1")
        for name in ("parts", "learn"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not all(isinstance(part, str) for part in given):
                raise ConfigError(f"LoRA: {name}={given!r} must be a tuple of names of parts, such as ('core',)")

    def attach(self, model: Network) -> None:
        """Add adapters to the linear layers in `parts`, in place. All other weights are frozen, except the parts in `learn`.

        Raises:
            ConfigError: peft is not installed, the model has adapters or is quantized, or no such part or layer.
        """
        if model.adapters is not None:
            raise ConfigError("LoRA: the model has adapters already; call lora.merge or lora.remove first")
        if model.quantization is not None:
            raise ConfigError(
                "LoRA: the model is quantized; attach adapters to the original, and merge them before quantize"
            )
        peft = _peft()
        inside, learned = weights_of("LoRA", model, self.parts), weights_of("LoRA", model, self.learn)
        # not subclasses of nn.Linear: their parent may use the weight without a call, which would skip the adapter
        names = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and f"{name}.weight" in inside - learned
        ]
        if not names:
            raise ConfigError(f"LoRA: parts={self.parts} have no linear layer that could get an adapter; name others")
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, names)),
        )
        with _seeded(model.seed, "lora"):
            peft.inject_adapter_in_model(config, model)
        vars(model).pop("peft_config", None)  # a copy of our declaration
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
        for layer in _adapted(model).values():
            layer.train(model.training)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(not name.startswith(f"{BASE}."))
        model.adapters = self


def merge(model: Network) -> None:
    """Add the adapters to the weights of their layers and remove them; all weights have their former names and are trainable again.

    Raises:
        ConfigError: the model has no adapters.
    """
    _detach(model, lambda layer: layer.merge())


def remove(model: Network) -> None:
    """Remove the adapters without merging: the outputs are as before `attach`, and all weights are trainable again.

    The parts in `LoRA.learn` keep their trained weights.

    Raises:
        ConfigError: the model has no adapters.
    """
    _detach(model, lambda layer: None)


def save(model: Network, folder: str | Path) -> Path:
    """Write only the adapters and the parts in `LoRA.learn`, and return the folder. Adapters saved there before are replaced.

    Raises:
        ConfigError: the model has no adapters.
        CheckpointError: the folder has a file of the same name that `save` did not write.
    """
    folder = Path(folder).resolve()
    _check_attached(model, "lora.save")
    own, base = _split_tensors(model)
    before: dict[str, str | None] = {}
    if (folder / CONFIG).is_file():
        before = {WEIGHTS: _read_config(folder)[SHA256].get(WEIGHTS), CONFIG: None}
    with Saving(folder, CONFIG, lambda name: name == WEIGHTS) as saving:
        check_names(folder, [CONFIG, WEIGHTS], before)
        saving.add(WEIGHTS, partial(write_tensors, {n: t.detach().clone().contiguous() for n, t in own.items()}))
        assert model.adapters is not None
        config = {
            "format": FORMAT,
            "made_by": f"multimodal-stream {package_version()}",
            "adapters": declaration(model.adapters),
            "base": weights_hash(base),
            SHA256: saving.sums,
        }
        saving.commit((json.dumps(config, indent=2) + "\n").encode(), before)
    return folder


def load(model: Network, folder: str | Path, *, any_base: bool = False) -> None:
    """Attach the adapters in a folder that `save` wrote, in place. Loading runs no code from the folder.

    any_base: load them also if the other weights of the model differ from those that they were trained with.

    Raises:
        CheckpointError: files or tensors are missing, damaged or do not fit, or the model has other weights.
        ConfigError: peft is not installed, or the model has adapters already.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        declared = rebuild(config["adapters"])
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    if not isinstance(declared, LoRA):
        raise CheckpointError(f"{folder / CONFIG}: 'adapters' is {short_repr(config['adapters'])}, wanted a LoRA")
    path = stored(folder, config, WEIGHTS)
    header = read_header(path)
    if file_hash(path) != config[SHA256].get(WEIGHTS):
        raise CheckpointError(f"{folder / WEIGHTS}: damaged: its checksum is not the one it was saved with")
    declared.attach(model)
    try:
        own, base = _split_tensors(model)
        check_tensors(header, own, folder)
        if not any_base and weights_hash(base) != config["base"]:
            raise CheckpointError(
                f"{folder}: these adapters were trained with other weights than this model has; load that model first, or give "
                "any_base=True"
            )
        put_weights(model, {**model.state_dict(), **read_tensors(path)}, folder)
    except BaseException:
        remove(model)
        raise


def _peft() -> Any:
    try:
        import peft  # pyright: ignore[reportMissingImports]  an extra

        return peft
    except ImportError as error:
        raise ConfigError(
            f"LoRA: adapters are made by the package peft ({error}): pip install 'multimodal-stream[finetune]'"
        ) from None


def _adapted(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the layers that have an adapter."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, BASE) and hasattr(module, "lora_A")
    }


def _check_attached(model: Network, who: str) -> None:
    if model.adapters is None:
        raise ConfigError(f"{who}: the model has no adapters; LoRA(..).attach(model) adds them")


def _detach(model: Network, first: Callable[[Any], Any]) -> None:
    """Call `first` on each layer that has an adapter, then replace it by the plain layer."""
    _check_attached(model, "lora")
    for name, layer in _adapted(model).items():
        first(layer)
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, layer.get_base_layer())
    model.adapters = None
    model.requires_grad_(True)


def _split_tensors(model: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (tensors that `save` writes, all other tensors under their names without adapters)."""
    assert isinstance(model.adapters, LoRA)
    adapted = tuple(f"{name}." for name in _adapted(model))
    learned = weights_of("LoRA", model, model.adapters.learn)
    # buffers of trained modules, such as running statistics, are saved with them
    buffers = {id(buffer) for module in topmost(model, learned) for buffer in module.buffers()}
    learned |= {name for name, buffer in model.named_buffers() if id(buffer) in buffers}
    own: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in learned or (name.startswith(adapted) and f".{BASE}." not in name):
            own[name] = tensor
        else:
            base[name.replace(f".{BASE}.", ".")] = tensor
    return own, base


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of adapters.json, checked.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    path = folder / CONFIG
    config = read_json(path, CheckpointError)
    kinds = {"format": int, "adapters": dict, "base": str, SHA256: dict}
    check_fields(path, config, kinds, CheckpointError)
    if config["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {short_repr(config['format'])}, but this version reads {FORMAT}; update multimodal-stream"
        )
    return config
