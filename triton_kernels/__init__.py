"""Kernels of DCT: plain PyTorch references, Triton kernels for CUDA, a compiled kernel for CPU. No FX graphs, no process groups."""
