"""Collectives that live outside every graph: a small reducer function is put in their place and rewritten by the same passes."""
