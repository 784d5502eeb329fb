"""NanoGPT as a transformers model: init, tying, saving, attention, cache, loss, positions and configuration."""

import copy
import math
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel
from modeling_nanogpt import modeling_nanogpt as modeling
from support.models import BLOCK, VOCAB, make_config, make_model, make_tokens

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")


def make_window(batch, length, seed=1):
    """Inputs and targets (B, T), cut from T + 1 tokens. The targets are contiguous, as the loss needs them."""
    window = make_tokens(batch, length + 1, seed=seed)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def left_pad(prompts):
    """Prompts (T,) of unequal length as input_ids, attention_mask and position_ids (B, T), padded on the left."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.stack([F.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (length - len(prompt), 0)) for prompt in prompts])
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def gradients(model, *losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def is_tied(model):
    return model.lm_head.weight is model.transformer.wte.weight


@pytest.fixture
def accelerator():
    """A fresh Accelerator. The whole process shares its state, and other tests may have changed it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def sdpa_calls(monkeypatch):
    """The arguments of every call of torch's fused attention."""
    calls, attention = [], F.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        calls.append(kwargs)
        return attention(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


# --- a new model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [NanoGPTForCausalLM, NanoGPTModel])
@pytest.mark.parametrize("initializer_range", [0.02, 0.05])
def test_init_draws_matrices_with_the_configured_std_and_residual_projections_smaller(cls, initializer_range):
    # The smallest matrix has 2**16 entries: the standard error of its std is 0.3 percent.
    torch.manual_seed(0)
    n_layer = 3
    config = NanoGPTConfig(
        vocab_size=512,
        block_size=256,
        n_layer=n_layer,
        n_head=4,
        n_embd=256,
        bias=True,
        initializer_range=initializer_range,
    )
    residual = 0
    for name, parameter in cls(config).named_parameters():
        if parameter.ndim == 1:
            norm_weight = "ln_" in name and name.endswith("weight")
            assert torch.equal(parameter, torch.full_like(parameter, 1.0 if norm_weight else 0.0)), name
            continue
        is_residual = name.endswith("c_proj.weight")
        residual += is_residual
        expected = initializer_range / math.sqrt(2 * n_layer) if is_residual else initializer_range
        assert parameter.std().item() == pytest.approx(expected, rel=0.015), name
        assert abs(parameter.mean().item()) < 0.02 * expected, name
    assert residual == 2 * n_layer


def test_untied_head_is_drawn_like_an_embedding():
    torch.manual_seed(0)
    model = NanoGPTForCausalLM(
        NanoGPTConfig(vocab_size=512, n_layer=1, n_embd=256, n_head=4, tie_word_embeddings=False)
    )
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.015)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_follows_the_formula_and_counts_tied_weights_once(bias, tied):
    vocab, block, layers, width, inner = 61, 32, 3, 24, 40
    model = NanoGPTForCausalLM(
        NanoGPTConfig(
            vocab_size=vocab,
            block_size=block,
            n_layer=layers,
            n_head=2,
            n_embd=width,
            intermediate_size=inner,
            bias=bias,
            tie_word_embeddings=tied,
        )
    )
    norm = width * (2 if bias else 1)
    layer = 2 * norm + 4 * width * width + 2 * width * inner + bias * (3 * width + width + inner + width)
    expected = (vocab + block) * width + layers * layer + norm + (0 if tied else vocab * width)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.num_parameters() == expected


def test_gpt2_shape_has_gpt2s_parameter_count():
    with torch.device("meta"):
        model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=50257, bias=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_model_has_no_buffers():
    # from_pretrained fills buffers that were not saved with uninitialised memory.
    assert list(make_model().buffers()) == []


def test_the_docstring_lists_every_weight_with_its_shape_and_its_start():
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "block_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 128, "intermediate_size": 320}
    config = NanoGPTConfig(**shape, tie_word_embeddings=False)
    model = NanoGPTForCausalLM(config)
    sizes = {"V": config.vocab_size, "C": config.n_embd, "3 C": 3 * config.n_embd}
    sizes |= {name: getattr(config, name) for name in ("block_size", "intermediate_size")}
    stds = {"N(0, s)": config.initializer_range, "1": 0.0}
    stds |= {"N(0, s / sqrt(2 n_layer))": config.initializer_range / math.sqrt(2 * config.n_layer)}
    rows = re.findall(r"^ {8}(\S+\.weight) +\((.+?)\) +(.+)$", NanoGPTForCausalLM.__doc__, re.M)
    weights = model.state_dict()
    assert {name for name, _, _ in rows} == {re.sub(r"\.h\.\d+\.", ".h.*.", name) for name in weights}
    for name, shape, start in rows:
        weight = weights[name.replace("*", "1")]
        assert list(weight.shape) == [sizes[size] for size in shape.split(", ")], name
        (std,) = {std for words, std in stds.items() if words in start}
        assert weight.std().item() == pytest.approx(std, rel=0.05), name


# --- tied weights ----------------------------------------------------------------------------------------------------


def test_head_and_embedding_are_one_parameter_after_init_and_loading(tmp_path):
    model = make_model()
    assert is_tied(model)
    model.save_pretrained(tmp_path)
    loaded = NanoGPTForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded)
    assert "lm_head.weight" not in dict(loaded.named_parameters())


@pytest.mark.parametrize("size", [VOCAB + 10, VOCAB - 10])
def test_resize_keeps_the_tie_the_old_rows_and_a_working_loss(size, tmp_path):
    model = make_model()
    before = model.transformer.wte.weight.detach().clone()
    model.resize_token_embeddings(size)
    kept = min(size, VOCAB)
    assert is_tied(model)
    assert model.config.vocab_size == model.lm_head.out_features == size
    assert torch.equal(model.transformer.wte.weight[:kept], before[:kept])
    x = make_tokens(2, 8) % kept
    out = model(x, labels=x)
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    model.save_pretrained(tmp_path)
    loaded = NanoGPTForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_tie_and_weights_survive_accelerates_save_state_and_load_state(tmp_path, accelerator):
    model = accelerator.prepare(make_model())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    model = accelerator.unwrap_model(model)
    assert is_tied(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len({"lm_head.weight", "transformer.wte.weight"} & set(file.keys())) == 1


def test_untied_head_is_a_parameter_of_its_own_and_round_trips(tmp_path):
    model = make_model(tie_word_embeddings=False)
    assert not is_tied(model)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    model.save_pretrained(tmp_path)
    loaded = NanoGPTForCausalLM.from_pretrained(tmp_path)
    assert not is_tied(loaded)
    assert not loaded.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_saved_names_are_nanogpts_and_tied_weights_are_stored_once(tmp_path):
    make_model(n_layer=1, bias=True).save_pretrained(tmp_path)
    layer = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = [f"transformer.h.0.{name}" for name in layer] + ["transformer.ln_f"]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(load_file(tmp_path / "model.safetensors")) == expected | {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }


@pytest.mark.parametrize("cls", [NanoGPTForCausalLM, NanoGPTModel])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loaded_model_is_the_saved_one_bit_for_bit(cls, bias, activation, tmp_path):
    model = make_model(cls, bias=bias, activation_function=activation)
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    x = make_tokens(2, 12)
    assert torch.equal(loaded(x)[0], model(x)[0])


def test_exact_and_tanh_gelu_are_different_models():
    x = make_tokens(2, 12)
    exact, new, tanh = (make_model(activation_function=name)(x).logits for name in ACTIVATIONS)
    assert torch.equal(new, tanh)
    assert (exact - new).abs().max() > 1e-4


def test_base_class_and_language_model_load_each_others_folders(tmp_path):
    model, x = make_model(), make_tokens(2, 12)
    model.save_pretrained(tmp_path / "lm")
    base = NanoGPTModel.from_pretrained(tmp_path / "lm")
    assert torch.equal(base(x).last_hidden_state, model.transformer(x).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = NanoGPTForCausalLM.from_pretrained(tmp_path / "base")
    assert is_tied(again)
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folder_loads_as_float32_on_request(dtype, tmp_path):
    model, x = make_model(initializer_range=0.1), make_tokens(2, 12)
    expected = model(x).logits
    model.to(dtype).save_pretrained(tmp_path)
    loaded = NanoGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), parameter.float()), name
    assert_close(loaded(x).logits, expected, atol=0.05, rtol=0.05)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "plain", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
def test_attention_implementations_agree_with_eager_also_with_left_padding(attention):
    x = make_tokens(2, 12)
    ids, mask, positions = left_pad([make_tokens(12), make_tokens(7, seed=2)])
    model = make_model(attention="eager")
    plain, padded = model(x).logits, model(ids, attention_mask=mask, position_ids=positions).logits
    model.set_attn_implementation(attention)
    # Compiling flex attention to C++ would take a quarter of a minute. Without compilation it is the same function.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        assert_close(model(x).logits, plain, atol=1e-5, rtol=1e-5)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(logits[mask.bool()], padded[mask.bool()], atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


def test_hidden_states_are_the_embeddings_each_block_and_the_final_norm():
    model, x = make_model(n_layer=3), make_tokens(2, 12)
    base = model.transformer
    out = model(x, output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in out.hidden_states] == [(2, 12, 32)] * 4
    assert torch.equal(out.hidden_states[0], base.wte(x) + base.wpe(torch.arange(12)))
    for before, block, after in zip(out.hidden_states, base.h[:2], out.hidden_states[1:3], strict=False):
        assert torch.equal(block(before), after)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(x).hidden_states is None


def test_eager_attention_rows_sum_to_one_and_look_only_back():
    model, x = make_model(attention="eager", n_layer=3), make_tokens(2, 12)
    attentions = model(x, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 2, 12, 12)] * 3
    for weights in attentions:
        assert_close(weights.sum(-1), torch.ones(2, 2, 12))
        assert not weights.triu(1).any()
    assert model(x).attentions is None


def test_eager_attention_gives_padding_no_weight_and_covers_the_cache():
    model = make_model(attention="eager")
    ids, mask, positions = left_pad([make_tokens(12), make_tokens(7, seed=2)])
    out = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True)
    for weights in out.attentions:
        assert not weights[1, :, 5:, :5].any()
    mask = F.pad(mask, (0, 1), value=1)
    step = model(
        ids[:, -1:],
        attention_mask=mask,
        position_ids=positions[:, -1:] + 1,
        past_key_values=out.past_key_values,
        output_attentions=True,
    )
    for weights in step.attentions:
        assert weights.shape == (2, 2, 1, 13)
        assert not weights[1, :, :, :5].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_changing_a_token_changes_no_logits_before_it(attention):
    model, x = make_model(attention=attention), make_tokens(1, 12)
    before = model(x).logits
    for t in range(12):
        changed = x.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        after = model(changed).logits
        assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        difference = (after[0, t:] - before[0, t:]).abs().amax(-1)
        assert (difference > 1e-4).all(), "every later position sees the token"


@pytest.mark.parametrize("length", [64, 192, 320])
def test_gradients_are_finite_at_any_length(length):
    model = make_model(block_size=320, n_layer=1).train()
    x, y = make_window(2, length)
    for name, gradient in gradients(model, model(x, shift_labels=y, use_cache=False).loss).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_finite_if_a_whole_row_is_padding(attention):
    model = make_model(attention=attention).train()
    ids, mask, positions = left_pad([make_tokens(12), make_tokens(3, seed=2)])
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, position_ids=positions, labels=labels, use_cache=False).loss
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_training_calls_the_fused_causal_kernel_without_a_mask(sdpa_calls):
    model = make_model().train()
    x, y = make_window(2, 12)
    model(x, shift_labels=y, skip_logits=True, use_cache=False)
    assert [(call["attn_mask"], call["is_causal"]) for call in sdpa_calls] == [(None, True)] * 2


def test_compiled_training_calls_the_fused_causal_kernel_without_a_mask(fresh_compiler):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model().train()
    x, y = make_window(2, 12)
    torch.compile(model, backend=backend, fullgraph=True)(x, shift_labels=y, skip_logits=True, use_cache=False)
    (graph,) = graphs
    calls = [node.kwargs for node in graph.graph.nodes if node.target is F.scaled_dot_product_attention]
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * 2


@pytest.mark.parametrize("cls", [NanoGPTForCausalLM, NanoGPTModel])
def test_extra_arguments_reach_the_attention_function(cls, monkeypatch):
    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.layer_idx, kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=kwargs["scaling"])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "recording", attention)
    model, x, extra = make_model(cls), make_tokens(2, 12), object()
    expected = model(x)[0]
    model.set_attn_implementation("recording")
    assert torch.equal(model(x, an_extra_argument=extra)[0], expected)
    assert [layer for layer, _ in calls] == [0, 1]
    for _, kwargs in calls:
        assert kwargs["an_extra_argument"] is extra
        assert torch.equal(kwargs["position_ids"], torch.arange(12)[None])
        assert kwargs["scaling"] == 16**-0.5


# --- generation ------------------------------------------------------------------------------------------------------


def continue_by_hand(model, ids, n):
    """Greedy decoding with the whole context every time."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@torch.no_grad()
def test_greedy_generation_is_the_same_with_any_cache_and_by_hand():
    model, prompt = make_model(initializer_range=0.5), make_tokens(3, 5)
    expected = continue_by_hand(model, prompt, 20)
    assert all(len(set(row)) > 5 for row in expected[:, 5:].tolist()), "a text that only repeats shows nothing"
    for kwargs in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        generated = model.generate(prompt, do_sample=False, max_new_tokens=20, **kwargs)
        assert torch.equal(generated, expected), kwargs


@torch.no_grad()
def test_cached_logits_are_those_of_the_full_context_whatever_the_steps():
    model, x = make_model(), make_tokens(2, 12)
    expected = model(x).logits
    for steps in ([1] * 12, [5, 7], [4, 1, 1, 6]):
        cache, logits = DynamicCache(config=model.config), []  # an empty cache is not None
        for chunk in x.split(steps, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            assert out.past_key_values is cache
            logits.append(out.logits)
        assert cache.get_seq_length() == 12
        assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_use_cache_false_returns_no_cache():
    model, x = make_model(), make_tokens(2, 12)
    assert model(x, use_cache=False).past_key_values is None
    assert model(x).past_key_values.get_seq_length() == 12


def test_beam_search_is_the_same_with_and_without_cache():
    model, prompt = make_model(), make_tokens(2, 5)
    cached, uncached = (
        model.generate(
            prompt,
            num_beams=4,
            do_sample=False,
            max_new_tokens=12,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(cached.sequences_scores, uncached.sequences_scores)
    assert not torch.equal(cached.sequences, model.generate(prompt, do_sample=False, max_new_tokens=12))


@pytest.mark.parametrize("cache", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_left_padded_batch_generates_what_each_prompt_does_alone(cache):
    model, prompts = make_model(), [make_tokens(n, seed=n) for n in (9, 4, 1)]
    ids, mask, _ = left_pad(prompts)
    batch = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, **cache)
    for row, prompt in zip(batch, prompts, strict=True):
        alone = model.generate(prompt[None], do_sample=False, max_new_tokens=12)[0]
        assert torch.equal(row[-12:], alone[-12:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_forward_gives_each_prompts_own_logits(attention):
    model, prompts = make_model(attention=attention), [make_tokens(n, seed=n) for n in (9, 4, 1)]
    ids, mask, positions = left_pad(prompts)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, prompt in zip(logits, prompts, strict=True):
        assert_close(row[-len(prompt) :], model(prompt[None]).logits[0], atol=1e-5, rtol=1e-5)


# --- logits and loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 3, 12])
def test_logits_to_keep_as_a_number_is_that_many_last_positions(keep):
    model, x = make_model(), make_tokens(2, 12)
    assert_close(model(x, logits_to_keep=keep).logits, model(x).logits[:, -keep:])


def test_logits_to_keep_as_a_tensor_selects_positions():
    model, x = make_model(), make_tokens(2, 12)
    full, rows = model(x).logits, torch.arange(2)[:, None]
    everywhere = torch.tensor([1, 7, 4])
    assert_close(model(x, logits_to_keep=everywhere).logits, full[:, everywhere])
    by_row = torch.tensor([[0, 5, 11], [3, 3, 2]])
    assert_close(model(x, logits_to_keep=by_row).logits, full[rows, by_row])
    chosen = make_tokens(2, 12, seed=3) % 3 == 0
    assert_close(model(x, logits_to_keep=chosen).logits, full[chosen])


def test_generation_computes_only_the_last_positions_logits():
    model, lengths = make_model(), []
    model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model.generate(make_tokens(2, 5), do_sample=False, max_new_tokens=4)
    assert lengths == [1] * 4


def test_labels_are_shifted_inside_and_shift_labels_are_not():
    model, window = make_model(), make_tokens(3, 13)
    x, y = window[:, :-1], window[:, 1:].contiguous()
    expected = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    assert_close(model(x, shift_labels=y).loss, expected)
    assert_close(model(window, labels=window).loss, expected)
    assert model(x).loss is None


def test_minus_100_is_not_a_target():
    model = make_model()
    x, y = make_window(3, 12)
    y[0, :7] = y[2, 3] = -100
    kept = y != -100
    expected = F.cross_entropy(model(x).logits[kept], y[kept])
    assert_close(model(x, shift_labels=y).loss, expected)
    labels = F.pad(y[:, :-1], (1, 0))  # the model shifts these, so the last one of each row is missing
    expected = F.cross_entropy(model(x).logits[:, :-1][kept[:, :-1]], y[:, :-1][kept[:, :-1]])
    assert_close(model(x, labels=labels).loss, expected)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch_divides_the_sum(as_tensor):
    model = make_model()
    x, y = make_window(3, 12)
    total = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum")
    items = torch.tensor(100) if as_tensor else 100
    assert_close(model(x, shift_labels=y, num_items_in_batch=items).loss, total / 100)


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [4] * 2, [5, 3]], ids=str)
def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(sizes):
    model = make_model().train()
    x, y = make_window(8, 12)
    y[0, :10] = y[1, 4:] = y[6, ::2] = -100
    items = (y != -100).sum()
    whole = gradients(model, model(x, shift_labels=y, use_cache=False).loss)
    losses = [
        model(a, shift_labels=b, num_items_in_batch=items, use_cache=False).loss
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]
    accumulated = gradients(model, *losses)
    for name, gradient in whole.items():
        assert_close(accumulated[name], gradient, atol=1e-5, rtol=1e-4)


def test_skip_logits_returns_the_same_loss_alone():
    model = make_model()
    x, y = make_window(3, 12)
    out = model(x, shift_labels=y, skip_logits=True, use_cache=False)
    assert list(out) == ["loss"]
    assert torch.equal(out.loss, model(x, shift_labels=y).loss)
    assert model(x, shift_labels=y).logits.shape == (3, 12, VOCAB)


def test_loss_of_a_half_precision_model_is_computed_in_float32():
    model = make_model().to(torch.bfloat16)
    x, y = make_window(3, 12)
    out = model(x, shift_labels=y)
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, F.cross_entropy(out.logits.float().flatten(0, 1), y.flatten()))


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
def test_packed_documents_do_not_see_each_other(attention):
    # Together the documents are longer than block_size, but each document is shorter.
    model = make_model(attention=attention)
    rows = [[make_tokens(n, seed=n) for n in lengths] for lengths in ((20, 5, 11), (2, 30, 4))]
    packed = torch.stack([torch.cat(documents) for documents in rows])
    positions = torch.stack([torch.cat([torch.arange(len(document)) for document in row]) for row in rows])
    assert packed.shape[1] > BLOCK
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        logits = model(packed, position_ids=positions, use_cache=False).logits
        for row, documents in zip(logits, rows, strict=True):
            alone = torch.cat([model(document[None]).logits[0] for document in documents])
            assert_close(row, alone, atol=1e-5, rtol=1e-5)


def test_positions_count_from_zero_and_on_from_the_cache():
    model, x = make_model(), make_tokens(2, 12)
    assert_close(model(x, position_ids=torch.arange(12)[None]).logits, model(x).logits)
    shifted = model(x, position_ids=torch.arange(12)[None] + 3).logits
    assert (shifted - model(x).logits).abs().max() > 1e-2
    cache = model(x[:, :5]).past_key_values
    assert_close(model(x[:, 5:], past_key_values=cache).logits, model(x).logits[:, 5:], atol=1e-5, rtol=1e-5)


def test_a_full_block_works_and_one_token_more_is_a_value_error():
    model, x = make_model(), make_tokens(2, BLOCK + 1)
    assert model(x[:, :BLOCK]).logits.shape == (2, BLOCK, VOCAB)
    with pytest.raises(ValueError, match=f"block_size={BLOCK}"):
        model(x)
    with pytest.raises(ValueError, match=f"block_size={BLOCK}"):
        model.transformer(inputs_embeds=model.transformer.wte(x))


def test_cached_steps_may_fill_the_block_and_no_more():
    model, x, cache = make_model(), make_tokens(2, BLOCK + 1), DynamicCache()
    for t in range(BLOCK):
        model(x[:, t : t + 1], past_key_values=cache)
    with pytest.raises(ValueError, match=f"block_size={BLOCK}"):
        model(x[:, BLOCK:], past_key_values=cache)


@pytest.mark.parametrize("cache", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_may_fill_the_block_and_no_more(cache):
    # The last new token is never fed back: BLOCK positions yield BLOCK + 1 tokens.
    model, prompt = make_model(), make_tokens(2, BLOCK - 4)
    assert model.generate(prompt, do_sample=False, max_new_tokens=5, **cache).shape == (2, BLOCK + 1)
    with pytest.raises(ValueError, match=f"block_size={BLOCK}"):
        model.generate(prompt, do_sample=False, max_new_tokens=6, **cache)


def test_a_given_position_beyond_the_block_is_a_value_error_however_short_the_input():
    model = make_model()
    with pytest.raises(ValueError, match=f"block_size={BLOCK}"):
        model(make_tokens(1, 2), position_ids=torch.tensor([[0, BLOCK]]))


def test_padding_does_not_count_against_the_block():
    model, prompt = make_model(), make_tokens(BLOCK - 4)
    ids, mask = F.pad(prompt, (9, 0))[None], F.pad(torch.ones_like(prompt), (9, 0))[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert ids.shape[1] > BLOCK
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(logits[0, 9:], model(prompt[None]).logits[0], atol=1e-5, rtol=1e-5)
    generated = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5)
    assert torch.equal(generated[0, 9:], model.generate(prompt[None], do_sample=False, max_new_tokens=5)[0])


def test_embeddings_may_be_given_instead_of_tokens():
    model, x = make_model(), make_tokens(2, 12)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model(x).logits)


def test_tokens_and_embeddings_together_or_neither_is_a_value_error():
    model, x = make_model(), make_tokens(2, 12)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(x, inputs_embeds=model.get_input_embeddings()(x))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_recomputes_every_block_and_changes_nothing(dropout):
    model = make_model(dropout=dropout).train()
    x, y = make_window(2, 12)
    calls = []
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda module, args: calls.append(module))

    def run():
        torch.manual_seed(0)  # dropout draws the same masks, in the recomputation too
        loss = model(x, shift_labels=y, use_cache=False).loss
        return loss.detach(), gradients(model, loss)

    loss, expected = run()
    assert len(calls) == 2
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed = run()
    assert len(calls) == 2 + 4
    assert torch.equal(checkpointed_loss, loss)
    for name, gradient in expected.items():
        assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("items", [None, 7.5])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_loss_in_parts_is_the_loss_and_never_holds_the_logits(monkeypatch, fresh_compiler, items, compiles):
    monkeypatch.setattr(modeling, "LOSS_PART", 10)  # of 24 positions: two parts are full, one is not
    model = make_model(bias=True).train()
    x, y = make_window(2, 12)
    y[0, :3] = -100
    settings = {"shift_labels": y, "num_items_in_batch": items, "use_cache": False}
    loss = model(x, **settings).loss
    expected = gradients(model, loss)

    rows = []
    if not compiles:  # the compiler refuses a hook with effects
        model.lm_head.register_forward_hook(lambda module, args, logits: rows.append(logits.shape[:-1].numel()))
    model.gradient_checkpointing_enable()
    forward = torch.compile(model, backend="eager", fullgraph=True) if compiles else model
    in_parts = forward(x, skip_logits=True, **settings).loss
    assert_close(in_parts, loss)
    for name, gradient in gradients(model, in_parts).items():
        assert_close(gradient, expected[name])
    expected_rows = [] if compiles else [4, 4, 10, 10, 10, 10]  # once forwards, and once more backwards
    assert sorted(rows) == expected_rows


def dropped_fraction(model, module):
    """The fraction of zeros in what leaves the module in one forward pass."""
    seen = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(make_tokens(16, 128))
    hook.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return (output == 0).float().mean().item()


@pytest.mark.parametrize("place", ["drop", "h.0.attn", "h.1.attn", "h.0.mlp", "h.1.mlp"])
def test_dropout_acts_on_embeddings_and_residuals_in_training_only(place):
    model = make_model(dropout=0.3, n_embd=64, block_size=128)
    module = model.transformer.get_submodule(place)
    assert dropped_fraction(model, module) == 0
    model.train()
    assert dropped_fraction(model, module) == pytest.approx(0.3, abs=0.01)


def test_dropout_acts_on_sdpa_attention_in_training_only(sdpa_calls):
    model, x = make_model(dropout=0.3), make_tokens(2, 12)
    model(x)
    model.train()(x)
    assert [call["dropout_p"] for call in sdpa_calls] == [0.0, 0.0, 0.3, 0.3]


def test_dropout_acts_on_eager_attention_in_training_only():
    model, x = make_model(dropout=0.3, attention="eager", block_size=128), make_tokens(16, 128)
    past = torch.ones(128, 128).tril().bool()
    weights = model(x, output_attentions=True).attentions[0]
    dropped = model.train()(x, output_attentions=True).attentions[0]
    assert (dropped[..., past] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (weights[..., past] == 0).float().mean().item() < 0.01


def test_dropout_is_off_in_eval_and_random_in_training():
    model, x = make_model(dropout=0.3), make_tokens(2, 12)
    assert torch.equal(model(x).logits, model(x).logits)
    assert torch.equal(model(x).logits, make_model()(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


def test_compiled_training_step_is_one_graph_and_the_same_step(fresh_compiler):
    model = make_model().train()
    x, y = make_window(2, 12)
    step = {"shift_labels": y, "skip_logits": True, "use_cache": False}
    expected = gradients(model, model(x, **step).loss)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name, gradient in gradients(model, compiled(x, **step).loss).items():
        assert_close(gradient, expected[name])


def test_model_compiled_in_place_saves_plain_names(fresh_compiler, tmp_path):
    model, x = make_model(), make_tokens(2, 12)
    names, expected = set(model.state_dict()) - {"lm_head.weight"}, model(x).logits
    model.compile(backend="eager")
    assert_close(model(x).logits, expected)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    assert_close(NanoGPTForCausalLM.from_pretrained(tmp_path)(x).logits, expected)


def test_a_few_steps_of_adamw_learn_a_batch_and_keep_the_tie():
    model = make_model(initializer_range=0.02).train()
    x, y = make_window(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(x, shift_labels=y, skip_logits=True, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.5)
    assert losses[-1] < 0.5
    assert is_tied(model)


# --- configuration ---------------------------------------------------------------------------------------------------

ALIASES = {
    "hidden_size": ("n_embd", 48),
    "num_attention_heads": ("n_head", 3),
    "num_hidden_layers": ("n_layer", 5),
    "max_position_embeddings": ("block_size", 17),
    "n_positions": ("block_size", 17),
    "hidden_act": ("activation_function", "gelu_new"),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_is_read_written_and_accepted_by_the_constructor(alias):
    name, value = ALIASES[alias]
    config = NanoGPTConfig()
    assert getattr(config, alias) == getattr(config, name) == getattr(NanoGPTConfig, name)
    setattr(config, alias, value)
    assert getattr(config, name) == value
    config = NanoGPTConfig(**{"n_embd": 48, alias: value})
    assert getattr(config, alias) == getattr(config, name) == value
    assert alias not in config.to_dict()


def test_intermediate_size_follows_n_embd_also_under_its_alias_unless_given():
    assert NanoGPTConfig().intermediate_size == 4 * 768
    assert NanoGPTConfig(n_embd=48).intermediate_size == 192
    assert NanoGPTConfig(hidden_size=48).intermediate_size == 192
    assert NanoGPTConfig(hidden_size=48, intermediate_size=100).intermediate_size == 100
    assert make_model(intermediate_size=100).transformer.h[0].mlp.c_fc.out_features == 100


def test_configuration_round_trips_through_dict_json_and_folder(tmp_path):
    config = make_config(
        hidden_act="gelu_new",
        bias=True,
        dropout=0.1,
        intermediate_size=100,
        tie_word_embeddings=False,
        eos_token_id=[1, 2],
    )
    config.to_json_file(tmp_path / "some.json", use_diff=False)
    config.save_pretrained(tmp_path)
    for again in (
        NanoGPTConfig.from_dict(config.to_dict()),
        NanoGPTConfig.from_json_file(tmp_path / "some.json"),
        NanoGPTConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
    ):
        for name in NanoGPTConfig.__annotations__:
            assert getattr(again, name) == getattr(config, name), name


def test_tie_word_embeddings_is_written_down_though_it_is_the_default():
    assert NanoGPTConfig().to_dict()["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("n_embd", {"n_embd": 30, "n_head": 4}),
        ("n_head", {"n_embd": 30, "n_head": 4}),
        ("n_embd", {"hidden_size": 30, "num_attention_heads": 4}),
        ("n_layer", {"n_layer": 0}),
        ("n_layer", {"num_hidden_layers": 0}),
        ("n_layer", {"n_layer": "2"}),
        ("vocab_size", {"vocab_size": 1.5}),
        ("block_size", {"block_size": -1}),
        ("intermediate_size", {"intermediate_size": 0}),
        ("bias", {"bias": "yes"}),
        ("dropout", {"dropout": 1.5}),
        ("dropout", {"dropout": -0.1}),
        ("activation_function", {"activation_function": "relu"}),
    ],
    ids=str,
)
def test_impossible_configuration_is_an_error_that_names_the_field(field, wrong):
    with pytest.raises(StrictDataclassError, match=rf"\b{field}\b"):
        NanoGPTConfig(**wrong)


def test_configuration_made_impossible_later_is_not_saved(tmp_path):
    config = make_config()
    config.n_embd = 31
    with pytest.raises(StrictDataclassError, match="n_embd=31"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_layer_norm_epsilon_reaches_every_norm():
    norms = [module for module in make_model(layer_norm_epsilon=1e-3).modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-3] * 5


@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_fsdp_plan"])
def test_the_parallel_plans_name_modules_that_exist(plan):
    # transformers at most warns about a name that matches nothing, and does not shard the module
    model = NanoGPTModel(NanoGPTConfig(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=16))
    modules = [name for name, _ in model.named_modules()]
    for pattern in getattr(NanoGPTConfig, plan):
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), name) for name in modules), pattern
