"""File formats of programs, which trace, write, load and run them: .pt2 of torch.export, which needs only PyTorch, and ONNX."""

import importlib
import importlib.metadata
import io
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.export.compare import RunProgram, example_inputs
from multimodal.export.programs import Program
from multimodal.shapes import ConfigError
from multimodal.texts import shortened

OPSET = 20
MOST_BYTES = 2**31 - 2**24  # of weights in one .onnx file, which must be smaller than 2 GiB


class Format(ABC):
    """A file format.

    ending: the suffix of file names. needs: the packages that it needs besides torch.
    """

    ending: str
    needs: tuple[str, ...] = ()

    def check_installed(self) -> None:
        """Raise a ConfigError if a package is missing."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(
                    f"export to {self.ending[1:]}: {name} is not installed ({error}); install it with "
                    "pip install 'multimodal-stream[export]', or export to pt2, which needs PyTorch alone"
                ) from error

    def versions(self) -> dict[str, Any]:
        """The versions that the manifest records."""
        return {"versions": {name: importlib.metadata.version(name) for name in ("torch", *self.needs)}}

    def check_int8(self) -> None:
        """Raise a ConfigError if programs of this format cannot be quantized to int8."""
        raise ConfigError(f"export: int8 programs are for to='onnx'; {self.ending[1:]} holds the weights as they are")

    def make_int8(self, path: Path) -> None:
        """Replace the program in a file by one whose matrices are int8."""
        raise NotImplementedError

    @abstractmethod
    def write(self, program: Program, path: Path) -> None:
        """Trace a program and write it to a file."""

    @abstractmethod
    def read(self, paths: dict[str, Path]) -> RunProgram:
        """Load programs. paths: {name of a program: its file}."""


class PT2(Format):
    ending = ".pt2"

    def write(self, program: Program, path: Path) -> None:
        whole = io.BytesIO()  # a full disk would end the process: torch's writer of files raises in a destructor
        with _quiet():
            torch.export.save(traced(program), whole)
        path.write_bytes(whole.getbuffer())

    def read(self, paths: dict[str, Path]) -> RunProgram:
        with _quiet():
            loaded = {name: torch.export.load(path).module() for name, path in paths.items()}
        return lambda name, inputs: loaded[name](inputs)


class ONNX(Format):
    ending = ".onnx"
    needs = ("onnx", "onnxscript", "onnxruntime")

    def versions(self) -> dict[str, Any]:
        return {"opset": OPSET, **super().versions()}

    def write(self, program: Program, path: Path) -> None:
        import torch.onnx

        example = example_inputs(program)
        with _quiet():
            made = torch.onnx.export(
                traced(program),
                (example,),
                input_names=list(example),
                output_names=[entry.name for entry in program.outputs],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert made is not None
        symbols = {}  # {torch's name of an axis, such as s71: our name}
        for entry, given in zip(program.inputs, made.model.graph.inputs, strict=True):
            assert given.shape is not None
            pairs = zip(entry.axes, given.shape, strict=True)
            symbols |= {str(size): axis for axis, size in pairs if isinstance(axis, str)}
        made.rename_axes(symbols)
        for node in made.model.graph.all_nodes():
            # the stack trace of each node takes more bytes than small weights
            node.metadata_props.clear()
        weights = sum(p.numel() * p.element_size() for p in program.parameters())
        made.save(path, external_data=weights > MOST_BYTES)

    def check_int8(self) -> None:
        pass

    def make_int8(self, path: Path) -> None:
        onnx, quantization = (importlib.import_module(name) for name in ("onnx", "onnxruntime.quantization"))
        if path.with_name(f"{path.name}.data").exists():
            raise ConfigError(f"export: int8 needs an .onnx file below 2 GB, and the weights of {path.name} are larger")
        program, smaller = onnx.load(path), path.with_name(f"{path.stem}.int8.onnx")
        # embeddings of continuous features and position tables stay float32; of the embeddings, only token tables become int8
        stay = [node.name for node in program.graph.node if not _is_quantized(node)]
        with _quiet():
            quantization.quantize_dynamic(
                path,
                smaller,
                op_types_to_quantize=["MatMul", "Gather"],
                # quantize_dynamic first turns a Gemm into a MatMul and an Add
                nodes_to_exclude=stay + [f"{name}_MatMul" for name in stay],
                per_channel=True,
                # with the full range, CPUs without VNNI overflow when they add two products in 16 bits
                reduce_range=True,
                weight_type=quantization.QuantType.QInt8,
            )
        smaller.replace(path)

    def read(self, paths: dict[str, Path]) -> RunProgram:
        runtime = importlib.import_module("onnxruntime")
        sessions = {name: runtime.InferenceSession(path) for name, path in paths.items()}

        def run(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            names = [output.name for output in sessions[name].get_outputs()]
            found = sessions[name].run(names, {key: x.numpy() for key, x in inputs.items()})
            return {key: torch.from_numpy(x) for key, x in zip(names, found, strict=True)}

        return run


FORMATS: dict[str, Format] = {"onnx": ONNX(), "pt2": PT2()}


def traced(program: Program) -> torch.export.ExportedProgram:
    """Trace a program with torch.export; axes with a name are dynamic.

    Raises:
        ConfigError: a part of the model cannot be traced.
    """
    example = example_inputs(program)
    known: dict[str, Any] = {}
    axes = {
        entry.name: {
            i: known.setdefault(axis, torch.export.Dim(axis))
            for i, axis in enumerate(entry.axes)
            if isinstance(axis, str)
        }
        for entry in program.inputs
    }
    try:
        made = torch.export.export(program, (example,), dynamic_shapes=(axes,))
    except ConfigError:
        raise
    except Exception as error:  # torch and parts of the user may raise errors of any class
        raise ConfigError(
            f"export, program {program.name!r}: torch.export cannot trace it: {type(error).__name__}: "
            f"{shortened(str(error), 600)}; a part of your own must not depend on values or lengths: use x.shape[0], not "
            "len(x), and no branch on what a tensor holds"
        ) from error
    for node in made.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return made


def _is_quantized(node: Any) -> bool:
    """Whether a node of ONNX is a matrix product of a core or a head, or a lookup of token embeddings."""
    if node.op_type == "Gather":
        return re.fullmatch(r"model\.embeds\.\w+\.weight", node.input[0]) is not None
    return not any(name.startswith("model.embeds.") for name in node.input) or node.op_type not in ("Gemm", "MatMul")


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off gradients, and warnings and logs of the exporters about themselves."""
    # onnxruntime's quantization writes to the root logger
    logs = [logging.getLogger(name) for name in ("onnxscript", None)]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
