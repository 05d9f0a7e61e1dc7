"""The operator by which schemes in plain PyTorch update their state: `store`."""

from dct_compile.ops.library import define_op
from dct_compile.triton_kernels.store import check_store, store_reference

store = define_op("store(Tensor(a!) state, Tensor value) -> ()", fake=check_store, reference=store_reference)
