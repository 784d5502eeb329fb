"""What only a GPU shows: loss scaling, 16-bit arithmetic, compiled kernels, pinned copies, fused attention."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.decoding import FixedReader, GraphReader, Reader, continue_prompt
from modeling_nanogpt.optimization import make_optimizer
from modeling_nanogpt.throughput import peak_flops
from support.synchronizations import waits_in
from support.tiny_run import train
from train_accelerate import to_device

pytestmark = pytest.mark.gpu


def small_model(**changes) -> NanoGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "block_size": 1024, "n_layer": 2, "n_head": 2, "n_embd": 128}
    return NanoGPTForCausalLM(NanoGPTConfig(**shape | changes)).cuda()


@pytest.fixture(scope="module")
def float32_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("float32"), dtype="float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_training_stays_close_to_float32(float32_run, tmp_path, dtype):
    run = train(tmp_path, dtype=dtype)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.losses == pytest.approx(float32_run.losses, abs=0.1)
    assert run.losses != float32_run.losses
    model = AutoModelForCausalLM.from_pretrained(run.out_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_auto_is_16_bit_on_a_gpu(float32_run, tmp_path):
    assert train(tmp_path, dtype="auto").losses != float32_run.losses


def test_accumulation_is_exact_on_a_gpu(float32_run, tmp_path):
    split = train(tmp_path, dtype="float32", batch_size=2, gradient_accumulation_steps=4)
    assert split.losses == pytest.approx(float32_run.losses, abs=1e-3)


def test_compiled_training_equals_eager(float32_run, tmp_path):
    compiled = train(tmp_path, dtype="float32", compile=True)
    assert compiled.losses == pytest.approx(float32_run.losses, abs=1e-2)


@pytest.mark.parametrize("count", [20, 200])  # within the context, and past it
def test_a_graph_continues_as_a_model_does(count):
    model = small_model(block_size=64).eval()
    prompt = torch.randint(128, (3, 5), device="cuda")
    rows = [
        torch.stack(list(continue_prompt(model, prompt, count, temperature=0, top_k=0, reader=reader)))
        for reader in (Reader(model), FixedReader(model, 5 + count), GraphReader(model, 3, 5 + count))
    ]
    assert (rows[0] == rows[1]).float().mean() > 0.99  # a tie may fall either way
    assert (rows[0] == rows[2]).float().mean() > 0.99


def test_sampling_does_not_wait_for_the_device():
    model = small_model(block_size=64).eval()
    prompt = torch.randint(128, (3, 5), device="cuda")
    tokens = continue_prompt(model, prompt, 31, temperature=0.8, top_k=50)
    next(tokens)  # records the graph, and reads the prompt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(29):
                next(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits_in(caught) == []


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(mixed_precision="fp16")
    model = small_model(block_size=64)
    model, optimizer = accelerator.prepare(
        model, make_optimizer("adamw", model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    )
    ids = torch.randint(0, 128, (4, 64), device="cuda")

    def step(gradient: float | None) -> None:
        accelerator.backward(model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss)
        if gradient is not None:
            model.lm_head.weight.grad[0, 0] = gradient
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def scale_after(gradient: float | None) -> float:
        step(gradient)
        return accelerator.scaler.get_scale()

    scale = accelerator.scaler.get_scale()
    while scale != (scale := scale_after(None)):  # until it is so low that nothing overflows by itself
        pass
    before = copy.deepcopy(model.state_dict())
    assert scale_after(math.inf) == scale / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert scale_after(None) == scale / 2
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)


def test_batches_travel_from_pinned_memory():
    ids = np.arange(4 * 128).reshape(4, 128)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        tensor = to_device(ids, torch.device("cuda"))
        torch.cuda.synchronize()
    assert any("Pinned -> Device" in event.name for event in profiler.events())
    assert tensor.cpu().equal(torch.from_numpy(ids))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_training_attention_fits_the_fused_kernels(backend):
    if backend == SDPBackend.CUDNN_ATTENTION and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("cuDNN attention needs compute capability 8.0")
    model = small_model()
    ids = torch.randint(0, 128, (2, 256), device="cuda")
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(backend):  # no other kernel is allowed
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-2)


@pytest.mark.parametrize("length", [64, 192, 320, 704, 1024])
def test_gradients_are_finite_at_every_length(length):
    model = small_model()
    ids = torch.randint(0, 128, (2, length), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_sampling_gives_the_same_text_on_a_gpu_as_on_a_cpu(float32_run):
    model = AutoModelForCausalLM.from_pretrained(float32_run.out_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(float32_run.out_dir)
    prompt = tokenizer("to be ", return_tensors="pt").input_ids
    greedy = {"temperature": 0, "top_k": 0}
    on_cpu = torch.stack(list(continue_prompt(model, prompt, 24, **greedy)))  # past block_size
    on_gpu = torch.stack(list(continue_prompt(model.cuda(), prompt.cuda(), 24, **greedy)))
    assert on_gpu.cpu().equal(on_cpu)


def test_the_static_cache_compiles_and_agrees(float32_run):
    model = AutoModelForCausalLM.from_pretrained(float32_run.out_dir).eval().cuda()
    ids = torch.tensor([[1, 2, 3]], device="cuda")
    dynamic = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert static.equal(dynamic)


def test_a_known_gpu_reports_mfu(float32_run):
    if peak_flops(torch.device("cuda")) is None:
        pytest.skip("this GPU's peak is not in the table")
    assert all(0 < entry["mfu"] < 1 for entry in float32_run.history if "loss" in entry)
