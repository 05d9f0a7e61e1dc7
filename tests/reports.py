"""Reports to draw: one of real graphs, and a large one."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

import dct_compile
from dct_compile.report import GraphReport, NodeReport, Report, SiteReport
from tests.small_models import Layers


@cache
def explained_report() -> Report:
    """Explains an activation with its backward and a gradient: real graphs, one with nodes that nothing touches."""

    class Deep(Layers):
        def forward(self, x: torch.Tensor) -> Any:
            for _ in range(40):
                x = torch.sin(x)
            return super().forward(x)

    return dct_compile.explain(Deep(exchanged=True), torch.randn(16, 64), options={"data_parallel": True})


@cache
def large_report() -> Report:
    """Makes 10,000 nodes, of which every 500th is a collective that was rewritten."""
    before: list[NodeReport] = []
    after: list[NodeReport] = []
    sites: list[SiteReport] = []
    last = "x"
    for position in range(10_000):
        node = NodeReport(
            f"sin_{position}", "aten.sin.default", (last,), (16, 64), "float32", 4096, f"/model.py:{position % 90 + 1}", "", None, False
        )
        if position % 500 == 250:
            number = len(sites)
            gone = replace(node, operator="_c10d_functional.all_to_all_single.default", site=number)
            packed = replace(node, name=f"pack_rows_{number}", operator="dct.pack_rows.default", site=number)
            unpacked = replace(packed, name=f"unpack_rows_{number}", inputs=(packed.name,))
            before.append(gone)
            after += [packed, unpacked]
            kind = "activation" if number % 2 else "embedding"
            site = SiteReport(
                "all_to_all_single", kind, "here", (16, 64), "float32", "compressed", "k of n", 3072, 144, "0", 4, number=number
            )
            sites.append(site)
        else:
            reading = tuple(f"unpack_rows_{len(sites) - 1}" if position % 500 == 251 else name for name in node.inputs)
            before.append(node)
            after.append(replace(node, inputs=reading))
        last = node.name
    return Report(tuple(sites), (GraphReport("graph 0/0", "", "", tuple(before), tuple(after)),), ())
