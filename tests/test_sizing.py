"""Sizes, memory and time beside what PyTorch measures, what files take, and what notebooks and papers say."""

import json

import pytest
import torch

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.memory import block_matrices, largest_batch, parameters_by_part, training_memory
from modeling_nanogpt.muon import arithmetic_dtype
from modeling_nanogpt.optimization import make_optimizer, muon_groups
from modeling_nanogpt.plan import read_recipe
from modeling_nanogpt.scaling_laws import CORRECTED, PUBLISHED, tokens_by_table
from modeling_nanogpt.throughput import flops_per_token, forward_flops
from support import ROOT
from support.commands import command
from support.memory import measure_training
from train_accelerate import parse_arguments

GPT2 = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
# nanoGPT's transformer_sizing.ipynb: FLOPs of the forward pass for a sequence of 1,024 tokens
NOTEBOOK = {
    "attn.c_attn": 12 * 3623878656,
    "attn: scores": 12 * 1610612736,
    "attn: values": 12 * 1610612736,
    "attn.c_proj": 12 * 1207959552,
    "mlp.c_fc": 12 * 4831838208,
    "mlp.c_proj": 12 * 4831838208,
    "lm_head": 79047426048,
}


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and FLOPs


@pytest.mark.parametrize(("bias", "published"), [(True, 124_439_808), (False, 124_337_664)])
def test_gpt2_small_has_the_parameters_that_were_published(bias, published):
    assert sum(parameters_by_part(NanoGPTConfig(**GPT2, bias=bias)).values()) == published


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True}, {"intermediate_size": 40}, {"tie_word_embeddings": False, "bias": True}],
    ids=str,
)
def test_the_parameters_of_a_part_are_those_of_its_weights(changes):
    shape = {"vocab_size": 96, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 32}
    config = NanoGPTConfig(**shape | changes)
    model, counted = NanoGPTForCausalLM(config), dict.fromkeys(parameters_by_part(config), 0)
    for name, weight in model.named_parameters():
        (part,) = (part for part in counted if f".{part}." in f".{name}")
        counted[part] += weight.numel()
    assert parameters_by_part(config) == counted


def test_flops_by_part_are_those_of_nanogpts_notebook():
    per_token = forward_flops(NanoGPTConfig(**GPT2))
    assert {part: 1024 * flops for part, flops in per_token.items()} == NOTEBOOK
    assert 3 * sum(per_token.values()) == flops_per_token(NanoGPTConfig(**GPT2))


# ---------------------------------------------------------------------------------------------------------------------
# Memory

LARGE_HEAD = {"vocab_size": 2048, "block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
DEEP = {"vocab_size": 128, "block_size": 128, "n_layer": 6, "n_head": 4, "n_embd": 128}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (LARGE_HEAD, {}),
        (LARGE_HEAD, {"dtype": "bfloat16"}),
        (LARGE_HEAD, {"micro_batches": 2}),
        (LARGE_HEAD, {"gradient_checkpointing": True}),
        (LARGE_HEAD, {"gradient_checkpointing": True, "dtype": "bfloat16"}),
        (LARGE_HEAD | {"tie_word_embeddings": False}, {"batch_size": 1}),
        (LARGE_HEAD | {"bias": True}, {"optimizer": "muon"}),
        (DEEP, {}),
        (DEEP, {"dtype": "bfloat16", "batch_size": 8}),
        (DEEP, {"gradient_checkpointing": True, "batch_size": 8}),
        (LARGE_HEAD | {"block_size": 128}, {"gradient_checkpointing": True, "batch_size": 32}),
        (LARGE_HEAD | {"vocab_size": 8192}, {"gradient_checkpointing": True, "dtype": "bfloat16", "batch_size": 40}),
        (DEEP, {"attention": "eager", "dtype": "bfloat16"}),
        (DEEP | {"n_head": 32}, {"attention": "plain", "dtype": "bfloat16"}),
        (DEEP | {"n_head": 32, "dropout": 0.1}, {"attention": "plain", "dtype": "bfloat16"}),
        (DEEP | {"n_head": 32, "block_size": 512}, {"attention": "plain", "dtype": "bfloat16", "batch_size": 1}),
        (DEEP | {"block_size": 16}, {"optimizer": "muon", "batch_size": 1}),
        (DEEP | {"block_size": 16, "vocab_size": 8192}, {"batch_size": 1}),
    ],
    ids=str,
)
def test_the_memory_to_train_is_within_15_per_cent_of_what_tensors_take(shape, settings):
    if settings.get("optimizer") == "muon" and arithmetic_dtype(torch.device("cpu")) != torch.bfloat16:
        pytest.skip("Muon computes in float32 on this CPU, and a GPU has bfloat16")
    config, settings = NanoGPTConfig(**shape), {"batch_size": 4, "dtype": "float32"} | settings
    measured = measure_training(config, **settings)
    held = settings.pop("micro_batches", 1) > 1
    estimate = training_memory(config, keeps_gradients=held, **settings)
    assert estimate.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_allocates_what_was_estimated(optimizer, checkpoints):
    config = NanoGPTConfig(**GPT2 | {"n_layer": 4, "vocab_size": 50304})
    model = NanoGPTForCausalLM(config).cuda().train()
    if checkpoints:
        model.gradient_checkpointing_enable()
    update = make_optimizer(optimizer, model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.zeros(4, 1024, dtype=torch.int64, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, shift_labels=ids, num_items_in_batch=1, skip_logits=True, use_cache=False).loss
        loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)
    estimate = training_memory(
        config, batch_size=4, optimizer=optimizer, gradient_checkpointing=checkpoints, keeps_gradients=False
    )
    assert estimate.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_muon_has_the_matrices_that_are_counted():
    config = NanoGPTConfig(vocab_size=96, block_size=16, n_layer=3, n_head=2, n_embd=32, intermediate_size=40)
    fused, single, *_ = muon_groups(NanoGPTForCausalLM(config), 0.1, 0.1)
    counted = dict.fromkeys(block_matrices(config), 0)
    for group in (fused, single):
        for weight in group["params"]:
            rows, columns = weight.shape[0] // group["parts"], weight.shape[1]
            counted[min(rows, columns), max(rows, columns)] += group["parts"]
    assert counted == block_matrices(config)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_largest_micro_batch_fits_and_one_more_does_not(checkpoints):
    settings = {"config": NanoGPTConfig(), "gradient_checkpointing": checkpoints}
    largest = largest_batch(24 * 2**30, **settings)
    assert largest > 8
    assert training_memory(batch_size=largest, **settings).peak <= 24 * 2**30
    assert training_memory(batch_size=largest + 1, **settings).peak > 24 * 2**30
    assert largest_batch(2**20, **settings) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Chinchilla


def test_chinchillas_sizes_are_those_of_nanogpts_notebook_and_of_the_paper():
    # the notebook looks along a grid of sizes 2 ** -4 decades apart
    assert PUBLISHED.best_size(2.21e19) == pytest.approx((316.23e6, 11.65e9), rel=0.04)
    assert PUBLISHED.best_tokens(399.54e6) == pytest.approx(14.43e9, rel=0.01)
    assert PUBLISHED.loss(399.54e6, 14.43e9) == pytest.approx(2.76, abs=0.005)
    assert tokens_by_table(124e6) == pytest.approx(2.292426e9, rel=1e-5)
    # the paper's table A3 has 400M parameters and 9.2B tokens, which the published fit does not give
    assert CORRECTED.best_size(2.21e19) == pytest.approx((400e6, 9.2e9), rel=0.02)


@pytest.mark.parametrize("fit", [PUBLISHED, CORRECTED])
def test_no_other_size_with_as_many_flops_has_a_lower_loss(fit):
    size, tokens = fit.best_size(1e20)
    assert 6 * size * tokens == pytest.approx(1e20)
    assert all(fit.loss(size * k, tokens / k) > fit.loss(size, tokens) for k in (0.5, 0.9, 1.1, 2))
    assert fit.best_tokens(size) == pytest.approx(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "lines",
    [
        "block_size: 64\n",
        "tokenizer: bpe\nvocab_size: 300\nbias: true\n",
        "attn_implementation: kernels-community/flash-attn3\n",
    ],
)
def test_a_plan_is_what_the_trainer_reads_in_the_same_recipe(lines, tmp_path):
    (tmp_path / "recipe.yaml").write_text(lines)
    flags = {
        key: value for part in parse_arguments([str(tmp_path / "recipe.yaml")]) for key, value in vars(part).items()
    }
    plan = vars(read_recipe(tmp_path / "recipe.yaml", {}))
    ours = {key: value for key, value in plan.items() if value is not None}
    assert ours == {key: flags[key] for key in ours} and len(ours) > 8
    # the trainer names data_dir after the recipe, and a vocab_size is for bpe alone
    assert all(flags[key] is None for key in plan.keys() - ours.keys() - {"data_dir", "vocab_size"})


@pytest.mark.parametrize(("name", "parameters"), [("gpt2", 124_439_808), ("openai-community/gpt2-xl", 1_557_611_200)])
def test_openais_models_are_sized_without_a_network(name, parameters, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"init_from: {name}\ndropout: 0.1\n")
    for subject in (name, tmp_path / "recipe.yaml"):
        status, said = command(tmp_path, "modeling_nanogpt.sizing", subject, "--json", "--batch_size=1")
        assert status == 0 and json.loads("\n".join(said))["parameters"] == parameters


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "hub_configs").glob("*.yaml")))
def test_every_recipe_can_be_read(recipe):
    assert read_recipe(ROOT / "hub_configs" / recipe, {"batch_size": "3"}).batch_size == 3


def test_a_run_has_the_size_that_was_said_before_it_began(run, tmp_path):
    """The estimate beside the folder that the run left: parameters, and bytes of its files."""
    status, said = command(tmp_path, "modeling_nanogpt.sizing", run.out_dir, "--json", "--gpu=H100")
    assert status == 0
    results = json.loads("\n".join(said))
    model = NanoGPTForCausalLM.from_pretrained(run.out_dir)
    assert results["parameters"] == model.num_parameters()
    assert results["tokens of a step"] == 8 * 16  # as the run.yaml in the folder says
    assert results["tokens a second"] == pytest.approx(0.37 * 989e12 / flops_per_token(model.config))
    files = {
        "bytes of model.safetensors": run.out_dir / "model.safetensors",
        "bytes of a checkpoint": run.out_dir / "checkpoints" / "step-00000020" / "training_state.pt",
    }
    for name, path in files.items():  # names and shapes of the tensors take some kilobytes
        assert results[name] <= path.stat().st_size <= results[name] + 40_000


def test_a_recipe_is_sized_and_drawn(tmp_path):
    arguments = ["hub_configs/gpt2_124m.yaml", "--bias=true", "--plot", tmp_path / "picture.png", "--flops=2.21e19"]
    status, said = command(tmp_path, "modeling_nanogpt.sizing", *arguments)
    assert status == 0
    lines = {" ".join(line.split()) for line in said}
    assert "without padding 124,439,808 of the vocabulary" in lines
    assert "the corrected fit 394M on 9.36B tokens" in lines
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
