"""What a run computes with, if no flag says so: what the device does fast."""

import ctypes
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from modeling_nanogpt import NanoGPTConfig, arithmetic
from support import ROOT
from support.tiny_run import train
from tokenization.arguments import read_switch

CPU = torch.device("cpu")


def flags(**given):
    defaults = {"compile": "auto", "eval_only": False, "batch_size": 8, "gradient_accumulation_steps": 1}
    return SimpleNamespace(**defaults | {"max_iters": 100} | given)


@pytest.mark.parametrize(
    ("fast", "width", "context", "run", "precision"),
    [
        (torch.bfloat16, 192, 1025, {}, "bf16"),
        (torch.bfloat16, 188, 1025, {}, "no"),  # too narrow
        (torch.bfloat16, 64, 1024, {}, "bf16"),  # attention is plain
        (torch.bfloat16, 60, 1024, {}, "no"),
        (torch.float32, 768, 1024, {}, "no"),  # no fast bfloat16
        (torch.bfloat16, 768, 1024, {"precision": "no"}, "no"),  # as the run began
        (torch.float32, 768, 1024, {"precision": "bf16"}, "bf16"),
        (torch.bfloat16, 768, 1024, {"compile": False}, "no"),  # a checkpoint of an earlier version
    ],
)
def test_a_cpu_computes_in_bfloat16_if_that_is_fast(monkeypatch, fast, width, context, run, precision):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(arithmetic, "arithmetic_dtype", lambda device: fast)
    config = NanoGPTConfig(block_size=context, n_head=4, n_embd=width)
    choice = arithmetic.choose_precision("auto", config, CPU, run)
    assert choice.value == precision and choice.reason.startswith("auto: ")


def test_a_flag_or_the_launcher_names_the_precision(monkeypatch):
    config = NanoGPTConfig(n_head=4, n_embd=768)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert arithmetic.choose_precision("bfloat16", config, CPU, {}) == ("bf16", "")
    assert arithmetic.choose_precision("float32", config, CPU, {"precision": "bf16"}) == ("no", "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arithmetic.choose_precision("auto", config, CPU, {"precision": "no"}) == ("bf16", "as launched")


def test_the_width_decides_for_other_architectures(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(arithmetic, "arithmetic_dtype", lambda device: torch.bfloat16)
    for config in (GPT2Config(n_embd=64), LlamaConfig(hidden_size=64), GPT2Config(n_embd=192)):
        precision = "bf16" if config.hidden_size == 192 else "no"
        assert arithmetic.choose_precision("auto", config, CPU, {}).value == precision


@pytest.mark.parametrize(
    ("name", "device", "precision", "context", "run", "attention"),
    [
        ("auto", "cpu", "bf16", 1024, {}, "plain"),
        ("auto", "cpu", "bf16", 1025, {}, "sdpa"),  # too long
        ("auto", "cpu", "no", 1024, {}, "sdpa"),
        ("auto", "cuda", "bf16", 1024, {}, "sdpa"),
        ("eager", "cpu", "bf16", 1024, {}, "eager"),  # as the flag says
        ("auto", "cpu", "bf16", 1024, {"attention": "sdpa"}, "sdpa"),  # as the run began
        ("auto", "cpu", "no", 1024, {"attention": "plain"}, "plain"),
        ("auto", "cuda", "bf16", 1024, {"attention": "plain"}, "sdpa"),
        ("auto", "cpu", "bf16", 1024, {"precision": "bf16"}, "sdpa"),  # a checkpoint of an earlier version
    ],
)
def test_attention_is_plain_where_that_is_fast(name, device, precision, context, run, attention):
    config, device = NanoGPTConfig(block_size=context, n_head=4, n_embd=64), torch.device(device)
    choice = arithmetic.choose_attention(flags(attn_implementation=name), config, device, precision, run)
    assert choice.value == attention
    assert "as the run began" in choice.reason or not run or device.type == "cuda"


def test_a_long_run_on_a_cpu_is_compiled(monkeypatch):
    monkeypatch.setattr(arithmetic, "why_not_compiled", lambda device: "")
    config = NanoGPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384)  # 3e11 FLOPs a step of 8 windows
    assert not arithmetic.choose_compile(flags(max_iters=100), config, CPU, {}).value
    assert arithmetic.choose_compile(flags(max_iters=1000), config, CPU, {}).value
    assert not arithmetic.choose_compile(flags(max_iters=1000, eval_only=True), config, CPU, {}).value
    monkeypatch.setattr(arithmetic, "why_not_compiled", lambda device: "there is no compiler")
    choice = arithmetic.choose_compile(flags(max_iters=1000), config, CPU, {})
    assert choice == (False, "auto: torch cannot compile here (there is no compiler)")


@pytest.mark.parametrize(
    ("device", "processes", "micro_batches", "windows", "mode"),
    [
        ("cuda", 1, 1, 64, "reduce-overhead"),  # 1.2e12 FLOPs, as in nanoGPT's shakespeare_char
        ("cuda", 1, 1, 1024, "default"),  # kernels so long that the host launches them in time
        ("cuda", 1, 2, 64, "default"),
        ("cuda", 2, 1, 64, "default"),
        ("cpu", 1, 1, 64, "default"),
    ],
)
def test_a_small_step_on_a_gpu_is_one_graph(device, processes, micro_batches, windows, mode):
    config = NanoGPTConfig(vocab_size=128, block_size=256, n_layer=6, n_head=6, n_embd=384)
    machine = SimpleNamespace(device=torch.device(device), num_processes=processes)
    step = flags(batch_size=windows, gradient_accumulation_steps=micro_batches)
    assert arithmetic.compile_mode(step, config, machine) == mode


@pytest.mark.parametrize(
    "run, compiles",
    [
        ({"compile": True, "recipe": {"compile": "auto"}}, True),
        ({"compile": False, "recipe": {"compile": "auto"}}, False),
        ({"recipe": {"compile": False}}, False),  # a checkpoint of an earlier version
    ],
)
def test_a_resumed_run_is_compiled_if_it_was_compiled_before(monkeypatch, run, compiles):
    monkeypatch.setattr(arithmetic, "why_not_compiled", lambda device: "")
    config = NanoGPTConfig(n_layer=1, n_head=1, n_embd=8)
    for max_iters in (1, 10**9):
        assert arithmetic.choose_compile(flags(max_iters=max_iters), config, CPU, run).value == compiles


def test_the_first_line_of_the_log_says_what_was_chosen(tmp_path, capsys):
    run = train(tmp_path, compile="auto", max_iters=2)
    first = capsys.readouterr().out.splitlines()[0]
    assert "compile=False (auto: the run is too short to earn the time that compiling takes)" in first
    assert "float32 (auto: " in first or torch.cuda.is_available()
    state = json.loads(next(run.out_dir.glob("checkpoints/step-*/state.json")).read_text())
    assert state["run"]["compile"] is False
    assert state["run"]["precision"] == "no" or torch.cuda.is_available()
    assert state["run"]["attention"] == "sdpa"


def test_a_run_in_bfloat16_on_a_cpu_goes_on_with_plain_attention(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("on a GPU, attention is sdpa")
    run = train(tmp_path, dtype="bfloat16", max_iters=2)
    assert "plain attention (auto: faster in bfloat16 on a CPU)" in capsys.readouterr().out
    assert "plain" not in (run.out_dir / "config.json").read_text()  # nobody else knows the function
    train(tmp_path, dtype="bfloat16", max_iters=3, lr_decay_iters=2, init_from="resume")
    assert "plain attention (auto: as the run began)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        (
            "flash",
            "cuda",
            ["attn_implementation=flash", "sdpa, plain, eager, flex_attention", "kernels-community/flash-attn3"],
        ),
        ("flex_attention", "cpu", ["attn_implementation=flex_attention", "GPU", "sdpa, plain or eager"]),
        ("kernels-community/flash-attn3", "cpu", ["attn_implementation=kernels-community/flash-attn3", "GPU"]),
        ("kernels-community/flash-attn3", "cuda", ["needs the package kernels"]),
    ],
)
def test_an_attention_function_that_does_not_run_here_is_refused(monkeypatch, name, device, said):
    monkeypatch.setattr(arithmetic, "find_spec", lambda package: None)
    with pytest.raises(ValueError) as mistake:
        arithmetic.check_attention(name, torch.device(device))
    assert all(words in str(mistake.value) for words in said)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_a_step_frees_serves_the_next_step():
    code = """
import resource, torch
from modeling_nanogpt.training.launching import keep_freed_memory

def faults(steps=50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        blocks = [torch.ones(2**20) for _ in range(4)]  # 4 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    given_back, kept = map(int, said.split())
    assert kept < given_back / 4


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("Auto", "auto"), ("True", True), ("false", False)])
def test_a_switch_is_auto_true_or_false(text, value):
    assert read_switch(text) == value
