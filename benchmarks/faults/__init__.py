"""Faults that ``benchmarks/reliability.py`` provokes, one module for each theme."""
