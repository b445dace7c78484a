"""Graphs: a token for each node, and relations along the edges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.media.sources import as_floats, as_numbers
from multimodal.shapes import AXES, ConfigError, MediaError, check_whole, did_you_mean
from multimodal.texts import listed, repeated
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal_tokenizers.features import embedding


@dataclass(frozen=True)
class Graph(Tokenizer):
    """{"nodes": numbers (nodes, features), "edges": [(from, to), ..]}; nodes are counted from 0, and each is a token.

    Edges are relations between tokens: `masks.Linked("edge")` attends along them, and `attention.Related("edge")` learns a bias for
    them. With several types of edges, each edge is (from, to, type). `EachRow(of=..)` gives each node an answer.

    Nodes have no order: all have time 0, row 0 and column 0, and their number on the axis "node". The core must know this axis, and
    permuted nodes have permuted answers if it is not rotated: `Core(axes=Graph.axes, rotary_split=(2, 1, 1, 0))`.

    features: F, numbers of a node.
    edges: the names of the types of edges.
    directed: whether (0, 1) and (1, 0) are different edges. If so, (0, 1) relates 0 to 1 by "edge" and 1 to 0 by "edge back"; if
        not, both by "edge".
    hidden: width of the hidden layer of a two-layer embedding; None: a linear one.

    Examples:
        >>> graph = Graph(features=1)({"nodes": [[0.5], [1.0], [0.0]], "edges": [(0, 1), (2, 1)]})
        >>> graph.pairs.tolist()
        [[0, 1, 0], [1, 0, 0], [2, 1, 0], [1, 2, 0]]
    """

    features: int
    edges: tuple[str, ...] = ("edge",)
    directed: bool = False
    hidden: int | None = None
    axes = (*AXES, "node")

    def __post_init__(self) -> None:
        check_whole(
            "Graph", least=1, features=self.features, **({} if self.hidden is None else {"hidden": self.hidden})
        )
        if isinstance(self.edges, str):
            raise ConfigError(f"Graph: edges={self.edges!r} is one name; give a list of names, as ({self.edges!r},)")
        object.__setattr__(self, "edges", tuple(self.edges))
        if not self.edges or not all(isinstance(name, str) and name for name in self.edges):
            raise ConfigError(f"Graph: edges={self.edges!r} must be one or more names")
        if twice := sorted(repeated(self.relations)):
            raise ConfigError(f"Graph: two relations along edges have the name {twice[0]!r}")

    @property
    def feature_size(self) -> int:
        return self.features

    @property
    def relations(self) -> tuple[str, ...]:
        back = tuple(f"{name} back" for name in self.edges) if self.directed else ()
        return (*self.edges, *back)

    def encode(self, value: Any) -> Tokens:
        if not isinstance(value, Mapping) or {*value} != {"nodes", "edges"}:
            raise MediaError(f'Graph.encode: wanted {{"nodes": .., "edges": ..}}, not {describe(value)}')
        content_NF = self._nodes(value["nodes"])
        pairs: list[tuple[int, int, int]] = []
        for start, end, kind in self._edges(value["edges"], len(content_NF)):
            pairs += [(start, end, kind), (end, start, kind + len(self.edges) * self.directed)]
        return Tokens(content_NF, self.places(len(content_NF)), torch.tensor(pairs).reshape(-1, 3) if pairs else None)

    def _nodes(self, nodes: Any) -> Tensor:
        wanted = f"an array, tensor or list (nodes, {self.features})"
        array = as_numbers(nodes, "Graph.encode: nodes", wanted, kinds="fiub")
        if array.ndim != 2 or array.shape[1] != self.features:
            raise MediaError(f"Graph.encode: nodes: wanted {wanted} of numbers, not {describe(nodes)}")
        return as_floats(array, "Graph.encode: nodes")

    def _edges(self, edges: Any, nodes: int) -> list[tuple[int, int, int]]:
        """(from, to, number of the type) of each edge."""
        single = len(self.edges) == 1
        wanted = "(from, to)" if single else "(from, to, type)"
        if isinstance(edges, (np.ndarray, Tensor)):
            edges = edges.tolist()
        if not isinstance(edges, (list, tuple)):
            raise MediaError(f"Graph.encode: edges: wanted a list of {wanted}, not {describe(edges)}")
        found: dict[tuple[int, int, int], int] = {}
        for i, edge in enumerate(edges):
            if not isinstance(edge, (list, tuple)) or len(edge) != (2 if single else 3):
                raise MediaError(f"Graph.encode: edge {i} is {describe(edge)}, wanted {wanted}")
            ends = [node for node in edge[:2] if isinstance(node, (int, np.integer)) and not isinstance(node, bool)]
            if len(ends) < 2 or not all(0 <= node < nodes for node in ends):
                raise MediaError(
                    f"Graph.encode: edge {i} is {describe(edge)}, wanted two nodes, numbers from 0 to {nodes - 1}"
                )
            name = self.edges[0] if single else edge[2]
            if not isinstance(name, str) or name not in self.edges:
                raise MediaError(
                    f"Graph.encode: edge {i} has type {describe(name)}, not one of {listed(self.edges)}"
                    f"{did_you_mean(str(name), self.edges)}"
                )
            start, end, kind = int(ends[0]), int(ends[1]), self.edges.index(name)
            ways = [(start, end, kind)] if self.directed else [(start, end, kind), (end, start, kind)]
            if twice := [found[way] for way in ways if way in found]:
                more = "" if self.directed else "; an edge goes both ways, unless directed=True"
                raise MediaError(
                    f"Graph.encode: edge {i}, {describe(edge)}, is there already, as edge {twice[0]}; leave it out{more}"
                )
            found[start, end, kind] = i
        return [*found]

    def decode(self, tokens: Tokens) -> dict[str, Any]:
        """The nodes as a float32 array, and the edges; written nodes have none."""
        pairs = [] if tokens.pairs is None else tokens.pairs[::2].tolist()  # every second pair is the way back
        edges = [(start, end) if len(self.edges) == 1 else (start, end, self.edges[kind]) for start, end, kind in pairs]
        return {"nodes": tokens.content.numpy().copy(), "edges": edges}

    def places(self, count: int) -> Tensor:
        position_NA = torch.zeros(count, len(self.axes))
        position_NA[:, -1] = torch.arange(count)
        return position_NA

    def token_names(self, tokens: Tokens) -> list[str]:
        return [f"node {number:g}" for number in tokens.position_NA[:, -1].tolist()]

    def embed(self, width: int) -> nn.Module:
        return embedding(self.features, self.hidden, width)

    def examples(self) -> list[dict[str, Any]]:
        """Values for the conformance checks."""
        draw = np.random.default_rng(0)
        found = []
        for count in (5, 8, 8, 13):
            ends = {(min(pair), max(pair)): None for pair in draw.integers(0, count, (count, 2)).tolist()}
            edges = [(a, b) if len(self.edges) == 1 else (a, b, self.edges[a % len(self.edges)]) for a, b in ends]
            found.append({"nodes": draw.standard_normal((count, self.features)).astype(np.float32), "edges": edges})
        return found
