"""The GPT: token and position embeddings, pre-norm blocks of attention and MLP, and a language-model head.

Below it are the heads for classification and question answering, which fine-tuning starts from.

The network and its parameter names are nanoGPT's (GPT-2's, with nn.Linear). Everything around the network is what
transformers expects of a causal language model. This file and the configuration travel with every checkpoint, so this
file imports torch, transformers and the configuration, and nothing else.

Shapes: B sequences, T tokens, C = n_embd, H heads of D = C / H, V = vocab_size, S = cached tokens + T.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

if not __package__:  # in a model's folder, Python takes this file for the package of the same name
    raise ImportError(
        "modeling_nanogpt.py in this folder is the code of a model, not the package modeling_nanogpt: go to another "
        "folder, or use an installed command such as nanogpt-sample",
        name="modeling_nanogpt",
    )

from .configuration_nanogpt import NanoGPTConfig

try:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM_NAMES
except ImportError:  # a release without this table of model types and the names of their classes
    CAUSAL_LM_NAMES = {}

LOSS_PART = 1024  # positions whose logits exist at a time, if the backward pass computes them again

# ---------------------------------------------------------------------------------------------------------------------
# The versions of transformers. Release 5.24 renamed the argument and output `past_key_values` to `cache`. Only this
# section and the uses of CACHE below depend on that. Once no older release is supported, delete the section, and write
# `cache` for the keyword.

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def resolve_cache(cache, past_key_values, kwargs: dict) -> tuple[Cache | None, dict]:
    """The key/value cache of a call, given by either name, and the keyword arguments for the attention function.

    Raises ValueError if both names are given, for a cache in the tuple format of transformers 4, and for a cache or a
    mask under a name that this model does not know: ignoring such an argument would give wrong text in silence.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("give the key/value cache once: either as cache or as past_key_values")
    if past_key_values is not None and CACHE == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            "`past_key_values` is deprecated: transformers calls it `cache` now", FutureWarning, stacklevel=2
        )
    cache = past_key_values if cache is None else cache
    if isinstance(cache, tuple | list):
        raise ValueError(f"the cache is a {type(cache).__name__}: give a transformers Cache, as DynamicCache()")
    for name, value in kwargs.items():
        changes_attention = "mask" in name or "past" in name or name.startswith("encoder_")
        if value is not None and (changes_attention or isinstance(value, Cache)):
            raise ValueError(
                f"{name} is unknown to this model: the key/value cache is cache (or past_key_values), "
                "and the mask is attention_mask"
            )
    if CACHE != "cache" and not isinstance(cache, Cache | None):
        return None, kwargs | {"cache": cache}  # before 5.24, the attention function itself updates a paged cache
    return cache, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# The network


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention spelled out; the other implementations (sdpa, flash, flex) come from transformers.

    query (B, H, T, D), key and value (B, H, S, D); attention_mask (B, 1, T, S) float is added to the scores, or None.
    Returns the output (B, T, H, D) and the attention weights (B, H, T, S). The softmax is computed in float32.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value)  # (B, H, T, D)
    return output.transpose(1, 2).contiguous(), weights


class NanoGPTAttention(nn.Module):
    """Multi-head causal self-attention; q, k and v come from one fused projection."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True  # see _init_weights
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query, key, value = (
            x.view(heads).transpose(1, 2) for x in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)
        )  # (B, H, T, D) each
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            # a paged cache also adds to kwargs, which the attention function gets
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*input_shape, -1).contiguous()  # (B, T, C)
        return self.resid_dropout(self.c_proj(output)), weights


class NanoGPTMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.act = nn.GELU(approximate="none" if config.activation_function == "gelu" else "tanh")
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))  # (B, T, C)


class NanoGPTBlock(GradientCheckpointingLayer):
    """Attention, then MLP, each on a normalised copy of the residual stream and added back to it."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = NanoGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))  # (B, T, C)


class NanoGPTPreTrainedModel(PreTrainedModel):
    """What transformers has to know about all models here, and how weights start."""

    config: NanoGPTConfig
    base_model_prefix = "transformer"  # the attribute that holds NanoGPTModel, and the prefix of its weights' names
    _input_embed_layer = "wte"  # the attribute that get_input_embeddings returns
    _no_split_modules = ["NanoGPTBlock"]  # device_map and FSDP keep each block whole
    _skip_keys_device_placement = ["cache", "past_key_values"]  # device_map leaves the cache on the layers' devices
    supports_gradient_checkpointing = True  # each block is a GradientCheckpointingLayer
    _supports_sdpa = True  # these four allow attn_implementation to be sdpa,
    _supports_flash_attn = True  # flash_attention_2 and its successors,
    _supports_flex_attn = True  # flex_attention,
    _supports_attention_backend = True  # or a function that the caller registers, as vLLM does
    _can_compile_fullgraph = True  # torch.compile traces forward as a single graph
    _can_record_outputs = {"hidden_states": NanoGPTBlock, "attentions": NanoGPTAttention}  # see capture_outputs

    @torch.no_grad()
    def _init_weights(self, module):
        # Matrices are drawn from N(0, 0.02), biases are zero, norms are one. The projections back into the residual
        # stream are smaller, so that 2 * n_layer of them add up to the same size (GPT-2 paper, section 2.3). The mark
        # is on the nn.Linear itself: in custom code, such as this file, transformers skips a module that owns no
        # parameter, so a test for NanoGPTAttention and NanoGPTMLP, as in its own GPT-2, would never be true.
        super()._init_weights(module)
        if getattr(module, "is_residual_projection", False):
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.n_layer))

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers. config.json names the classes of all models, whichever of them is saved."""
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = auto_map | {auto: f"modeling_nanogpt.{cls.__name__}" for auto, cls in CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)


class NanoGPTModel(NanoGPTPreTrainedModel):
    """The GPT without its head: token ids to hidden states after the final layer norm."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(NanoGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # an argument left at None, as use_cache, comes from the configuration
    @capture_outputs  # with output_hidden_states or output_attentions, hooks add what each block computes
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Embed the tokens and run the blocks.

        input_ids (B, T) int64, or inputs_embeds (B, T, C) instead; attention_mask (B, S), 1 for a token and 0 for
        padding; position_ids (B, T), by default counted over the tokens that attention_mask keeps, or on from the
        cache if there is no such mask. So padding on the left changes nothing. Returns last_hidden_state (B, T, C).
        Raises ValueError if a position lies beyond block_size.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache, kwargs = resolve_cache(cache, past_key_values, kwargs)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)

        padding = attention_mask
        attention_mask = self.causal_mask_or_none(inputs_embeds, attention_mask, position_ids, cache)
        seen = cache.get_seq_length() if isinstance(cache, Cache) else 0
        length = inputs_embeds.shape[1]
        if position_ids is None and padding is not None and padding.ndim == 2:
            position_ids = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]  # (B, T)
        elif position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + seen  # (1, T)
        self.check_positions(position_ids, seen)

        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))  # (B, T, C)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), **{CACHE: cache})

    def causal_mask_or_none(self, inputs_embeds, attention_mask, position_ids, cache):
        """The mask in the form that the attention function wants, or None if that function is causal by itself.

        Without padding, cache or given positions, SDPA needs no mask, and only then uses its fastest kernel. The
        trainer's own function, "plain", needs none either. create_causal_mask would sometimes make one even so, under
        torch.compile. It sees only the positions that the caller gave: it searches them for packed sequences, and on
        a GPU that search waits for the device.
        """
        only_order_matters = attention_mask is None and position_ids is None and cache is None
        is_causal = self.config._attn_implementation in ("sdpa", "plain")
        if only_order_matters and is_causal:
            return None
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )

    def check_positions(self, position_ids, seen):
        """Raise ValueError if a position lies beyond block_size, and if there is no position at all.

        The lookup itself would be an IndexError on a CPU and would end the process on a GPU. There, reading positions
        waits for the device, so it happens only if the cached and the new tokens together exceed block_size.
        """
        if torch.compiler.is_compiling():
            return
        if not position_ids.numel():
            raise ValueError("the input has no token: give at least one, for example the token that begins a text")
        too_long = not torch.is_tensor(seen) and seen + position_ids.shape[1] > self.config.block_size
        if (too_long or position_ids.device.type == "cpu") and position_ids.max() >= self.config.block_size:
            raise ValueError(
                f"position {position_ids.max().item()} is beyond block_size={self.config.block_size} (positions count "
                "from 0): shorten the input, or the number of new tokens"
            )


def select_positions(hidden_states: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """The hidden states (B, T, C) at the positions whose logits are wanted, in the forms that transformers allows.

    An int N means the last N positions, and 0 means all of them. A tensor (N,) means the same positions in every row,
    an integer tensor (B, N) the positions of each row. These return (B, N, C). A boolean tensor (B, T) means the
    positions that are true, and returns (N, C). This is transformers' slice_logits_to_keep, which 5.17 does not have:
    keep this copy until the floor has slice_logits_to_keep.
    """
    if isinstance(positions, int):
        return hidden_states[:, -positions:, :]
    if positions.ndim == 1:
        return hidden_states[:, positions, :]
    if positions.dtype == torch.bool:
        return hidden_states[positions]
    return torch.take_along_dim(hidden_states, positions[..., None], dim=1)


class NanoGPTForCausalLM(NanoGPTPreTrainedModel, GenerationMixin):
    """The GPT with its language-model head, tied to the token embedding unless the configuration says otherwise.

    The weights, their shapes, and how they start, with C = n_embd, V = vocab_size and s = initializer_range:

        transformer.wte.weight              (V, C)                      N(0, s)
        transformer.wpe.weight              (block_size, C)             N(0, s)
        transformer.h.*.ln_1.weight         (C)                         1
        transformer.h.*.attn.c_attn.weight  (3 C, C)                    N(0, s)  queries, keys, values
        transformer.h.*.attn.c_proj.weight  (C, C)                      N(0, s / sqrt(2 n_layer))
        transformer.h.*.ln_2.weight         (C)                         1
        transformer.h.*.mlp.c_fc.weight     (intermediate_size, C)      N(0, s)
        transformer.h.*.mlp.c_proj.weight   (C, intermediate_size)      N(0, s / sqrt(2 n_layer))
        transformer.ln_f.weight             (C)                         1
        lm_head.weight                      (V, C)                      the same tensor as wte, unless untied: N(0, s)

    With bias=True, every `weight` of the blocks and of ln_f has a `bias` beside it, as long as the first dimension of
    the weight and 0 at the start.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # the first is the second, and is not saved
    _tp_plan = {"lm_head": "colwise_gather_output"}  # tensor parallelism: each process computes a part of the logits
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # FSDP: the head stays gathered between forward and backward

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_generated_length(self, generation_config, **others):
        # generation_config.json has block_size as its max_length, for callers that name no length. max_new_tokens
        # wins over it in any case; if the limit stayed, transformers would warn at each call that both are set.
        is_limit = generation_config.max_length == self.generation_config.max_length
        if generation_config.max_new_tokens is not None and is_limit:
            generation_config.max_length = None
        return super()._prepare_generated_length(generation_config=generation_config, **others)

    @can_return_tuple  # with return_dict=False, the caller gets a tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, T, V) and, with labels, the mean cross-entropy in nats.

        labels (B, T) int64 are the inputs themselves, and are shifted here. shift_labels (B, T) int64 are the next
        tokens already, so that a window of T + 1 tokens has T targets. Either way a label of -100 does not count. The
        sum of the losses is divided by `num_items_in_batch` if that is given, and by the number of targets if not:
        this makes accumulated micro-batches exact. With skip_logits the caller gets the loss alone, and a training
        step does not hold a second copy of (B, T, V). With gradient checkpointing, a training step computes the
        loss by loss_in_parts. logits_to_keep names the positions to compute logits for, see select_positions.
        """
        # shift_labels is not in the signature: Trainer would take it for a label, and would not evaluate a loss if the
        # input has `labels` alone.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = select_positions(outputs.last_hidden_state, logits_to_keep)  # (B, T, C)

        logits, loss = None, None
        computes_again = self.transformer.gradient_checkpointing and self.training
        if computes_again and skip_logits and shift_labels is not None:
            loss = self.loss_in_parts(hidden_states, shift_labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)  # (B, T, V)
            if labels is not None or shift_labels is not None:
                options = {"labels": labels, "shift_labels": shift_labels, "vocab_size": self.config.vocab_size}
                loss = self.loss_function(logits=logits, **options, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def loss_in_parts(self, hidden_states, targets, num_items_in_batch=None, **kwargs):
        """The loss of hidden_states (B, T, C) and targets (B, T), without logits (B, T, V) in memory.

        The logits of LOSS_PART positions exist at a time, and the backward pass computes them again: 9 % more FLOPs
        for GPT-2 small. Its logits would take more memory than everything else.
        """

        def sum_of_losses(hidden_states, targets):  # (N, C), (N,)
            logits = self.lm_head(hidden_states)  # (N, V)
            options = {"shift_labels": targets, "vocab_size": self.config.vocab_size, "num_items_in_batch": 1}
            return self.loss_function(logits=logits, labels=None, **options | kwargs)

        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum()
        parts = zip(hidden_states.flatten(0, 1).split(LOSS_PART), targets.flatten().split(LOSS_PART), strict=True)
        losses = [checkpoint(sum_of_losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(losses).sum() / num_items_in_batch


# ---------------------------------------------------------------------------------------------------------------------
# Heads for fine-tuning, by transformers' own mixins. Each is a new linear layer on the hidden states. `num_labels` is
# a field of the configuration, 2 by default.


class NanoGPTHead(NanoGPTPreTrainedModel):
    """What the heads share: a GPT in each, also if the code of the configuration came with a checkpoint."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        # A mixin calls AutoModel.from_config next. AutoModel does not know a class that came with a checkpoint.
        AutoModel.register(type(config), NanoGPTModel, exist_ok=True)


class NanoGPTForSequenceClassification(GenericForSequenceClassification, NanoGPTHead):
    """Logits (B, num_labels) of whole texts, from the last token of each that is not padding."""

    base_model_prefix = "transformer"  # the mixins call it "model"


class NanoGPTForTokenClassification(GenericForTokenClassification, NanoGPTHead):
    """Logits (B, T, num_labels) of tokens. Each token only sees the tokens before it."""

    base_model_prefix = "transformer"


class NanoGPTForQuestionAnswering(GenericForQuestionAnswering, NanoGPTHead):
    """Logits (B, T) of the places where an answer starts, and logits (B, T) of the places where the answer ends."""

    base_model_prefix = "transformer"
    get_input_embeddings = NanoGPTPreTrainedModel.get_input_embeddings  # the mixin's expect another name than wte
    set_input_embeddings = NanoGPTPreTrainedModel.set_input_embeddings


# ---------------------------------------------------------------------------------------------------------------------
# What the auto classes load

CLASSES = {
    "AutoModel": NanoGPTModel,
    "AutoModelForCausalLM": NanoGPTForCausalLM,
    "AutoModelForSequenceClassification": NanoGPTForSequenceClassification,
    "AutoModelForTokenClassification": NanoGPTForTokenClassification,
    "AutoModelForQuestionAnswering": NanoGPTForQuestionAnswering,
}
for auto_class, model_class in CLASSES.items():
    model_class.register_for_auto_class(auto_class)
# Trainer computes label smoothing outside of the model. It shifts the labels for the classes in this table, and for
# any other class it would teach the model in silence to repeat its input.
CAUSAL_LM_NAMES[NanoGPTConfig.model_type] = NanoGPTForCausalLM.__name__
