"""The names of version 0.1, which work in 0.2 with a warning that says the new one. This file goes with version 0.3."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
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
"""The module that now has a name which `multimodal` itself had: `mm.ALiBi` is `mm.attention.ALiBi`."""

MODULES = {
    "adversarial": "zoo.adversarial",
    "attention.kept": "attention.cached",
    "attention.layout": "masks",
    "conformance": "check",
    "contrast": "heads.contrast",
    "cross_entropy": "heads.cross_entropy",
    "data.members": "data.codecs",
    "data.writing": "data.shard_writer",
    "flow": "heads.flow",
    "layers.temporal": "zoo.temporal_conv",
    "layers.turing": "zoo.turing_machine",
    "look.facts": "zoo.fact_editing",
    "look.posterior": "look.layer_xray",
    "look.roles": "look.parameter_count",
    "look.sparse": "zoo.sparse_autoencoder",
    "look.words": "look.embeddings",
    "masked": "heads.masked",
    "mixture": "zoo.mixture",
    "plan": "count",
    "pointer": "heads.pointer",
    "pruning": "zoo.pruning",
    "reinforce": "attention.reinforce",
    "rows": "heads.each_row",
    "train.compare": "train.run_report",
    "train.feed": "train.loaders",
    "train.folder": "train.run_folder",
    "train.host": "train.runtime",
    "train.report": "train.display",
    "train.trouble": "train.spikes",
    "transcription.lexicon": "transcription.ctc",
    "transcription.listen": "transcription.streaming",
    "transcription.long": "transcription.recordings",
    "transcription.prior": "transcription.language_model",
    "transcription.reader": "transcription.alignment",
    "transcription.sound": "transcription.recordings",
    "verify": "check",
    "verify.checks": "check.equivalence",
}
"""Where modules below `multimodal` are now; those of a package that moved are in the new one."""

NAMES = {
    "contrast": {
        "evaluate_pairs": "retrieval.evaluate_pairs",
        "matches": "retrieval.match_probabilities",
        "recalls": "retrieval.recalls",
        "side_vectors": "retrieval.side_vectors",
    },
    "generate": {"Prefix": "generate.CachedPrefix"},
    "layers": {"TemporalConv": "zoo.TemporalConv", "TuringMachine": "zoo.TuringMachine"},
    "look": {"Field": "look.XRayField", "looked_at": "look.attention_rollout"},
    "look.roles": {"Roles": "look.parameter_count.ParameterCount", "roles": "look.parameter_count.count_parameters"},
    "look.words": {"analogy": "zoo.analogies.analogy"},
    "masks": {"Places": "masks.MaskInfo", "everyone": "masks.all_pairs"},
    "media": {"announce": "media.warn_once", "say_once": "media.warn_once"},
    "plan": {
        "Memory": "count.MemoryUse",
        "StreamFacts": "count.StreamStats",
        "given_stream": "count.stream_of_length",
    },
    "stream": {"Task": "task.Task"},
    "task": {"Field": "pattern.Field", "Pattern": "pattern.Pattern"},
    "transcription": {
        "Greedy": "transcription.GreedyCTC",
        "ModelPrior": "transcription.ModelLM",
        "NGram": "transcription.NGramLM",
        "Prior": "transcription.LanguageModel",
        "hearing_tasks": "transcription.transcription_tasks",
        "written": "transcription.formatted",
    },
    "verify": {"CHECKS": "check.MODEL_CHECKS", "Row": "check.Measurement"},
}
"""By the module of 0.1, what has another name now, or is in another place than the rest of its module."""

_TYPES = {
    "heads": {"CTC": "heads.ctc", "Classify": "heads.classify", "Head": "heads.base", "NextToken": "heads.next_token"},
}
"""Classes that checkpoints name by a module which is a package now."""

_OURS = "multimodal."


def module_of(name: str) -> str | None:
    """The module that now has a name which `multimodal` itself had in 0.1, with a warning; None: there was no such name."""
    for module, names in TOP.items():
        if name in names.split():
            warn(f"multimodal.{name}", f"multimodal.{module}.{name}", 2)
            return module
    return None


def new_type(name: str) -> str:
    """The present "module:Class" of one that a checkpoint names, which may be of version 0.1."""
    module, _, cls = name.partition(":")
    if not module.startswith(_OURS):
        return name
    old = module.removeprefix(_OURS)
    return f"{_OURS}{_TYPES.get(old, {}).get(cls) or MODULES.get(old, old)}:{cls}"


def warn(old: str, new: str, up: int) -> None:
    """Say that a name is an old one; `up`: number of calls between this one and the user's line."""
    warnings.warn(f"{old} is now {new}; the old name goes with version 0.3", FutureWarning, stacklevel=up + 2)


def moved(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that is still there and has lost names."""
    old = module.removeprefix(_OURS)

    def get(name: str) -> Any:
        if name not in NAMES[old]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", _OURS + NAMES[old][name], 1)
        return _found(NAMES[old][name])

    return get


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(_OURS + module), name)


def _present(old: str) -> str | None:
    """The present path of an old module, also of one within a package that moved; None: there was none."""
    if old in MODULES:
        return MODULES[old]
    package, _, name = old.rpartition(".")
    if package not in MODULES or importlib.util.find_spec(f"{_OURS}{MODULES[package]}") is None:
        return None
    new = f"{MODULES[package]}.{name}"
    try:
        return new if importlib.util.find_spec(_OURS + new) is not None else None
    except ModuleNotFoundError:  # the new place is no package
        return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their old names; Python asks it last, for modules that are nowhere else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(_OURS) and _present(fullname.removeprefix(_OURS)) is not None:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__.removeprefix(_OURS)
        path = _OURS + (_present(old) or "")
        new = importlib.import_module(path)
        names = NAMES.get(old, {})
        module.__getattr__ = lambda name: _found(names[name]) if name in names else getattr(new, name)  # type: ignore[method-assign]
        module.__all__ = [*names, *(name for name in vars(new) if not name.startswith("_"))]  # type: ignore[attr-defined]
        # the user's import is the first frame above Python's import machinery, whose own frames `warnings` does not count
        frame, up = sys._getframe(1), 1
        while frame is not None and "importlib" in frame.f_code.co_filename:
            up += "_bootstrap" not in frame.f_code.co_filename
            frame = frame.f_back
        warn(module.__name__, path, up)


sys.meta_path.append(_Finder())
