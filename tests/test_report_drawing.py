"""Side by side and drawn: which nodes are shown, where boxes stand, which edges are the mask."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import dct_compile
from dct_compile.report import NodeReport, Report
from dct_compile.report.alignment import CONTEXT, align, stretches
from dct_compile.report.drawing import HEIGHT, WIDTH, Drawing, draw
from tests.small_models import Layers, exchange


def chain(*names: str) -> list[NodeReport]:
    """Nodes, each of which reads the one before."""
    inputs = [(), *((name,) for name in names)]
    return [
        NodeReport(name, "aten.sin.default", inputs[i], (4,), "float32", 16, "", "", None, False)  # type: ignore[arg-type]
        for i, name in enumerate(names)
    ]


def numbered(count: int) -> list[NodeReport]:
    return chain(*(f"n{i}" for i in range(count)))


def test_replaced_nodes_stand_beside_what_replaced_them() -> None:
    blocks = align(chain("a", "b", "c", "d"), chain("a", "x", "y", "c", "d"))
    names = [([node.name for node in block.before], [node.name for node in block.after]) for block in blocks]
    assert names == [(["a"], ["a"]), (["b"], ["x", "y"]), (["c"], ["c"]), (["d"], ["d"])]
    assert [block.is_kept for block in blocks] == [True, False, True, True]
    assert [block.reads_the_same for block in blocks if block.is_kept] == [True, False, True]
    assert [block.is_of_interest for block in blocks] == [False, True, True, False]


def test_equal_graphs_have_nothing_of_interest() -> None:
    nodes = numbered(50)
    assert not any(block.is_of_interest for block in align(nodes, nodes))
    (only,) = stretches(align(nodes, nodes))
    assert (only.collapsed, len(only.blocks)) == (True, 50)
    assert stretches([]) == []


def test_a_site_that_stays_dense_is_of_interest() -> None:
    nodes = numbered(50)
    nodes[25] = replace(nodes[25], site=0)
    found = stretches(align(nodes, nodes))
    assert [(item.collapsed, len(item.blocks)) for item in found] == [(True, 25 - CONTEXT), (False, 2 * CONTEXT + 1), (True, 24 - CONTEXT)]


@pytest.mark.parametrize("distance", range(1, 14))
def test_stretches_keep_every_node_in_order(distance: int) -> None:
    nodes = numbered(40)
    for position in (10, 10 + distance):
        nodes[position] = replace(nodes[position], site=0)
    blocks = align(nodes, nodes)
    found = stretches(blocks)
    assert [block for item in found for block in item.blocks] == blocks
    assert all(one.collapsed != other.collapsed for one, other in pairwise(found))
    assert all(len(item.blocks) >= CONTEXT for item in found if item.collapsed)
    hidden = distance - 1 - 2 * CONTEXT
    assert sum(item.collapsed for item in found) == (3 if hidden >= CONTEXT else 2)


@pytest.fixture(scope="module")
def report() -> Report:
    return dct_compile.explain(Layers(exchanged=True), torch.randn(16, 64), options={"data_parallel": True, "exempt": ["top.*"]})


def drawing_of(report: Report, *kinds: str) -> Drawing:
    return draw(report.graphs[0].nodes_after, [site.number for site in report.sites if site.kind in kinds])


def operators(drawing: Drawing) -> list[str]:
    return [box.lines[0] for box in drawing.boxes if box.role != "outside"]


def ends(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    numbers = [int(number) for number in re.findall(r"-?\d+", path)]
    return (numbers[0], numbers[1]), (numbers[-2], numbers[-1])


def test_a_forward_and_its_backward_share_the_mask(report: Report) -> None:
    drawing = drawing_of(report, "activation", "activation_gradient")
    forward = ["dct.pack_rows", "all_to_all_single", "wait_tensor", "dct.unpack_rows"]
    backward = ["dct.gather_rows", "all_to_all_single", "wait_tensor", "dct.scatter_rows"]
    assert operators(drawing) == forward + backward
    assert [text for _, text in drawing.lanes] == ["forward", "backward"]
    places = {(box.x, box.y): box.lines[0] for box in drawing.boxes}
    masks = [ends(edge.path) for edge in drawing.edges if edge.role == "mask"]
    named = {(places[x1 - WIDTH, y1 - HEIGHT // 2], places[x2, y2 - HEIGHT // 2]) for (x1, y1), (x2, y2) in masks}
    assert named == {("wait_tensor", "dct.gather_rows"), ("dct.pack_rows", "dct.scatter_rows")}
    assert "dct.pack_rows, 16x12 uint8, 192 B" in drawing.text


def test_a_gradient_with_a_dense_part(report: Report) -> None:
    drawing = drawing_of(report, "gradient")
    assert [operators(drawing).count(f"dct.{name}") for name in ("threshold_pack", "repack", "unpack_accumulate")] == [1, 1, 1]
    assert {"all_to_all_single", "all_gather_into_tensor"} <= set(operators(drawing))
    assert "all_reduce" not in operators(drawing), "the dense part rides behind the payload"
    assert drawing.lanes == ()
    assert [edge.role for edge in drawing.edges].count("order") == 1
    assert any(box.lines[0] == "3 inputs" for box in drawing.boxes), "the state is one box"


def test_a_dense_site_is_drawn_as_it_is() -> None:
    report = dct_compile.explain(lambda x: exchange(x.sin()).cos(), torch.randn(16, 64), options={"mp_density": 1})
    drawing = drawing_of(report, "activation")
    assert [(box.title, box.role) for box in drawing.boxes] == [
        ("sin", "outside"),
        ("all_to_all_single", "collective"),
        ("wait_tensor", "other"),
        ("cos", "outside"),
    ]


@pytest.mark.parametrize("kinds", [("gradient",), ("activation", "activation_gradient"), ("activation",)])
def test_boxes_do_not_overlap_and_edges_go_down(report: Report, kinds: tuple[str, ...]) -> None:
    drawing = drawing_of(report, *kinds)
    boxes = drawing.boxes
    for position, box in enumerate(boxes):
        assert 0 <= box.x <= drawing.width - WIDTH
        assert 0 <= box.y <= drawing.height - HEIGHT
        for other in boxes[position + 1 :]:
            assert abs(box.x - other.x) >= WIDTH or abs(box.y - other.y) >= HEIGHT, (box, other)
    for edge in drawing.edges:
        (x1, y1), (x2, y2) = ends(edge.path)
        assert x2 > x1 if edge.role == "mask" else y2 > y1
        assert all(int(number) >= 0 for number in re.findall(r"-?\d+", edge.path))


def test_many_users_are_counted() -> None:
    nodes = chain("x", "collective")
    nodes[1] = replace(nodes[1], site=0)
    nodes += [replace(node, inputs=("collective",)) for node in numbered(9)]
    outside = [box.title for box in draw(nodes, [0]).boxes if box.role == "outside"]
    assert outside == ["x", "n0", "n1", "7 more"]
    assert [box.title for box in draw(nodes[:5], [0]).boxes if box.role == "outside"] == ["x", "n0", "n1", "n2"]
