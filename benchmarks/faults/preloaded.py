"""Imported once by the process from which ranks are forked. It starts no thread."""

import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.checkpoint

import dct_compile.backend

__all__ = ["dct_compile", "torch"]
