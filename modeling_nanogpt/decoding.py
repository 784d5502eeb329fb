"""How a model continues prompts: one pass over the prompt, then one short step for each token.

A cache keeps the keys and values of earlier tokens, so a step costs about the same at every position. Positions are
learned and absolute, so the cache is only valid while no token moves. Once the context is full, the oldest `stride`
tokens are dropped, and one pass over those that stay fills a new cache. With stride 1 this happens for each token, as
in nanoGPT, and each token is predicted from as many tokens as the model can see.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .modeling_nanogpt import CACHE

ENDED_EVERY = 32  # steps between two looks at whether all rows have ended: each look waits for the GPU


@torch.no_grad()
def continue_prompt(
    model: PreTrainedModel,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int,
    stride: int | None = None,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> Iterator[torch.Tensor]:
    """Continue prompts (B, T) int64: yields the next token of each row, (B,) int64, at most max_new_tokens times.

    Temperature 0 takes the likeliest token; top_k 0 draws from all tokens. `stride` is the number of tokens of a full
    context that are dropped at once, by default half of the context. A row that has ended goes on with the end-of-text
    id, and the last row that ends also ends the whole. Draws come from `generator`, or from torch's own. The model's
    generation configuration says which tokens end a text (eos_token_id), and which are never drawn (suppress_tokens).

    In a step of one token, a GPU mostly waits for its kernels to be launched. If `compiled`, the step becomes one CUDA
    graph, or on a CPU one compiled function; compiling takes some time at the start. A graph needs a cache of a fixed
    size at a fixed address.
    """
    block_size = model.config.max_position_embeddings
    stride = stride or max(block_size // 2, 1)
    ends, never = token_sets(model.generation_config, ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
    ended_every = 1 if ids.device.type == "cpu" else ENDED_EVERY
    context = ids[:, -block_size:]  # all that the model sees
    cache: Cache = DynamicCache(config=model.config)
    read_one: Callable = model
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=block_size)
        read_one = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    unread = context  # what the cache does not hold yet
    for step in range(1, max_new_tokens + 1):
        forward = read_one if unread.shape[1] == 1 else model
        logits = forward(unread, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float()  # (B, V)
        token = choose(logits.index_fill(1, never, -torch.inf), temperature, top_k, generator)  # (B,)
        if len(ends):
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, ends)
        yield token
        if step % ended_every == 0 and ended.all():
            return
        if context.shape[1] < block_size:
            unread = token[:, None]  # (B, 1)
            context = torch.cat([context, unread], dim=1)
        else:
            unread = context = torch.cat([context[:, stride:], token[:, None]], dim=1)
            if compiled:
                cache.reset()
            else:
                cache = DynamicCache(config=model.config)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a newline, or the end-of-text id if no token spells a newline."""
    try:
        ids: list[int] = tokenizer("\n", add_special_tokens=False).input_ids
    except Exception:  # tokenizers raises the base class if the vocabulary lacks a character
        ids = []
    return ids or [tokenizer.eos_token_id or 0]


def token_sets(settings: GenerationConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that end a text, and the ids that are never drawn (such as those that only pad the vocabulary)."""
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    never = settings.suppress_tokens or []
    return torch.tensor(ends, dtype=torch.long, device=device), torch.tensor(never, dtype=torch.long, device=device)


def choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> torch.Tensor:
    """One token (B,) for each row of logits (B, V): the likeliest, or a draw from the softmax of the top_k."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k)  # (B, top_k) each: a draw from few tokens is cheaper
        return tokens.gather(1, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))[:, 0]
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
