"""A picture of a program before and after its lookups were cut out, as SVG.

A graph is drawn from left to right in layers: an op stands right of all it reads. Large ones are folded: what is near a
lookup is drawn op by op, and ops that lie alike towards all of that (behind the same of its ops, and before the same)
are one box with their number. Such boxes cannot form a circle, since an op between two of one box would be of that box.
"""

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol
from xml.etree import ElementTree

_MOST_NODES = 40  # that are drawn one by one
_MOST_LOOKUPS = 12  # of a folded graph that are drawn one by one, those with the largest tables
_BEFORE, _BEHIND = 3, 2  # how far from a lookup ops are drawn
_SWEEPS = 8
_LINE, _PADDING, _GAP_X, _GAP_Y, _MARGIN = 15, 7, 46, 12, 24  # pixels
_CHARACTER, _BOLDER, _MOST_CHARACTERS = 6.4, 1.15, 34  # width of one in pixels, of a bold one beside it; of a line
_STYLES = {  # fill and stroke
    "input": ("#e8eefb", "#5b7bc0"),
    "output": ("#ececec", "#777777"),
    "op": ("#ffffff", "#999999"),
    "cut": ("#fde3c8", "#d9730d"),
    "stays": ("#fbf5cf", "#b59b10"),
    "feed": ("#d5f2df", "#1a7f4b"),
    "fold": ("#f6f6f6", "#999999"),
}
_BOLD = ("cut", "stays", "feed")  # whose first line is
_LEGEND = {
    "input": "input", "op": "op", "cut": "lookup that goes", "stays": "lookup that stays", "feed": "new input",
    "output": "output", "fold": "several",
}  # fmt: skip


class Operation(NamedTuple):
    """One op of a graph."""

    kind: str  # the program's word for what it does
    reads: Sequence[str]  # names of values; those that nobody writes (parameters) are not drawn
    writes: Sequence[str]


class Graph(NamedTuple):
    """What a program computes. Operations come in the order in which they run."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    operations: Sequence[Operation]


class Looked(Protocol):
    """What the picture says of a lookup; see programs.program.Lookup."""

    @property
    def name(self) -> str: ...
    @property
    def table(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def dim(self) -> int: ...
    @property
    def feed(self) -> str: ...


class _Node(NamedTuple):
    """A box to be drawn."""

    style: str  # of _STYLES
    lines: list[str]
    title: str  # in full


class _Drawing(NamedTuple):
    """Boxes, and edges: pairs of places in the list."""

    nodes: list[_Node]
    edges: set[tuple[int, int]]


def picture(before: Graph, after: Graph, gone: Sequence[Looked], stay: Sequence[Looked] = ()) -> str:
    """Both graphs beside each other, as an SVG document. gone, stay: the lookups of the first."""
    feeds = {lookup.feed: lookup for lookup in gone}
    kept = {lookup.name: lookup for lookup in stay}
    panels = [
        (f"before: {len(before.operations):,} ops", _drawing(before, {k.name: k for k in gone}, kept, {})),
        (f"after: {len(after.operations):,} ops", _drawing(after, {}, kept, feeds)),
    ]
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
    root.set("font-family", "DejaVu Sans, Helvetica, Arial, sans-serif")
    root.set("font-size", "11")
    background = ElementTree.SubElement(root, "rect", fill="#ffffff")
    left, height = float(_MARGIN), 0.0
    for caption, drawing in panels:
        group = ElementTree.SubElement(root, "g", transform=f"translate({left:.0f},{_MARGIN})")
        _text(group, 0, 12, caption, weight="bold", size="14")
        width, deep = _draw(group, drawing)
        left, height = left + max(width, 260) + 2 * _MARGIN, max(height, deep)
    bottom = _MARGIN + height + 2 * _LINE
    left = max(left, _legend(root, bottom))
    for element in (root, background):
        element.set("width", f"{left:.0f}")
        element.set("height", f"{bottom + 2 * _LINE:.0f}")
    root.set("viewBox", f"0 0 {left:.0f} {bottom + 2 * _LINE:.0f}")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _drawing(
    graph: Graph, gone: Mapping[str, Looked], kept: Mapping[str, Looked], feeds: Mapping[str, Looked]
) -> _Drawing:
    """The boxes of a graph, folded if they are many. gone and kept by name, feeds by input."""
    nodes: list[_Node] = []
    edges, marked, writer = set[tuple[int, int]](), dict[int, int](), dict[str, int]()
    lookups = {**gone, **kept}
    for name in graph.inputs:
        writer[name] = len(nodes)
        if name in feeds:
            marked[len(nodes)] = _size(feeds[name])
            nodes.append(_Node("feed", [name, _rows(feeds[name])], name))
        else:
            nodes.append(_Node("input", [name], name))
    for operation in graph.operations:
        at = len(nodes)
        edges |= {(writer[name], at) for name in operation.reads if name in writer}
        writer |= dict.fromkeys(operation.writes, at)
        lookup = next((lookups[name] for name in operation.writes if name in lookups), None)
        if lookup:
            marked[at] = _size(lookup)
            style = "cut" if lookup.name in gone else "stays"
            nodes.append(_Node(style, [operation.kind, lookup.table, _rows(lookup)], f"{lookup.name}: {lookup.table}"))
        else:
            nodes.append(_Node("op", [operation.kind], ", ".join(operation.writes)))
    for name in graph.outputs:
        edges |= {(writer[name], len(nodes))} if name in writer else set()
        nodes.append(_Node("output", [name], name))
    drawing = _Drawing(nodes, edges)
    return drawing if len(nodes) <= _MOST_NODES else _folded(drawing, marked)


def _folded(drawing: _Drawing, marked: Mapping[int, int]) -> _Drawing:
    """With only the boxes near those marked, of which the largest count, as they are."""
    count = len(drawing.nodes)
    readers, read = _neighbours(count, drawing.edges)
    shown = set(sorted(marked, key=lambda at: (-marked[at], at))[:_MOST_LOOKUPS])
    near = shown | _within(shown, read, _BEFORE) | _within(shown, readers, _BEHIND)
    if len(near) <= _MOST_NODES:
        shown = near
    behind, before = [0] * count, [0] * count  # bit i: it is after, or before, the box i that is shown
    for at in range(count):  # edges go from left to right in the list
        for other in read[at]:
            behind[at] |= behind[other] | (1 << other if other in shown else 0)
    for at in reversed(range(count)):
        for other in readers[at]:
            before[at] |= before[other] | (1 << other if other in shown else 0)
    groups: dict[tuple[int, ...], list[int]] = {}
    for at in range(count):
        groups.setdefault((at,) if at in shown else (behind[at], before[at]), []).append(at)
    place = {at: number for number, members in enumerate(groups.values()) for at in members}
    nodes = [_together([drawing.nodes[at] for at in members]) for members in groups.values()]
    return _Drawing(nodes, {(place[a], place[b]) for a, b in drawing.edges if place[a] != place[b]})


def _together(nodes: Sequence[_Node]) -> _Node:
    """One box for several."""
    if len(nodes) == 1:
        return nodes[0]
    styles = Counter(node.style for node in nodes)
    kinds = Counter(node.lines[0] for node in nodes if node.style == "op")
    ops = sum(kinds.values())
    lines = [_counted(ops, "op")] if ops else []
    lines += [f"{kind} × {number:,}" for kind, number in kinds.most_common(3)] + ["…"] * (len(kinds) > 3)
    words = {"cut": "more lookup", "stays": "other lookup", "feed": "new input"}
    words |= {"input": "more input", "output": "more output"}
    lines += [_counted(styles[style], word) for style, word in words.items() if styles[style]]
    return _Node("fold", lines, ", ".join(f"{kind} × {number}" for kind, number in kinds.most_common()))


def _counted(number: int, word: str) -> str:
    """1 op, 2 ops."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _within(start: Iterable[int], neighbours: Sequence[Sequence[int]], steps: int) -> set[int]:
    found, edge = set(start), set(start)
    for _ in range(steps):
        edge = {other for at in edge for other in neighbours[at]} - found
        found |= edge
    return found


def _neighbours(count: int, edges: Iterable[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    """For each box those that read it, and those it reads."""
    readers: list[list[int]] = [[] for _ in range(count)]
    read: list[list[int]] = [[] for _ in range(count)]
    for one, other in sorted(edges):
        readers[one].append(other)
        read[other].append(one)
    return readers, read


# ---- layout ----


def _draw(group: ElementTree.Element, drawing: _Drawing) -> tuple[float, float]:
    """Place boxes and edges; returns width and height of all."""
    count = len(drawing.nodes)
    layer = _layers(count, drawing.edges)
    chains = []  # an edge over several layers passes a point in each
    for one, other in sorted(drawing.edges):
        points = list(range(len(layer), len(layer) + layer[other] - layer[one] - 1))
        layer += range(layer[one] + 1, layer[other])
        chains.append([one, *points, other])
    columns = _ordered(layer, [pair for chain in chains for pair in pairwise(chain)])
    tall = [_PADDING * 2 + _LINE * len(node.lines) for node in drawing.nodes] + [0] * (len(layer) - count)
    wide = [_width(node) for node in drawing.nodes] + [0.0] * (len(layer) - count)
    x, left = [0.0] * len(layer), 0.0
    for column in columns:
        span = max((wide[at] for at in column), default=0)
        for at in column:
            x[at] = left
            wide[at] = wide[at] or span
        left += span + _GAP_X
    y = _heights(columns, tall, [pair for chain in chains for pair in pairwise(chain)])
    top = 2 * _LINE - min((y[at] - tall[at] / 2 for at in range(count)), default=0)
    for chain in chains:
        _edge(group, [(x[at], x[at] + wide[at], y[at] + top) for at in chain])
    for at, node in enumerate(drawing.nodes):
        _box(group, node, x[at], y[at] + top - tall[at] / 2, wide[at], tall[at])
    return left - _GAP_X, top + max((y[at] + tall[at] / 2 for at in range(count)), default=0)


def _layers(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Column of each box: behind all it reads; what reads nothing stands right before its first reader."""
    readers, read = _neighbours(count, edges)
    waiting = [len(before) for before in read]
    order = [at for at in range(count) if not waiting[at]]
    layer = [0] * count
    for at in order:
        for other in readers[at]:
            layer[other] = max(layer[other], layer[at] + 1)
            waiting[other] -= 1
            if not waiting[other]:
                order.append(other)
    for at in range(count):
        if not read[at] and readers[at]:
            layer[at] = min(layer[other] for other in readers[at]) - 1
    return layer


def _ordered(layer: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The columns, each sorted by where the neighbours of its boxes stand: swept forth and back."""
    columns: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for at, number in enumerate(layer):
        columns[number].append(at)
    readers, read = _neighbours(len(layer), edges)
    rank = {at: float(place) for column in columns for place, at in enumerate(column)}
    for sweep in range(_SWEEPS):
        forth = sweep % 2 == 0
        for column in columns if forth else reversed(columns):
            by = read if forth else readers
            mean = {at: sum(rank[n] for n in by[at]) / len(by[at]) if by[at] else rank[at] for at in column}
            column.sort(key=lambda at: (mean[at], rank[at]))
            rank |= {at: float(place) for place, at in enumerate(column)}
    return columns


def _heights(columns: Sequence[Sequence[int]], tall: Sequence[float], edges: Sequence[tuple[int, int]]) -> list[float]:
    """Middle of each box: near its neighbours', none over another of its column."""
    readers, read = _neighbours(len(tall), edges)
    y = [0.0] * len(tall)
    for sweep in range(_SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wanted = []
            for at in column:
                near = (read[at] if sweep % 2 == 0 else readers[at]) or [*read[at], *readers[at]]
                wanted.append(sum(y[n] for n in near) / len(near) if near else y[at])
            placed: list[float] = []
            for at, want in zip(column, wanted, strict=True):
                least = placed[-1] + (tall[column[len(placed) - 1]] + tall[at]) / 2 + _GAP_Y if placed else want
                placed.append(max(want, least))
            shift = sum(w - p for w, p in zip(wanted, placed, strict=True)) / len(column) if column else 0
            for at, place in zip(column, placed, strict=True):
                y[at] = place + shift
    return y


# ---- SVG ----


def _box(group: ElementTree.Element, node: _Node, x: float, y: float, width: float, height: float) -> None:
    fill, stroke = _STYLES[node.style]
    box = ElementTree.SubElement(group, "g", {"class": node.style})
    ElementTree.SubElement(box, "title").text = _clean(node.title)
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}", "rx": "4"}
    if node.style == "fold":
        attributes["stroke-dasharray"] = "4 3"
    ElementTree.SubElement(box, "rect", attributes, fill=fill, stroke=stroke)
    for number, line in enumerate(node.lines):
        weight = "bold" if number == 0 and node.style in _BOLD else "normal"
        _text(box, x + _PADDING, y + _PADDING + _LINE * number + 11, _short(line), weight=weight)


def _edge(group: ElementTree.Element, points: Sequence[tuple[float, float, float]]) -> None:
    """A line through columns. points: left, right and height of where it starts, passes and ends."""
    path = f"M{points[0][1]:.1f},{points[0][2]:.1f}"
    for (_, start, y), (end, beyond, other) in pairwise(points):
        middle = (start + end) / 2
        path += f" C{middle:.1f},{y:.1f} {middle:.1f},{other:.1f} {end:.1f},{other:.1f}"
        if (end, beyond, other) != points[-1]:
            path += f" L{beyond:.1f},{other:.1f}"
    ElementTree.SubElement(group, "path", d=path, fill="none", stroke="#b0b0b0")


def _legend(root: ElementTree.Element, y: float) -> float:
    """What the colours mean; returns where it ends."""
    x = float(_MARGIN)
    for style, word in _LEGEND.items():
        node = _Node(style, [word], word)
        group = ElementTree.SubElement(root, "g", {"class": "legend"})
        _box(group, node, x, y - _LINE, _width(node), 2 * _PADDING + _LINE)
        x += _width(node) + _GAP_Y
    return x + _MARGIN


def _text(group: ElementTree.Element, x: float, y: float, text: str, weight: str = "normal", size: str = "11") -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-weight": weight, "font-size": size}
    ElementTree.SubElement(group, "text", attributes).text = _clean(text)


def _width(node: _Node) -> float:
    wide = [_CHARACTER * len(_short(line)) for line in node.lines]
    if node.style in _BOLD:
        wide[0] *= _BOLDER
    return 2 * _PADDING + max(wide)


def _short(line: str) -> str:
    """A line that fits: names differ at their ends."""
    return line if len(line) <= _MOST_CHARACTERS else f"…{line[1 - _MOST_CHARACTERS :]}"


def _clean(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(c if c.isprintable() or c in string.whitespace[:1] else "�" for c in text)


def _rows(lookup: Looked) -> str:
    if lookup.rows is None:
        return f"rows of {lookup.dim}, elsewhere"
    size, unit = float(_size(lookup)), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{lookup.rows:,} × {lookup.dim:,} · {size:.3g} {unit}"


def _size(lookup: Looked) -> int:
    """Bytes of a table as float32."""
    return 4 * (lookup.rows or 0) * lookup.dim
