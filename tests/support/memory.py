"""The memory that tensors really take while a model trains, counted operation by operation."""

import weakref
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.optimization import make_optimizer


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were: an operation's results count from then on."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._known = set()

    def watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.watch(each)
        return result


def measure_training(
    config: NanoGPTConfig,
    *,
    batch_size: int,
    optimizer: str = "adamw",
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    micro_batches: int = 1,
    attention: str = "sdpa",
) -> int:
    """The peak of live bytes in a step of training on the CPU, as the trainer does one.

    It is the second step, because the first one makes the moments of the optimizer only at its end.
    """
    model = NanoGPTForCausalLM(config).train()
    model.set_attn_implementation(attention)
    if gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
    update = make_optimizer(optimizer, model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.zeros(batch_size, config.block_size, dtype=torch.int64)
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.watch(parameter)
        for _ in range(2):
            live.peak = live.bytes
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                    loss = model(ids, shift_labels=ids, num_items_in_batch=1, skip_logits=True, use_cache=False).loss
                loss.backward()
            update.found_inf = torch.zeros(())
            update.step()
            update.zero_grad(set_to_none=True)
    return live.peak
