"""What a request must hold for a workflow, where nothing declares it: what nodes take and none of them makes. Pure."""

from collections.abc import Collection, Mapping, Sequence

from cube.errors import BadConfig
from predictor.ops.op import Port
from predictor.ops.values import PassOn
from predictor.workflow import REQUEST, Node, bound, ordered

_BOOL = Port("BOOL")
_ECHOED = {"text": Port("BYTES")}
_DECLARE = "inputs { name: ... datatype: ... } of the workflow, which say what a request holds"


def request_ports(
    place: str, nodes: Sequence[Node], declared: Mapping[str, Port], of_lookups: Collection[str]
) -> dict[str, Port]:
    """The values of a request, by name. Raises BadConfig naming the node.

    place: of the workflow. declared: if not empty, all there are but those of lookups. of_lookups: names of keys and
    their weights, whose form the lookups say.
    """
    if not declared:
        return _Search(place).through(ordered(place, nodes))
    wanted = [item for node in nodes for item in (node.op.wanted() or {}).items()]
    return {**{name: port for name, port in wanted if name in of_lookups}, **declared}


class _Search:
    """Goes through the nodes and notes what they take of the request."""

    def __init__(self, place: str):
        self._place = place
        self._found: dict[str, Port] = {}
        self._makes: dict[str, Mapping[str, Port] | None] = {REQUEST: None}  # None: passes a request on

    def through(self, nodes: Sequence[Node]) -> dict[str, Port]:
        """nodes: each after those it depends on."""
        for node in nodes:
            if isinstance(node.op, PassOn) and all(self._makes[d.node] is None for d in node.dependencies):
                self._makes[node.name] = None
            else:
                place = f"{self._place} node {node.name!r}"
                self._makes[node.name] = bound(node, self._taken(node, place), place)
                if node.when:
                    self._take(node, "when", _BOOL, node.when.lstrip("!"), place)
        return self._found or dict(_ECHOED)  # nodes that only pass on what comes

    def _taken(self, node: Node, place: str) -> dict[str, Port]:
        """What a node is given."""
        wanted = node.op.wanted()
        if wanted is not None:
            return {
                name: self._take(node, name, port, node.inputs.get(name, ""), place) for name, port in wanted.items()
            }
        taken: dict[str, Port] = {}
        for dependency in node.dependencies:
            made = self._makes[dependency.node]
            if made is None:
                raise BadConfig(place, "an op that takes all there is of a request", _DECLARE)
            taken |= made
        if not node.dependencies and not node.inputs:
            raise BadConfig(place, "an op that takes all there is of a request", _DECLARE)
        for name, said in node.inputs.items():
            taken[name] = self._take(node, name, Port("", ()), said, place)
        return taken

    def _take(self, node: Node, name: str, port: Port, said: str, place: str) -> Port:
        """Where an input comes from; noted if that is the request. Wrong names are left for `plan` to tell."""
        if said:
            source, _, value = said.partition(".")
            sources = [source]
        else:
            value, sources = name, [dependency.node for dependency in node.dependencies]
        for source in sources:
            made = self._makes.get(source, {})
            if made is not None and value in made:
                return made[value]
        if said and self._makes.get(sources[0], {}) is not None:
            return port
        if not port.datatype and value not in self._found:
            raise BadConfig(f"{place} input {name!r}", f"nothing that says what {value!r} holds", _DECLARE)
        self._found[value] = self._narrowed(value, port, place)
        return self._found[value]

    def _narrowed(self, value: str, port: Port, place: str) -> Port:
        """What suits this node and those before it."""
        before = self._found.get(value, port)
        if not port.datatype:
            return before
        if before._replace(shape=()) != port._replace(shape=()) or len(before.shape) != len(port.shape):
            raise BadConfig(f"{place} input {value!r}", f"{port}, and another node takes {before}", "one of the two")
        if any(a != b and -1 not in (a, b) for a, b in zip(before.shape, port.shape, strict=True)):
            raise BadConfig(f"{place} input {value!r}", f"{port}, and another node takes {before}", "one of the two")
        return port._replace(shape=tuple(max(a, b) for a, b in zip(before.shape, port.shape, strict=True)))
