"""The graph: which values go where, in which order nodes run, what may run at once. Pure: descriptions in, plan out.

A node takes each of its op's inputs from the nodes it depends on, else from the request; where two of them make a
value of that name, or its name is another one, `inputs` says which: {"x": "node.value"} or {"x": "request.value"}.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from cube.errors import BadConfig, ServingError
from predictor.ops.op import Op, Port

REQUEST = "request"


class Mode(Enum):
    """What a node may do with the values of one that it depends on."""

    RO = "RO"  # read: they are read-only views
    RW = "RW"  # change: it gets a copy where anybody else reads them too


class Kind(Enum):
    """How the nodes of a workflow run."""

    SEQUENCE = "Sequence"  # one after the other
    PARALLEL = "Parallel"  # those of a stage at once


class Dependency(NamedTuple):
    """A node that another one takes values from, or only runs after."""

    node: str
    mode: Mode = Mode.RO


class Node(NamedTuple):
    """One use of an op."""

    name: str
    op: Op
    dependencies: tuple[Dependency, ...] = ()
    inputs: Mapping[str, str] = {}  # of the op → "node.value" or "request.value", where names alone do not say it
    when: str = ""  # "node.value", or "!node.value": a BOOL of each row. For other rows its outputs are zeros, or empty
    deadline_s: float | None = None  # of one run; None: the request's
    is_apart: bool = False  # the op has threads or processes of its own, so `run` returns at once


class Take(NamedTuple):
    """One input of a step."""

    name: str
    place: int  # among the values of a run
    is_copied: bool
    port: Port
    changes: bool = False  # the op may write to it


class Make(NamedTuple):
    """One output of a step."""

    name: str
    place: int
    port: Port
    is_frozen: bool  # stored as a read-only view


class Step(NamedTuple):
    """A node with its values bound to places in a run."""

    node: Node
    number: int  # in the order of the plan
    takes: tuple[Take, ...]
    makes: tuple[Make, ...]
    guard: int | None  # place of the BOOL values that say for which rows it runs
    guard_value: bool  # which of their values says so


class Plan(NamedTuple):
    """What an executor runs."""

    name: str
    kind: Kind
    request: Mapping[str, Port]  # what a request holds; its values come first, in this order
    steps: tuple[Step, ...]  # each after those it depends on
    stages: tuple[tuple[Step, ...], ...]  # steps that do not depend on each other
    outputs: Mapping[str, Make]  # of the reply, by name
    size: int  # values of a run

    @property
    def can_batch(self) -> bool:
        """Whether requests can be merged: request and reply go by rows, and the rows of two always fit together."""
        made = [make.port for step in self.steps for make in step.makes]
        ends = [*self.request.values(), *(make.port for make in self.outputs.values())]
        return all(port.goes_by_rows for port in ends) and not any(-1 in port.shape[1:] for port in (*ends, *made))


def plan(
    name: str,
    nodes: Sequence[Node],
    request: Mapping[str, Port],
    kind: Kind = Kind.SEQUENCE,
    outputs: Iterable[str] | None = None,
) -> Plan:
    """Check and order `nodes`. Raises BadConfig naming workflow, node and value.

    outputs: of the values of the last nodes (those that no other depends on) what makes the reply; None: all of them.
    """
    place = f"workflow {name!r}"
    in_order = ordered(place, nodes)
    taken_from = {dependency.node for node in nodes for dependency in node.dependencies}
    last = [node for node in in_order if node.name not in taken_from]
    return _Binding(place, request, in_order).bind(name, kind, last, outputs)


def bound(node: Node, ports: Mapping[str, Port], place: str) -> Mapping[str, Port]:
    """What a node's op makes of its inputs. place: of the node. Raises BadConfig, whatever the op raises."""
    try:
        return node.op.bind(ports)
    except BadConfig as error:
        raise BadConfig(f"{place} {error.place}", error.found, error.expected) from error
    except ServingError:
        raise
    except Exception as error:  # the op may be the user's
        raise BadConfig(place, f"{type(error).__name__}: {error}", "an op that takes its inputs") from error


def ordered(place: str, nodes: Iterable[Node]) -> list[Node]:
    """Each node after those it depends on. Raises BadConfig for names, dependencies and cycles that make none."""
    by_name: dict[str, Node] = {}
    for node in nodes:
        if node.name in by_name:
            raise BadConfig(f"{place} node {node.name!r}", "a second node of this name", "every name once")
        if node.name == REQUEST or "." in node.name or not node.name:
            raise BadConfig(f"{place} node {node.name!r}", "this name", "one without dots, other than 'request'")
        by_name[node.name] = node
    if not by_name:
        raise BadConfig(place, "no nodes", "at least one")
    _check_dependencies(place, by_name)
    return _ordered(place, by_name)


def _check_dependencies(place: str, by_name: Mapping[str, Node]) -> None:
    for node in by_name.values():
        seen: set[str] = set()
        for dependency in node.dependencies:
            if dependency.node not in by_name:
                others = [name for name in by_name if name != node.name]
                near = difflib.get_close_matches(dependency.node, others, 1)
                expected = repr(near[0]) if near else f"one of {', '.join(others)}" if others else "none: it is alone"
                raise BadConfig(f"{place} node {node.name!r} dependency", repr(dependency.node), expected)
            if dependency.node in seen:
                raise BadConfig(f"{place} node {node.name!r} dependency", f"{dependency.node!r} twice", "once")
            seen.add(dependency.node)


def _ordered(place: str, by_name: Mapping[str, Node]) -> list[Node]:
    """Each node after those it depends on, else as they are given. Raises BadConfig for a cycle, showing it."""
    ordered: list[Node] = []
    done: set[str] = set()
    left = list(by_name.values())
    while left:
        ready = next((n for n in left if all(d.node in done for d in n.dependencies)), None)
        if ready is None:
            raise BadConfig(place, f"a cycle: {' → '.join(_cycle(left))}", "nodes that do not wait for each other")
        left.remove(ready)
        done.add(ready.name)
        ordered.append(ready)
    return ordered


def _cycle(left: Sequence[Node]) -> list[str]:
    """A way from a node back to itself; every one of `left` waits for another of them."""
    waiting = {node.name: node for node in left}
    path, name = [], left[0].name
    while name not in path:
        path.append(name)
        name = next(d.node for d in waiting[name].dependencies if d.node in waiting)
    return [name, *reversed(path[path.index(name) :])]


class _Binding:
    """Gives every value a place, and every input of a node the place it reads."""

    def __init__(self, place: str, request: Mapping[str, Port], ordered: Sequence[Node]):
        self._place, self._request, self._ordered = place, request, ordered
        self._makes: dict[str, dict[str, tuple[int, Port]]] = {
            REQUEST: {name: (at, port) for at, (name, port) in enumerate(request.items())}
        }
        self._size = len(request)
        self._readers: dict[int, int] = {}  # of each place: how many steps read it
        self._changed: set[int] = set()  # places that a step takes to change

    def bind(self, name: str, kind: Kind, last: Sequence[Node], outputs: Iterable[str] | None) -> Plan:
        bound = [self._bound(node) for node in self._ordered]
        reply = self._reply(last, outputs)
        for place in reply.values():
            self._readers[place] = self._readers.get(place, 0) + 1
        steps = [self._step(number, *each) for number, each in enumerate(bound)]
        made = {make.place: make for step in steps for make in step.makes}
        depth: dict[str, int] = {}
        stages: list[list[Step]] = []
        for step in steps:
            depth[step.node.name] = at = max((depth[d.node] + 1 for d in step.node.dependencies), default=0)
            stages += [[]] * (at + 1 - len(stages))
            stages[at] = [*stages[at], step]
        return Plan(
            name=name,
            kind=kind,
            request=self._request,
            steps=tuple(steps),
            stages=tuple(map(tuple, stages)),
            outputs={output: made[place] for output, place in reply.items()},
            size=self._size,
        )

    def _bound(
        self, node: Node
    ) -> tuple[Node, list[tuple[str, int, bool, Port]], dict[str, tuple[int, Port]], int | None]:
        """Where a node's inputs come from, its outputs' places, and the place of what it runs for."""
        place = f"{self._place} node {node.name!r}"
        wanted = node.op.wanted()
        names = self._all_offered(node, place) if wanted is None else list(wanted)
        for name in node.inputs:
            if name not in names and wanted is not None:
                raise BadConfig(f"{place} input {name!r}", "no input of its op", f"one of {', '.join(names) or 'none'}")
        names += [name for name in node.inputs if name not in names]
        modes = {dependency.node: dependency.mode for dependency in node.dependencies}
        takes, ports = [], {}
        for name in names:
            source, at, port = self._found(node, name, place)
            ports[name] = port
            self._readers[at] = self._readers.get(at, 0) + 1
            changes = modes.get(source) is Mode.RW
            takes.append((name, at, changes, port))
            if changes:
                self._changed.add(at)
        made = bound(node, ports, place)
        if node.when and (fixed := [name for name, port in made.items() if not port.goes_by_rows]):
            raise BadConfig(f"{place} when", f"output {fixed[0]!r}, which does not go by rows", "outputs that do")
        self._makes[node.name] = {name: (self._size + i, port) for i, (name, port) in enumerate(made.items())}
        self._size += len(made)
        return node, takes, self._makes[node.name], self._guard(node, place)

    def _guard(self, node: Node, place: str) -> int | None:
        if not node.when:
            return None
        _, at, port = self._found(node._replace(inputs={"when": node.when.lstrip("!")}), "when", place)
        if port != Port("BOOL"):
            raise BadConfig(f"{place} when", f"{node.when!r}: {port}", "BOOL [-1], a value for each row")
        self._readers[at] = self._readers.get(at, 0) + 1
        return at

    def _all_offered(self, node: Node, place: str) -> list[str]:
        sources = [d.node for d in node.dependencies] or [REQUEST]
        names = [name for source in sources for name in self._makes[source]]
        for name in names:
            if names.count(name) > 1 and name not in node.inputs:
                raise BadConfig(f"{place} input {name!r}", f"several of {', '.join(sources)}", "inputs to say which")
        return list(dict.fromkeys(names))

    def _found(self, node: Node, name: str, place: str) -> tuple[str, int, Port]:
        """Source, place and port of one input."""
        if said := node.inputs.get(name):
            source, _, value = said.partition(".")
            if source != REQUEST and source not in {d.node for d in node.dependencies}:
                expected = (
                    f"{REQUEST} or a node it depends on: {', '.join(d.node for d in node.dependencies) or 'none'}"
                )
                raise BadConfig(f"{place} input {name!r}", f"{said!r}", expected)
            if value not in self._makes[source]:
                expected = f"one of {', '.join(f'{source}.{v}' for v in self._makes[source])}"
                raise BadConfig(f"{place} input {name!r}", f"{said!r}", expected)
            return source, *self._makes[source][value]
        sources = [d.node for d in node.dependencies if name in self._makes[d.node]]
        if len(sources) > 1:
            raise BadConfig(f"{place} input {name!r}", f"made by {' and '.join(sources)}", "inputs to say which")
        if not sources and name in self._makes[REQUEST]:
            sources = [REQUEST]
        if not sources:
            there = "; ".join(
                f"{source} makes {', '.join(self._makes[source]) or 'nothing'}"
                for source in (REQUEST, *(d.node for d in node.dependencies))
            )
            raise BadConfig(f"{place} input {name!r}", f"nothing that makes it ({there})", "a dependency that does")
        return sources[0], *self._makes[sources[0]][name]

    def _reply(self, last: Sequence[Node], outputs: Iterable[str] | None) -> dict[str, int]:
        """Places of the reply's values."""
        reply: dict[str, int] = {}
        for node in last:
            for name, (place, _) in self._makes[node.name].items():
                if name in reply:
                    raise BadConfig(f"{self._place} output {name!r}", "two of the last nodes that make it", "one")
                reply[name] = place
        if outputs is None:
            return reply
        for name in outputs:
            if name not in reply:
                raise BadConfig(f"{self._place} output {name!r}", "nothing that makes it", f"one of {', '.join(reply)}")
        return {name: reply[name] for name in outputs}

    def _step(
        self,
        number: int,
        node: Node,
        takes: list[tuple[str, int, bool, Port]],
        makes: dict[str, tuple[int, Port]],
        guard: int | None,
    ) -> Step:
        requests = len(self._request)
        return Step(
            node=node,
            number=number,
            # A value that only this step reads is handed over; a request's belongs to the caller's bytes.
            takes=tuple(Take(n, at, rw and (self._readers[at] > 1 or at < requests), p, rw) for n, at, rw, p in takes),
            makes=tuple(Make(n, at, p, not self._is_handed_over(at)) for n, (at, p) in makes.items()),
            guard=guard,
            guard_value=not node.when.startswith("!"),
        )

    def _is_handed_over(self, place: int) -> bool:
        """Whether the one step that reads a value may change it."""
        return self._readers.get(place, 0) == 1 and place in self._changed
