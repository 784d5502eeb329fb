"""The model on every supported release of transformers: 5.24 renamed the key/value cache, and both names must work."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel
from modeling_nanogpt.modeling_nanogpt import CACHE

NAMES = ["cache", "past_key_values"]


def make_model(kind=NanoGPTForCausalLM):
    torch.manual_seed(0)
    config = NanoGPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32, initializer_range=0.2)
    return kind(config).eval()


def make_ids(*shape):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [NanoGPTForCausalLM, NanoGPTModel])
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_used_and_returned_under_either_name(kind, name):
    model, ids = make_model(kind), make_ids(2, 12)
    expected = model(ids, use_cache=False)[0]
    cache, parts = DynamicCache(config=model.config), []
    for chunk in ids.split([5, 1, 6], dim=1):
        out = model(chunk, **{name: cache})
        assert out[CACHE] is cache
        parts.append(out[0])
    assert cache.get_seq_length() == 12
    assert_close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_is_used_under_either_name(name):
    model, ids = make_model(), make_ids(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [model(chunk, **{name: cache}).logits for chunk in ids.split([5, 1, 6], dim=1)]
    assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits)


def test_only_a_name_that_transformers_has_deprecated_causes_a_warning():
    model, ids = make_model(), make_ids(1, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(ids, cache=DynamicCache())
        assert said == []
        model(ids, past_key_values=DynamicCache())
    assert len(said) == (CACHE == "cache")


def test_both_names_stand_in_the_signature():
    # clients look for the name in the signature before they pass a cache: PEFT for the old one, generate for either
    for kind in (NanoGPTForCausalLM, NanoGPTModel):
        assert set(NAMES) <= set(inspect.signature(kind.forward).parameters)


@pytest.mark.parametrize("kind", [NanoGPTForCausalLM, NanoGPTModel])
def test_a_cache_under_both_names_is_refused(kind):
    model = make_model(kind)
    with pytest.raises(ValueError, match="either as cache or as past_key_values"):
        model(make_ids(1, 4), cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("kind", [NanoGPTForCausalLM, NanoGPTModel])
@pytest.mark.parametrize(
    "name, value",
    [
        ("layer_past", DynamicCache()),
        ("kv_store", DynamicCache()),
        ("cache_params", DynamicCache()),
        ("past_key_value", ((torch.zeros(1, 2, 3, 16),) * 2,)),
        ("head_mask", torch.ones(2, 2)),
        ("decoder_attention_mask", torch.ones(1, 4)),
        ("mask", torch.ones(1, 4)),
        ("encoder_hidden_states", torch.zeros(1, 4, 32)),
    ],
)
def test_a_cache_or_mask_under_another_name_is_refused(kind, name, value):
    model = make_model(kind)
    with pytest.raises(ValueError, match=f"{name} is unknown to this model: .*cache.*attention_mask"):
        model(make_ids(1, 4), **{name: value})
    model(make_ids(1, 4), **{name: None})  # None is as if the argument were left out


@pytest.mark.parametrize("name", NAMES)
def test_the_tuples_of_transformers_4_are_refused(name):
    layers = tuple((torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)) for _ in range(2))
    with pytest.raises(ValueError, match="is a tuple: give a transformers Cache"):
        make_model()(make_ids(1, 4), **{name: layers})


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_does_not_fill_a_cache_twice(name):
    # the backward pass runs each block again, so a block must not get a cache that it would fill once more
    model, ids = make_model().train(), make_ids(2, 12)
    gradients, lengths = [], []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        cache = DynamicCache(config=model.config)
        model.zero_grad()
        model(ids, labels=ids, **{name: cache}).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        lengths.append(cache.get_seq_length())
    assert lengths == [12, 0]
    for kept, recomputed in zip(*gradients, strict=True):
        assert_close(kept, recomputed)


QUIET = """
import warnings

warnings.simplefilter("error", FutureWarning)  # what transformers announces

import logging

import torch
import transformers

said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


transformers.utils.logging.get_logger("transformers").addHandler(Listener(level=logging.WARNING))
from transformers import DynamicCache

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.modeling_nanogpt import CACHE

model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32))
ids = torch.arange(6)[None]
for extra in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}):
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **extra)
cache = model(ids, use_cache=True)[CACHE]
model(ids, attention_mask=torch.ones(1, 12), cache=cache)
model.train()(ids, labels=ids, output_hidden_states=True).loss.backward()
print(said)
"""


def test_the_model_causes_no_warning():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
