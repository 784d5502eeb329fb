"""The shape of a nanoGPT model. This file travels with every checkpoint, so it imports nothing of the project."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")


@strict
class NanoGPTConfig(PreTrainedConfig):
    """The architecture of a GPT-2 style decoder, under nanoGPT's names. transformers' names are aliases of them.

    Every field is checked on construction and before saving: a wrong type or an impossible shape raises an error that
    names the field. As in nanoGPT, and unlike GPT-2, there is one `dropout` for embeddings, attention and residuals.
    """

    model_type = "nanogpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # transformers 5.24 renamed the second to the first
    attribute_map = {
        "n_positions": "block_size",
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "hidden_act": "activation_function",
    }

    # Tensor parallelism. c_attn holds q, k and v in one matrix, and a shard of its columns is not a number of whole
    # heads. So each process computes its columns, all processes gather them, and each computes all of attention. The
    # MLP is sharded throughout.
    base_model_tp_plan = {
        "wte": "embedding_rowwise",
        "h.*.attn.c_attn": "colwise_gather_output",
        "h.*.attn.c_proj": "rowwise_split_input",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    # FSDP: after the forward pass, the full weight is freed or kept for the backward pass.
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "wpe": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    vocab_size: int = 50304  # GPT-2's 50257 tokens, rounded up to a multiple of 64, which is faster
    block_size: int = 1024  # longest context, in tokens, fixed by the learned positions
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    intermediate_size: int | None = None  # width of the MLP, 4 * n_embd by default
    activation_function: str = "gelu"  # the exact GELU, as in nanoGPT; "gelu_new" is GPT-2's tanh approximation
    dropout: float | int = 0.0
    bias: bool = False  # biases in linear layers and layer norms; GPT-2 has them, nanoGPT trains better without
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # first, because it applies the aliases: hidden_size sets n_embd
        # transformers 5.17 adds llama's "embed_tokens" to the plan of a tied model; here wte is in the plan already
        vars(self).pop("base_model_tp_plan", None)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.n_embd

    def validate_architecture(self):
        """Raise ValueError if the fields cannot form a model. Construction and saving call this."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but it must be at least 1")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd}, but it must be a multiple of n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, but it must be at least 0 and below 1")
        if self.activation_function not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation_function={self.activation_function}, but it must be one of {allowed}")


NanoGPTConfig.register_for_auto_class()
