"""Named tuples of arguments that travel together in Triton kernels. Fields in capitals are known when a kernel is compiled.

For a kernel that Inductor launches (option ``inline_kernels``), Inductor takes no tuples as arguments, and its generated module copies the
functions that the kernel calls but imports no classes. So the outermost kernel takes its arguments one by one and hands them on in tuples,
which it makes by `named`. They are made where they are handed on: an assignment would make variables of the fields in capitals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dct_compile.triton_kernels.compat import constexpr_function


class State(NamedTuple):
    """The state of a bucket's parameters."""

    residual: Any  # float32 [state_numel]
    threshold: Any  # float32 [S]
    counters: Any  # int64 [S, 5]


class Schedule(NamedTuple):
    """At which steps a threshold is due, as in schedule.py."""

    interval: Any
    GEOMETRIC: Any
    HOLD: Any


class Tables(NamedTuple):
    """Tiles and pieces of a bucket, see gradient_tables.py."""

    tiles: Any  # int64 [tile_count, 4]
    tile_count: Any
    pieces: Any  # int64 [pieces, 7]


class Wire(NamedTuple):
    """The format of a payload's chunk, as in layout.py."""

    chunk_bytes: Any
    values_offset: Any
    counts_offset: Any
    indices_offset: Any
    VALUE: Any  # code of the value dtype, see number_formats_triton.py
    INDEX_BYTES: Any
    MAX_COUNT: Any  # at most TILE
    WHOLE: Any  # whether a block is a whole piece
    BLOCK: Any  # elements of a block within a tile
    CHUNKS: Any  # over which the units of a parameter are spread; 1 in the owner's buffer


class Gathered(NamedTuple):
    """Payloads that were gathered: ``rounds`` of ``chunks``."""

    payloads: Any  # uint8 [rounds * chunks, chunk_bytes]
    reached: Any  # int64 [rounds * chunks, blocks_per_chunk]: entries up to the end of each block
    rounds: Any
    chunks: Any
    blocks_per_chunk: Any
    capacity: Any


class Staging(NamedTuple):
    """Scratch: the candidates of each tile, as if all of them could be sent."""

    staged: Any  # float32 [tiles, TILE]: their W
    indices: Any  # int16 [tiles, TILE]: their indices in the tile
    counts: Any  # int32 [tiles, TILE / BLOCK]: how many of each block are staged
    found: Any  # int32 [2, tiles]: candidates staged and not staged
    held: Any  # int32 [1], zero before: whether a W is not finite


class Tally(NamedTuple):
    """Scratch: what each group of tiles has, and what each piece sends of it."""

    piece_count: Any
    segment_count: Any
    reached: Any  # int32 [2, tiles]: running sums of `Staging.found` within each group
    sums: Any  # int64 [2, groups]: totals of the groups, then running sums without their own
    groups: Any
    windows: Any  # int64 [pieces, 4]: candidates, the first that is sent, how many are sent, entries of the pieces before
    GROUP: Any  # tiles
    LANES: Any


class Format(NamedTuple):
    """Options that the kernels that pack are compiled for."""

    GRAD: Any  # code of the gradient's dtype
    PART: Any  # elements that a program holds in registers at a time
    TILE: Any
    FEEDBACK: Any


class OutputFormat(NamedTuple):
    """Options that the kernel that unpacks is compiled for."""

    OUT: Any  # code of the output's dtype
    PART: Any  # elements of a tile that a program clears or divides at a time
    TILE: Any


class Samples(NamedTuple):
    """The gradient plus what is owed to it, in the regions that `select_threshold` looks at."""

    grad: Any  # [numel], bfloat16 as int16
    residual: Any  # float32 [state_numel]
    RUN: Any  # samples of a task
    GRAD: Any
    FEEDBACK: Any


class Regions(NamedTuple):
    """The parameters whose thresholds are chosen, see `select_threshold_triton`."""

    counters: Any  # int64 [S, 5]
    table: Any  # int64 [regions, 10]
    runs: Any  # int64 [runs, 2]: region, first sample
    threshold: Any  # float32 [S]


class RankScratch(NamedTuple):
    """Scratch of `rank_kernel`, and how many regions and runs there are."""

    region_count: Any
    run_count: Any
    histograms: Any  # int64 [regions, 4, BINS]
    state: Any  # int64 [regions, STATE_COLUMNS]: zero before
    ticket: Any  # int64 [1]: zero before


@constexpr_function
def named(name):  # type: ignore[no-untyped-def]
    """Returns the class of that name in this module."""
    from dct_compile.triton_kernels import tuples_triton

    return getattr(tuples_triton, name)
