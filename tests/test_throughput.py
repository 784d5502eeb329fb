"""FLOPs per token against a count of the operations that really run, and the table of peak rates."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.throughput import flops_per_token, peak_flops


@pytest.mark.parametrize("changes", [{}, {"n_layer": 3, "intermediate_size": 40}, {"tie_word_embeddings": False}])
def test_flops_per_token_is_what_forward_and_backward_run(changes):
    shape = {"vocab_size": 96, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = NanoGPTConfig(**shape | changes)
    model = NanoGPTForCausalLM(config)
    model.set_attn_implementation("eager")  # counts the whole square of the scores, as the convention does
    ids = torch.randint(0, 96, (3, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() == 3 * 16 * flops_per_token(config)


def test_gpt2_at_1024_tokens_costs_what_the_convention_says():
    assert flops_per_token(NanoGPTConfig()) == pytest.approx(854.8e6, rel=1e-3)


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA Something 1", None),
    ],
)
def test_peak_is_found_by_the_name_of_the_device(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"))
    assert peak == (None if teraflops is None else teraflops * 1e12)
