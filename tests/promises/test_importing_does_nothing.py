"""Promise 7: importing does nothing: no output, no downloads, no device queries."""

import json

from tests.test_guards import in_new_python

LAZY = (
    "matplotlib",
    "timm",
    "torchvision",
    "soundfile",
    "rich",
    "cyclopts",
    "torchaudio",
    "PIL",
    "jiwer",
    "fsspec",
    "datasets",
    "pyarrow",
    "av",
    "pillow_heif",
    "torchcodec",
    "anyio",
    "httpx",
    "python_multipart",
    "starlette",
    "uvicorn",
)


def test_importing_does_nothing():
    code = f"""
import os, random, sys
import numpy, torch
def state():
    return [
        dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        torch.cuda.is_initialized(),
    ]
before = state()
import multimodal, multimodal_tokenizers
after = state()
import json
print(json.dumps({{
    "changed": [i for i, (x, y) in enumerate(zip(before, after)) if x != y],
    "cuda": torch.cuda.is_initialized(),
    "loaded": [name for name in {LAZY!r} if name in sys.modules],
}}))
"""
    assert json.loads(in_new_python(code)) == {"changed": [], "cuda": False, "loaded": []}
