"""The trainer's own attention on a CPU: the formula in double precision, and PyTorch's function, give the same."""

import pytest
import torch

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, modeling_nanogpt
from modeling_nanogpt.plain_attention import plain_attention_forward


def attend(query, key, value):
    """The formula, in double precision: a token sees itself and those before it."""
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
    scores[..., torch.ones(scores.shape[-2:]).triu(1).bool()] = -torch.inf
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)  # (B, T, H, D)


@pytest.mark.parametrize("length", [17, 300, 640])  # one block of queries; two and a short one; four longer ones
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_the_formula(dtype, error, length):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]  # (B, H, T, D)
    output, weights = plain_attention_forward(None, *inputs, None, scaling=8**-0.5)
    expected = attend(*inputs)
    assert weights is None and output.dtype == dtype and output.is_contiguous()
    assert (output - expected).abs().max() < error
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, inputs, direction.to(dtype))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert (gradient - wanted).norm() < error * wanted.norm()


@pytest.mark.parametrize("queries", [1, 5, 200])
def test_the_last_queries_are_attended_as_among_all(queries):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 300, 8)
    output, _ = plain_attention_forward(None, query[:, :, -queries:], key, value, None, scaling=8**-0.5)
    assert torch.allclose(output.double(), attend(query, key, value)[:, -queries:], atol=1e-6)


def test_under_autocast_nothing_is_copied_to_float32():
    inputs = [torch.randn(2, 3, 17, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        plain_attention_forward(None, *inputs, None, scaling=8**-0.5)
    assert {tensor.dtype for tensor in kept if tensor is not None} == {torch.bfloat16}


def test_dropout_leaves_out_weights_and_scales_the_others():
    torch.manual_seed(0)
    query, key = torch.zeros(2, 1, 1, 64, 64)  # each token sees those before it equally
    value = torch.eye(64)[None, None]  # so the output is the weights, (1, 64, 1, 64)
    output, _ = plain_attention_forward(None, query, key, value, None, scaling=0.125, dropout=0.25)
    weights = output[0, :, 0] * torch.arange(1, 65)[:, None]
    seen = weights[torch.ones(64, 64).tril().bool()]
    kept = seen[seen != 0]
    assert torch.allclose(kept, torch.tensor(4 / 3))
    assert 0.7 < len(kept) / len(seen) < 0.8


def make_model(attention):
    torch.manual_seed(0)
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    model.set_attn_implementation(attention)
    return model


def test_cached_and_padded_tokens_are_attended_as_by_pytorch():
    ids = torch.randint(50, (2, 8))
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    for given in ({}, {"attention_mask": mask}):
        texts = [
            make_model(attention).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **given)
            for attention in ("plain", "sdpa")
        ]
        assert torch.equal(*texts)
    long = torch.randint(50, (1, 12))
    for attention in ("plain", "sdpa"):
        model = make_model(attention)
        cache = model(long[:, :5], use_cache=True).past_key_values
        rest = model(long[:, 5:], past_key_values=cache).logits  # several tokens beside cached ones
        assert torch.allclose(rest, model(long).logits[:, 5:], atol=1e-5)


def test_without_padding_no_mask_is_asked_for(monkeypatch):
    # transformers 5.17 would make one if the model is compiled
    monkeypatch.setattr(modeling_nanogpt, "create_causal_mask", None)
    make_model("plain")(torch.randint(50, (2, 8)), use_cache=False)
