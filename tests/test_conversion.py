"""Checkpoints of nanoGPT and GPT-2, both ways: equal logits, nothing lost, and wrong input refused in one line."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2Config, GPT2LMHeadModel, GPT2Model

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, conversion, convert
from modeling_nanogpt.conversion import unwrap, weights_from_gpt2, weights_to_gpt2
from modeling_nanogpt.sources import build_model, open_source
from support.references import exact_gelu, make_counterpart, reference_logits
from support.tiny_run import TINY, train
from tokenization.arguments import DataArguments
from tokenization.prepare import prepare

IDS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter moved off its initial value: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours(**changes) -> NanoGPTForCausalLM:
    shape = {"vocab_size": 384, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return stirred(NanoGPTForCausalLM(NanoGPTConfig(**shape | changes)))


def gpt2(**changes) -> GPT2LMHeadModel:
    shape = {"vocab_size": 384, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return stirred(GPT2LMHeadModel(GPT2Config(**shape | ends | changes)))


def load(path: Path) -> NanoGPTForCausalLM:
    source = open_source(str(path))
    return source.model(source.config)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def write_ckpt(path: Path, source: NanoGPTForCausalLM, prefix: str = "", **more) -> Path:
    """A file as nanoGPT's train.py saves it."""
    config = source.config
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in source.state_dict().items()},
        "optimizer": torch.optim.AdamW(source.parameters()).state_dict(),
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint | more, path)
    return path


def make_tokenizer(folder: Path, text: str, kind: str = "char") -> str:
    """A data_dir in this folder, which holds the tokenizer."""
    corpus = folder / "corpus.txt"
    corpus.write_text(text)
    arguments = DataArguments(corpus=str(corpus), tokenizer=kind, data_dir=str(folder / "data"), val_fraction=0.5)
    return str(prepare(arguments).folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A folder with a tokenizer of 322 tokens, fewer than the models here have."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "".join(chr(48 + i) for i in range(65)))


def run_convert(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
    convert.main(convert.parse_arguments())


# --- nanoGPT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bias", [False, True])
def test_a_nanogpt_checkpoint_has_the_logits_of_the_definition(tmp_path, bias, prefix):
    model = stirred(make_counterpart(bias))
    path = write_ckpt(tmp_path / "ckpt.pt", model, prefix)
    loaded = load(path).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    expected = reference_logits(weights, IDS, exact_gelu)
    torch.testing.assert_close(logits(loaded), expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_is_read_once_for_its_shape_and_its_weights(tmp_path, monkeypatch):
    model = ours()
    path = write_ckpt(tmp_path / "ckpt.pt", model)
    read, reads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **options: reads.append(path) or read(path, **options))
    for name in (path, tmp_path):  # the file, or the folder that it is in
        source = open_source(str(name))
        assert source.config.n_embd == 32 and not source.carries_tokenizer
        assert torch.equal(logits(source.model(source.config).eval()), logits(model))
    assert reads == [path, path]


def test_old_mask_buffers_are_left_out(tmp_path):
    model = ours(bias=True)
    buffers = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    path = write_ckpt(tmp_path / "ckpt.pt", model, model=model.state_dict() | buffers)
    weights = open_source(str(path)).weights()
    assert set(weights) == set(model.state_dict())
    assert "transformer.h.0.attn.c_attn.bias" in weights


def test_there_and_back_to_nanogpt_is_bit_exact(tmp_path, monkeypatch, tokenizer):
    model = ours()
    run_convert(monkeypatch, write_ckpt(tmp_path / "a" / "ckpt.pt", model), tmp_path / "b", "--tokenizer", tokenizer)
    run_convert(monkeypatch, tmp_path / "b", tmp_path / "c", "--to", "ckpt")
    back = torch.load(tmp_path / "c" / "ckpt.pt", weights_only=True)
    assert back["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert back["model_args"] == torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)["model_args"]
    assert {"iter_num", "best_val_loss", "config"} <= back.keys()


def test_the_optimizer_of_a_written_checkpoint_loads_as_nanogpt_loads_it(tmp_path, monkeypatch):
    model = ours(bias=True)
    model.save_pretrained(tmp_path / "a")
    run_convert(monkeypatch, tmp_path / "a", tmp_path / "b", "--to", "ckpt")
    parameters = list(model.parameters())  # two groups in the order of the parameters, matrices first
    groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3)
    optimizer.load_state_dict(torch.load(tmp_path / "b" / "ckpt.pt", weights_only=True)["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_function": "gelu_new"}, "exact GELU"),
        ({"intermediate_size": 40}, "4 * n_embd"),
        ({"tie_word_embeddings": False}, "ties its head"),
    ],
)
def test_what_nanogpt_cannot_compute_is_not_written_for_it(tmp_path, monkeypatch, capsys, changes, said):
    ours(**changes).save_pretrained(tmp_path / "a")
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, tmp_path / "a", tmp_path / "b", "--to", "ckpt")
    assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "bare"), [("a", "a"), ("module.a", "a"), ("_orig_mod.module._orig_mod.a.module.b", "a.module.b")]
)
def test_wrappers_are_taken_off_the_front_only(name, bare):
    assert unwrap(name) == bare


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"activation_function": "gelu"}, {"n_inner": 40}, {"tie_word_embeddings": False}]
)
def test_a_gpt2_has_the_same_logits_here(tmp_path, changes):
    model = gpt2(**changes)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_a_stock_gpt2_has_our_logits(tmp_path, monkeypatch, tokenizer, bias, activation):
    model = ours(bias=bias, activation_function=activation)
    model.save_pretrained(tmp_path / "a")
    run_convert(monkeypatch, tmp_path / "a", tmp_path / "b", "--to", "gpt2", "--tokenizer", tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(stock) is GPT2LMHeadModel and stock.config.vocab_size == 322
    assert json.loads((tmp_path / "b" / "config.json").read_text())["n_ctx"] == 16  # llama.cpp's converter reads it
    torch.testing.assert_close(logits(stock), logits(model)[..., :322], atol=1e-5, rtol=1e-5)
    biases = [parameter for name, parameter in stock.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    if not bias:
        assert all(not parameter.any() for parameter in biases)


@pytest.mark.parametrize(
    "forgotten", ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
)
def test_each_of_the_four_matrices_is_transposed(monkeypatch, forgotten):
    # a square matrix loads without an error even if it is not transposed
    model = gpt2(n_inner=32, n_embd=32)  # the matrices of the MLP are square too, so only the logits can tell
    kept = tuple(name for name in conversion.TRANSPOSED if name != forgotten)
    config = conversion.config_from_gpt2(model.config)
    right = weights_from_gpt2(model.state_dict())
    torch.testing.assert_close(
        logits(build_model(NanoGPTForCausalLM, config, right, torch.float32).eval()),
        logits(model),
        atol=1e-5,
        rtol=1e-5,
    )
    monkeypatch.setattr(conversion, "TRANSPOSED", kept)
    wrong = weights_from_gpt2(model.state_dict())
    if forgotten == "attn.c_attn.weight":
        with pytest.raises(ValueError, match="do not fit"):
            build_model(NanoGPTForCausalLM, config, wrong, torch.float32)
    else:
        loaded = build_model(NanoGPTForCausalLM, config, wrong, torch.float32).eval()
        assert (logits(loaded) - logits(model)).abs().max() > 1e-2


def test_a_bare_gpt2_with_mask_buffers_is_read_by_its_own_names():
    bare = stirred(GPT2Model(gpt2().config))
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    weights = weights_from_gpt2(bare.state_dict() | buffers)
    assert set(weights) == {name for name in ours(bias=True).state_dict() if name != "lm_head.weight"}


def test_a_saved_bare_gpt2_loads(tmp_path):
    whole = gpt2()
    whole.transformer.save_pretrained(tmp_path)
    loaded = load(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(whole), atol=1e-5, rtol=1e-5)


def test_there_and_back_to_gpt2_is_bit_exact():
    weights = ours(bias=True).state_dict()
    back = weights_from_gpt2(weights_to_gpt2(weights, vocab_size=384))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    stock = gpt2().state_dict()
    there = weights_to_gpt2(weights_from_gpt2(stock), vocab_size=384)
    assert there.keys() == stock.keys() and all(torch.equal(there[name], stock[name]) for name in stock)


@pytest.mark.parametrize(
    "changes",
    [{"activation_function": "relu"}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}],
)
def test_a_gpt2_that_is_not_plain_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        conversion.config_from_gpt2(GPT2Config(**changes))


def test_weights_keep_their_dtype(tmp_path, monkeypatch, tokenizer):
    ours().bfloat16().save_pretrained(tmp_path / "a")
    for to in ("gpt2", "nanogpt"):
        run_convert(monkeypatch, tmp_path / "a", tmp_path / to, "--to", to, "--tokenizer", tokenizer)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / to).dtype == torch.bfloat16


def test_an_export_needs_no_code_of_ours_and_says_the_same(run, tmp_path, monkeypatch):
    run_convert(monkeypatch, run.out_dir, tmp_path / "stock", "--to", "gpt2")
    assert not list((tmp_path / "stock").glob("*.py"))
    model, tokenizer = (auto.from_pretrained(run.out_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer("to be", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=10, do_sample=False)[0])
    child = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("modeling_nanogpt", "tokenization", "train_accelerate"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer("to be", return_tensors="pt")
print(json.dumps(tokenizer.decode(model.generate(**inputs, max_new_tokens=10, do_sample=False)[0])))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", child, str(tmp_path / "stock")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_characters_of_a_text_file_are_numbered_as_nanogpt_does(tmp_path, monkeypatch):
    text = "to be, or not\nto be"
    path = write_ckpt(tmp_path / "ckpt.pt", ours(vocab_size=len(set(text))))
    folder = make_tokenizer(tmp_path, text, kind=str(tmp_path / "corpus.txt"))  # as --help says
    run_convert(monkeypatch, path, tmp_path / "b", "--tokenizer", folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer(text).input_ids == [numbers[character] for character in text]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR")
def test_the_tokenizer_gpt2_is_tiktokens(tmp_path, monkeypatch):
    path = write_ckpt(tmp_path / "ckpt.pt", ours(vocab_size=50304))
    run_convert(monkeypatch, path, tmp_path / "b", "--tokenizer", make_tokenizer(tmp_path, "to be or not", "gpt2"))
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "b"), tiktoken.get_encoding("gpt2")
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == encoding.eot_token == 50256
    draw = random.Random(0)
    texts = ["Hello world", "  def f(x):\n\treturn x\r\n", Path(__file__).read_text()]
    texts += [
        "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xD800)))) for _ in range(99))
        for _ in range(500)
    ]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == encoding.encode_ordinary(text)
        assert tokenizer.decode(encoding.encode_ordinary(text)) == text


def test_ids_beyond_the_tokenizer_are_never_generated(tmp_path, monkeypatch, tokenizer):
    run_convert(monkeypatch, write_ckpt(tmp_path / "ckpt.pt", ours()), tmp_path / "b", "--tokenizer", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert (model.config.pad_token_id, model.config.eos_token_id) == (320, 321)
    assert model.generation_config.suppress_tokens == [320, *range(322, 384)]


@pytest.mark.parametrize("to", ["nanogpt", "gpt2"])
def test_the_end_of_text_serves_for_beginning_and_padding_if_the_tokenizer_has_neither(
    tmp_path, monkeypatch, tokenizer, to
):
    bare = AutoTokenizer.from_pretrained(tokenizer)
    bare.bos_token = bare.pad_token = None
    bare.save_pretrained(tmp_path / "tokenizer")
    ours().save_pretrained(tmp_path / "a")
    run_convert(monkeypatch, tmp_path / "a", tmp_path / "b", "--to", to, "--tokenizer", tmp_path / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for holder in (model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (321, 321, 321)
    assert AutoTokenizer.from_pretrained(tmp_path / "b").model_max_length == 16


# --- training from them ----------------------------------------------------------------------------------------------


def prepared(run, **flags) -> dict:
    """Flags for a run on the data of another run."""
    shape = dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd"))
    data = {"corpus": run.data_dir.parent / "corpus.txt", "data_dir": run.data_dir}
    return {key: "" if value is None else value for key, value in (shape | data | flags).items()}


@pytest.mark.parametrize("to", ["gpt2", "ckpt"])
def test_training_goes_on_from_gpt2_and_from_nanogpt(run, tmp_path, monkeypatch, to):
    run_convert(monkeypatch, run.out_dir, tmp_path / "other", "--to", to)
    more = train(tmp_path, **prepared(run, init_from=tmp_path / "other", max_iters=2))
    assert more.val_losses[0] == pytest.approx(run.val_losses[-1], abs=2e-2)  # the vocabulary is no longer padded
    assert AutoModelForCausalLM.from_pretrained(more.out_dir).config.bias == (to == "gpt2")


def test_a_smaller_block_size_crops_the_positions(run, tmp_path):
    more = train(tmp_path, **prepared(run, init_from=run.out_dir, block_size=8, max_iters=1, learning_rate=0))
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (more.out_dir, run.out_dir))
    assert model.config.block_size == 8 and TINY["block_size"] == 16
    assert torch.equal(model.transformer.wpe.weight, before.transformer.wpe.weight[:8])


# --- wrong input -----------------------------------------------------------------------------------------------------


class Code:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def inputs(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no checkpoint")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "ckpt.pt").write_bytes(write_ckpt(tmp_path / "good" / "ckpt.pt", ours()).read_bytes()[:5000])
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": {}}))
    torch.save({"model": Code(tmp_path / "ran"), "model_args": {}}, tmp_path / "code.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save({"model": {}, "model_args": {"n_layer": 2}}, tmp_path / "args.pt")
    write_ckpt(tmp_path / "part.pt", ours(), model={"transformer.wte.weight": torch.zeros(384, 32)})
    write_ckpt(tmp_path / "small.pt", ours(vocab_size=65))
    BertConfig().save_pretrained(tmp_path / "bert")
    ours().save_pretrained(tmp_path / "untokenized")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "new"], "nowhere"),
        (["empty", "new"], "empty"),
        (["text.txt", "new"], "text.txt"),
        (["cut", "new", "--tokenizer=TOKENIZER"], "cut"),
        (["plain.pt", "new", "--tokenizer=TOKENIZER"], "plain.pt"),
        (["code.pt", "new", "--tokenizer=TOKENIZER"], "code in it is not run"),
        (["other.pt", "new", "--tokenizer=TOKENIZER"], "model_args"),
        (["args.pt", "new", "--tokenizer=TOKENIZER"], "args.pt"),
        (["part.pt", "new", "--tokenizer=TOKENIZER"], "transformer.wpe.weight"),
        (["bert", "new"], "bert"),
        (["untokenized", "new"], "--tokenizer"),
        (["good", "new"], "--tokenizer"),
        (["good", "new"], "python -m tokenization.prepare"),
        (["good", "new", "--tokenizer=empty"], "empty"),
        (["good", "new", "--tokenizer=text.txt"], "python -m tokenization.prepare"),
        (["small.pt", "new", "--tokenizer=TOKENIZER"], "322 tokens"),
        (["good", "bert", "--tokenizer=TOKENIZER"], "bert"),
        (["good", "text.txt", "--tokenizer=TOKENIZER"], "text.txt"),
        (["good", "text.txt/new", "--tokenizer=TOKENIZER"], "cannot be written"),
        (["good", "new", "--to=gguf"], "gguf"),
        (["good", "new", "--too=gpt2"], "--too"),
        (["good"], "DESTINATION"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(inputs, monkeypatch, capsys, tokenizer, arguments, said):
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        run_convert(monkeypatch, *(argument.replace("TOKENIZER", tokenizer) for argument in arguments))
    assert exit.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("state is left out")]
    assert len(lines) == 1 and said in lines[0]
    assert sorted(inputs.rglob("*")) == before  # the code in code.pt has not run either
