"""nanoGPT as a transformers model: importing this package makes the auto classes know it."""

import sys

# A command of this package, as `python -m modeling_nanogpt.sample`, answers --help and a mistyped flag at once: it
# imports torch and transformers, which takes seconds, only after it has read its flags. But Python runs this file
# before the command's own. While Python looks for the command, sys.argv[0] is "-m" (docs.python.org/3/using/cmdline),
# and the command's name stands in front of its arguments.
is_command = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].startswith(f"{__name__}.")

if not is_command:
    from . import registration  # noqa: F401
    from .configuration_nanogpt import NanoGPTConfig
    from .modeling_nanogpt import (
        NanoGPTForCausalLM,
        NanoGPTForQuestionAnswering,
        NanoGPTForSequenceClassification,
        NanoGPTForTokenClassification,
        NanoGPTModel,
        NanoGPTPreTrainedModel,
    )

__all__ = [
    "NanoGPTConfig",
    "NanoGPTForCausalLM",
    "NanoGPTForQuestionAnswering",
    "NanoGPTForSequenceClassification",
    "NanoGPTForTokenClassification",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
]
