"""Importing this file makes transformers' auto classes know the model, without any code from a checkpoint.

It also makes known the attention function "plain".
"""

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.masking_utils import sdpa_mask

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import CLASSES
from .plain_attention import plain_attention_forward

AutoConfig.register("nanogpt", NanoGPTConfig, exist_ok=True)
for auto_class, model_class in CLASSES.items():
    getattr(transformers, auto_class).register(NanoGPTConfig, model_class, exist_ok=True)
AttentionInterface.register("plain", plain_attention_forward)
AttentionMaskInterface.register("plain", sdpa_mask)  # for calls with padding or a cache
