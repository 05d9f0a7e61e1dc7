"""Draws docs/images/rewrite.svg: the graph of a small model before and after, from the report of ``dct_compile.explain``.

python docs/images/rewrite.py
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn

import dct_compile
from dct_compile.report import NodeReport
from dct_compile.report.drawing import HEIGHT, WIDTH, Drawing, draw

_HEAD, _GAP, _MARGIN = 56, 72, 12
_STYLE = """
svg { font: 11px ui-monospace, monospace; }
text { fill: #1d2125; } .head { font: 600 15px system-ui, sans-serif; } .sub { font: 12px system-ui, sans-serif; fill: #59626b; }
.paper { fill: #ffffff; stroke: #d8dce0; } .box rect { fill: #f3f5f6; stroke: #d8dce0; } .title { font-weight: 700; }
.outside rect { fill: #ffffff; stroke: #59626b; stroke-dasharray: 4 3; } .collective rect { fill: #e4edfb; stroke: #2b62b5; }
.kernel rect { fill: #def3f0; stroke: #0f766e; } .edge { fill: none; stroke: #59626b; stroke-width: 1.3; }
.order { stroke-dasharray: 1.5 3; } .tip, .arrow { fill: #59626b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e3e6e8; } .sub { fill: #a0a9b1; } .paper { fill: #16191c; stroke: #363c42; } .box rect { fill: #20252a; stroke: #363c42; }
  .outside rect { fill: #16191c; stroke: #a0a9b1; } .collective rect { fill: #1b2c47; stroke: #7aa7ea; }
  .kernel rect { fill: #123330; stroke: #3fbfae; } .edge { stroke: #a0a9b1; } .tip, .arrow { fill: #a0a9b1; }
}
"""


class Model(nn.Module):
    """One layer: its gradient is one collective."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` [batch, 256] to [batch, 256]."""
        return self.layer(x)


def nodes_of(drawing: Drawing, left: float, top: float) -> list[str]:
    """Returns the elements of one drawing, moved to ``left`` and ``top``."""
    parts = [f'<g transform="translate({left:g} {top:g})">']
    parts += [f'<path class="edge {edge.role}" d="{edge.path}" marker-end="url(#tip)"/>' for edge in drawing.edges]
    for box in drawing.boxes:
        title = box.title if len(box.title) <= 26 else f"{box.title[:25]}…"
        parts.append(f'<g class="box {box.role}"><rect x="{box.x}" y="{box.y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>')
        parts.append(f'<text class="title" x="{box.x + 8}" y="{box.y + 17}">{escape(title)}</text>')
        parts += [f'<text x="{box.x + 8}" y="{box.y + 33 + 15 * row}">{escape(line)}</text>' for row, line in enumerate(box.lines)]
        parts.append("</g>")
    return [*parts, "</g>"]


def picture(before: Drawing, after: Drawing, sent: Sequence[int]) -> str:
    """Returns the SVG of both drawings side by side; ``sent``: bytes per rank before and after."""
    width = 2 * _MARGIN + before.width + _GAP + after.width
    height = _HEAD + max(before.height, after.height) + _MARGIN
    right = _MARGIN + before.width + _GAP
    titles = ("before", "after")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>One all_reduce of a gradient, {sent[0]:,} bytes, becomes packing, an all_gather and unpacking, {sent[1]:,} bytes</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>',
        f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
    ]
    for left, title, size in zip((_MARGIN, right), titles, sent, strict=True):
        parts.append(f'<text class="head" x="{left + _MARGIN}" y="24">{title}</text>')
        parts.append(f'<text class="sub" x="{left + _MARGIN}" y="42">a rank sends {size:,} bytes</text>')
    middle = _MARGIN + before.width + _GAP / 2
    parts.append(f'<path class="arrow" d="M{middle - 20} {_HEAD + 96}h22v-9l20 15l-20 15v-9h-22z"/>')
    parts += nodes_of(before, _MARGIN, _HEAD)
    parts += nodes_of(after, right, _HEAD)
    return "\n".join([*parts, "</svg>", ""])


def around(nodes: Sequence[NodeReport]) -> Drawing:
    """Returns the drawing of the first site of a graph."""
    return draw(nodes, {0})


def main() -> None:
    """Compiles the model for two ranks and writes the picture."""
    report = dct_compile.explain(Model(), torch.randn(8, 256), options={"data_parallel": True}, ranks=2)
    graph, site = report.graphs[0], report.sites[0]
    target = Path(__file__).with_suffix(".svg")
    target.write_text(picture(around(graph.nodes_before), around(graph.nodes_after), (site.dense_bytes, site.wire_bytes)), encoding="utf-8")
    print(f"wrote {target}: {site}")


if __name__ == "__main__":
    main()
