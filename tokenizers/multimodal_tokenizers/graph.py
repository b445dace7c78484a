"""Graphs: a token for each node, and relations along the edges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.media.sources import as_floats, as_numbers
from multimodal.shapes import AXES, ConfigError, MediaError, did_you_mean
from multimodal.texts import repeated
from multimodal.tokenizer import Tokenizer, Tokens, describe


@dataclass(frozen=True)
class Graph(Tokenizer):
    """{"nodes": numbers (n, features), "edges": [(from, to), ..]}; nodes are counted from 0, and each is a token.

    An edge relates its nodes, so that `masks.Linked("edge")` attends along edges and `attention.Related("edge")` prefers them.
    Where there are several sorts of edges, each is (from, to, sort). `EachRow(of=..)` answers the nodes.

    Nodes have no order: they all stand at time 0, row 0, column 0, and are told apart on an axis of their own. The core has to know
    it, and permuted nodes have permuted answers if it does not rotate by it: `Core(axes=Graph.axes, rotary_split=(2, 1, 1, 0))`.

    features: F, numbers of a node.
    edges: names of the sorts of edges.
    directed: whether (0, 1) is another edge than (1, 0). Then 0 is related to 1 by "edge", and 1 to 0 by "edge back"; else both by
        "edge".
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
        for name, number in (("features", self.features), ("hidden", self.hidden)):
            if number is not None and (type(number) is not int or number < 1):
                raise ConfigError(f"Graph: {name}={number!r} must be a whole number of at least 1")
        if isinstance(self.edges, str):
            raise ConfigError(f"Graph: edges={self.edges!r} is one name; give a list of names, as ({self.edges!r},)")
        object.__setattr__(self, "edges", tuple(self.edges))
        if not self.edges or not all(isinstance(name, str) and name for name in self.edges):
            raise ConfigError(f"Graph: edges={self.edges!r} must be one or more names")
        if twice := sorted(repeated(self.relations)):
            raise ConfigError(f"Graph: the edges have the name {twice[0]!r} twice")

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
        for start, end, sort in self._edges(value["edges"], len(content_NF)):
            pairs += [(start, end, sort), (end, start, sort + len(self.edges) * self.directed)]
        return Tokens(content_NF, self.places(len(content_NF)), torch.tensor(pairs).reshape(-1, 3) if pairs else None)

    def _nodes(self, nodes: Any) -> Tensor:
        wanted = f"an array, tensor or list (nodes, {self.features})"
        array = as_numbers(nodes, "Graph.encode: nodes", wanted, kinds="fiub")
        if array.ndim != 2 or array.shape[1] != self.features:
            raise MediaError(f"Graph.encode: nodes: wanted {wanted} of numbers, not {describe(nodes)}")
        return as_floats(array, "Graph.encode: nodes")

    def _edges(self, edges: Any, nodes: int) -> list[tuple[int, int, int]]:
        """(from, to, number of the sort) of each edge."""
        single = len(self.edges) == 1
        wanted = "(from, to)" if single else "(from, to, sort)"
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
                    f"Graph.encode: edge {i} is {describe(edge)}, but nodes are numbers from 0 to {nodes - 1}"
                )
            name = self.edges[0] if single else edge[2]
            if not isinstance(name, str) or name not in self.edges:
                raise MediaError(
                    f"Graph.encode: edge {i}: there is no sort {describe(name)} of edges; there are {', '.join(self.edges)}"
                    f"{did_you_mean(str(name), self.edges)}"
                )
            start, end, sort = int(ends[0]), int(ends[1]), self.edges.index(name)
            ways = [(start, end, sort)] if self.directed else [(start, end, sort), (end, start, sort)]
            if twice := [found[way] for way in ways if way in found]:
                more = "" if self.directed else "; edges go both ways, unless directed=True"
                raise MediaError(
                    f"Graph.encode: edge {i}, {describe(edge)}, is there already, as edge {twice[0]}; leave it out{more}"
                )
            found[start, end, sort] = i
        return [*found]

    def decode(self, tokens: Tokens) -> dict[str, Any]:
        """The nodes as a float32 array, and the edges, of which there are none where nodes are written."""
        pairs = [] if tokens.pairs is None else tokens.pairs[::2].tolist()  # each second one is the way back
        edges = [(start, end) if len(self.edges) == 1 else (start, end, self.edges[sort]) for start, end, sort in pairs]
        return {"nodes": tokens.content.numpy().copy(), "edges": edges}

    def places(self, count: int) -> Tensor:
        position_NA = torch.zeros(count, len(self.axes))
        position_NA[:, -1] = torch.arange(count)
        return position_NA

    def token_names(self, tokens: Tokens) -> list[str]:
        return [f"node {number:g}" for number in tokens.position_NA[:, -1].tolist()]

    def embed(self, width: int) -> nn.Module:
        if self.hidden is None:
            return nn.Linear(self.features, width)
        return nn.Sequential(nn.Linear(self.features, self.hidden), nn.GELU(), nn.Linear(self.hidden, width))

    def examples(self) -> list[dict[str, Any]]:
        """Values for the conformance checks."""
        draw = np.random.default_rng(0)
        found = []
        for count in (5, 8, 8, 13):
            ends = {(min(pair), max(pair)): None for pair in draw.integers(0, count, (count, 2)).tolist()}
            edges = [(a, b) if len(self.edges) == 1 else (a, b, self.edges[a % len(self.edges)]) for a, b in ends]
            found.append({"nodes": draw.standard_normal((count, self.features)).astype(np.float32), "edges": edges})
        return found
