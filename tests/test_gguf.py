"""GGUF files: what is in them, and what llama.cpp makes of them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanogpt import convert
from modeling_nanogpt.gguf_export import read_vocabulary
from modeling_nanogpt.sources import adopt_tokenizer
from support.models import make_model
from support.needs import needs_gpt2, node_packages
from support.texts import HARD_TEXTS, TEXT
from tokenization.vocabularies import (
    make_gpt2_tokenizer,
    read_char_tokenizer,
    train_bpe_tokenizer,
    train_char_tokenizer,
)

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
needs_llama_cpp = pytest.mark.skipif(
    node_packages("node-llama-cpp") is None, reason="NODE_MODULES names no folder with the package node-llama-cpp"
)
KINDS = ["char", "bpe", pytest.param("gpt2", marks=needs_gpt2)]
PROMPTS = ["def wrap(", "import re\n\n", "class TextWrapper:\n    def __init__(self", "Ça va, 12345 times  "]
NEW = 60  # tokens to generate
RUNNER = Path(__file__).parent / "support" / "run_gguf.mjs"


def make_tokenizer(kind):
    if kind == "char":
        return train_char_tokenizer([TEXT])
    return make_gpt2_tokenizer() if kind == "gpt2" else train_bpe_tokenizer([TEXT], 400)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a kind of tokenizer to a folder with such a tokenizer and a model that knows four texts."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_model(made[kind], kind, intermediate_size=96)  # a narrow MLP
        return made[kind]

    return folder_of


def save_model(folder, kind, **shape):
    """A model that knows four texts, and its tokenizer. The model has more rows than tokens, and biases or none."""
    tokenizer = make_tokenizer(kind)
    shape |= {"vocab_size": len(tokenizer) + 7, "block_size": 128, "bias": kind == "char"}
    model = make_model(**shape, initializer_range=0.05)
    teach(model, [tokenizer(prompt + TEXT[1000 * i :][:1000]).input_ids for i, prompt in enumerate(PROMPTS)])
    adopt_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(model, texts):
    """Let a model learn the first 100 ids of each text by heart. Then no rounding changes which token is likeliest."""
    ids = torch.tensor([text[:100] for text in texts])
    used, places = ids.unique(return_inverse=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        hidden = model.transformer(ids[:, :-1]).last_hidden_state
        logits = hidden @ model.transformer.wte.weight[used].T  # all 50,000 of GPT-2 would take long
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), places[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05


def run_convert(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
    convert.main(convert.parse_arguments())


# ---------------------------------------------------------------------------------------------------------------------
# The file, by the reader of the package gguf


def value_of(reader, key):
    return reader.get_field(key).contents()


@needs_gguf
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_file_holds_the_weights_under_llama_cpps_names(folders, tmp_path, monkeypatch, kind, dtype):
    import gguf

    run_convert(monkeypatch, folders(kind), tmp_path / "m.gguf", "--to=gguf", f"--dtype={dtype}")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(folders(kind))
    tokens = len(AutoTokenizer.from_pretrained(folders(kind)))
    layers = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"}
    layers |= {"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    names = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
    names |= {f"blk.{i}.{theirs}": f"h.{i}.{ours}" for i in range(2) for theirs, ours in layers.items()}
    expected = {f"{theirs}.weight" for theirs in names}
    expected |= {f"{theirs}.bias" for theirs in names if not theirs.endswith("embd")}  # a GPT-2 always has biases
    assert {tensor.name for tensor in reader.tensors} == expected

    weights = model.transformer.state_dict()
    for tensor in reader.tensors:
        name, part = tensor.name.rsplit(".", 1)
        weight = weights.get(f"{names[name]}.{part}")
        weight = torch.zeros(tensor.data.shape[0]) if weight is None else weight
        weight = weight[:tokens].numpy() if name == "token_embd" else weight.numpy()
        stored = "f32" if weight.ndim == 1 or name == "position_embd" else dtype
        assert tensor.tensor_type == gguf.GGMLQuantizationType[stored.upper()], tensor.name
        assert tensor.shape.tolist() == list(weight.shape[::-1])
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        steps = {"f32": 0, "f16": 2**-11, "q8_0": 1 / 220}
        np.testing.assert_allclose(data, weight, rtol=0, atol=steps[stored] * np.abs(weight).max())

    config = model.config
    assert value_of(reader, "general.architecture") == "gpt2"
    assert value_of(reader, "gpt2.context_length") == config.block_size == 128
    assert value_of(reader, "gpt2.embedding_length") == config.n_embd == 32
    assert value_of(reader, "gpt2.feed_forward_length") == config.intermediate_size == 96
    assert value_of(reader, "gpt2.block_count") == config.n_layer == 2
    assert value_of(reader, "gpt2.attention.head_count") == config.n_head == 2
    assert value_of(reader, "gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)


@needs_gguf
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_file_holds_the_tokenizer(folders, tmp_path, monkeypatch, kind):
    import gguf

    run_convert(monkeypatch, folders(kind), tmp_path / "m.gguf", "--to=gguf")
    reader, tokenizer = gguf.GGUFReader(tmp_path / "m.gguf"), AutoTokenizer.from_pretrained(folders(kind))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = (value_of(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    texts = [token.replace("\u2581", " ") if kind == "char" else token for token in tokens]
    assert texts == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = dict.fromkeys(range(len(tokens)), gguf.TokenType.NORMAL)
    kinds |= {i: gguf.TokenType.BYTE for i, token in enumerate(tokens) if kind == "char" and token.startswith("<0x")}
    kinds |= dict.fromkeys((tokenizer.eos_token_id, tokenizer.pad_token_id), gguf.TokenType.CONTROL)
    assert types == list(kinds.values())
    if kind == "char":
        assert value_of(reader, "tokenizer.ggml.model") == "llama"
        assert value_of(reader, "tokenizer.ggml.add_space_prefix") is False
        assert "\u2581" in tokens and " " not in tokens
        assert value_of(reader, "tokenizer.ggml.scores") == [0.0] * len(tokens)
        assert types.count(gguf.TokenType.BYTE) == 255  # the byte 0xFF is in no text: padding has its token
    else:
        assert value_of(reader, "tokenizer.ggml.model") == "gpt2" and value_of(reader, "tokenizer.ggml.pre") == "gpt-2"
        merges = value_of(reader, "tokenizer.ggml.merges")
        assert [merge.split(" ") for merge in merges] == [list(merge) for merge in spec["model"]["merges"]]
    assert value_of(reader, "tokenizer.ggml.padding_token_id") == tokenizer.pad_token_id
    for key in ("bos", "eos", "unknown"):
        assert value_of(reader, f"tokenizer.ggml.{key}_token_id") == tokenizer.eos_token_id
    assert value_of(reader, "tokenizer.ggml.add_bos_token") is False


@needs_gguf
def test_an_untied_head_is_written_and_rows_that_q8_0_cannot_store_are_f16(folders, tmp_path, monkeypatch):
    import gguf

    tokenizer = AutoTokenizer.from_pretrained(folders("bpe"))
    model = make_model(vocab_size=400, tie_word_embeddings=False, intermediate_size=40)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_convert(monkeypatch, tmp_path / "model", tmp_path / "m.gguf", "--to=gguf", "--dtype=q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    head = gguf.dequantize(tensors["output.weight"].data, tensors["output.weight"].tensor_type)
    weight = model.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(head, weight, rtol=0, atol=np.abs(weight).max() / 250)
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_tokenizers_that_llama_cpp_does_not_have_are_refused_by_their_reason(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not")
    for tokenizer, said in (
        (read_char_tokenizer(path), "WordLevel"),
        (train_char_tokenizer(["one \u2581 two"]), r"U\+2581"),
        (train_char_tokenizer(["one\0two"]), r"U\+0000"),
    ):
        with pytest.raises(ValueError, match=said):
            read_vocabulary(tokenizer)
    bpe = train_bpe_tokenizer([TEXT], 300)
    bpe.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    with pytest.raises(ValueError, match="other ids"):
        read_vocabulary(bpe)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "m.gguf", "--to=gguf", "--dtype=f8"], "f16"),
        (["model", "new", "--dtype=f16"], "leave out --dtype"),
        (["model", "new", "--to=gguf"], ".gguf"),
        (["model", "there.gguf", "--to=gguf"], "there already"),
        (["model", "m.gguf", "--to=gguf", "--tokenizer=words"], "WordLevel"),
    ],
)
@needs_gguf
def test_wrong_input_is_one_line_and_writes_nothing(folders, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(folders("bpe"))
    Path("there.gguf").write_text("of somebody")
    read_char_tokenizer(Path("there.gguf")).save_pretrained("words")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()  # making a model shows a progress bar
    with pytest.raises(SystemExit) as exit:
        run_convert(monkeypatch, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_package_one_line_names_the_package(folders, tmp_path, monkeypatch, capsys):
    model = folders("char")
    capsys.readouterr()
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, model, tmp_path / "m.gguf", "--to=gguf")
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install gguf" in line and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The file, by llama.cpp


def run_llama_cpp(model, prompts, tokens):
    """What llama.cpp makes of each prompt: {"ids", "generated", "logprobs", "text"}."""
    request = {"folder": node_packages("node-llama-cpp"), "model": str(model), "context": 128}
    request |= {"prompts": prompts, "tokens": tokens}
    command = ["node", str(RUNNER)]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.strip("\n").split("\n")[-1])["answers"]


@needs_gguf
@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_and_continues_prompts_as_transformers_does(folders, tmp_path, monkeypatch, kind, dtype):
    run_convert(monkeypatch, folders(kind), tmp_path / "m.gguf", "--to=gguf", f"--dtype={dtype}")
    model, tokenizer = (auto.from_pretrained(folders(kind)) for auto in (AutoModelForCausalLM, AutoTokenizer))
    compare(run_llama_cpp(tmp_path / "m.gguf", PROMPTS, NEW), model, tokenizer)


def compare(answers, model, tokenizer):
    """Compare what llama.cpp made of PROMPTS with transformers: ids, greedy tokens, and their log-probabilities."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        start = inputs.input_ids.shape[1]
        assert answer["ids"] == inputs.input_ids[0].tolist()
        assert answer["text"] == prompt
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None)[0]
        assert answer["generated"] == ids[start:].tolist(), prompt
        logprobs = model(ids[None]).logits[0, start - 1 : -1, : len(tokenizer)].log_softmax(-1)
        expected = logprobs.gather(-1, ids[start:, None])[:, 0].tolist()
        assert answer["logprobs"] == pytest.approx(expected, abs=0.05)


@needs_gguf
@needs_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_of_every_text(folders, tmp_path, monkeypatch, kind):
    run_convert(monkeypatch, folders(kind), tmp_path / "m.gguf", "--to=gguf")
    tokenizer = AutoTokenizer.from_pretrained(folders(kind))
    texts = [text for text in HARD_TEXTS if "\u2581" not in text and "\0" not in text]
    for text, answer in zip(texts, run_llama_cpp(tmp_path / "m.gguf", texts, 0), strict=True):
        assert answer["ids"] == tokenizer(text, split_special_tokens=True).input_ids, text


@needs_gguf
@needs_llama_cpp
def test_llama_cpp_spells_a_space_that_no_text_had(tmp_path, monkeypatch):
    tokenizer = train_char_tokenizer(["abc"])
    model = make_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_convert(monkeypatch, tmp_path / "model", tmp_path / "m.gguf", "--to=gguf")
    (answer,) = run_llama_cpp(tmp_path / "m.gguf", ["a b\nc"], 0)
    assert answer["ids"] == tokenizer("a b\nc").input_ids and answer["text"] == "a b\nc"


@needs_gpt2
@needs_llama_cpp
def test_llama_cpps_own_converter_takes_the_gpt2_form(tmp_path, monkeypatch):
    # The npm package brings the source of llama.cpp as a bundle of git. The converter takes every MLP for a wide one.
    bundle = Path(node_packages("node-llama-cpp"), "node-llama-cpp", "llama", "gitRelease.bundle")
    subprocess.run(["git", "clone", "--quiet", bundle, tmp_path / "llama.cpp"], check=True, capture_output=True)
    save_model(tmp_path / "model", "gpt2")
    run_convert(monkeypatch, tmp_path / "model", tmp_path / "gpt2", "--to=gpt2")
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, script, tmp_path / "gpt2", "--outtype=f32", f"--outfile={tmp_path / 'm.gguf'}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    model, tokenizer = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    compare(run_llama_cpp(tmp_path / "m.gguf", PROMPTS, NEW), model, tokenizer)
