"""Smaller models: linear layers and tables of symbols in int8 or bfloat16; places and all other weights stay as they are.

small = mm.quantize(model, "int8")     a new model, which answers, is served, saved and loaded as any other
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.core import Transformer
from multimodal.declare import Declared
from multimodal.heads.base import Readout, TiedLinear
from multimodal.heads.flow import FlowReadout
from multimodal.network import Network
from multimodal.shapes import ConfigError, did_you_mean

_Model = TypeVar("_Model", bound=Network)
FORMS = {"int8": torch.int8, "int8-weights": torch.int8, "bfloat16": torch.bfloat16}
"""What a model can be quantized to, and how a matrix is stored then."""
LARGEST = {"int8": 63, "int8-weights": 127}
"""The largest code of a weight. CPUs without VNNI add two products in 16 bits, where 2 * 255 * 63 fits; inputs get the finer steps,
since a token's largest number is many times its others, and a row of weights is even."""
MOST_INPUT = 127  # the largest code of an input; stored without a sign, it is up to 255
BLOCK = 2**18  # numbers of a matrix that are converted at once; as float32 they take 1 MB, which caches hold


@dataclass(frozen=True)
class Quantization(Declared):
    """How the matrices of a model are stored, and multiplied.

    to: "int8": inputs are rounded too, each token by its own largest number. "int8-weights": inputs stay float32. "bfloat16".
    """

    to: str = "int8"

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise ConfigError(
                f"quantize: to={self.to!r} is unknown; there are {', '.join(map(repr, FORMS))}{did_you_mean(str(self.to), FORMS)}"
            )

    def attach(self, model: Network) -> dict[str, nn.Module]:
        """Replace the matrices of a model, in place, by others without values; returns those that were there, by name."""
        if model.quantization is not None:
            raise ConfigError(f"quantize: this model is quantized to {model.quantization.to!r} already")  # type: ignore[attr-defined]
        if model.adapters is not None:
            raise ConfigError("quantize: the model has adapters; call lora.merge or lora.remove first")
        before = dict(_matrices(model))
        made = {id(module): _made(module, self.to) for module in before.values()}
        for name, module in before.items():
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, made[id(module)])
        for module in model.modules():
            if isinstance(module, TiedLinear) and id(module.table) in made:
                module.table = made[id(module.table)]
        model.quantization = self
        model.requires_grad_(False)
        return before


def quantize(model: _Model, to: str = "int8") -> _Model:
    """A smaller copy of a model, in evaluation mode: the linear layers of its cores and heads, and its tables of symbols.

    All else stays float32: positions, rotary turns, learned times and tables of places, norms, biases, and what embeds features
    or draws them. A matrix that a head shares with an embedding is one matrix still.

    to: "int8": a fourth of the bytes, and faster on x86 CPUs; the inputs of each token are rounded too. "int8-weights": the
        same bytes, only weights are rounded, and it is no faster. "bfloat16": half of the bytes, nearly the same numbers.

    Raises:
        ConfigError: an unknown form, a model that is quantized or has adapters, or weights that are not finite.

    Examples:
        >>> small = mm.quantize(model, "int8")
        >>> small.predict("image -> label", image=square).value
        'square'
    """
    form = Quantization(to)
    # the copy shares the matrices of the original, which are replaced in it
    small = copy.deepcopy(model, {id(module): module for _, module in _matrices(model)})
    for name, module in form.attach(small).items():
        new = small.get_submodule(name)
        assert isinstance(new, _Stored)
        assert isinstance(module.weight, Tensor)
        if not bool(module.weight.isfinite().all()):
            raise ConfigError(
                f"quantize: the weights in {name} are not all finite (NaN or infinity); train a model anew"
            )
        new.fill(module.weight.detach())
    # what is left may be of another precision; codes are no floating-point numbers, and bfloat16 ones are converted back exactly
    for module in small.modules():
        if not isinstance(module, _Stored):
            module._parameters = {
                name: p if p is None else nn.Parameter(p.detach().float(), requires_grad=False)
                for name, p in module._parameters.items()
            }
    return small.eval()


def _matrices(model: Network) -> Iterator[tuple[str, nn.Module]]:
    """The modules that become smaller, by name."""
    inside = {id(m) for core in model.modules() if isinstance(core, Transformer) for m in core.modules()}
    last = {
        id(readout.linear)
        for readout in model.readouts.values()
        if isinstance(readout, Readout) and not isinstance(readout, FlowReadout)
    }
    for name, module in model.named_modules():
        # of a subclass it is not known what it does with its weight
        if type(module) is nn.Linear and (id(module) in inside or id(module) in last):
            yield name, module
        elif isinstance(module, nn.Embedding) and name.startswith("embeds.") and id(module) not in inside:
            rest = name.removeprefix("embeds.").partition(".")[2]
            # in an embedding of one's own a table may be one of places
            if rest in ("", "frozen_part.embed") and (type(module) is nn.Embedding or hasattr(module, "scale")):
                yield name, module


def _made(module: nn.Module, to: str) -> "_Stored":
    return QuantizedTable(module, to) if isinstance(module, nn.Embedding) else QuantizedLinear(module, to)  # type: ignore[arg-type]


class _Stored(nn.Module):
    """A matrix of N rows of D numbers, in int8 with a scale for each row, or in bfloat16.

    scale: (N,), the number that a code of 1 stands for; (0,) where there are no codes. stored: (N, D).
    """

    def __init__(self, weight: Tensor, to: str) -> None:
        super().__init__()
        self.form, kind = to, FORMS[to]
        self.coded = kind == torch.int8
        # the scale comes first, even if it is empty: the type of a module's first parameter counts as the one it computes in
        scale_N = torch.ones(len(weight) if self.coded else 0, device=weight.device)
        self.scale = nn.Parameter(scale_N, requires_grad=False)
        self.stored = nn.Parameter(torch.zeros_like(weight, dtype=kind), requires_grad=False)
        self._packs: dict[tuple[int, int], Any] = {}

    def fill(self, weight: Tensor) -> None:
        """Round a matrix (N, D)."""
        weight = weight.float()
        if not self.coded:
            self.stored.copy_(weight)
            return
        # a row of zeros needs no scale, but 0 / 0 has no value
        scale_N = (weight.abs().amax(1) / LARGEST[self.form]).clamp(min=torch.finfo(torch.float32).tiny)
        self.scale.copy_(scale_N)
        self.stored.copy_((weight / scale_N[:, None]).round())
        self._packs.clear()

    @property
    def weight(self) -> Tensor:
        """The matrix (N, D) in float32: a new tensor each time."""
        return self.rows(slice(None))

    def rows(self, some: slice | Tensor) -> Tensor:
        """Some rows of the matrix in float32."""
        rows_ND = self.stored[some].float()
        return rows_ND * self.scale[some, None] if self.coded else rows_ND

    def product(self, x: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """x (.., D) times the rows `first` to `end` of the matrix, in the precision of x."""
        end = len(self.stored) if end is None else end
        x_TD = x.reshape(-1, x.shape[-1])
        if not self.coded and multiplies_bfloat16(x.device):
            y_TN = F.linear(x_TD.bfloat16(), self.stored[first:end])
        elif self.form == "int8":
            y_TN = self._rounded(x_TD.float(), first, end)
        else:
            y_TN = self._converted(x_TD.float(), first, end)
        return y_TN.to(x.dtype).reshape(*x.shape[:-1], end - first)

    def _converted(self, x_TD: Tensor, first: int, end: int) -> Tensor:
        """The product with the codes as float32, block by block: converted whole, a large matrix would not fit into a cache."""
        blocks = self.stored[first:end].split(max(1, BLOCK // x_TD.shape[1]))
        parts = [F.linear(x_TD, block.float()) for block in blocks]
        y_TN = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y_TN * self.scale[first:end] if self.coded else y_TN

    def _rounded(self, x_TD: Tensor, first: int, end: int) -> Tensor:
        """The product with inputs that are rounded to steps of their token's largest number.

        By token and not, as is usual, by batch, because an answer must not depend on the other samples.
        """
        largest_T1 = torch.linalg.vector_norm(x_TD, torch.inf, dim=-1, keepdim=True)
        largest_T1 = largest_T1.clamp(min=torch.finfo(torch.float32).tiny)
        x_TD = x_TD / largest_T1
        if has_int8_kernel(x_TD.device):
            if (first, end) not in self._packs:
                self._packs[first, end] = _packed(self.stored[first:end], self.scale[first:end])
            kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
            return kernel(x_TD, 1 / MOST_INPUT, MOST_INPUT + 1, self._packs[first, end]).mul_(largest_T1)
        # the same whole numbers, multiplied as float32
        return self._converted((x_TD * MOST_INPUT).round(), first, end) * (largest_T1 / MOST_INPUT)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._packs.clear()  # they belong to the device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *given: Any, **named: Any) -> None:
        self._packs.clear()
        super()._load_from_state_dict(*given, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packs": {}}  # made again by a copy


class QuantizedLinear(_Stored):
    """A linear layer with a smaller matrix; its bias stays float32."""

    def __init__(self, linear: nn.Linear, to: str) -> None:
        super().__init__(linear.weight, to)
        self.out_features, self.in_features = linear.weight.shape
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def divided(self, sizes: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """The products with the first rows, with the rows after them, and so on."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [partial(self.product, first=end - size, end=end) for size, end in zip(sizes, ends, strict=True)]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form}"


class QuantizedTable(_Stored):
    """A table of symbols with smaller rows; a tied head multiplies by the same rows.

    factor: multiplies what is looked up, and not what a head multiplies by, as the `scale` of the table that it replaces.
    """

    def __init__(self, table: nn.Embedding, to: str) -> None:
        super().__init__(table.weight, to)
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.factor = float(getattr(table, "scale", 1.0))

    def forward(self, ids: Tensor) -> Tensor:
        rows_ND = self.rows(ids)
        return rows_ND if self.factor == 1.0 else rows_ND * self.factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form}"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for products of bfloat16; without them they are ten times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def has_int8_kernel(device: torch.device) -> bool:
    """Whether this PyTorch has a fast product of int8 for a device: FBGEMM's, on x86 CPUs."""
    return device.type == "cpu" and _works()


@cache
def _works() -> bool:
    """Whether a matrix can be packed and multiplied; PyTorch says that a later release will lack what packs it."""
    try:
        kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        packed = _packed(torch.ones(1, 1, dtype=torch.int8), torch.ones(1))
        return float(kernel(torch.ones(1, 1), 1 / MOST_INPUT, MOST_INPUT + 1, packed)) == 1
    except (AttributeError, RuntimeError):  # NotImplementedError too
        return False


ENGINE = "fbgemm"
_lock = Lock()  # PyTorch's choice of an engine, and Python's of warnings, belong to the process


def _packed(code_ND: Tensor, scale_N: Tensor) -> Any:
    """The codes in the order in which the kernel reads them."""
    with _lock, warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # tensors of quantized types will go; only the packed matrix is kept
        zero_N = torch.zeros(len(scale_N), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(code_ND.detach().clone(), scale_N.double(), zero_N, 0)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE  # others have no kernel for inputs whose scale is given
        try:
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before
