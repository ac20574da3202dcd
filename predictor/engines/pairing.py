"""The same program by two engines, under one set of names: an exporter may name inputs and outputs as it likes.

torch.export keeps what a net's `forward` calls its inputs and the keys of the dict it returns (else output_0, ...);
torch.onnx calls outputs after the op that makes them (linear, 7), and with `dynamo=False` inputs too (onnx::Gemm_0).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from predictor.engines.engine import Engine, Feed
from predictor.tensors import shape_text
from trainer_tools.manifest import Tensor


class Unlike(Exception):
    """Two engines whose inputs or outputs are not each other's. Its text has both lists."""


def named_as(first: Engine, engine: Engine) -> Engine:
    """An engine with the names, and in the order, of the first one's inputs and outputs. Raises Unlike.

    Where both have the same names these pair them. Else their order does: number and datatypes are to be equal, and
    shapes, though the other engine may leave open (-1) what the first one says. A name that both have must be in the
    same place; inputs that are called otherwise must differ from each other in datatype or shape, for nobody would see
    that two are exchanged where a request happens to hold the same in both. Exchanged outputs are seen: whoever takes
    an engine for another one compares their answers first.
    """
    inputs = _order("inputs", _side(first, first.inputs), _side(engine, engine.inputs))
    outputs = _order("outputs", _side(first, first.outputs), _side(engine, engine.outputs))
    if (engine.inputs, engine.outputs) == (first.inputs, first.outputs):
        return engine
    return _Renamed(engine, first, inputs, outputs)


def listed(tensors: Sequence[Tensor]) -> str:
    """Names, datatypes and shapes, for people."""
    return ", ".join(f"{tensor.name} {tensor.datatype} {shape_text(tensor.shape)}" for tensor in tensors) or "none"


class _Side(NamedTuple):
    """Inputs or outputs of an engine."""

    tensors: Sequence[Tensor]
    lod_levels: Mapping[str, int]

    def names(self) -> list[str]:
        return [tensor.name for tensor in self.tensors]

    def kind(self, at: int) -> tuple[str, tuple[int, ...], int]:
        """What tells a tensor from others besides its name."""
        tensor = self.tensors[at]
        return tensor.datatype, tuple(tensor.shape), self.lod_levels.get(tensor.name, 0)


def _side(engine: Engine, tensors: Sequence[Tensor]) -> _Side:
    return _Side(tensors, engine.lod_levels)


def _order(what: str, first: _Side, other: _Side) -> list[int]:
    """For each tensor of the first side which one of the other it is."""
    names, theirs = first.names(), other.names()
    is_by_name = sorted(names) == sorted(theirs)
    order = [theirs.index(name) for name in names] if is_by_name else list(range(len(names)))
    fits = len(names) == len(theirs) and all(_fits(first.kind(at), other.kind(to)) for at, to in enumerate(order))
    why = "" if fits else "are not those of the first, {}"
    if fits and not is_by_name:
        renamed = [at for at, name in enumerate(names) if name != theirs[at]]
        if any(names[at] in theirs for at in renamed):
            why = "have names in other places than those of the first, {}"
        elif what == "inputs" and len({first.kind(at) for at in renamed}) < len(renamed):
            why = "are called otherwise than those of the first, {}, and nothing but their order tells which is which"
    if why:
        raise Unlike(f"its {what}, {listed(other.tensors)}, {why.format(listed(first.tensors))}")
    return order


def _fits(first: tuple[str, tuple[int, ...], int], other: tuple[str, tuple[int, ...], int]) -> bool:
    (datatype, shape, lod), (other_datatype, other_shape, other_lod) = first, other
    if (datatype, lod, len(shape)) != (other_datatype, other_lod, len(other_shape)):
        return False
    return all(theirs in (size, -1) for size, theirs in zip(shape, other_shape, strict=True))


class _Renamed:
    """An engine under another one's names."""

    def __init__(self, engine: Engine, first: Engine, inputs: Sequence[int], outputs: Sequence[int]):
        """inputs, outputs: for each of the first one's, the number of the engine's own."""
        self._engine, self._outputs = engine, outputs
        self._feeds = sorted(range(len(inputs)), key=inputs.__getitem__)  # for each own input the feed that is for it
        self.platform, self.inputs, self.outputs = engine.platform, first.inputs, first.outputs
        self.lod_levels = first.lod_levels
        if list(inputs) == sorted(inputs) and list(outputs) == sorted(outputs):
            self.run = engine.run  # type: ignore[method-assign]  # names alone cost a run nothing

    def run(self, feeds: Sequence[Feed]) -> list[Any]:
        """See Engine."""
        made = self._engine.run([feeds[at] for at in self._feeds])
        return [made[at] for at in self._outputs]

    def close(self) -> None:
        """See Engine."""
        self._engine.close()
        del self._engine
