"""Do ranks that must hold the same parameters hold the same, to the bit?"""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from dct_compile.models.parallel import Mesh, sharded_parameters


class ReplicaMismatch(RuntimeError):
    """Ranks that must hold the same parameters do not."""


def check_replicas(model: nn.Module, mesh: Mesh, moment: str) -> None:
    """Compares SHA-256 digests: of the sharded parameters over the data-parallel ranks, of all others over all ranks.

    A collective of all ranks. Raises :class:`ReplicaMismatch`, which names the first rank that differs and ``moment``, on every rank.
    """
    sharded = dict(sharded_parameters(model))
    replicated = [parameter for name, parameter in model.named_parameters() if name not in sharded]
    own = torch.frombuffer(bytearray(_sha256(replicated) + _sha256(sharded.values())), dtype=torch.uint8)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    digests = [bytes(item.tolist()) for item in gathered]
    half = len(digests[0]) // 2
    for rank, digest in enumerate(digests):
        # Ranks are numbered dp * mp-ranks + mp: the first mp ranks hold one copy of every shard.
        if digest[:half] != digests[0][:half] or digest[half:] != digests[rank % mesh.mp][half:]:
            raise ReplicaMismatch(f"{moment}: the parameters of rank {rank} differ from those of its replicas")


def _sha256(parameters: Iterable[nn.Parameter]) -> bytes:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.digest()
