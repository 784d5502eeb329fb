"""nanoGPT as a transformers model: importing this package makes the auto classes know it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import NanoGPTForCausalLM, NanoGPTModel, NanoGPTPreTrainedModel

AutoConfig.register("nanogpt", NanoGPTConfig, exist_ok=True)
AutoModel.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)
AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTForCausalLM, exist_ok=True)

__all__ = ["NanoGPTConfig", "NanoGPTForCausalLM", "NanoGPTModel", "NanoGPTPreTrainedModel"]
