"""The graph: which op runs after which. Pure: names in, order out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cube.errors import BadConfig
from predictor.ops.op import Op


class Stage(NamedTuple):
    """Ops that run one after the other in the same place: a compute thread or the event loop."""

    compute: bool
    ops: tuple[Op, ...]


def stages(ops: Sequence[Op], wanted: Iterable[str]) -> list[Stage]:
    """Order ops so that each runs after those that make what it takes, and join neighbours of one kind.

    Raises BadConfig for a value that nothing makes, that two ops make, or for a cycle.
    """
    maker: dict[str, Op] = {}
    for op in ops:
        for name in op.makes:
            if name in maker:
                raise BadConfig(
                    f"value {name!r}", f"{_name(maker[name])} and {_name(op)}, which both make it", "one op"
                )
            maker[name] = op
    for name, taker in [(n, "the reply") for n in wanted] + [(n, _name(op)) for op in ops for n in op.takes]:
        if name not in maker:
            raise BadConfig(f"value {name!r}, which {taker} takes", "no op that makes it", f"one of {', '.join(maker)}")
    ordered: list[Op] = []
    made: set[str] = set()
    left = list(ops)
    while left:
        ready = next((op for op in left if made.issuperset(op.takes)), None)
        if ready is None:
            raise BadConfig("workflow", f"a cycle among {', '.join(map(_name, left))}", "an order")
        left.remove(ready)
        ordered.append(ready)
        made.update(ready.makes)
    grouped: list[Stage] = []
    for op in ordered:
        if grouped and grouped[-1].compute == op.compute:
            grouped[-1] = Stage(op.compute, (*grouped[-1].ops, op))
        else:
            grouped.append(Stage(op.compute, (op,)))
    return grouped


def _name(op: Op) -> str:
    return type(op).__name__.lower()
