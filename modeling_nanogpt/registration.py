"""Importing this file makes transformers' auto classes know the model, without any code from a checkpoint."""

import transformers
from transformers import AutoConfig

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import CLASSES

AutoConfig.register("nanogpt", NanoGPTConfig, exist_ok=True)
for auto_class, model_class in CLASSES.items():
    getattr(transformers, auto_class).register(NanoGPTConfig, model_class, exist_ok=True)
