"""Files that others bring: llm.c's model.bin, state dicts, and the checkpoints of nanoGPT's forks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_nanogpt import convert
from modeling_nanogpt.sources import open_source
from modeling_nanogpt.training.starting import SHAPE, start_from_model
from support.references import (
    BLOCK,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    exact_gelu,
    make_counterpart,
    reference_logits,
    tanh_gelu,
)
from tokenization.vocabularies import read_char_tokenizer

IDS = torch.randint(VOCAB, (2, BLOCK), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(source) -> torch.Tensor:
    return source.model(source.config).eval()(IDS).logits


def weights_of(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def run_convert(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
    convert.main(convert.parse_arguments())


def refusal(capsys, monkeypatch, *argv) -> str:
    capsys.readouterr()  # loading a model shows a progress bar
    with pytest.raises(SystemExit) as exit:
        run_convert(monkeypatch, *argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    return line


# ---------------------------------------------------------------------------------------------------------------------
# llm.c


def write_llmc(path: Path, weights: dict, version: int = 3, magic: int = 20240326) -> Path:
    """A file as llm.c's train_gpt2 writes it. The vocabulary is padded to a multiple of 128."""
    header, rows = np.zeros(256, dtype="<i4"), 128
    header[:8] = (magic, version, BLOCK, VOCAB, LAYERS, HEADS, WIDTH, rows)
    padded = torch.full((rows, WIDTH), 9.0)
    padded[:VOCAB] = weights["transformer.wte.weight"]
    parts = [padded, weights["transformer.wpe.weight"]]
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for leaf in ("weight", "bias"):
            parts += [weights[f"transformer.h.{layer}.{kind}.{leaf}"] for layer in range(LAYERS)]
    parts += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    numbers = torch.cat([part.flatten() for part in parts])
    raw = numbers.bfloat16().view(torch.int16) if version == 5 else numbers
    path.write_bytes(header.tobytes() + raw.numpy().tobytes())
    return path


@pytest.mark.parametrize("version", [3, 5])
def test_a_model_of_llmc_has_the_logits_of_the_definition(tmp_path, monkeypatch, version):
    weights = weights_of(make_counterpart(bias=True))
    path = write_llmc(tmp_path / "model.bin", weights, version)
    if version == 5:
        weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    expected = reference_logits(weights, IDS, tanh_gelu)
    source = open_source(str(path))
    assert source.config.vocab_size == VOCAB and source.config.bias and source.config.tie_word_embeddings
    torch.testing.assert_close(logits(source), expected, atol=1e-5, rtol=1e-5)

    (tmp_path / "letters.txt").write_text("".join(chr(65 + i) for i in range(VOCAB)))
    read_char_tokenizer(tmp_path / "letters.txt").save_pretrained(tmp_path / "tokens")
    run_convert(monkeypatch, path, tmp_path / "out", "--tokenizer", tmp_path / "tokens")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == (torch.bfloat16 if version == 5 else torch.float32)
    saved = model.float().state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "format is 2"),
        ({"magic": 20240803}, "Llama model of llm.c"),
        ({"size": 5000}, "5,000 bytes"),
        ({"size": 500}, "ends within its header"),
    ],
)
def test_other_files_of_llmc_are_refused_by_what_they_are(tmp_path, monkeypatch, capsys, change, said):
    size = change.pop("size", None)
    path = write_llmc(tmp_path / "model.bin", weights_of(make_counterpart(bias=True)), **change)
    path.write_bytes(path.read_bytes()[:size])
    assert said in refusal(capsys, monkeypatch, path, tmp_path / "out", "--to=ckpt")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# State dicts, and what forks put around them


def save(path: Path, content: dict) -> str:
    torch.save(content, path)
    return str(path)


CONTENTS = {  # what surrounds the weights of nanoGPT's network
    "weights alone": lambda weights: weights,
    "weights alone of a compiled model": lambda weights: {f"_orig_mod.{name}": each for name, each in weights.items()},
    "a checkpoint without model_args": lambda weights: {"model": weights, "optimizer": {}, "iter_num": 7},
    "another name for the weights": lambda weights: {"model_state_dict": weights, "epoch": 3},
    "Lightning": lambda weights: {"state_dict": {f"model.{name}": each for name, each in weights.items()}},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("content", CONTENTS)
def test_weights_without_model_args_need_the_number_of_heads_alone(tmp_path, content, bias):
    weights = weights_of(make_counterpart(bias))
    path = save(tmp_path / "model.pt", CONTENTS[content](weights))
    with pytest.raises(ValueError, match="--n_head"):
        open_source(path)
    expected = reference_logits(weights, IDS, exact_gelu)
    torch.testing.assert_close(logits(open_source(path, n_head=HEADS)), expected, atol=1e-5, rtol=1e-5)


def test_the_number_of_heads_is_also_read_from_the_settings_of_a_run(tmp_path, monkeypatch, capsys):
    model = make_counterpart(bias=False)
    path = save(tmp_path / "ckpt.pt", {"model": model.state_dict(), "config": {"n_head": HEADS, "device": "cpu"}})
    expected = reference_logits(weights_of(model), IDS, exact_gelu)
    torch.testing.assert_close(logits(open_source(path)), expected, atol=1e-5, rtol=1e-5)
    assert f"n_head={HEADS}" in refusal(capsys, monkeypatch, path, tmp_path / "out", "--to=ckpt", "--n_head=2")
    run_convert(monkeypatch, path, tmp_path / "out", "--to=ckpt", f"--n_head={HEADS}")
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model_args"]["n_head"] == HEADS


@pytest.mark.parametrize("bare", [False, True])
def test_a_state_dict_of_transformers_gpt2_is_known_by_its_shapes(tmp_path, bare):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "n_positions": BLOCK, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, bos_token_id=None, eos_token_id=None)).eval()
    weights = (model.transformer if bare else model).state_dict()
    path = save(tmp_path / "pytorch_model.bin", weights | {"h.0.attn.bias": torch.ones(1, 1, BLOCK, BLOCK)})
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(logits(open_source(path, n_head=HEADS)), expected, atol=1e-5, rtol=1e-5)


def test_training_starts_from_weights_alone_if_its_flags_name_the_number_of_heads(tmp_path):
    weights = weights_of(make_counterpart(bias=False))
    path = save(tmp_path / "model.pt", weights)
    recipe = dict.fromkeys(SHAPE) | {"n_head": HEADS}
    start = start_from_model(path, None, recipe)
    assert start.config.n_head == HEADS and not start.carries_tokenizer
    with pytest.raises(ValueError, match="--n_head"):
        start_from_model(path, None, recipe | {"n_head": None})


# ---------------------------------------------------------------------------------------------------------------------
# Other architectures

MATRIX = torch.zeros(8, 8)
OTHERS = {
    "nanochat": {"transformer.wte.weight": MATRIX, "transformer.h.0.attn.c_q.weight": MATRIX},
    "Llama": {"model.embed_tokens.weight": MATRIX, "model.layers.0.self_attn.q_proj.weight": MATRIX},
    "a Llama model": {"tok_embeddings.weight": MATRIX, "layers.0.attention.wq.weight": MATRIX},
    "litgpt": {"transformer.wte.weight": MATRIX, "transformer.h.0.attn.qkv.weight": MATRIX},
    "GPT-NeoX": {"gpt_neox.layers.0.attention.query_key_value.weight": MATRIX},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("around", [False, True])
def test_a_model_that_is_no_gpt2_is_refused_by_what_it_is(tmp_path, monkeypatch, capsys, kind, around):
    content = {"model": OTHERS[kind], "optimizer": {}} if around else OTHERS[kind]
    path = save(tmp_path / "model.pt", content)
    line = refusal(capsys, monkeypatch, path, tmp_path / "out", "--to=gpt2", "--n_head=2")
    assert kind in line and "GPT-2" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("m.gguf", b"GGUF\3\0\0\0", "a GGUF file"), ("stories.bin", b"24ka\1\0\0\0", "llama2.c")]
    + [("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "config.json")],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(tmp_path, monkeypatch, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(capsys, monkeypatch, tmp_path / name, tmp_path / "out")
