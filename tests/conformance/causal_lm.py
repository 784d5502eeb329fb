"""transformers' own tests of a model, a configuration, training, sharding and export, on the NanoGPT classes.

suite.py runs this file, with transformers' `tests` on the path. An ordinary pytest run passes over its name.
"""

import unittest
from unittest.mock import patch

import tests.test_executorch as test_executorch
import tests.test_fsdp_mixin as test_fsdp_mixin
import tests.test_tensor_parallel_mixin as test_tensor_parallel_mixin
import torch
from suite import PipelineTesterMixin
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel
from modeling_nanogpt.modeling_nanogpt import CLASSES

# The suite knows the task of a class by the name of the class, and has a list of model types for distributed tests.
modeling_auto.MODEL_MAPPING_NAMES["nanogpt"] = "NanoGPTModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nanogpt"] = "NanoGPTForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["nanogpt"] = "NanoGPTForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["nanogpt"] = "NanoGPTForTokenClassification"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["nanogpt"] = "NanoGPTForQuestionAnswering"
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class NanoGPTTester:
    """What the suite needs to know of a model: the shape of a tiny one, and inputs for it."""

    base_model_class = NanoGPTModel
    causal_lm_class = NanoGPTForCausalLM
    is_training = True
    batch_size = 13
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self):
        return NanoGPTConfig(
            vocab_size=self.vocab_size,
            block_size=64,  # the longest sequence in the suite
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_embd=self.hidden_size,
            intermediate_size=40,  # even: transformers 5.17 cannot train an MLP whose shards differ in width
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class NanoGPTTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = tuple(CLASSES.values())
    test_can_init_all_missing_weights_before_2023 = True  # our files do not name the year that the suite looks for

    def setUp(self):
        self.model_tester = NanoGPTTester()

    def test_config(self):
        ConfigTester(self, config_class=NanoGPTConfig, n_embd=32, n_head=4).run_common_tests()


class NanoGPTExportTest(test_executorch.ExecutorchTest):
    def setUp(self):
        model = NanoGPTForCausalLM(NanoGPTTester().get_config())
        with patch.object(test_executorch.AutoModelForCausalLM, "from_pretrained", return_value=model):
            super().setUp()
