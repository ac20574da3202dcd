"""The picture of a graph before and after the cut: what is in it, and that large graphs stay small."""

import re
import shutil
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from two_towers import written

from trainer_tools.graph_picture import Graph, Operation, picture
from trainer_tools.programs.program import Lookup

SVG = "{http://www.w3.org/2000/svg}"


def lookup(name, table="t", rows=2000, dim=8):
    return Lookup(name, "Gather", table, rows, dim, "ids", f"{name}_fed")


def parsed(svg):
    return ElementTree.fromstring(svg)  # noqa: S314 - our own


def boxes(svg):
    """Class and lines of text of each box, in order, and how many edges there are."""
    root = parsed(svg)
    found = []
    for panel in [group for group in root if group.tag == f"{SVG}g" and group.get("class") is None]:
        caption = panel.find(f"{SVG}text").text
        inner = [(g.get("class"), *[t.text for t in g.iter(f"{SVG}text")]) for g in panel.findall(f"{SVG}g")]
        found.append((caption, inner, len(panel.findall(f"{SVG}path"))))
    return found


def places(svg):
    """Left, top, right and bottom of the boxes of each panel."""
    for panel in parsed(svg).findall(f"{SVG}g"):
        if panel.get("class") is None:
            rects = [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in panel.iter(f"{SVG}rect")]
            yield [(x, y, x + width, y + height) for x, y, width, height in rects]


def test_a_small_graph_is_drawn_op_by_op_with_its_lookups_tables_and_new_inputs():
    before = Graph(
        ["ids", "x"],
        ["y"],
        [
            Operation("Gather", ["t", "ids"], ["e"]),
            Operation("Gather", ["small", "ids"], ["f"]),
            Operation("Concat", ["e", "f", "x"], ["c"]),
            Operation("MatMul", ["c", "w"], ["y"]),
        ],
    )
    after = Graph(["ids", "x", "e_fed"], ["y"], before.operations[1:])
    svg = picture(before, after, [lookup("e", rows=2_000_000)], [lookup("f", "small", 7)])
    assert boxes(svg) == [
        (
            "before: 4 ops",
            [
                ("input", "ids"),
                ("input", "x"),
                ("cut", "Gather", "t", "2,000,000 × 8 · 64 MB"),
                ("stays", "Gather", "small", "7 × 8 · 224 bytes"),
                ("op", "Concat"),
                ("op", "MatMul"),
                ("output", "y"),
            ],
            7,
        ),
        (
            "after: 3 ops",
            [
                ("input", "ids"),
                ("input", "x"),
                ("feed", "e_fed", "2,000,000 × 8 · 64 MB"),
                ("stays", "Gather", "small", "7 × 8 · 224 bytes"),
                ("op", "Concat"),
                ("op", "MatMul"),
                ("output", "y"),
            ],
            4 + 1,
        ),
    ]
    legend = [g.find(f"{SVG}g").get("class") for g in parsed(svg).findall(f"{SVG}g[@class='legend']")]
    assert {"cut", "stays", "feed"} <= set(legend)


def test_ops_stand_behind_what_they_read_and_no_box_over_another():
    chain = [Operation("Gather", ["t", "ids"], ["e0"])]
    chain += [Operation("Add", [f"e{i}", "e0" if i % 3 else "x"], [f"e{i + 1}"]) for i in range(20)]
    svg = picture(Graph(["ids", "x"], ["e20"], chain), Graph(["x", "f"], ["e20"], chain[1:]), [lookup("e0")])
    for rects in places(svg):
        for at, (left, top, right, bottom) in enumerate(rects):
            for other in rects[:at]:
                assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]
    root = parsed(svg)
    for path in root.iter(f"{SVG}path"):
        x = [float(x) for x, _ in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path.get("d"))]
        assert x[0] < x[-1]
    assert max(box[2] for rects in places(svg) for box in rects) <= float(root.get("width"))
    assert max(box[3] for rects in places(svg) for box in rects) <= float(root.get("height"))


def test_a_large_graph_is_folded_around_its_lookups():
    ops = [Operation("Gather", ["t", "ids"], ["a0"]), Operation("Dense", ["x"], ["b0"])]
    ops += [Operation("Relu" if i % 2 else "MatMul", [f"b{i}"], [f"b{i + 1}"]) for i in range(500)]
    ops += [Operation("Concat", ["a0", "b500"], ["c0"])]
    ops += [Operation("Add", [f"c{i}"], [f"c{i + 1}"]) for i in range(1000)]
    (before, _, _), (after, seen, _) = boxes(
        picture(
            Graph(["ids", "x"], ["c1000"], ops), Graph(["x", "a0_fed"], ["c1000"], ops[1:]),
            [lookup("a0")],
        )
    )  # fmt: skip
    assert (before, after) == ("before: 1,503 ops", "after: 1,502 ops")
    assert len(seen) < 40
    (_, seen, _), _ = boxes(picture(Graph(["ids", "x"], ["c1000"], ops), Graph([], [], []), [lookup("a0")]))
    assert [box for box in seen if box[0] != "op"] == [
        ("input", "ids"),
        ("fold", "501 ops", "MatMul × 250", "Relu × 250", "Dense × 1", "1 more input"),
        ("cut", "Gather", "t", "2,000 × 8 · 64 kB"),
        ("fold", "999 ops", "Add × 999", "1 more output"),
    ]


def test_of_hundreds_of_lookups_the_largest_are_drawn():
    many = [lookup(f"e{i}", f"t{i}", rows=1000 + i) for i in range(408)]
    ops = [Operation("Gather", [k.table, f"ids{i}"], [k.name]) for i, k in enumerate(many)]
    ops += [Operation("Concat", [k.name for k in many], ["y"])]
    feeds = [k.feed for k in many]
    after = Graph(feeds, ["y"], [Operation("Concat", feeds, ["y"])])
    svg = picture(Graph([f"ids{i}" for i in range(408)], ["y"], ops), after, many)
    (_, before, _), (_, after, _) = boxes(svg)
    assert [box[2] for box in before if box[0] == "cut"] == [f"t{i}" for i in range(396, 408)]
    assert ("fold", "396 more lookups", "396 more inputs") in before
    assert ("fold", "396 new inputs") in after


def test_names_of_any_kind_are_drawn():
    name = 'a<b>&"\x00\x1b\n￾' + "x" * 100
    (_, nodes, _), _ = boxes(picture(Graph([name], [name], []), Graph([], [], []), []))
    assert [kind for kind, _ in nodes] == ["input", "output"]
    assert nodes[0][1] == "…" + "x" * 33


def test_an_empty_graph_is_drawn():
    assert [caption for caption, _, _ in boxes(picture(Graph([], [], []), Graph([], [], []), []))] == [
        "before: 0 ops",
        "after: 0 ops",
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 200), max_size=3), max_size=70), st.sets(st.integers(0, 69), max_size=20))
def test_any_graph_is_drawn_without_circles_or_overlaps(reads, looked):
    ops = [Operation("Op", [f"v{n % (i + 1)}" for n in names], [f"v{i + 1}"]) for i, names in enumerate(reads)]
    gone = [lookup(f"v{i + 1}") for i in looked if i < len(ops)]
    graph = Graph(["v0"], [f"v{len(ops)}"], ops)
    svg = picture(graph, graph, gone)
    assert len([box for box in boxes(svg)[0][1] if box[0] == "cut"]) == (
        len(gone) if len(ops) + 2 <= 40 else min(len(gone), 12)
    )
    for rects in places(svg):
        ordered = sorted(rects)
        assert len(set(ordered)) == len(ordered)


@pytest.mark.parametrize("model", ["paddle-331-ctr", "two-towers"])
def test_the_command_draws_programs_of_each_format(model, tmp_path, command):
    place = written(tmp_path / model) if model == "two-towers" else shutil.copytree(GOLDEN / model, tmp_path / model)
    done = command("prune-program", place, "--verify", 0, "--svg", tmp_path / "g.svg")
    assert done.returncode == 0, done.stderr
    (_, before, _), (_, after, _) = boxes((tmp_path / "g.svg").read_text())
    cut, feeds = [b for b in before if b[0] == "cut"], [b for b in after if b[0] == "feed"]
    assert len(cut) == len(feeds) == (3 if model == "paddle-331-ctr" else 2)
    assert not [b for b in after if b[0] == "cut"]
