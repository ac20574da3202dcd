"""Program inputs → program outputs, by an engine."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cube.rpc.calls import Call
from predictor.engines.engine import Engine
from predictor.ops.op import Values


class Dense:
    """One run of the dense net."""

    compute: ClassVar[bool] = True

    def __init__(self, engine: Engine):
        self._engine = engine
        self.takes: tuple[str, ...] = tuple(tensor.name for tensor in engine.inputs)
        self.makes: tuple[str, ...] = tuple(tensor.name for tensor in engine.outputs)

    def run(self, values: Mapping[str, Any], call: Call) -> Values:
        call.remaining_s(at_most=1.0)  # nothing is computed for a caller who has gone
        return dict(zip(self.makes, self._engine.run([values[name] for name in self.takes]), strict=True))
