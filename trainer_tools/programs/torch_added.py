"""What a torch program adds to ids before it looks them up, such as where each field's rows begin in one table of all.

ids ──▶ add ──▶ embedding          ids + constants; constants are what comes out where every input is 0
         ▲
[0, 20, 50]
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

_WHOLE = {torch.int32, torch.int64}


class Constants:
    """Which values of a graph are constants, and what is added to which others."""

    def __init__(self, graph: fx.Graph, changed: Collection[fx.Node], tensors: Mapping[str, torch.Tensor]):
        """changed: tensors of the program that its ops write to. tensors: all it has, by name."""
        self._tensors = tensors
        self._constant: set[fx.Node] = set()
        for node in graph.nodes:
            if node not in changed and self._follows(node):
                self._constant.add(node)

    def base(self, node: fx.Node) -> fx.Node | None:
        """Of whole numbers plus or minus constants: those numbers. None if a node is anything else."""
        packet = str(getattr(node.target, "_overloadpacket", ""))
        if packet not in ("aten.add", "aten.sub") or node.meta["val"].dtype not in _WHOLE:
            return None
        first, second = node.args[:2]
        if packet == "aten.add" and self._is_constant(first) and node.kwargs.get("alpha", 1) == 1:
            first, second = second, first
        is_shifted = isinstance(first, fx.Node) and not self._is_constant(first) and self._is_constant(second)
        return first if is_shifted and first.meta["val"].dtype in _WHOLE else None  # type: ignore[union-attr, return-value]

    def added(self, node: fx.Node, zeros: Mapping[str, torch.Tensor]) -> NDArray[np.int64]:
        """What is added to each number of a value that is made of an input by moves and such sums alone.

        zeros: a value for each input, of any sizes that the program takes; the result is for these sizes.
        """
        values: dict[fx.Node, Any] = {}

        def value(of: fx.Node) -> Any:
            if of not in values:
                if of.op == "placeholder":
                    values[of] = zeros[of.name]
                elif of.op == "get_attr":
                    values[of] = self._tensors[str(of.target)]
                else:
                    args, kwargs = fx.map_arg((of.args, dict(of.kwargs)), value)
                    values[of] = of.target(*args, **kwargs)  # type: ignore[operator]
            return values[of]

        with torch.inference_mode():
            made: NDArray[np.int64] = value(node).numpy().astype(np.int64)
        return made

    def _is_constant(self, value: Any) -> bool:
        return isinstance(value, int) or value in self._constant

    def _follows(self, node: fx.Node) -> bool:
        """Whether a node is a tensor of the program, or is computed of constants alone and the same each time."""
        if node.op == "get_attr":
            return str(node.target) in self._tensors
        is_aten = str(getattr(node.target, "_overloadpacket", "")).startswith("aten.")
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        return is_aten and not is_random and all(given in self._constant for given in node.all_input_nodes)
