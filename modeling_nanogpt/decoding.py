"""How a model continues prompts: one pass over the prompt, then one short step for each token.

A cache keeps the keys and values of earlier tokens, so a step costs about the same at every position. Positions are
learned and absolute, so the cache is only valid while no token moves. Once the context is full, the oldest `stride`
tokens are dropped, and one pass over those that stay fills a new cache. With stride 1 this happens for each token, as
in nanoGPT, and each token is predicted from as many tokens as the model can see.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .modeling_nanogpt import CACHE, NanoGPTForCausalLM

LOOKS_EVERY = 32  # steps between two looks at what a GPU has computed, because each look waits for it
FEW_FLOPS = 5e7  # of a step of one token: with fewer, several threads of a CPU are no faster than one


class Diverged(RuntimeError):
    """A model predicts nan or inf, so it has diverged in training."""


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
    reader: "Reader | None" = None,
) -> Iterator[torch.Tensor]:
    """Continue prompts (B, T) int64: yields the next token of each row, (B,) int64, at most max_new_tokens times.

    Temperature 0 takes the likeliest token; top_k 0 draws from all tokens. `stride` is the number of tokens of a full
    context that are dropped at once, by default half of the context. A row that has ended goes on with the end-of-text
    id, and the last row that ends also ends the whole. Draws come from `generator`, or from torch's own. The model's
    generation configuration says which tokens end a text (eos_token_id), and which are never drawn (suppress_tokens).
    `reader` is how the model reads, by default choose_reader(model, B, T + max_new_tokens).

    Raises Diverged if the model predicts no numbers. On a GPU, some tokens may have come before that.
    """
    block_size = model.config.max_position_embeddings
    stride = stride or max(block_size // 2, 1)
    reader = reader or choose_reader(model, len(ids), ids.shape[1] + max_new_tokens)
    ends, never = token_sets(model.generation_config, ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
    finite = torch.ones((), dtype=torch.bool, device=ids.device)
    looks_every = 1 if ids.device.type == "cpu" else LOOKS_EVERY
    reader.forget()
    unread = context = ids[:, -block_size:]  # (B, T): what the cache does not hold yet, and all that the model sees
    for step in range(1, max_new_tokens + 1):
        logits = reader.read(unread).float().index_fill(1, never, -torch.inf)  # (B, V)
        finite &= logits.amax(dim=-1).isfinite().all()
        token = choose(logits, temperature, top_k, generator)  # (B,)
        if len(ends):
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, ends)
        looks = step % looks_every == 0 or step == max_new_tokens
        if looks and not finite:
            raise Diverged("the model predicts nan or inf")
        yield token
        if looks and ended.all():
            return
        if context.shape[1] < block_size:
            unread = token[:, None]  # (B, 1)
            context = torch.cat([context, unread], dim=1)
        else:
            unread = context = torch.cat([context[:, stride:], token[:, None]], dim=1)
            reader.forget()


class Reader:
    """A model and its cache, which grows with each token."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.parameters = model.num_parameters()
        self.cache: Cache = DynamicCache(config=model.config)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read further tokens (B, T) int64; returns the logits (B, V) of the token after them."""
        with threads_for(2 * self.parameters * len(ids)):  # FLOPs: a product and a sum for each parameter and row
            output = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        return output.logits[:, -1]

    def forget(self) -> None:
        """Empty the cache."""
        self.cache = DynamicCache(config=self.model.config)


class FixedReader(Reader):
    """A model and a cache of a fixed size, at a fixed address, for a prompt and its continuation of `length` tokens.

    On a GPU, a cache that grows is slow at first: for each new length, cuDNN makes a plan of its attention, which
    takes tens of milliseconds.
    """

    def __init__(self, model: PreTrainedModel, length: int):
        super().__init__(model)
        size = min(length, model.config.max_position_embeddings)  # the cache holds a full context at most
        self.cache = StaticCache(config=model.config, max_cache_len=size)

    def forget(self) -> None:
        self.cache.reset()


class GraphReader(FixedReader):
    """A model on a GPU that reads a token for each of `rows` rows by one CUDA graph.

    In a step of one token, a GPU mostly waits for its kernels to be launched. A graph launches all of them at once.
    Recording the graph takes about half a second.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, rows: int, length: int):
        super().__init__(model, length)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # the first steps allocate the cache and choose kernels: no part of the graph
            for _ in range(2):
                super().read(self.token)
                self.forget()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = super().read(self.token)  # (B, V)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 1:
            return super().read(ids)
        self.token.copy_(ids)
        self.graph.replay()
        return self.logits


def choose_reader(model: PreTrainedModel, rows: int, length: int) -> Reader:
    """The fastest reader of prompts (rows, T) which, with their continuations, have at most `length` tokens."""
    if model.device.type == "cuda" and isinstance(model, NanoGPTForCausalLM):
        return GraphReader(model, rows, length)
    return Reader(model)  # a model of transformers may do what a graph cannot hold


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """One thread of the CPU if a step of one token has fewer FLOPs than FEW_FLOPS, else as many threads as before.

    Threads wait for each other at the end of each matrix product. If another program takes one of their cores, a wait
    may last for milliseconds, and the products of a small step take microseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if flops < FEW_FLOPS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    tokens = None
    if 0 < top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k)  # (B, top_k) each: a draw from few tokens is cheaper
    probabilities = logits.softmax(dim=-1)
    # These are the draws of torch.multinomial, without its checks, for which the host would wait. Each token gets a
    # time from an exponential distribution whose rate is its probability. The first token is the one that is drawn.
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = (probabilities / times).argmax(dim=-1)  # (B,)
    return drawn if tokens is None else tokens.gather(1, drawn[:, None])[:, 0]
