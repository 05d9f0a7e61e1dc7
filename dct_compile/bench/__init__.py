"""The parts of ``dct bench``: cases, timing, results."""
