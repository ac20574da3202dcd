"""The embedding lookups of a torch.export program: which ops do one, what they read, what stands against cutting one.

    embedding               rows of ids of any shape; also index_select and indexing of a parameter
    embedding_bag           rows of ids, pooled: bag b owns ids[offsets[b] : offsets[b + 1]]

and what torch's decompositions make of them. A graph here is that of `ExportedProgram.module()`, in which parameters
are get_attr nodes; names are those of its nodes, the same each time it is made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

from trainer_tools.programs.torch_added import Constants

Pooling = Literal["none", "sum", "mean", "max"]

_BAGS = {"embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"}
_POOLINGS: dict[int, Pooling] = {0: "sum", 1: "mean", 2: "max"}  # numbers of embedding_bag's `mode`
# Ops that only move numbers about: what comes out is ids that a request can hold as they are.
_MOVES = {
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "cat", "chunk", "clone", "concat", "concatenate",
    "contiguous", "detach", "expand", "flatten", "getitem", "hstack", "lift_fresh_copy", "movedim", "narrow",
    "permute", "repeat", "reshape", "select", "select_copy", "slice", "slice_copy", "split", "split_with_sizes",
    "squeeze", "stack", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "vstack",
}  # fmt: skip
_IN_ORDER = {"_to_copy", "alias", "clone", "contiguous", "detach", "to"}  # and every number stays in its place
_FLAT = {"_reshape_alias", "_unsafe_view", "flatten", "reshape", "view"}  # or at least in its order
_SAME_TABLE = {"alias", "detach", "lift_fresh_copy"}
# What ids may be cast to on their way: every row number of a table stays what it is.
_WIDE = {torch.int32, torch.int64, torch.float32, torch.float64}
# Where torch rounds what it has added so far, or the sum before it divides.
_ROUNDED = {(torch.bfloat16, "sum"), (torch.bfloat16, "mean"), (torch.float16, "mean")}
_ROWS = {torch.float32, torch.float16, torch.bfloat16}


class TorchLookup(NamedTuple):
    """One lookup. Names are those of nodes."""

    name: str
    op: str
    table: str  # the parameter; empty where there is none
    pooling: Pooling
    output: str  # the rows, or a row for each bag
    ids: str
    called: str  # what ids are called in a request: as the program's input where they are one as it is
    inputs: list[str]  # of the program, from which ids are arranged; mostly just themselves
    offsets: str | None = None  # of a bag
    has_end: bool = False  # whether the last offset is where the last bag ends
    is_even: bool = False  # whether offsets follow from the shape of ids alone: all bags are as long
    weights: str | None = None  # of a bag: a number for each id
    padding: int | None = None  # of a bag: the id that is as if it were not there
    slots: int | None = None  # of a bag: how many bags each sample has; None: that is not told
    added: tuple[int, ...] = ()  # constants that are added to ids: one for all, or for each id of a sample or a bag
    obstacle: str = ""  # why it cannot be cut; empty if it can

    def of_bags(self) -> list[str]:
        """What says where bags begin, and weighs what is in them."""
        return [name for name in (self.offsets, self.weights) if name is not None]


def op_of(node: fx.Node) -> str:
    """The name of what a node does: add, embedding, getitem ..."""
    packet = getattr(node.target, "_overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(node.target, "__name__", str(node.target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """What an op is given, by the names of its schema."""
    schema: Any = node.target
    return dict(zip([a.name for a in schema._schema.arguments], node.args, strict=False)) | node.kwargs


def find(program: ExportedProgram, module: fx.GraphModule, zeros: Mapping[str, torch.Tensor]) -> list[TorchLookup]:
    """Every lookup that the outputs depend on, in the program's order.

    module: of this program. zeros: for each input, of sizes that the program takes.
    """
    tables = {**program.state_dict, **program.constants}
    finder = _Finder(module.graph, {name: t for name, t in tables.items() if isinstance(t, torch.Tensor)}, zeros)
    found = [finder.lookup(node) for node in module.graph.nodes if finder.is_lookup(node)]
    for name, part in module.named_modules():
        if isinstance(part, fx.GraphModule) and part is not module:
            found += [_inner(name, node) for node in part.graph.nodes if _is_named_lookup(node)]
    return found


def times(size: int | torch.SymInt, unit: int | torch.SymInt | str) -> int | None:
    """How many times a size is another, or the one of that name; None if that varies or is no whole number.

    Found by trying some sizes: there are roundings in what torch says of them that it could leave out.
    """
    symbols = {
        str(s) for given in (size, unit) if isinstance(given, torch.SymInt) for s in given.node.expr.free_symbols
    }
    names = sorted(symbols | ({unit} if isinstance(unit, str) else set()))
    found: set[int | None] = set()
    for least in (7, 11, 30):
        sizes = {name: least + 6 * at for at, name in enumerate(names)}
        whole, part = _tried(size, sizes), sizes[unit] if isinstance(unit, str) else _tried(unit, sizes)
        found.add(whole // part if part and whole % part == 0 else None)
    return found.pop() if len(found) == 1 else None


def _tried(size: int | torch.SymInt, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))


class _Finder:
    """What is known of one graph."""

    def __init__(self, graph: fx.Graph, tables: Mapping[str, torch.Tensor], zeros: Mapping[str, torch.Tensor]):
        self._tables, self._zeros = tables, zeros
        self._live = _live(graph)
        self._changed = dict(self._changes(graph))
        self._constants = Constants(graph, self._changed, tables)
        self._same = _same_values(graph)
        self._before_sums = _same_values(graph, self._constants.base)
        self._named: dict[tuple[fx.Node, tuple[int, ...]], str] = {}

    def is_lookup(self, node: fx.Node) -> bool:
        """Whether a node is one that the outputs depend on."""
        if node not in self._live or node.op != "call_function":
            return False
        return _is_named_lookup(node) or (op_of(node) in ("index", "index_select") and self._is_indexing(node))

    def lookup(self, node: fx.Node) -> TorchLookup:
        """The lookup that a node does."""
        given, op = arguments(node), op_of(node)
        table = self._table(given.get("weight", given.get("self")))
        ids: fx.Node = given["indices"][0] if op == "index" else given["index" if op == "index_select" else "indices"]
        inputs, obstacle = _origins(ids, "ids", self._constants)
        name = table.target if table is not None else ""
        if op not in _BAGS:
            added, uneven = ((), "") if obstacle else self._added(ids, ids.meta["val"].shape[:1])
            return TorchLookup(
                node.name,
                op,
                str(name),
                "none",
                node.name,
                self._name(ids) if uneven else self._ids_name(ids, added),
                self._called(ids, _IN_ORDER),
                inputs,
                added=added,
                obstacle=self._obstacle(table) or obstacle or uneven,
            )
        pooling = _POOLINGS[given.get("mode", 0)]
        offsets, weights = given["offsets"], given.get("per_sample_weights")
        padding = given.get("padding_idx")
        pooled = next((user for user in node.users if _item(user) == 0), node)
        is_even = op_of(_first(offsets)) == "arange"
        added, uneven = ((), "") if obstacle else self._added(ids, node.meta["val"][0].shape[:1] if is_even else ())
        if padding is not None and padding < 0 and op == "embedding_bag" and table is not None:
            padding += len(self._tables[str(name)])  # torch counts from the end; its inner ops mean none
        return TorchLookup(
            node.name,
            f"{pooling} embedding_bag",
            str(name),
            pooling,
            pooled.name,
            self._name(ids) if uneven else self._ids_name(ids, added),
            self._called(ids, _IN_ORDER | _FLAT),
            inputs,
            self._name(offsets),
            bool(given.get("include_last_offset", False)),
            is_even,
            None if weights is None else self._name(weights),
            padding if padding is not None and padding >= 0 else None,
            None,
            added,
            self._obstacle(table)
            or obstacle
            or uneven
            or self._bag_obstacle(node, str(name), pooling, offsets, weights),
        )

    def _added(self, ids: fx.Node, groups: Sequence[Any]) -> tuple[tuple[int, ...], str]:
        """What the program adds to ids, and what stands against saying it.

        groups: how many samples or bags the ids are of, as the graph says it; empty if these have any number each.
        """
        if not self._has_sums(ids):
            return (), ""
        added = self._constants.added(ids, self._zeros)
        if (added == added.flat[0]).all():
            return (int(added.flat[0]),), ""
        if groups and (width := times(ids.meta["val"].numel(), groups[0])):
            of_each = added.reshape(-1, width)
            if (of_each == of_each[0]).all():
                return tuple(of_each[0].tolist()), ""
        return (), "to its ids constants are added that are not the same in every sample"

    def _has_sums(self, ids: fx.Node) -> bool:
        """Whether constants are added to ids on their way."""
        todo = [ids]
        while todo:
            at = todo.pop()
            if self._constants.base(at) is not None:
                return True
            todo += [given for given in at.all_input_nodes if _is_tensor(given)]
        return False

    def _called(self, ids: fx.Node, ops: set[str]) -> str:
        """The name of the input that ids are but for some ops and sums, with that of a column if they are one of it.

        If they are none, of what is added to.
        """
        start = at = self._before_sums[ids]
        column = ""
        while at.op == "call_function":
            base = self._constants.base(at)
            if base is None and not column and _is_column(at):
                column = f".{at.args[2]}"
            elif base is None and not (op_of(at) in (_IN_ORDER if column else ops) or _is_whole_slice(at)):
                return start.name
            at = base if base is not None else at.all_input_nodes[0]
        return f"{at.name}{column}" if at.op == "placeholder" else start.name

    def _ids_name(self, ids: fx.Node, added: tuple[int, ...]) -> str:
        """Of the first node that has this value: constants may be there several times."""
        return self._named.setdefault((self._before_sums[ids], added), self._name(ids))

    def _name(self, node: fx.Node) -> str:
        """Of the first node that has this value."""
        return self._same[node].name

    def _table(self, node: Any) -> fx.Node | None:
        """The parameter that a node is, if it is one."""
        while isinstance(node, fx.Node) and node.op == "call_function" and op_of(node) in _SAME_TABLE:
            node = node.args[0]
        return node if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in self._tables else None

    def _is_indexing(self, node: fx.Node) -> bool:
        """Whether index or index_select takes rows of a parameter of two dimensions by one tensor of whole numbers."""
        table = self._table(node.args[0])
        if table is None or self._tables[str(table.target)].ndim != 2:
            return False
        if op_of(node) == "index_select":
            return bool(node.args[1] == 0)
        ids = node.args[1]
        if not isinstance(ids, Sequence) or len(ids) != 1 or not isinstance(ids[0], fx.Node):
            return False
        return ids[0].meta["val"].dtype in (torch.int32, torch.int64)

    def _changes(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
        """Tables that an op of the program writes to, and the op."""
        for node in graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable and op_of(node) != "detach_":
                for given in node.all_input_nodes[:1]:
                    if (table := self._table(given)) is not None:
                        yield table, op_of(node)

    def _obstacle(self, table: fx.Node | None) -> str:
        """Why rows of this table cannot come from a cube."""
        if table is None:
            return "its table is no parameter but computed"
        tensor = self._tables[str(table.target)]
        if (op := self._changed.get(table)) is not None:
            return "max_norm: a lookup changes its table" if op == "embedding_renorm_" else f"op {op} changes its table"
        if tensor.ndim != 2 or tensor.shape[1] < 1:
            return f"its table has shape {list(tensor.shape)}, not [rows, elements]"
        if tensor.dtype not in _ROWS:
            return f"its rows are {_dtype(tensor)}; a cube's are float32"
        return ""

    def _bag_obstacle(self, node: fx.Node, table: str, pooling: Pooling, offsets: fx.Node, weights: Any) -> str:
        """What stands against cutting a bag, beyond its table and ids."""
        others = [user for user in node.users if _item(user) != 0 and (user in self._live or _item(user) is None)]
        if others:
            return f"its output {_item(others[0])} is used too"
        dtype = self._tables[table].dtype
        if (dtype, pooling) in _ROUNDED:
            return f"its {pooling} is rounded to {_dtype(self._tables[table])} on the way, and a cube's is not"
        if op_of(_first(offsets)) != "arange" and (obstacle := _origins(offsets, "offsets")[1]):
            return obstacle
        return _origins(weights, "weights")[1] if weights is not None else ""


def _is_named_lookup(node: fx.Node) -> bool:
    """Whether a node's op can be nothing else."""
    is_aten = str(getattr(node.target, "_overloadpacket", "")).startswith("aten.")
    return node.op == "call_function" and is_aten and op_of(node) in _BAGS | {"embedding"}


def _inner(graph: str, node: fx.Node) -> TorchLookup:
    """A lookup of a graph within the graph."""
    name = f"{graph}.{node.name}"
    return TorchLookup(name, op_of(node), "", "none", name, "", "", [], obstacle="it is inside a loop or a branch")


def _origins(node: fx.Node, what: str, constants: Constants | None = None) -> tuple[list[str], str]:
    """The program's inputs that a value is arranged from, or why it is none of a request.

    constants: may be added to it, if they are known.
    """
    inputs: list[str] = []
    todo, seen = [node], set[fx.Node]()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.op == "placeholder":
            inputs.append(at.name)
            continue
        if constants is not None and (base := constants.base(at)) is not None:
            todo.append(base)
            continue
        before = [given for given in at.all_input_nodes if _is_tensor(given)]
        if at.op == "get_attr" or not before:
            return [], f"its {what} are constants, {at.name}"
        if op_of(at) not in _MOVES:
            return [], f"its {what} are computed by op {op_of(at)} ({at.name})"
        if _is_tensor(at) and isinstance(at.meta["val"], torch.Tensor) and at.meta["val"].dtype not in _WIDE:
            return [], f"its {what} are cast to {_dtype(at.meta['val'])} ({at.name})"
        todo += reversed(before)
    return inputs, ""


def _first(node: fx.Node) -> fx.Node:
    """Where a value that is only moved about comes from, along the first arguments."""
    while node.op == "call_function" and op_of(node) in _MOVES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor or several, not a size."""
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, list, tuple)) or node.op == "get_attr"


def _is_column(node: fx.Node) -> bool:
    """Whether a node is one column, not counted from the end, of a matrix."""
    if op_of(node) not in ("select", "select_copy") or not isinstance(node.args[0], fx.Node):
        return False
    matrix = node.args[0].meta.get("val")
    is_matrix = isinstance(matrix, torch.Tensor) and matrix.ndim == 2
    return is_matrix and node.args[1] in (1, -1) and isinstance(node.args[2], int) and node.args[2] >= 0


def _is_whole_slice(node: fx.Node) -> bool:
    """Whether a node is all of what it is taken from: ids[:, 3] is a slice of all samples first."""
    if op_of(node) not in ("slice", "slice_copy") or not isinstance(node.args[0], fx.Node):
        return False
    return str(node.args[0].meta["val"].shape) == str(node.meta["val"].shape) and len(node.args) < 5


def _item(node: fx.Node) -> int | None:
    """Which of several results a node takes; None if it does something else."""
    return int(node.args[1]) if op_of(node) == "getitem" else None  # type: ignore[arg-type]  # of a tuple


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs depend on."""
    todo, seen = [node for node in graph.nodes if node.op == "output"], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


def _same_values(
    graph: fx.Graph, base: Callable[[fx.Node], fx.Node | None] = lambda node: None
) -> dict[fx.Node, fx.Node]:
    """For each node the first one that is the same move of the same values; mostly itself.

    Programs that read a column of ids in several places take it out of its input each time, and make offsets of bags
    for each of them (arange). base: of a node that is some value and constants added to it, that value, which it counts
    as.
    """

    def told(given: fx.Node) -> Any:
        size = given.meta.get("val")
        return str(size) if isinstance(size, torch.SymInt) else same[given]

    first: dict[str, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        same[node] = node
        if (before := base(node)) is not None:
            same[node] = same[before]
        elif node.op == "call_function" and (op_of(node) in _MOVES or op_of(node) == "arange"):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), told)
            same[node] = first.setdefault(f"{node.target} {args} {kwargs}", node)
    return same
