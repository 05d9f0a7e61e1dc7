"""The schemes: ways to carry an exchange, each a plain function of tensors. This is the list of all."""

from dct_compile.schemes import (
    cast_rows,
    gathered_shards,
    powersgd,
    quantized_rows,
    quantized_shards,
    quantized_sum,
    random_k,
    row_threshold,
    threshold,
    threshold_owner,
    two_level,
)
from dct_compile.schemes.offer import Declined, GradientOffer, Offer, RowOffer, Scheme

SCHEMES = (
    Scheme("gather", threshold.offer),
    Scheme("owner", threshold_owner.offer),
    Scheme("two_level", two_level.offer),
    Scheme("powersgd", powersgd.offer),
    Scheme("random_k", random_k.offer),
    Scheme("row_threshold", row_threshold.offer),
    Scheme("quantized_rows", quantized_rows.offer),
    Scheme("quantized_sum", quantized_sum.offer),
    Scheme("cast_rows", cast_rows.offer),
    Scheme("quantized_shards", quantized_shards.offer),
    Scheme("gathered_shards", gathered_shards.offer),
)
"""Every scheme, in the order in which they are preferred where they send as many bytes."""

__all__ = ["SCHEMES", "Declined", "GradientOffer", "Offer", "RowOffer", "Scheme"]
