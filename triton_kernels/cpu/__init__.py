"""Compiled kernels for CPU: C++ sources with a C interface, built on first use."""
