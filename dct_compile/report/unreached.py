"""Finds DDP modules that train without any compiled graph inside of them: a backend that is never called cannot tell."""

import gc
from collections.abc import Container

import torch.distributed as dist
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def wrapped_class(module: nn.Module) -> str:
    """Returns the name of the class that a user has wrapped in DDP and ``torch.compile``, in whichever order."""
    while isinstance(module, DistributedDataParallel | OptimizedModule):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
    return type(module).__name__


def unreached_modules(reached: Container[nn.Module]) -> list[str]:
    """Returns the DDP modules of this process that train and are not ``reached``, as ``DDP(Net)``."""
    if not dist.is_initialized():
        return []
    # torch keeps no list of them, but every object refers to its class.
    referrers = gc.get_referrers(DistributedDataParallel, *DistributedDataParallel.__subclasses__())
    modules = [item for item in referrers if isinstance(item, DistributedDataParallel)]
    return [f"DDP({wrapped_class(module)})" for module in modules if module not in reached and _averages(module)]


def _averages(module: DistributedDataParallel) -> bool:
    """Returns True if DDP's own reducer averages the gradients of ``module`` over several ranks, and has done so in an earlier step."""
    group = module.process_group
    if group not in dist.distributed_c10d._world.pg_map or group.size() == 1:  # the groups that were destroyed are not there
        return False
    log = module._get_ddp_logging_data()
    return log["iteration"] > 0 and "comm_hook" not in log
