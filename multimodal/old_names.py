"""The names of version 0.1, which work in 0.2 with a warning that says the new one. This file goes with version 0.3."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

TOP = {
    "attention": "ALiBi Additive Bernoulli Cosine DotProduct Factored Gaussian General Gumbel Hard LocationBased MixingWeights "
    "PredictedWindow Read RelativeBias ScaledDotProduct Score Soft Trace",
    "generate": "AtLeast Greedy MinP OneOf Only Piece Repetition Sampler",
    "layers": "MLP Add Concat CrossAttention Gated Layer Merge PersistentMemory Recurrent Replace SelfAttention",
    "masks": "Causal Chunked Prefix Prior Rule SameSample SameSegment Window",
    "packer": "Packer",
    "stream": "Stream",
    "zoo": "TemporalConv TuringMachine pruned",
}
"""Where the names now are that `multimodal` itself had: `mm.ALiBi` is `mm.attention.ALiBi`."""

MODULES = {
    "adversarial": "zoo.adversarial",
    "conformance": "check",
    "contrast": "heads.contrast",
    "cross_entropy": "heads.base",
    "flow": "heads.flow",
    "generate.answer": "generate.request",
    "layers.temporal": "zoo.temporal_conv",
    "layers.turing": "zoo.turing_machine",
    "look.facts": "zoo.fact_editing",
    "look.roles": "look.parameter_count",
    "look.sparse": "zoo.sparse_autoencoder",
    "look.words": "look.embeddings",
    "look.xray": "look.attention_xray",
    "masked": "heads.masked",
    "mixture": "zoo.mixture",
    "plan": "count",
    "pointer": "heads.pointer",
    "pruning": "zoo.pruning",
    "rows": "heads.each_row",
    "train.fit": "train.loop",
    "transcription.align": "transcription.alignment",
    "verify": "check",
}
"""Where modules now are, below `multimodal`; a checkpoint may name their classes."""

MOVED = {
    "heads": {"Classify": "heads.classify", "NextToken": "heads.next_token", "CTC": "heads.ctc", "Head": "heads.base"},
    "contrast": {
        "evaluate_pairs": "retrieval",
        "recalls": "retrieval",
        "side_vectors": "retrieval",
        "matches": "retrieval",
    },
    "stream": {"Task": "task"},
}
"""Names that have left a module which is still there, or are not where the rest of it is."""

_OLD = "multimodal."


def module_of(name: str) -> str | None:
    """The module that now has a name which `multimodal` itself had in 0.1, with a warning; None: there was no such name."""
    for module, names in TOP.items():
        if name in names.split():
            warn(f"multimodal.{name}", f"multimodal.{module}.{name}", 3)
            return module
    return None


def new_type(name: str) -> str:
    """The present "module:Class" of one that a checkpoint names, which may be of version 0.1."""
    module, _, cls = name.partition(":")
    if not module.startswith(_OLD):
        return name
    old = module.removeprefix(_OLD)
    new = MOVED.get(old, {}).get(cls) or MODULES.get(old, old)
    return f"{_OLD}{new}:{cls}"


def warn(old: str, new: str, up: int) -> None:
    """Say that a name is an old one; `up`: how many calls above this one the user's line is."""
    warnings.warn(f"{old} is now {new}; the old name goes with version 0.3", FutureWarning, stacklevel=up + 1)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their old names; Python asks it last, for modules that are nowhere else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(_OLD) and fullname.removeprefix(_OLD) in MODULES:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__.removeprefix(_OLD)
        new = importlib.import_module(_OLD + MODULES[old])

        def get(name: str) -> Any:
            if name in MOVED.get(old, {}):
                return getattr(importlib.import_module(_OLD + MOVED[old][name]), name)
            return getattr(new, name)

        module.__getattr__ = get  # type: ignore[method-assign]
        module.__all__ = [name for name in vars(new) if not name.startswith("_")]  # type: ignore[attr-defined]
        # the user's import is the first frame above Python's own import machinery
        frame, up = sys._getframe(), 0
        while frame is not None and ("importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame, up = frame.f_back, up + 1
        warn(module.__name__, _OLD + MODULES[old], up)


sys.meta_path.append(_Finder())
