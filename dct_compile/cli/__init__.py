"""The command ``dct``."""
