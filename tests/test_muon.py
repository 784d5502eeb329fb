"""Muon beside torch.optim.Muon and beside the singular values, and as the optimizer of a training run."""

import copy
import math
import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GPT2LMHeadModel

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, muon
from modeling_nanogpt.conversion import config_to_gpt2, weights_from_gpt2, weights_to_gpt2
from modeling_nanogpt.optimization import make_optimizer, muon_groups
from support.runs import call_together, finish
from support.tiny_run import train

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # torch.optim.Muon's
SHAPES = [(64, 64), (64, 64), (96, 24), (24, 96), (96, 24)]
BETAS = (0.9, 0.95)


def tiny_model(**changes) -> NanoGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return NanoGPTForCausalLM(NanoGPTConfig(**shape | changes))


def make(name: str, model: NanoGPTForCausalLM, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return make_optimizer(name, model, learning_rate=learning_rate, betas=BETAS, weight_decay=weight_decay)


def random_gradients(*models, seed=1):
    """Give the same parameter of each model the same gradient."""
    torch.manual_seed(seed)
    for together in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn_like(together[0])
        for parameter in together:
            parameter.grad = gradient.clone()


# ---------------------------------------------------------------------------------------------------------------------
# The update


@pytest.mark.parametrize("coefficients", [muon.COEFFICIENTS, JORDAN])
def test_orthogonalize_maps_the_singular_values_and_nothing_else(coefficients):
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for matrix, result in zip(matrices, muon.orthogonalize(matrices, coefficients), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for a, b, c in coefficients:
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(result, u * s @ vh, atol=1e-8, rtol=1e-8)


def test_the_coefficients_do_what_their_comment_says():
    s = torch.logspace(math.log10(0.002), 0, 10_000, dtype=torch.float64)
    for a, b, c in muon.COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    assert (s - 1).abs().max() < 0.34


def test_a_zero_gradient_does_not_become_nan():
    assert not muon.orthogonalize(torch.zeros(2, 3, 4), muon.COEFFICIENTS).any()


@pytest.mark.parametrize("momentum", [0.9, 0.95])
def test_it_takes_the_steps_of_torchs_muon(monkeypatch, momentum):
    monkeypatch.setattr(muon, "COEFFICIENTS", JORDAN)
    monkeypatch.setattr(
        muon, "arithmetic_dtype", lambda device: torch.bfloat16
    )  # as torch.optim.Muon does, on any device
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    lr = 0.02
    optimizer = muon.Muon([{"params": ours, "weight_decay": 0.1, "parts": 1}], lr, BETAS, momentum)
    reference = torch.optim.Muon(theirs, lr=lr, weight_decay=0.1, momentum=momentum)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_queries_keys_and_values_are_orthogonalised_one_by_one(monkeypatch):
    monkeypatch.setattr(muon, "arithmetic_dtype", lambda device: torch.float32)
    model = tiny_model()
    random_gradients(model)
    weight = model.transformer.h[1].attn.c_attn.weight
    before = weight.detach().clone()
    make("muon", model, 1e-3, weight_decay=0.0).step()
    for part, gradient in zip((before - weight.detach()).chunk(3), weight.grad.chunk(3), strict=True):
        expected = 1e-3 * muon.orthogonalize(gradient[None], muon.COEFFICIENTS)[0]
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-4)


def test_everything_except_the_matrices_of_the_blocks_takes_adamws_steps():
    model, reference = tiny_model(bias=True), tiny_model(bias=True)
    optimizer, plain = (
        make("muon", model, 1e-2, weight_decay=0.1),
        make("adamw", reference, 1e-2 * 100 / 32, weight_decay=0.1),
    )
    for step in range(3):
        random_gradients(model, reference, seed=step)
        optimizer.step()
        plain.step()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, expected[name])
        assert same == (not name.startswith("transformer.h.") or parameter.ndim == 1), name


# ---------------------------------------------------------------------------------------------------------------------
# Which weights are in which group


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_group_once(tied):
    model = tiny_model(bias=True, tie_word_embeddings=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in muon_groups(model, 0.1, 0.1)]
    assert sorted(sum(groups, [])) == sorted(names.values())
    fused, single, tables, vectors = groups
    assert fused == [f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)]
    assert {name.split(".", 3)[3] for name in single} == {"attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert tables == ["transformer.wte.weight", "transformer.wpe.weight"] + ["lm_head.weight"] * (not tied)
    assert all(name.endswith("bias") or "ln_" in name for name in vectors)
    assert [group["weight_decay"] for group in muon_groups(model, 0.1, 0.3)] == [0.3, 0.3, 0.1, 0.0]


def test_frozen_parameters_stay_where_they_are():
    model = tiny_model()
    frozen = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before = frozen.clone()
    optimizer = make("muon", model, 1e-2, weight_decay=0.1)
    random_gradients(model)
    optimizer.step()
    assert torch.equal(frozen, before)


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer for everything around it


def test_it_resumes_bit_for_bit(tmp_path):
    model = tiny_model()
    optimizer = make("muon", model, 1e-2, weight_decay=0.1)
    for step in range(3):
        random_gradients(model, seed=step)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    again = tiny_model()
    resumed = make("muon", again, 0.5, weight_decay=0.3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        random_gradients(model, again, seed=step)
        optimizer.step()
        resumed.step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clipped", [True, False])
def test_a_gradient_scaler_unscales_once_and_skips_an_overflow(clipped):
    model, reference = tiny_model(), tiny_model()
    optimizer, plain = make("muon", model, 1e-2, weight_decay=0.1), make("muon", reference, 1e-2, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))  # a scaler begins with the first loss
    for step, overflows in enumerate([False, True, False]):
        random_gradients(model, reference, seed=step)
        for parameter in model.parameters():
            parameter.grad *= scaler.get_scale()
        if overflows:
            model.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = math.inf
        else:
            plain.step()
        if clipped:
            scaler.unscale_(optimizer)  # as clipping does
        scaler.step(optimizer)
        scaler.update()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_step_with_an_infinite_gradient_changes_nothing(broken):
    model = tiny_model()
    optimizer = make("muon", model, 1e-2, weight_decay=0.1)
    random_gradients(model)
    optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    random_gradients(model)
    for parameter in model.parameters():
        parameter.grad[..., 0] = broken
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()["state"]], before, atol=0, rtol=0)


def test_a_step_with_finite_gradients_is_the_usual_one():
    model, reference = tiny_model(), tiny_model()
    optimizer, plain = make("muon", model, 1e-2, weight_decay=0.1), make("muon", reference, 1e-2, weight_decay=0.1)
    optimizer.found_inf = torch.zeros(())
    for step in range(3):
        random_gradients(model, reference, seed=step)
        optimizer.step()
        plain.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def check_that_two_hold_the_same_weights() -> None:
    """Each of two processes runs this."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32))
    optimizer = make_optimizer("muon", model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(accelerator.process_index)
    for _ in range(8):
        with accelerator.accumulate(model):
            ids = torch.randint(0, 64, (4, 16))
            accelerator.backward(model(ids, labels=ids).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    ours, theirs = accelerator.gather(flat[None])
    assert accelerator.num_processes == 2 and torch.equal(ours, theirs) and torch.isfinite(ours).all()


def test_two_processes_hold_the_same_weights(tmp_path):
    running = call_together(2, check_that_two_hold_the_same_weights, log=tmp_path / "log")
    assert finish(*running) == [0, 0], (tmp_path / "log.0").read_text()


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path):
    flags = {"optimizer": "muon", "max_iters": 8, "save_interval": 4, "eval_tokens": 64}
    whole = train(tmp_path, **flags)
    expected = load_file(whole.out_dir / "model.safetensors")
    shutil.rmtree(whole.out_dir / "checkpoints" / "step-00000008")
    resumed = train(tmp_path, **flags, init_from="resume")
    assert resumed.losses == whole.losses
    weights = load_file(resumed.out_dir / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_muon_trained_is_a_stock_gpt2_and_comes_back(tmp_path):
    run = train(tmp_path, optimizer="muon", lr_schedule="linear", min_lr=0)
    assert run.val_losses[-1] < 2.5 and run.rates[-1] == pytest.approx(1e-2 / 18)
    model = NanoGPTForCausalLM.from_pretrained(run.out_dir).eval()
    weights, size = model.state_dict(), model.config.vocab_size
    stock = GPT2LMHeadModel(config_to_gpt2(model.config, size)).eval()
    stock.load_state_dict(weights_to_gpt2(weights, size))
    ids = torch.randint(0, size, (2, 16))
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    back = weights_from_gpt2(stock.state_dict())
    assert all(torch.equal(back[name], weights[name]) for name in weights)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes share the work


def train_20_steps(monkeypatch, sharded: bool = False) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Take 20 steps with random gradients. Returns the weights, and how many matrices each batch had.

    In the fourth step a weight has no gradient, and the sixth step is skipped.
    """
    batches, orthogonalize = [], muon.orthogonalize

    def noted(matrices, coefficients):
        batches.append(len(matrices))
        return orthogonalize(matrices, coefficients)

    monkeypatch.setattr(muon, "orthogonalize", noted)
    monkeypatch.setattr(muon, "arithmetic_dtype", lambda device: torch.float32)
    model = tiny_model(n_layer=3)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = make("muon", model, 0.02, weight_decay=0.1)
    for step in range(20):
        torch.manual_seed(step)
        for p in model.parameters():
            gradient = torch.randn(p.shape)
            if step == 5:
                gradient[0] = math.nan
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient
        if step == 3:
            model.transformer.h[1].mlp.c_fc.weight.grad = None
        optimizer.found_inf = torch.tensor(float(step == 5))
        optimizer.step()
    weights = {name: whole_of(p.detach()).clone() for name, p in model.named_parameters()}
    return weights, batches


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_beside_others(folder: str, machines: list[int]) -> None:
    """Each of several processes runs this. `machines` has a number for each process: of those on its machine."""
    os.environ["LOCAL_WORLD_SIZE"] = str(machines[int(os.environ["RANK"])])
    torch.distributed.init_process_group("gloo")
    results = {}
    for kind in ("DDP", "FSDP2"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            results[kind] = train_20_steps(monkeypatch, sharded=kind == "FSDP2")
    torch.save(results, f"{folder}/{os.environ['RANK']}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("machines", "shares"),
    [
        ([2, 2], [[6, 3]] * 2),  # of 12 square matrices and 6 of the MLP
        ([4, 4, 4, 4], [[3, 2]] * 3 + [[3, 0]]),
        ([2, 2, 2, 2], [[6, 3]] * 4),  # two machines
        ([3, 3, 3, 1], [[12, 6]] * 4),  # machines that differ share nothing
    ],
    ids=["two on a machine", "four on a machine", "two machines", "unequal machines"],
)
def test_processes_that_share_the_work_take_the_steps_of_one(tmp_path, monkeypatch, machines, shares):
    expected, _ = train_20_steps(monkeypatch)
    count = len(machines)
    running = call_together(count, train_beside_others, str(tmp_path), machines, log=tmp_path / "log")
    assert finish(*running) == [0] * count, (tmp_path / "log.0").read_text()
    results = [torch.load(tmp_path / str(rank)) for rank in range(count)]
    for kind in ("DDP", "FSDP2"):
        assert [result[kind][1][:2] for result in results] == shares
        for weights, _ in (result[kind] for result in results):
            assert all(torch.equal(weights[name], results[0][kind][0][name]) for name in weights)  # replicas
            assert max((weights[name] - expected[name]).abs().max() for name in expected) < 1e-5
