"""Notes, graphs and words with tags: every check, what is written and saved, and data whose answer is known."""

import builtins
import dataclasses
import io
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.layers import MLP, SelfAttention
from multimodal.masks import Linked
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Events, Graph, Labels, TextBytes, Words

DRAW = np.random.default_rng(0)
CHORD = [(0, 60, 1, 100, 0), (0, 64, 2, 64, 1), (1.5, 60, 0.5, 1, 0), (20, 0, 0.25, 2, 0), (20, 127, 30, 127, 3)]
CHECKED = [
    (Events(), None),
    (Events(resolution=4, longest=6, velocities=127, voices=4, causal=True), [CHORD, CHORD[:2], CHORD[2:]]),
    (Events(resolution=2, velocities=8, lossy=True), [[(0, 60, 1, 90), (0.6, 64, 0.1, 64)], [(0, 62, 1, 90)], [(1, 60, 2, 12)]]),
    (Graph(features=3), None),
    (Graph(features=2, edges=("likes", "knows"), directed=True, hidden=8), None),
    (Words(buckets=256), None),
    (Words(causal=True), ["a text of words", "another One", "ünd 1 Wort"]),
]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{type(kind).__name__}{i}-{check}")
        for i, (kind, values) in enumerate(CHECKED)
        for check in tokenizer_checks(kind, kind.examples() if values is None else values)
        if str(check) not in ("fresh_process", "worker_process") or i in (1, 4, 5)
    ],
)
def test_every_check_passes(check):
    check()
