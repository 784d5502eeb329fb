"""What a checkpoint holds is read, not assumed, whichever command reads it: kept exactly, or refused in one line.

Each command is a process of its own, which sees nothing but files.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from support.checkpoints import write_ckpt
from support.commands import command
from support.texts import write_words
from support.tiny_run import TINY, write_recipe
from tokenization.vocabularies import named_tokenizer

LETTERS = "\n abcdefghijklmnopqrstuvwxyz.,"
SHAPE = {"vocab_size": len(LETTERS), "n_layer": 2, "n_head": 2, "n_embd": 32}
IDS = torch.randint(len(LETTERS), (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stirred(model):
    """The model with every weight moved off its initial value, the head and the embedding by different amounts."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours(**changes) -> NanoGPTForCausalLM:
    return stirred(NanoGPTForCausalLM(NanoGPTConfig(**SHAPE | {"block_size": 16, "bias": True} | changes)))


def gpt2(**changes) -> GPT2LMHeadModel:
    ends = {"bos_token_id": None, "eos_token_id": None}
    return stirred(GPT2LMHeadModel(GPT2Config(**SHAPE | {"n_positions": 16} | ends | changes)))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of checkpoints. Each function writes one into a folder and returns the model that it is.


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def plain_ckpt(folder):
    model = ours()
    write_ckpt(folder, model)
    return model


def untied_ckpt(folder):
    model = ours(tie_word_embeddings=False)
    write_ckpt(folder, model)
    return model


def copied_head_ckpt(folder):
    model = ours()
    write_ckpt(folder, model, weights={name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model


def ckpt_of_january_2023(folder):
    """No flag `bias` yet: every model had biases, masks among its weights, and the tanh form of GELU."""
    model = ours(activation_function="gelu_new")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    write_ckpt(folder, model, without=("bias",), weights=model.state_dict() | masks)
    return model


def ckpt_without_biases_and_without_the_flag(folder):
    model = ours(bias=False)
    write_ckpt(folder, model, without=("bias", "dropout"))
    return model


def ckpt_of_another_width(folder):
    model = ours(intermediate_size=40)
    write_ckpt(folder, model)
    return model


def ckpt_of_an_old_torch(folder):
    model = ours()
    write_ckpt(folder, model, legacy=True)
    return model


def ckpt_with_numpy_numbers(folder):
    model = ours()
    numbers = {"n_head": np.int64(2), "dropout": np.float32(0), "bias": np.bool_(True)}
    write_ckpt(folder, model, args=numbers, best_val_loss=np.float64(1.5), iter_num=np.int64(7))
    return model


def ckpt_with_switches_of_a_fork_that_are_off(folder):
    model = ours()
    write_ckpt(folder, model, args={"rope": False, "qk_norm": None})
    return model


def ckpt_of_two_precisions(folder):
    model = ours()
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    weights = {name: tensor if "ln_" in name else tensor.bfloat16() for name, tensor in model.state_dict().items()}
    write_ckpt(folder, model, weights=weights)
    return model


def untied_folder(folder):
    model = ours(tie_word_embeddings=False)
    model.save_pretrained(folder)
    return model


def untied_folder_that_says_tied(folder):
    model = untied_folder(folder)
    change_config(folder, tie_word_embeddings=True)
    return model


def untied_gpt2_that_says_tied(folder):
    model = gpt2(tie_word_embeddings=False)
    model.save_pretrained(folder)
    change_config(folder, tie_word_embeddings=True)
    return model


KINDS = {
    function.__name__: function
    for function in (
        *(plain_ckpt, untied_ckpt, copied_head_ckpt, ckpt_of_january_2023, ckpt_without_biases_and_without_the_flag),
        *(ckpt_of_another_width, ckpt_of_an_old_torch, ckpt_with_numpy_numbers, ckpt_of_two_precisions),
        *(ckpt_with_switches_of_a_fork_that_are_off, untied_folder, untied_folder_that_says_tied),
        untied_gpt2_that_says_tied,
    )
}
NOT_FOR_NANOGPT = {  # what nanoGPT itself cannot compute, and what the refusal names
    "untied_ckpt": "tie_word_embeddings",
    "untied_folder": "tie_word_embeddings",
    "untied_folder_that_says_tied": "tie_word_embeddings",
    "untied_gpt2_that_says_tied": "activation_function",
    "ckpt_of_january_2023": "activation_function",
    "ckpt_of_another_width": "intermediate_size",
}


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def convert(folder: Path, to: str) -> tuple[int, list[str]]:
    tokenizer = [] if to == "ckpt" else ["--tokenizer", folder / "tokens"]
    return command(folder, "modeling_nanogpt.convert", folder / "source", folder / "result", "--to", to, *tokenizer)


def train(folder: Path) -> tuple[int, list[str]]:
    """Two steps at a learning rate that changes nothing."""
    write_words(folder / "words.txt")
    shape = dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd"), "")
    names = {"corpus": folder / "words.txt", "data_dir": folder / "data", "out_dir": folder / "result"}
    start = {"tokenizer": folder / "tokens", "init_from": folder / "source"}
    still = {"learning_rate": 0, "weight_decay": 0, "max_iters": 2, "eval_interval": 2}
    recipe = write_recipe(folder / "recipe.yaml", **TINY | shape | names | start | still)
    return command(folder, "train_accelerate", recipe)


def sample(folder: Path) -> tuple[int, list[str]]:
    return command(folder, "modeling_nanogpt.sample", folder / "source", "--prompt", "to be", "--max_new_tokens", 2)


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer, and an empty folder for the source."""
    (tmp_path / "letters.txt").write_text(LETTERS)
    named_tokenizer(str(tmp_path / "letters.txt")).save_pretrained(tmp_path / "tokens")
    (tmp_path / "source").mkdir()
    return tmp_path


@pytest.mark.parametrize("to", ["nanogpt", "gpt2", "ckpt", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_keeps_the_logits_or_refuses(folder, kind, to):
    expected = logits(KINDS[kind](folder / "source"))
    if not list((folder / "source").glob("ckpt.pt")):
        named_tokenizer(str(folder / "letters.txt")).save_pretrained(folder / "source")
    status, said = train(folder) if to == "training" else convert(folder, to)
    if to == "ckpt" and kind in NOT_FOR_NANOGPT:
        assert status == 2 and NOT_FOR_NANOGPT[kind] in said[-1]
        assert not (folder / "result").exists()
        return
    assert status == 0, said
    if to == "ckpt":  # nanoGPT reads its weights with strict=True, and ties the head by itself
        saved = torch.load(folder / "result" / "ckpt.pt", weights_only=True)
        result = ours(**saved["model_args"])
        result.load_state_dict(saved["model"], strict=True)
        assert torch.equal(saved["model"]["lm_head.weight"], saved["model"]["transformer.wte.weight"])
    else:
        result = AutoModelForCausalLM.from_pretrained(folder / "result", dtype=torch.float32)
        head, embedding = result.get_output_embeddings().weight, result.get_input_embeddings().weight
        assert result.config.tie_word_embeddings == (head is embedding) == ("untied" not in kind)
    torch.testing.assert_close(logits(result), expected, atol=2e-5, rtol=1e-5)


def test_an_untied_head_is_trained_and_comes_back_in_a_resumed_run(folder):
    untied_ckpt(folder / "source")
    status, said = train(folder)
    assert status == 0, said
    recipe = (folder / "recipe.yaml").read_text().replace("learning_rate: 0", "learning_rate: 1e-2")
    for max_iters, init_from in ((2, folder / "source"), (4, "resume")):
        lines = [line for line in recipe.splitlines() if not line.startswith(("max_iters", "init_from", "out_dir"))]
        lines += [
            f"max_iters: {max_iters}",
            "lr_decay_iters: 4",
            f"init_from: {init_from}",
            f"out_dir: {folder / 'b'}",
        ]
        (folder / "b.yaml").write_text("\n".join(lines))
        status, said = command(folder, "train_accelerate", folder / "b.yaml")
        assert status == 0, said
    first, last = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("result", "b"))
    for model in (first, last):
        assert not model.config.tie_word_embeddings
    assert (first.lm_head.weight - last.lm_head.weight).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be kept


class Code:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def save_with(folder: Path, model=None, **config) -> None:
    """A model in a folder, with a configuration that says something else."""
    (model or ours()).save_pretrained(folder)
    change_config(folder, **config)


def save_bin(folder: Path, content: object) -> None:
    ours().config.save_pretrained(folder)
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")


FOLDERS = {  # of transformers' kind: what is wrong, and what the one line says
    "a layer is missing": (lambda folder: save_with(folder, n_layer=3), "transformer.h.2"),
    "a layer is left over": (lambda folder: save_with(folder, n_layer=1), "transformer.h.1"),
    "biases are left over": (lambda folder: save_with(folder, bias=False), "bias"),
    "biases are missing": (lambda folder: save_with(folder, ours(bias=False), bias=True), "bias"),
    "another shape": (lambda folder: save_with(folder, block_size=8), "transformer.wpe.weight"),
    "no head": (lambda folder: save_with(folder, tie_word_embeddings=False), "lm_head.weight"),
    "code": (lambda folder: save_bin(folder, {"x": Code(folder / "ran")}), "code, which is not run"),
    "no pickle": (lambda folder: save_bin(folder, b"nonsense"), "damaged"),
    "an empty file": (lambda folder: save_bin(folder, b""), "EOFError"),
    "a long name": (lambda folder: save_with(folder, activation_function="x" * 5000), "activation_function"),
}
CKPTS = {  # nanoGPT's
    "activation": (lambda folder: write_ckpt(folder, ours(), args={"activation": "relu2"}), "activation='relu2'"),
    "rope": (lambda folder: write_ckpt(folder, ours(), args={"rope": True, "mup": False}), "rope=True"),
    "a long value": (lambda folder: write_ckpt(folder, ours(), args={"rope": "x" * 5000}), "rope"),
    "a vocabulary": (lambda folder: write_ckpt(folder, ours(), args={"vocab_size": 50257}), "vocab_size=50257"),
    "biases": (lambda folder: write_ckpt(folder, ours(bias=False), args={"bias": True}), "bias=True"),
    "no heads": (lambda folder: write_ckpt(folder, ours(), without=("n_head",)), "n_head"),
    "heads of text": (lambda folder: write_ckpt(folder, ours(), args={"n_head": "x" * 5000}), "n_head"),
    "no weights": (lambda folder: write_ckpt(folder, ours(), weights={"a": 1}), "model"),
    "a tensor": (lambda folder: write_ckpt(folder, ours(), weights={"a": torch.ones(2)}), "transformer.wte.weight"),
    "a vector": (
        lambda folder: write_ckpt(folder, ours(), weights=ours().state_dict() | {"lm_head.x": torch.ones(2)}),
        "lm_head.x",
    ),
    "code": (lambda folder: write_ckpt(folder, ours(), config=Code(folder / "ran")), "code in it is not run"),
}
GPT2S = {
    "dropouts": (lambda folder: gpt2(attn_pdrop=0.2).save_pretrained(folder), "attn_pdrop=0.2"),
}
REFUSED = {
    f"{kind} {wrong} {door.__name__}": (door, *kinds[wrong])
    for kind, kinds, doors in (
        ("folder", FOLDERS, (train, convert, sample)),
        ("ckpt", CKPTS, (train, convert)),
        ("gpt2", GPT2S, (train, convert)),
    )
    for wrong in kinds
    for door in doors
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("modeling_nanogpt.sample", ["LONG"]),
        ("modeling_nanogpt.convert", ["LONG", "new"]),
        ("modeling_nanogpt.convert", ["source", "LONG"]),
        ("modeling_nanogpt.convert", ["source", "new", "--tokenizer=LONG"]),
        ("train_accelerate", ["--init_from=LONG", "--data_dir=data", "--out_dir=new"]),
        ("tokenization.prepare", ["--tokenizer=LONG", "--data_dir=new"]),
    ],
)
@pytest.mark.parametrize("long", ["x" * 5000, "x/" * 3000 + "y"], ids=["a word", "a path"])
def test_a_name_that_is_too_long_for_a_file_is_one_line(folder, name, arguments, long, monkeypatch):
    monkeypatch.chdir(folder)
    plain_ckpt(folder / "source")
    (folder / "words.txt").write_text("to be or not to be")
    corpus = [] if "convert" in name or "sample" in name else ["--corpus=words.txt"]
    status, said = command(folder, name, *(argument.replace("LONG", long) for argument in arguments), *corpus)
    assert status in (1, 2) and ": error: " in said[-1] and not any(line.startswith("Traceback") for line in said)
    assert not (folder / "new").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line(folder, case):
    door, write, expected = REFUSED[case]
    source = folder / "source"
    write(source)
    if (source / "config.json").exists():
        named_tokenizer(str(folder / "letters.txt")).save_pretrained(source)
    status, said = door(folder, "nanogpt") if door is convert else door(folder)
    said = [line for line in said if not line.endswith("state is left out")]
    errors = [line for line in said if ": error: " in line]
    assert status in (1, 2) and len(errors) == 1 and errors[0] == said[-1], said
    assert expected in errors[0] and len(errors[0]) < 1000
    assert not any(line.startswith("Traceback") for line in said)
    assert not (source / "ran").exists() and not (folder / "result").exists()
