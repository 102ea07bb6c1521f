"""Emits whole graphs for LiteRT: what follows what, loops and branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...graph import Graph, Node, Value
from .operators import Emitter

_FUSED = {"relu": "RELU", "relu6": "RELU6"}


class GraphEmitter(Emitter):
    """Appends the operators of a graph; those of its loops to graphs beside it.

    Args:
      s: the schema.
      around: the emitter of the graph around this one.
    """

    def __init__(self, s: Any, around: GraphEmitter | None = None):
        super().__init__(s)
        self.subgraphs: list[Any] = []
        # Graphs of one file have their own tensors and share all else.
        if around is not None:
            self.buffers, self.codes = around.buffers, around.codes
            self.names, self.subgraphs = around.names, around.subgraphs
        self.place = len(self.subgraphs)
        # Reserves the number, which the loop's operator needs before the graph is
        # finished.
        self.subgraphs.append(None)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int], name: str) -> Any:
        """Return the graph, which has its place among the file's."""
        graph = self.subgraphs[self.place] = self.s.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs, graph.name = list(inputs), list(outputs), name
        return graph

    def emit_all(self, graph: Graph, names: Mapping[Value, str]) -> None:
        """Append the operators of a graph."""
        uses = graph.uses()
        names = {**names, **{n.out: n.name for n in graph.linear()}}
        skip: set[Node] = set()
        readers: dict[Value, Node] = {v: n for n in graph.nodes for v in n.inputs}
        behind: dict[Value, str] = {}
        for node in graph.nodes:
            # Other operations are named after the layer in front of them.
            place = node.name or next(
                (behind[v] for v in node.inputs if v in behind), ""
            )
            behind |= dict.fromkeys(node.outputs, place)
            if node in skip:
                continue
            follower = readers.get(node.out) if len(node.outputs) == 1 else None
            fused = ""
            if node.op in ("conv", "dense", "add", "sub", "mul") and follower:
                # Another reader would need the value in front of the activation.
                lone = uses[node.out] == 1 and follower.op in _FUSED
                if lone and node.out.dtype == np.float32:
                    fused = _FUSED[follower.op]
                    skip.add(follower)
                    # The layer's output is what comes out of the activation.
                    names.setdefault(follower.out, names.get(node.out, ""))
                    node = Node(
                        node.op, node.inputs, follower.outputs, node.attrs, node.name
                    )
            for value in node.outputs:
                other = f"{place}/{node.op}" if place else node.op
                self.tensor(value, names.get(value, "") or other)
            self.emit(node, fused)

    def _inside(
        self, inputs: Sequence[Value], fill: Callable[[GraphEmitter], Sequence[int]]
    ) -> int:
        """Return the number of a new graph of these inputs."""
        part = GraphEmitter(self.s, self)
        taken = [part.tensor(value, "taken") for value in inputs]
        part.finish(taken, fill(part), f"body{part.place}")
        return part.place

    def _returned(self, body: Graph) -> list[int]:
        """Append the operators of a body and return its outputs, each its own."""
        self.emit_all(body, {})
        made = {self.tensor(v) for node in body.nodes for v in node.outputs}
        found = []
        for value in body.outputs:
            index = self.tensor(value)
            if index not in made:  # an input, a constant, or the same output again
                dims = value.dims or value.shape
                given = [-1 if isinstance(n, str) else n for n in dims]
                index = self._reshaped(index, value, value.shape, given)
            made.discard(index)
            found.append(index)
        return found

    def _reshaped(
        self, index: int, value: Value, shape: Sequence[int], given: Any = None
    ) -> int:
        out = Value(tuple(shape), value.dtype)
        given = list(given or shape)
        inputs = [index, self.constant(np.asarray(given, np.int32))]
        self.op("RESHAPE", inputs, [out], "ReshapeOptions", newShape=given)
        return self.tensor(out)

    def _cond(self, node: Node, fused: str) -> None:
        no, yes = (
            self._inside(body.inputs, lambda part, body=body: part._returned(body))
            for body in node.attrs["bodies"]
        )
        inputs = [self.tensor(value) for value in node.inputs]
        places = {"thenSubgraphIndex": yes, "elseSubgraphIndex": no}
        self.op("IF", inputs, node.outputs, "IfOptions", **places)

    def _loop(
        self,
        inputs: Sequence[int],
        outputs: Sequence[Value],
        test: Callable[[GraphEmitter, Sequence[Value]], int],
        state: Sequence[Value],
        step: Callable[[GraphEmitter], Sequence[int]],
    ) -> None:
        """Append a WHILE: as many inputs as outputs, whose shapes stay."""
        fresh = [Value(value.shape, value.dtype) for value in state]
        places = {
            "condSubgraphIndex": self._inside(fresh, lambda part: [test(part, fresh)]),
            "bodySubgraphIndex": self._inside(state, step),
        }
        self.op("WHILE", inputs, outputs, "WhileOptions", **places)

    def _while(self, node: Node, fused: str) -> None:
        (body,), captured = node.attrs["bodies"], node.attrs["captured"]
        on = Value((), np.dtype(np.bool_))
        state = [on, *body.inputs]

        def step(part: GraphEmitter) -> list[int]:
            again, *carried = part._returned(body)
            return [again, *map(part.tensor, body.inputs[:captured]), *carried]

        outputs = [Value(v.shape, v.dtype) for v in state[: captured + 1]]
        self._loop(
            *([self.tensor(value) for value in node.inputs],),
            *([*outputs, *node.outputs],),
            *(lambda part, fresh: part.tensor(fresh[0]), state, step),
        )

    def _scan(self, node: Node, fused: str) -> None:
        p = node.attrs
        (body,), length = p["bodies"], p["length"]
        kept = p["captured"] + p["carried"]
        results = node.outputs[p["carried"] :]
        count = Value((), np.dtype(np.int32))
        stacks = [Value(v.shape, v.dtype) for v in node.inputs[kept:]]
        made = [Value(v.shape, v.dtype) for v in results]
        state = [count, *body.inputs[:kept], *stacks, *made]

        def step(part: GraphEmitter) -> list[int]:
            at = number = part.tensor(count)
            if p["reverse"]:
                back, last = Value((), count.dtype), part.constant(length - 1)
                part.op("SUB", [last, number], [back])
                at = part.tensor(back)
            for stack, row in zip(stacks, body.inputs[kept:]):
                taken = [part.tensor(stack), at]
                part.op("GATHER", taken, [row], "GatherOptions", axis=0)
            ends = part._returned(body)
            following = Value((), count.dtype)
            part.op("ADD", [number, part.constant(1)], [following])
            first = part._reshaped(at, count, (1,))
            put = []
            for whole, end in zip(made, ends[p["carried"] :]):
                row = Value(whole.shape[1:], whole.dtype)
                start, rank = first, len(whole.shape)
                if rank > 1:
                    place = Value((rank,), count.dtype)
                    parts = [first, part.constant(np.zeros(rank - 1))]
                    part.op("CONCATENATION", parts, [place], "ConcatenationOptions")
                    start = part.tensor(place)
                one = part._reshaped(end, row, (1, *row.shape))
                out = Value(whole.shape, whole.dtype)
                part.op("DYNAMIC_UPDATE_SLICE", [part.tensor(whole), one, start], [out])
                put.append(part.tensor(out))
            same = [*body.inputs[: p["captured"]], *stacks]
            kinds = list(map(part.tensor, same))
            carried = ends[: p["carried"]]
            return [
                part.tensor(following),
                *kinds[: p["captured"]],
                *carried,
                *kinds[p["captured"] :],
                *put,
            ]

        def test(part: GraphEmitter, fresh: Sequence[Value]) -> int:
            on = Value((), np.dtype(np.bool_))
            part.op("LESS", [part.tensor(fresh[0]), part.constant(length)], [on])
            return part.tensor(on)

        # WHILE takes as many inputs as it has outputs, so results enter as zeros and
        # are filled row by row.
        empty = []
        for value in results:
            out = Value(value.shape, value.dtype)
            zero = self.constant(0, value.dtype)
            self.op("FILL", [self.constant(value.shape), zero], [out], "FillOptions")
            empty.append(self.tensor(out))
        inputs = [self.constant(0), *map(self.tensor, node.inputs), *empty]
        # What only the loop needs comes out of it, too.
        unread = [Value(v.shape, v.dtype) for v in state]
        n = len(state) - len(made)
        outputs = [
            *unread[: 1 + p["captured"]],
            *node.outputs[: p["carried"]],
            *unread[1 + kept : n],
            *results,
        ]
        self._loop(inputs, outputs, test, state, step)
