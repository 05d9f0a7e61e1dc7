"""A graph before and after, side by side: which nodes went, which came, and which stretches stayed as they were."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from dct_compile.report.data import NodeReport

CONTEXT = 3
"""Unchanged nodes that are shown on either side of what changed."""


@dataclass(frozen=True)
class Block:
    """One node that is in both graphs, or the nodes that went and those that came at one place."""

    before: tuple[NodeReport, ...]
    after: tuple[NodeReport, ...]
    is_kept: bool

    @property
    def reads_the_same(self) -> bool:
        """True for a kept node whose inputs have been kept, too."""
        return [node.inputs for node in self.before] == [node.inputs for node in self.after]

    @property
    def sites(self) -> tuple[int, ...]:
        """The numbers of the sites that its nodes belong to."""
        return tuple(dict.fromkeys(node.site for node in (*self.before, *self.after) if node.site is not None))

    @property
    def is_of_interest(self) -> bool:
        """True if nodes are new, gone, read other nodes than before, or belong to a site."""
        return not self.is_kept or not self.reads_the_same or bool(self.sites)


@dataclass(frozen=True)
class Stretch:
    """Blocks in a sequence; ``collapsed`` where none of them is of interest or near one that is."""

    blocks: Sequence[Block]
    collapsed: bool


def align(before: Sequence[NodeReport], after: Sequence[NodeReport]) -> list[Block]:
    """Returns every node of both graphs, in order."""
    matcher = SequenceMatcher(None, [node.name for node in before], [node.name for node in after], autojunk=False)
    blocks: list[Block] = []
    for tag, low, high, new_low, new_high in matcher.get_opcodes():
        old, new = tuple(before[low:high]), tuple(after[new_low:new_high])
        if tag == "equal":
            blocks += [Block((left,), (right,), True) for left, right in zip(old, new, strict=True)]
        else:
            blocks.append(Block(old, new, False))
    return blocks


def stretches(blocks: Sequence[Block]) -> list[Stretch]:
    """Cuts ``blocks`` into shown and collapsed stretches, alternating; a gap that would hide fewer than ``CONTEXT`` nodes is shown."""
    near = [False] * len(blocks)
    for position, block in enumerate(blocks):
        if block.is_of_interest:
            low, high = max(0, position - CONTEXT), min(len(blocks), position + CONTEXT + 1)
            near[low:high] = [True] * (high - low)
    found: list[Stretch] = []
    start = 0
    while start < len(blocks):
        end = start
        while end < len(blocks) and near[end] == near[start]:
            end += 1
        collapsed = not near[start] and end - start >= CONTEXT
        if not collapsed and found and not found[-1].collapsed:
            found[-1] = Stretch([*found[-1].blocks, *blocks[start:end]], False)
        else:
            found.append(Stretch(blocks[start:end], collapsed))
        start = end
    return found
