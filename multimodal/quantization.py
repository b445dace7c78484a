"""Quantization after training: linear layers and token embedding tables in int8 or bfloat16; all other weights stay float32.

small = mm.quantize(model, "int8")     a new model, which you use, serve, save and load like any other
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.core import Transformer
from multimodal.declare import Declared
from multimodal.heads.base import Readout, TiedLinear
from multimodal.network import Network
from multimodal.shapes import ConfigError, did_you_mean

_Model = TypeVar("_Model", bound=Network)
FORMS = {"int8": torch.int8, "int8-weights": torch.int8, "bfloat16": torch.bfloat16}
"""{what a model can be quantized to: the type of a stored matrix}."""
MAX_WEIGHT = {"int8": 63, "int8-weights": 127}
"""The largest int8 code of a weight. CPUs without VNNI add two products in 16 bits, and 2 * 255 * 63 fits. Weights get the shorter
range, because a token has outliers and needs the finer steps, and a row of weights has none."""
MAX_INPUT, ZERO = 127, 128
"""The largest code of an activation, and the code of 0: the kernel takes unsigned ones, up to 255."""
PACKED_ROWS = 16  # for so many rows weights are packed; any other number works too
BLOCK = 2**18  # numbers of a matrix that are converted at once: 1 MB in float32, which fits into a CPU cache


@dataclass(frozen=True)
class Quantization(Declared):
    """How the matrices of a model are stored and multiplied.

    to: "int8": int8 weights and int8 activations, with a scale for each token. "int8-weights": int8 weights, float32 activations.
        "bfloat16": bfloat16 weights.
    """

    to: str = "int8"

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise ConfigError(
                f"quantize: to={self.to!r} is unknown; there are {', '.join(map(repr, FORMS))}{did_you_mean(str(self.to), FORMS)}"
            )

    def attach(self, model: Network) -> None:
        """Replace the matrices of a model in place by quantized ones whose values are still zeros.

        Raises:
            ConfigError: the model is quantized already, or has adapters.
        """
        self.check(model)
        made = {id(module): _quantized_module(module, self.to) for module in _matrices(model).values()}
        for module in list(model.modules()):
            for name, inner in module._modules.items():  # a matrix may be registered several times
                if id(inner) in made:
                    setattr(module, name, made[id(inner)])
            if isinstance(module, TiedLinear) and id(module.table) in made:
                module.table = made[id(module.table)]
        self._note(model)

    def check(self, model: Network) -> None:
        """Raise a ConfigError if a model cannot be quantized."""
        if model.quantization is not None:
            raise ConfigError(f"quantize: this model is quantized to {model.quantization.to!r} already")  # type: ignore[attr-defined]
        if model.adapters is not None:
            raise ConfigError("quantize: the model has adapters; call lora.merge or lora.remove first")

    def _note(self, model: Network) -> None:
        model.quantization = self
        model.requires_grad_(False)


def quantize(model: _Model, to: str = "int8") -> _Model:
    """A quantized copy of a model, in evaluation mode: linear layers of cores and heads, and token embedding tables are quantized.

    All else stays float32: positions, norms, biases, the embeddings of continuous features, and `FlowMatching`. A tied head and its
    embedding still share one matrix.

    to: "int8": a fourth of the bytes, and faster on x86 CPUs; activations are rounded too, with a scale for each token.
        "int8-weights": a fourth of the bytes; only weights are rounded; not faster. "bfloat16": half of the bytes, nearly the same
        numbers.

    Raises:
        ConfigError: `to` is unknown, the model is quantized already or has adapters, or a weight is not finite.

    Examples:
        >>> small = mm.quantize(model, "int8")
        >>> small.predict("image -> label", image=square).value
        'square'
    """
    form = Quantization(to)
    form.check(model)
    made: dict[int, Any] = {}
    for name, module in _matrices(model).items():
        assert isinstance(module.weight, Tensor)
        if not bool(module.weight.isfinite().all()):
            raise ConfigError(
                f"quantize: the weights in {name} are not all finite (NaN or infinity); train the model again"
            )
        made[id(module)] = _quantized_module(module, to)
        made[id(module)].fill(module.weight.detach())
    # wherever the original refers to a matrix, the copy refers to the quantized one
    small = copy.deepcopy(model, made)
    form._note(small)
    # all other weights become float32; quantized matrices must keep their types
    for module in small.modules():
        if not isinstance(module, _QuantizedMatrix):
            module._parameters = {
                name: p if p is None else nn.Parameter(p.detach().float(), requires_grad=False)
                for name, p in module._parameters.items()
            }
    return small.eval()


def _matrices(model: Network) -> dict[str, nn.Module]:
    """{name: module} of the linear layers and embedding tables to quantize; a module with several names has the first."""
    inside = {id(m) for core in model.modules() if isinstance(core, Transformer) for m in core.modules()}
    last = {id(m) for readout in model.readouts.values() if isinstance(readout, Readout) for m in readout.last_layers()}
    found = {}
    for name, module in model.named_modules():
        # not subclasses of nn.Linear: they may use their weight in another way
        if type(module) is nn.Linear and (id(module) in inside or id(module) in last):
            found[name] = module
        elif isinstance(module, nn.Embedding) and name.startswith("embeds.") and id(module) not in inside:
            rest = name.removeprefix("embeds.").partition(".")[2]
            # a table deeper in a user's embedding may hold positions
            if rest in ("", "frozen_part.embed") and (type(module) is nn.Embedding or hasattr(module, "scale")):
                found[name] = module
    return found


def _quantized_module(module: nn.Module, to: str) -> "_QuantizedMatrix":
    return QuantizedTable(module, to) if isinstance(module, nn.Embedding) else QuantizedLinear(module, to)  # type: ignore[arg-type]


class _QuantizedMatrix(nn.Module):
    """A matrix (N, D) in int8 with a scale for each row, or in bfloat16.

    scale: (N,) float32; weight = stored * scale for int8, empty (0,) for bfloat16.
    stored: (N, D) int8 or bfloat16.
    """

    def __init__(self, weight: Tensor, to: str) -> None:
        super().__init__()
        self.form, kind = to, FORMS[to]
        self.coded = kind == torch.int8
        # the scale comes first, even if it is empty: the dtype of a module's first parameter is taken for its compute dtype
        scale_N = torch.ones(len(weight) if self.coded else 0, device=weight.device)
        self.scale = nn.Parameter(scale_N, requires_grad=False)
        self.stored = nn.Parameter(torch.zeros_like(weight, dtype=kind), requires_grad=False)
        self._packed: dict[tuple[int, int], _Packed] = {}

    def fill(self, weight: Tensor) -> None:
        """Store a float matrix (N, D), rounded."""
        weight = weight.float()
        if not self.coded:
            self.stored.copy_(weight)
            return
        # avoids 0 / 0 for a row of zeros
        scale_N = (weight.abs().amax(1) / MAX_WEIGHT[self.form]).clamp(min=torch.finfo(torch.float32).tiny)
        self.scale.copy_(scale_N)
        self.stored.copy_((weight / scale_N[:, None]).round())
        self._packed.clear()

    @property
    def weight(self) -> Tensor:
        """The matrix (N, D) in float32, converted at each access."""
        return self.rows(slice(None))

    def rows(self, some: slice | Tensor) -> Tensor:
        """Some rows of the matrix, in float32."""
        rows_ND = self.stored[some].float()
        return rows_ND * self.scale[some, None] if self.coded else rows_ND

    def product(self, x: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """x (.., D) times the transpose of the rows [first, end): (.., end - first), in the dtype of x."""
        end = len(self.stored) if end is None else end
        x_TD = x.reshape(-1, x.shape[-1])
        y_TN = self.rows_product(x_TD if x_TD.dtype == torch.float32 else x_TD.float(), first, end)
        return y_TN.to(x.dtype).reshape(*x.shape[:-1], end - first)

    def rows_product(self, x_TD: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """`product` of rows (T, D) in float32."""
        end = len(self.stored) if end is None else end
        if not self.coded and multiplies_bfloat16(x_TD.device):
            return self._bfloat16_product(x_TD.bfloat16(), first, end).float()
        if self.form == "int8":
            return self._int8_product(x_TD, first, end)
        return self._float32_product(x_TD, first, end)

    def _float32_product(self, x_TD: Tensor, first: int, end: int) -> Tensor:
        """The product with the codes as float32, block by block, so that a converted block fits into a CPU cache."""
        blocks = self.stored[first:end].split(max(1, BLOCK // x_TD.shape[1]))
        parts = [F.linear(x_TD, block.float()) for block in blocks]
        y_TN = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y_TN * self.scale[first:end] if self.coded else y_TN

    def _bfloat16_product(self, x_TD: Tensor, first: int, end: int) -> Tensor:
        backward = x_TD.requires_grad and torch.is_grad_enabled()  # which a packed weight has not
        if x_TD.device.type != "cpu" or backward or not _onednn_works(torch.bfloat16):
            return F.linear(x_TD, self.stored[first:end])
        return self._packed_rows(first, end).multiply(x_TD)

    def _packed_rows(self, first: int, end: int) -> "_Packed":
        """Rows of the matrix as the kernel wants them, made once."""
        if (first, end) not in self._packed:
            self._packed[first, end] = _Packed(self.stored[first:end], self.scale[first:end])
        return self._packed[first, end]

    def _int8_product(self, x_TD: Tensor, first: int, end: int) -> Tensor:
        """The product with activations rounded to int8, each token with its own scale.

        A scale for the whole batch is more usual, but would make a sample depend on the other samples.
        """
        step_T1 = torch.linalg.vector_norm(x_TD, torch.inf, dim=-1, keepdim=True).div_(MAX_INPUT)
        step_T1.clamp_(min=torch.finfo(torch.float32).tiny)
        if not has_int8_kernel(x_TD.device):
            # the same integers, multiplied as float32
            code_TD = torch.addcdiv(x_TD.new_tensor(ZERO + 0.5), x_TD, step_T1).floor_().sub_(ZERO)
            return self._float32_product(code_TD, first, end) * step_T1
        packed = self._packed_rows(first, end)
        code_TD = torch.addcdiv(packed.round, x_TD, step_T1).to(torch.uint8)
        # scales are applied here, because the kernel's way differs with the number of rows in the last bit
        return packed.multiply_codes(code_TD).mul_(packed.scale_N).mul_(step_T1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._packed.clear()  # packed weights belong to a device

        def moved(tensor: Tensor) -> Tensor:
            # viewed as integers, so that bfloat16 stays bfloat16 when the model is converted to another precision
            return (
                fn(tensor.view(torch.int16)).view(tensor.dtype)
                if tensor is self.stored and not self.coded
                else fn(tensor)
            )

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, *given: Any, **named: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*given, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # a copy packs its weights again


class QuantizedLinear(_QuantizedMatrix):
    """A linear layer with a quantized matrix; its bias stays float32."""

    def __init__(self, linear: nn.Linear, to: str) -> None:
        super().__init__(linear.weight, to)
        self.out_features, self.in_features = linear.weight.shape
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def divided(self, sizes: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """Functions that multiply by consecutive blocks of rows, of these sizes; for layers that split a fused projection."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [partial(self.product, first=end - size, end=end) for size, end in zip(sizes, ends, strict=True)]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form}"


class QuantizedTable(_QuantizedMatrix):
    """A quantized embedding table; a tied head multiplies by the same rows.

    factor: multiplies embeddings but not the rows of a tied head, like the `scale` of the replaced table.
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
    """Whether a device has hardware for bfloat16 products; without it they are ten times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def has_int8_kernel(device: torch.device) -> bool:
    """Whether this PyTorch has a fast int8 product for a device: oneDNN's, on CPUs."""
    return device.type == "cpu" and _onednn_works(torch.int8)


@cache
def _onednn_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack and multiply matrices of a type; not every build of PyTorch has it."""
    try:
        packed = _Packed(torch.ones(1, 1, dtype=dtype), torch.ones(1))
        if dtype == torch.int8:
            return float(packed.multiply_codes(torch.full((1, 1), ZERO + 1, dtype=torch.uint8))) == 1
        return float(packed.multiply(torch.ones(1, 1, dtype=dtype))) == 1
    except (AttributeError, RuntimeError):  # NotImplementedError too
        return False


class _Packed:
    """A matrix (N, D) in bfloat16 or int8 in the memory layout of oneDNN's kernels.

    scale_N: the scales of its rows, in float32. round: what makes a code of an activation in steps, when the fraction is cut off.
    """

    def __init__(self, weight_ND: Tensor, scale_N: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weight_ND = weight_ND.detach().clone()
            self.scale_N, self.round = scale_N.detach().float().clone(), torch.tensor(ZERO + 0.5)
            self._one_N, self._zero_N = torch.ones(len(weight_ND)), torch.zeros(len(weight_ND), dtype=torch.int32)
            if weight_ND.dtype == torch.int8:
                self._packed = torch.ops.onednn.qlinear_prepack(weight_ND, None)
                self._kernel = torch.ops.onednn.qlinear_pointwise.default
            else:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_ND, PACKED_ROWS)
                self._kernel = torch.ops.mkldnn._linear_pointwise.default

    def multiply(self, x_TD: Tensor) -> Tensor:
        """x times the transpose of a bfloat16 matrix, in bfloat16."""
        return self._kernel(x_TD, self._packed, None, "none", [], "")

    def multiply_codes(self, code_TD: Tensor) -> Tensor:
        """uint8 codes around ZERO times the transpose of the int8 codes, in float32."""
        more = None, 1.0, 0, torch.float32, "none", [], ""
        return self._kernel(code_TD, 1.0, ZERO, self._packed, self._one_N, self._zero_N, *more)
