"""A drawing of the nodes around a site, from the rewritten graph: what feeds it, what it became, what uses the result.

Nodes stand in layers, the flow goes down; the backward part stands to the right of the forward one. An edge from left to right is the mask
that both share.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dct_compile.report.data import NodeReport

WIDTH, HEIGHT = 196, 58
_GAP, _DROP, _LANE, _MARGIN = 14, 30, 44, 12
_USERS_SHOWN = 2


@dataclass(frozen=True)
class Box:
    """One node (or several inputs of the same nodes) at ``x``, ``y`` in pixels; ``role``: "collective", "kernel", "other" or "outside"."""

    title: str
    lines: tuple[str, str]
    role: str
    x: int
    y: int


@dataclass(frozen=True)
class Edge:
    """From one box to another; ``role``: "data", "order" (of updates in place) or "mask" (to the backward)."""

    path: str
    role: str


@dataclass(frozen=True)
class Drawing:
    """Boxes and edges on a canvas of ``width`` x ``height`` pixels. ``lanes``: where a headline belongs, as (x, text)."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    lanes: tuple[tuple[int, str], ...]
    width: int
    height: int

    @property
    def text(self) -> str:
        """The drawing in words, for readers who cannot see it."""
        return "; ".join(f"{box.title}: {box.lines[0]}, {box.lines[1]}" for box in self.boxes)


@dataclass(frozen=True)
class _Cell:
    """A box before it has a place."""

    key: str
    box: Box
    backward: bool


def draw(nodes: Sequence[NodeReport], sites: Collection[int]) -> Drawing:
    """Returns the region of ``sites`` (one site, or a forward and its backward) in the graph of ``nodes``."""
    region = [node for node in nodes if node.site in sites]
    cells = [_Cell(node.name, _box(node, _role(node)), node.backward) for node in region]
    inside = {node.name for node in region}
    edges = [(source, node.name) for node in region for source in node.inputs if source in inside]
    inputs, input_edges = _inputs(nodes, region, inside)
    users, user_edges = _users(nodes, region, inside)
    return _lay_out([*inputs, *cells, *users], [*input_edges, *edges, *user_edges], _orders(nodes, region))


def _inputs(nodes: Sequence[NodeReport], region: Sequence[NodeReport], inside: set[str]) -> tuple[list[_Cell], list[tuple[str, str]]]:
    """Returns the boxes of the nodes that the region reads from outside. Nodes that are read by the same nodes share a box."""
    readers: dict[str, list[NodeReport]] = defaultdict(list)
    for node in region:
        for source in node.inputs:
            if source not in inside:
                readers[source].append(node)
    named = {node.name: node for node in nodes}
    groups: dict[tuple[str, ...], list[NodeReport]] = defaultdict(list)
    for source, users in readers.items():
        is_input = named[source].operator == "placeholder"
        groups[tuple(user.name for user in users) if is_input else (source,)].append(named[source])
    cells: list[_Cell] = []
    edges: list[tuple[str, str]] = []
    for members in groups.values():
        users = readers[members[0].name]
        cells.append(_Cell(members[0].name, _group_box(members), users[0].backward))
        edges += [(members[0].name, user.name) for user in users]
    return cells, edges


def _users(nodes: Sequence[NodeReport], region: Sequence[NodeReport], inside: set[str]) -> tuple[list[_Cell], list[tuple[str, str]]]:
    """Returns the boxes of the nodes that use the region's results, below them. Beyond a few, a box holds their number."""
    lane = {node.name: node.backward for node in region}
    users = [node for node in nodes if node.name not in inside and inside.intersection(node.inputs)]
    shown, rest = users[:_USERS_SHOWN], users[_USERS_SHOWN:]
    if len(rest) == 1:
        shown, rest = users, []
    cells = [_Cell(f"user {node.name}", _box(node, "outside"), lane[_last(node, inside)]) for node in shown]
    edges = [(source, f"user {node.name}") for node in shown for source in node.inputs if source in inside]
    if rest:
        more = Box(f"{len(rest)} more", (rest[0].operator, "and so on"), "outside", 0, 0)
        cells.append(_Cell("more users", more, lane[_last(rest[0], inside)]))
        edges += [(source, "more users") for source in sorted({name for node in rest for name in node.inputs if name in inside})]
    return cells, edges


def _last(node: NodeReport, inside: set[str]) -> str:
    return [name for name in node.inputs if name in inside][-1]


def _orders(nodes: Sequence[NodeReport], region: Sequence[NodeReport]) -> list[tuple[str, str]]:
    """Returns the edges of updates in place: a node without a result updates its inputs, so their next reader comes after it."""
    used = {source for node in nodes for source in node.inputs}
    pairs = []
    for position, node in enumerate(region):
        following = [other for other in region[position + 1 :] if set(other.inputs) & set(node.inputs)]
        if node.name not in used and following:
            pairs.append((node.name, following[0].name))
    return pairs


def _lay_out(cells: Sequence[_Cell], edges: Sequence[tuple[str, str]], orders: Sequence[tuple[str, str]]) -> Drawing:
    lane = {cell.key: cell.backward for cell in cells}
    within = [(source, target) for source, target in (*edges, *orders) if lane[source] == lane[target]]
    layer = _layers(cells, within)
    places: dict[str, Box] = {}
    lanes: list[tuple[int, str]] = []
    both = len(set(lane.values())) == 2
    left, top, height = _MARGIN, 24 if both else 2, 0
    for backward in (False, True):
        rows: dict[int, list[_Cell]] = defaultdict(list)
        for cell in cells:
            if cell.backward == backward:
                rows[layer[cell.key]].append(cell)
        if not rows:
            continue
        widest = max(len(row) for row in rows.values()) * (WIDTH + _GAP) - _GAP
        for depth, row in rows.items():
            indent = (widest - len(row) * (WIDTH + _GAP) + _GAP) // 2
            for position, cell in enumerate(row):
                places[cell.key] = replace(cell.box, x=left + indent + position * (WIDTH + _GAP), y=top + depth * (HEIGHT + _DROP))
        height = max(height, top + max(rows) * (HEIGHT + _DROP) + HEIGHT + 2)
        lanes.append((left, "backward" if backward else "forward"))
        left += widest + _LANE
    drawn = []
    for source, target, role in [*((*edge, "data") for edge in edges), *((*order, "order") for order in orders)]:
        if lane[source] != lane[target]:
            drawn.append(Edge(_sideways(places[source], places[target]), "mask"))
        else:
            others = [box for key, box in places.items() if lane[key] == lane[source]]
            drawn.append(Edge(_downward(places[source], places[target], others), role))
    return Drawing(tuple(places.values()), tuple(drawn), tuple(lanes) if both else (), left - _LANE + 2, height)


def _layers(cells: Sequence[_Cell], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Returns the longest way from the top to each cell; what nothing feeds stands right above its first reader."""
    layer = {cell.key: 0 for cell in cells}
    fed = {target for _, target in edges}
    # As many rounds as there are cells settle every path.
    for _ in cells:
        settled = True
        for source, target in edges:
            if layer[target] <= layer[source]:
                layer[target], settled = layer[source] + 1, False
        if settled:
            break
    for cell in cells:
        readers = [layer[target] for source, target in edges if source == cell.key]
        if cell.key not in fed and readers:
            layer[cell.key] = min(readers) - 1
    return layer


def _sideways(source: Box, target: Box) -> str:
    """Returns the path of an edge from the forward's lane to the backward's."""
    x1, y1, x2, y2 = source.x + WIDTH, source.y + HEIGHT // 2, target.x, target.y + HEIGHT // 2
    return f"M{x1} {y1}C{x1 + 30} {y1} {x2 - 30} {y2} {x2} {y2}"


def _downward(source: Box, target: Box, boxes: Collection[Box]) -> str:
    """Returns the path of an edge from the bottom of a box to the top of another. It goes past the boxes in between, not through them."""
    x1, y1, x2, y2, bend = source.x + WIDTH // 2, source.y + HEIGHT, target.x + WIDTH // 2, target.y, _DROP // 2
    between = [box for box in boxes if y1 < box.y < y2 - HEIGHT]
    if not between:
        return f"M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"
    rails = (x1, x2, target.x - 7, target.x + WIDTH + 7, source.x - 7, source.x + WIDTH + 7)
    free = [rail for rail in rails if not any(box.x <= rail <= box.x + WIDTH for box in between)]
    rail = free[0] if free else min(box.x for box in between) - 7
    return f"M{x1} {y1}C{x1} {y1 + bend} {rail} {y1} {rail} {y1 + bend}V{y2 - bend}C{rail} {y2} {x2} {y2 - bend} {x2} {y2}"


def _role(node: NodeReport) -> str:
    if node.operator.startswith("_c10d_functional.") and "wait_tensor" not in node.operator:
        return "collective"
    return "kernel" if node.operator.startswith("dct.") else "other"


def _box(node: NodeReport, role: str) -> Box:
    return Box(node.name, (node.operator.removeprefix("_c10d_functional.").removesuffix(".default"), _tensor(node)), role, 0, 0)


def _group_box(members: Sequence[NodeReport]) -> Box:
    if len(members) == 1:
        return _box(members[0], "outside")
    names = ", ".join(node.name for node in members)
    return Box(names, (f"{len(members)} inputs", f"{sum(node.size for node in members):,} B"), "outside", 0, 0)


def _tensor(node: NodeReport) -> str:
    if node.shape is None:
        return "in place" if node.operator.startswith("dct.") else ""
    return f"{'x'.join(map(str, node.shape)) or 'scalar'} {node.dtype}, {node.size:,} B"
