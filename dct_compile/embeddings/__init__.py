"""Embeddings that other code exchanges outside of every graph: it hands them to a codec, or calls an exchange that encodes them."""

from dct_compile.embeddings.all_to_all import all_to_all_single
from dct_compile.embeddings.torchrec import torchrec_sharder

__all__ = ["all_to_all_single", "torchrec_sharder"]
