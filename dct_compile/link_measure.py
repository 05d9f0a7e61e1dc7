"""Measures the link between the ranks of a process group: latency, rate, and the rate of their memory."""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dct_compile.link import Link

_LONG_S = 0.05
"""A message that takes this long is long enough to tell the rate."""
_SMALLEST, _LARGEST = 2**16, 2**26
"""Bytes that a rank sends in the messages that tell the rate."""
_SHORT_MESSAGES = 9
_COPIED = 2**24
"""Elements of the tensors whose sum tells the rate of memory: 64 MiB each, more than most caches hold."""
_INSIDE = 2**24
"""Bytes of the messages that tell the rate inside of a host."""


def device_of(group: ProcessGroup) -> torch.device:
    """Returns the device whose tensors the group sends: the current GPU where it has a backend for those, else the CPU. Gloo takes both."""
    gpu = next((device for device in group._device_types if device.type == "cuda" and torch.cuda.is_available()), None)
    if gpu is None or group._get_backend(gpu).name() == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def measured(group: ProcessGroup, hosts: Sequence[str]) -> Link:
    """Measures latency and rate with the collective that carries payloads. All ranks of ``group`` make this call, and get the same link.

    Takes less than two seconds from a rate of 1 Mbit/s on.

    Args:
        group: The process group.
        hosts: The host of each of its ranks. Where two share one, the rate inside of a host is measured as well.
    """
    device, ranks = device_of(group), group.size()
    short = torch.zeros(8, dtype=torch.uint8, device=device)
    _slowest(_gather_seconds(short, group), group)  # connections are made at the first message
    latency_s = statistics.median(_gather_seconds(short, group) for _ in range(_SHORT_MESSAGES))
    latency_s = _slowest(latency_s, group) / (ranks - 1)
    sent, seconds = 0.0, latency_s
    size = _SMALLEST
    while size <= _LARGEST and seconds < _LONG_S:
        message = torch.zeros(-(-size // (ranks - 1)), dtype=torch.uint8, device=device)
        taken = _slowest(min(_gather_seconds(message, group) for _ in range(2 if seconds < _LONG_S / 4 else 1)), group)
        sent, seconds = float(message.numel() * (ranks - 1)), taken
        size *= 4
    wire_s = max(seconds - (ranks - 1) * latency_s, seconds / 2)
    copy_bytes_per_s = 1 / _slowest(1 / _copy_rate(device), group)
    inside_s = _slowest(_inside_seconds(group, hosts), group)
    return Link(sent / wire_s, latency_s, copy_bytes_per_s, _INSIDE / inside_s if inside_s else None)


def _inside_seconds(group: ProcessGroup, hosts: Sequence[str]) -> float:
    """Returns the seconds in which this rank sends :data:`_INSIDE` bytes to the next rank of its host, while all do; 0 if it is alone.

    As in an exchange, the message is a copy, memory for what arrives is new, and that is added up. All of it counts, and often is the most.
    """
    mates = [rank for rank, host in enumerate(hosts) if host == hosts[group.rank()]]
    if len(mates) == 1:
        return 0.0
    place, device = mates.index(group.rank()), device_of(group)
    own = torch.ones(_INSIDE // 4, device=device)
    to, source = mates[(place + 1) % len(mates)], mates[place - 1]
    times = []
    for _ in range(6):
        _finish(own)
        start = time.perf_counter()
        sent, received = own.clone(), torch.empty_like(own)
        both = [dist.P2POp(dist.isend, sent, group=group, group_peer=to), dist.P2POp(dist.irecv, received, group=group, group_peer=source)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        _finish(received + own)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # connections are made at the first message


def _gather_seconds(message: Tensor, group: ProcessGroup) -> float:
    gathered = message.new_empty(group.size() * message.numel())
    _finish(message)
    start = time.perf_counter()
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on, and before
    all_gather(gathered, message, group=group)
    _finish(message)
    return time.perf_counter() - start


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _slowest(seconds: float, group: ProcessGroup) -> float:
    """Returns the largest of all ranks' numbers."""
    value = torch.tensor([seconds], dtype=torch.float64, device=device_of(group))
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return float(value.item())


def _copy_rate(device: torch.device) -> float:
    """Returns bytes per second that an operator reads and writes."""
    one, other = torch.ones(_COPIED, device=device), torch.ones(_COPIED, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.add(one, other, out=other)
        _finish(other)
        times.append(time.perf_counter() - start)
    return 3 * other.numel() * other.itemsize / min(times)
