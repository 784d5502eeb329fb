"""The learning rate at each step, and which parameters decay."""

import math
from types import SimpleNamespace

import pytest
import torch

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.optimization import Schedule, decay_groups, make_optimizer, momentum_at, set_rates

SCHEDULE = {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "lr_decay_iters": 2000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-3 / 101),  # the first step already moves
        (99, 1e-3 * 100 / 101),
        (100, 1e-3),  # the top
        (1050, 5.5e-4),  # half of the cosine: the mean of both ends
        (2000, 1e-4),
        (10**6, 1e-4),  # and stays there
    ],
)
def test_learning_rate_at_the_corners(step, expected):
    assert Schedule(**SCHEDULE)(step) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_is_the_cosine_between_the_corners():
    for step in range(100, 2001, 7):
        turn = math.pi * (step - 100) / 1900
        assert Schedule(**SCHEDULE)(step) == pytest.approx(5.5e-4 + 4.5e-4 * math.cos(turn), rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # at the top, in the middle between warmup and end, one step before the end, at the end, and far behind it
        ("linear", {100: 1e-3, 1050: 5.5e-4, 1999: 1e-4 + 9e-4 / 1900, 2000: 1e-4, 10**6: 1e-4}),
        ("wsd", {100: 1e-3, 1500: 1e-3, 1750: 5.5e-4, 1999: 1e-4 + 9e-4 / 500, 2000: 1e-4, 10**6: 1e-4}),
        ("constant", {100: 1e-3, 1999: 1e-3, 2000: 1e-3, 10**6: 1e-3}),
    ],
)
def test_each_schedule_after_the_same_warmup(schedule, expected):
    rate = Schedule(**SCHEDULE, lr_schedule=schedule, decay_fraction=0.25)

    assert [rate(step) for step in range(100)] == [1e-3 * (step + 1) / 101 for step in range(100)]
    assert {step: rate(step) for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay_fraction", [0.0, 0.96, 0.99])
def test_wsd_neither_divides_by_zero_nor_decays_in_the_warmup(decay_fraction):
    rate = Schedule(**SCHEDULE, lr_schedule="wsd", decay_fraction=decay_fraction)

    assert rate(99) == pytest.approx(1e-3 * 100 / 101) and rate(100) == 1e-3 and rate(2000) == 1e-4


def test_a_warmup_beyond_the_end_is_a_warmup():
    assert Schedule(1e-3, 1e-4, 100, 20, "linear")(50) == pytest.approx(1e-3 * 51 / 101)


@pytest.mark.parametrize(
    ("warmup", "cooldown", "expected"),
    [
        (0, 0, {0: 0.95, 10: 0.95, 99: 0.95, 1000: 0.95}),
        (20, 0, {0: 0.855, 9: 0.9, 18: 0.945, 19: 0.95, 99: 0.95, 1000: 0.95}),
        (0, 10, {0: 0.95, 90: 0.95, 95: 0.9, 99: 0.86, 100: 0.85, 1000: 0.85}),
        (20, 10, {0: 0.855, 19: 0.95, 50: 0.95, 91: 0.94, 99: 0.86}),
        (200, 200, {49: 0.875, 99: 0.8505}),  # a run that is too short for both: the lower of the two
    ],
)
def test_the_momentum_rises_at_first_and_falls_at_the_end(warmup, cooldown, expected):
    flags = SimpleNamespace(
        momentum=0.95, momentum_warmup_iters=warmup, momentum_cooldown_iters=cooldown, lr_decay_iters=100
    )
    assert {step: momentum_at(step, flags) for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_group_gets_the_rate_and_muons_groups_the_momentum(name):
    optimizer = make_optimizer(name, tiny_model(), learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    before = [set(group) for group in optimizer.param_groups]
    set_rates(optimizer, lr=0.5, momentum=0.7)
    assert [set(group) for group in optimizer.param_groups] == before
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    assert all(group["momentum"] == 0.7 for group in optimizer.param_groups if "momentum" in group)


def tiny_model(**changes) -> NanoGPTForCausalLM:
    shape = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return NanoGPTForCausalLM(NanoGPTConfig(**shape | changes))


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = tiny_model(bias=True)
    decaying, constant = decay_groups(model.parameters(), weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decaying["weight_decay"] == 0.1 and constant["weight_decay"] == 0.0
    vectors = {names[id(parameter)] for parameter in constant["params"]}
    assert vectors == {name for name in names.values() if name.endswith("bias") or "ln_" in name}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= {names[id(p)] for p in decaying["params"]}


def test_each_parameter_is_in_one_group_once_and_the_tied_one_too():
    model = tiny_model()
    grouped = [id(parameter) for group in decay_groups(model.parameters(), 0.1) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert (
        sum(p.numel() for group in decay_groups(model.parameters(), 0.1) for p in group["params"])
        == model.num_parameters()
    )


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.transformer.wpe.weight.requires_grad_(False)
    grouped = [id(parameter) for group in decay_groups(model.parameters(), 0.1) for parameter in group["params"]]
    assert id(model.transformer.wpe.weight) not in grouped


def test_fused_adamw_takes_the_step_of_the_plain_one():
    torch.manual_seed(0)
    model, reference = tiny_model(), tiny_model()
    reference.load_state_dict(model.state_dict())
    fused = make_optimizer("adamw", model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    plain = torch.optim.AdamW(
        decay_groups(reference.parameters(), 0.1), lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False
    )
    assert all(group["fused"] for group in fused.param_groups)
    ids = torch.randint(0, 64, (4, 16))
    for _ in range(3):
        for one, optimizer in ((model, fused), (reference, plain)):
            one(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)


def test_all_matrices_of_muon_have_its_own_weight_decay_and_no_other_weight_has_it():
    config = NanoGPTConfig(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)
    model = NanoGPTForCausalLM(config)
    optimizer = make_optimizer(
        "muon", model, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.1, muon_weight_decay=0.5
    )
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        in_a_block = name.startswith("transformer.h.")
        assert decays[p] == (0.0 if p.ndim == 1 else 0.5 if in_a_block else 0.1), name
