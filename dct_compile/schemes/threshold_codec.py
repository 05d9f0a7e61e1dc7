"""Encodes a gradient as the entries above a threshold, and adds up what was encoded: the part that "gather" and "owner" share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_GATHER, ALL_TO_ALL, Exchange
from dct_compile.schemes.members import Members
from dct_compile.state.spec import StateTensor, counters_of, end_to_end, residual_of
from dct_compile.triton_kernels.layout import GradientLayout, Selection, choose_block
from dct_compile.triton_kernels.values import per_segment

dct = torch.ops.dct


@dataclass(frozen=True)
class ThresholdCodec:
    """The threshold codec over one layout.

    ``stage``: "" for a whole buffer, "owner" for the share that a rank owns. ``site``: the name of the site, for code and profiles.
    """

    layout: GradientLayout
    selection: Selection
    error_feedback: bool
    site: str
    stage: str = ""

    @classmethod
    def of(cls, exchange: Exchange, members: Members, chunks: int, config: DCTConfig) -> "ThresholdCodec":
        """Returns the codec that the options ask for, for payloads cut into ``chunks``."""
        selection = Selection(
            per_segment(members.densities(config)),
            config.threshold_method,
            config.fixed_threshold,
            config.refresh_interval,
            config.refresh_warmup,
            config.hold_density,
        )
        return cls(gradient_layout_of(members, chunks, config), selection, config.error_feedback, exchange.label)

    @property
    def digest(self) -> str:
        """The numbers on which all ranks must agree: those of the payload and of the choice of its entries."""
        wire, chosen = self.layout, self.selection
        densities = ", ".join(f"{each:g}" for each in (chosen.density if isinstance(chosen.density, tuple) else (chosen.density,)))
        rule = f"fixed at {chosen.fixed:g}" if chosen.method == "fixed" else f"{chosen.method} for density {densities}"
        refresh = f"every {chosen.refresh_interval} steps, warm-up {chosen.refresh_warmup}{', held' if chosen.hold else ''}"
        feedback = "" if self.error_feedback else ", no error feedback"
        return (
            f"{len(wire.segments)} parameters, {wire.payload_bytes} bytes in {wire.chunks} chunks, blocks of {wire.block},"
            f" {str(wire.value_dtype).removeprefix('torch.')} values; threshold {rule}, {refresh}{feedback}"
        )

    def memory_bytes(self, exchange: Exchange, payloads: int) -> int:
        """Returns the bytes that a step reads and writes: gradient and residual, payloads, and the result."""
        assert exchange.dtype is not None
        kept = self.layout.state_numel
        return kept * (2 * exchange.dtype.itemsize + 8) + (1 + payloads) * self.layout.payload_bytes

    def state(self) -> tuple[StateTensor, ...]:
        """Returns the state that the operators update: residual, threshold and counters."""
        count = len(self.layout.segments)
        parts: tuple[tuple[int, int], ...] = end_to_end([numel for _, numel in self.layout.segments])
        if self.stage:
            parts = tuple((piece.state_offset, piece.state_offset + piece.numel) for piece in self.layout.pieces)
        threshold = StateTensor("threshold", (count,), torch.float32, tuple(range(count)), float("inf"), self.stage)
        return residual_of(parts, self.stage), threshold, counters_of(count, self.stage)

    def encode(self, grad: Tensor, state: Mapping[str, Tensor], sends: str) -> Tensor:
        """Packs the entries of ``grad`` [numel] plus residual that reach the threshold: uint8 [layout.payload_bytes].

        ``sends``: the collective that will carry the payload. The rest of the sum becomes the new residual.
        """
        own = self._own(state)
        dct.select_threshold(grad, *own, self.layout, self.selection, self.error_feedback, site=self.site)
        payload: Tensor = dct.threshold_pack(grad, *own, self.layout, self.error_feedback, site=self.site, sends=sends)
        return payload

    def encode_sum(self, chunks: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Adds up the ``chunks`` that an owner received, and packs the sum again: uint8 [layout.chunk_bytes]."""
        names = {"site": self.site, "receives": ALL_TO_ALL, "sends": ALL_GATHER}
        chunk: Tensor = dct.repack(chunks, *self._own(state), self.layout, self.selection, self.error_feedback, **names)
        return chunk

    def decode_sum(self, payloads: Tensor, rest: Tensor | None, grad: Tensor, divisor: int, in_place: bool = False) -> Tensor:
        """Adds up the gathered ``payloads`` and divides: a tensor like ``grad``, or itself, with the dense ``rest`` in its place."""
        names = {"site": self.site, "receives": ALL_GATHER}
        if in_place:
            dct.unpack_into(grad, payloads, rest, self.layout, divisor, **names)
            return grad
        total: Tensor = dct.unpack_accumulate(payloads, rest, grad.numel(), grad.dtype, self.layout, divisor, **names)
        return total

    def _own(self, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        prefix = f"{self.stage}_" if self.stage else ""
        return state[f"{prefix}residual"], state[f"{prefix}threshold"], state[f"{prefix}counters"]


def gradient_layout_of(members: Members, chunks: int, config: DCTConfig) -> GradientLayout:
    """Returns the payload geometry of a buffer's compressed segments, cut into ``chunks``."""
    densities, numels = members.densities(config), members.numels
    # Bytes of metadata per element are linear in the density, so those of all follow from the mean.
    mean = sum(density * numel for density, numel in zip(densities, numels, strict=True)) / sum(numels)
    return GradientLayout(
        tuple((segment.offset, segment.parameter.numel) for segment in members.compressed),
        choose_block(mean, max(numels)),
        chunks,
        -1,
        per_segment([min(1.0, density * config.capacity_factor) for density in densities]),
        config.dp_dtype,
    )
