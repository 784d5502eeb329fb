"""What Muon needs if several processes train together: whole tensors of shards, and work that processes share."""

import math
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, unless FSDP2 has sharded it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is sharded in the same way as `like`. Every process must call this."""
    if not isinstance(like, DTensor):
        return shard
    sharded = DTensor.from_local(
        shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return sharded.full_tensor()


def cut(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that every process holds, sharded in the same way as `like`."""
    if not isinstance(like, DTensor):
        return whole
    sharded = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # no communication
    return sharded.to_local()


def machine_group() -> dist.ProcessGroup | None:
    """The processes on this machine, or None if they cannot share work. Every process of the run must call this.

    The launcher says in LOCAL_WORLD_SIZE how many there are. They don't share work if machines differ in this number:
    the rounding of a matrix product may depend on the size of its batch, and then the replicas of DDP would drift
    apart.
    """
    if not dist.is_initialized():
        return None
    here, everywhere = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), dist.get_world_size()
    counts = [None] * everywhere
    dist.all_gather_object(counts, here)
    if here == 1 or set(counts) != {here} or everywhere % here:
        return None
    return dist.group.WORLD if here == everywhere else dist.new_subgroups(here)[0]


def share(
    function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """function(batch), where each process of the group computes an equal part of the batch (N, ...)."""
    if group is None:
        return function(batch)
    count = math.ceil(len(batch) / group.size())  # a process
    first = group.rank() * count
    mine = batch.new_zeros(count, *batch.shape[1:])  # zeros, if there are not enough for all
    part = batch[first : first + count]
    mine[: len(part)] = function(part)
    together = batch.new_empty(count * group.size(), *batch.shape[1:])
    # torch 2.13 has a new name for this, and warns of the old one
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(together, mine, group=group)
    return together[: len(batch)]
