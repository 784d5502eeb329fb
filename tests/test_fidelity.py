"""NanoGPT against a GPT and an AdamW loop written here from their definitions: same logits, gradients and training."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.nn import functional as F
from torch.testing import assert_close

from support.references import BLOCK, VOCAB, WIDTH, exact_gelu, make_counterpart, reference_logits, tanh_gelu

STEPS, BATCH = 50, 8


def reference_loss(weights, tokens, targets, gelu):
    """Mean over all targets of -log p(target)."""
    log_p = torch.log_softmax(reference_logits(weights, tokens, gelu), dim=-1)
    return -F.one_hot(targets, VOCAB).mul(log_p).sum(-1).mean()


def reference_gradients(weights, tokens, targets, gelu):
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = reference_loss(leaves, tokens, targets, gelu)
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


def reference_training(weights, batches, gelu):
    """AdamW by hand, whole batches, no accumulation. Returns the weights, the losses and the norms before clipping."""
    weights = {name: weight.clone() for name, weight in weights.items()}
    m = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    v = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    losses, norms = [], []
    for step, (tokens, targets) in enumerate(batches):
        loss, gradients = reference_gradients(weights, tokens, targets, gelu)
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients.values()))
        losses.append(loss)
        norms.append(norm)
        lr = learning_rate(step)
        for name, weight in weights.items():
            gradient = gradients[name] * min(1.0, CLIP / norm)
            m[name] = BETA1 * m[name] + (1 - BETA1) * gradient
            v[name] = BETA2 * v[name] + (1 - BETA2) * gradient**2
            m_hat, v_hat = m[name] / (1 - BETA1 ** (step + 1)), v[name] / (1 - BETA2 ** (step + 1))
            decay = WEIGHT_DECAY if weight.ndim == 2 else 0.0
            weights[name] = weight - lr * (m_hat / (v_hat.sqrt() + EPSILON) + decay * weight)
    return weights, losses, norms


# --- what both sides share -------------------------------------------------------------------------------------------

BETA1, BETA2, EPSILON, WEIGHT_DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 1.0


def learning_rate(step, peak=4e-3, lowest=4e-4, warmup=10):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return lowest + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) * (peak - lowest)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def make_batches(count):
    """Inputs and targets (B, T) cut from windows of T + 1 tokens, in which some tokens follow from the one before."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        window = torch.randint(VOCAB, (BATCH, BLOCK + 1), generator=generator)
        window[:, 1::2] = (3 * window[:, :-1:2] + 1) % VOCAB
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


@pytest.fixture
def fresh_accelerator_state():
    """The whole process shares Accelerate's state, and other tests may have changed it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- the claims ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gelu"), [("gelu", exact_gelu), ("gelu_new", tanh_gelu), ("gelu_pytorch_tanh", tanh_gelu)]
)
def test_same_logits_loss_and_gradients_from_the_same_weights(attention, bias, activation, gelu):
    model = make_counterpart(bias, activation)
    model.set_attn_implementation(attention)
    weights, [(tokens, targets)] = weights_of(model), make_batches(1)
    loss, gradients = reference_gradients(weights, tokens, targets, gelu)

    out = model(tokens, shift_labels=targets, use_cache=False)
    out.loss.backward()
    assert_close(out.logits, reference_logits(weights, tokens, gelu), atol=1e-5, rtol=1e-5)
    assert out.loss.item() == pytest.approx(loss, abs=1e-5)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)


def test_the_other_gelu_is_told_apart():
    model = make_counterpart(bias=False, activation="gelu")
    tokens, _ = next(make_batches(1))
    wrong = reference_logits(weights_of(model), tokens, tanh_gelu)
    assert (model(tokens).logits - wrong).abs().max() > 1e-4


def train_with_accelerate(model, batches, accumulation):
    """The loop that users write: accumulate, backward, clip once the gradients are complete, step, zero."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(BETA1, BETA2), eps=EPSILON)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step, (tokens, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        micro_losses = []
        for micro in range(accumulation):
            with accelerator.accumulate(model):
                rows = slice(micro * BATCH // accumulation, (micro + 1) * BATCH // accumulation)
                loss = model(tokens[rows], shift_labels=targets[rows], skip_logits=True, use_cache=False).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
            micro_losses.append(loss.item())
        losses.append(sum(micro_losses) / accumulation)
    return losses


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_same_weights_after_fifty_steps_of_adamw(bias, accumulation, fresh_accelerator_state):
    model = make_counterpart(bias)
    start, batches = weights_of(model), list(make_batches(STEPS))
    expected, expected_losses, norms = reference_training(start, batches, exact_gelu)
    assert min(norms) < CLIP < max(norms), "some steps are clipped, some are not"
    assert expected_losses[-1] < expected_losses[0] - 0.5, "it learns"

    losses = train_with_accelerate(model, batches, accumulation)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    for name, parameter in model.named_parameters():
        ours, reference = parameter.detach(), expected[name]
        if name.endswith("c_attn.bias"):
            # The bias of the keys adds the same to all scores of a query. Softmax undoes this, so the gradient is
            # rounding noise, and Adam scales noise up to full steps. The biases of queries and values are compared.
            ours, reference = (torch.cat([x[:WIDTH], x[2 * WIDTH :]]) for x in (ours, reference))
        assert_close(ours, reference, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    tokens, _ = batches[0]
    assert_close(model(tokens).logits, reference_logits(expected, tokens, exact_gelu), atol=1e-3, rtol=1e-3)
