"""Chooses the codec of an activation or embedding: that which the options name, or the one that keeps the accuracy of its kind."""

from math import ceil

from dct_compile.config import DCTConfig
from dct_compile.exchange import ACTIVATION, ALL_REDUCE, BACKWARD_OF, EMBEDDING, RECTIFIED, RETURNED, Exchange

AUTO, THRESHOLD, DENSE, BFLOAT16 = "auto", "threshold", "dense", "bfloat16"
BITS = {"int8": 8, "int4": 4}
_ROWS = (ACTIVATION, EMBEDDING, BACKWARD_OF[ACTIVATION], BACKWARD_OF[EMBEDDING])


def codec_of(exchange: Exchange, config: DCTConfig) -> str | None:
    """Returns the codec of rows that carries ``exchange``; ``None`` where it carries no activation or embedding.

    A ReLU leaves few entries of a row that matter, and a threshold finds them [Gupta21]. Everything else is quantised: hidden states,
    attention and pooled embeddings have no unimportant entries (docs/accuracy.md).

    Args:
        exchange: Any exchange, with its backward if it has one.
        config: The options.

    Returns:
        One of the codecs of ``activation_codec`` but "auto".
    """
    if exchange.kind not in _ROWS:
        return None
    wanted = asked_for(exchange, config)[1]
    if wanted != AUTO:
        return wanted
    if config.mp_density == 1:
        return THRESHOLD  # which declines, for that reason
    if exchange.destination == RETURNED:
        return BFLOAT16
    return THRESHOLD if exchange.origin == RECTIFIED and _can_be_masked(exchange, config) else "int8"


def asked_for(exchange: Exchange, config: DCTConfig) -> tuple[str, str]:
    """Returns the option that says how the rows of ``exchange`` travel, and what it says. Patterns come first."""
    if not isinstance(config.activation_codec, str):
        found = next((codec for pattern, codec in config.activation_codec if exchange.matches(pattern)), None)
        if found is not None:
            return "activation_codec", found
    if exchange.kind in (EMBEDDING, BACKWARD_OF[EMBEDDING]):
        return "embedding_codec", config.embedding_codec
    return "activation_codec", config.activation_codec if isinstance(config.activation_codec, str) else AUTO


def kept_of(width: int, config: DCTConfig) -> int | None:
    """Returns how many entries of a row are sent; ``None`` where a row is so short that they would be twice the fraction asked for."""
    kept = ceil(config.mp_density * width)
    return kept if kept <= 2 * config.mp_density * width else None


def has_mask(exchange: Exchange) -> bool:
    """Returns True if the gradient of the exchange can be masked like the exchange itself, or if there is none."""
    if not exchange.trains or exchange.backward is not None or exchange.local_gradient:
        return True
    return exchange.collective.name != ALL_REDUCE and not exchange.unpaired  # else its gradient may be the unmasked one


def _can_be_masked(exchange: Exchange, config: DCTConfig) -> bool:
    if exchange.kind not in (ACTIVATION, EMBEDDING) or not exchange.static_rows or not exchange.shape:
        return False
    return kept_of(exchange.width, config) is not None and has_mask(exchange)
