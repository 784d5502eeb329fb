"""ONNX files: what onnxruntime and transformers.js make of them."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from modeling_nanogpt import NanoGPTConfig, convert
from modeling_nanogpt.onnx_export import FILES, check_size
from modeling_nanogpt.sources import adopt_tokenizer
from support import PATIENCE
from support.models import make_model
from support.needs import node_packages
from support.texts import TEXT
from support.tiny_run import with_random_weights
from tokenization.vocabularies import train_bpe_tokenizer

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MISSING = [package for package in PACKAGES if find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
needs_transformers_js = pytest.mark.skipif(
    node_packages("@huggingface/transformers") is None,
    reason="NODE_MODULES names no folder with the package @huggingface/transformers",
)
KINDS = ("char", "bpe")
PROMPTS = ["to be", "or", "Ça 12", "not to"]  # of different lengths: as one batch, three of them are padded
NEW = 9  # tokens to generate; with the longest prompt, they fill the context of the char model but for one


@pytest.fixture(scope="module")
def sources(run, tmp_path_factory):
    """A folder for each kind of tokenizer, with a model of random weights; one of them has biases."""
    folder, tokenizer = tmp_path_factory.mktemp("bpe"), train_bpe_tokenizer([TEXT], 400)
    model = make_model(vocab_size=len(tokenizer) + 7, intermediate_size=96, bias=True, activation_function="gelu_new")
    adopt_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"char": with_random_weights(run, tmp_path_factory.mktemp("char") / "out"), "bpe": folder}


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """A function that converts one of these sources, once for each dtype, and says where the folder is."""
    made = {}

    def folder_of(kind, dtype="fp32"):
        if (kind, dtype) not in made:
            made[kind, dtype] = tmp_path_factory.mktemp(kind) / dtype
            with pytest.MonkeyPatch.context() as monkeypatch:
                run_convert(monkeypatch, sources[kind], made[kind, dtype], "--to=onnx", f"--dtype={dtype}")
        return made[kind, dtype]

    return folder_of


def run_convert(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
    convert.main(convert.parse_arguments())


def load(folder):
    """The model, the tokenizer, and how many tokens the tokenizer has."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(model=model, tokenizer=tokenizer, count=len(tokenizer))


class Session:
    """A session of onnxruntime that holds the cache between its calls."""

    def __init__(self, path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.cache = None

    def __call__(self, ids, mask=None):
        """The logits of ids (B, T); the mask (B, S) also covers what the cache holds."""
        if self.cache is None:
            empty = {name: each for name, each in self.inputs.items() if name.startswith("past_key_values.")}
            shapes = {name: [len(ids), each.shape[1], 0, each.shape[3]] for name, each in empty.items()}
            half = {name: "float16" in each.type for name, each in empty.items()}
            self.cache = {
                name: np.zeros(shape, np.float16 if half[name] else np.float32) for name, shape in shapes.items()
            }
        held = next(iter(self.cache.values())).shape[2]
        if mask is None:
            mask = np.ones((len(ids), held + ids.shape[1]), np.int64)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, held:]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.cache}
        answers = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        logits = answers.pop("logits")
        self.cache = {name.replace("present", "past_key_values"): value for name, value in answers.items()}
        return torch.from_numpy(logits)


def session_of(folder, dtype="fp32"):
    return Session(folder / "onnx" / FILES[dtype])


def ids_for(loaded, *shape):
    return np.random.default_rng(0).integers(loaded.count, size=shape)


@torch.no_grad()
def expected_logits(loaded, ids):
    """The model's logits without a cache, for the tokens that the tokenizer has."""
    return loaded.model(torch.from_numpy(ids)).logits[..., : loaded.count]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize("dtype", FILES)
def test_the_folder_is_a_stock_gpt2_with_its_network_in_one_file(exported, sources, dtype):
    folder, source = exported("bpe", dtype), load(sources["bpe"])
    assert [path.name for path in (folder / "onnx").iterdir()] == [FILES[dtype]]
    assert not [*folder.glob("*.py"), *folder.glob("*.safetensors")]
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is GPT2Config and config.architectures == ["GPT2LMHeadModel"]
    assert (config.vocab_size, config.n_inner) == (source.count, 96)
    assert config.to_dict()["transformers.js_config"] == {"dtype": dtype}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == source.tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == source.tokenizer(TEXT).input_ids


def test_the_axes_have_the_names_that_transformers_js_looks_for(exported):
    inputs = session_of(exported("bpe")).inputs
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"].shape == ["batch_size", "total_sequence_length"]
    names = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert list(inputs)[3:] == names
    for name in names:
        assert inputs[name].shape == ["batch_size", 2, "past_sequence_length", 16]


@pytest.mark.parametrize("dtype, kept", [("fp16", "FLOAT16"), ("q8", "UINT8")])
def test_a_smaller_dtype_holds_every_matrix_in_it(exported, dtype, kept):
    import onnx

    model = onnx.load(exported("bpe", dtype) / "onnx" / FILES[dtype])
    types = {onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer if len(each.dims) > 1}
    assert types == {kept}


# ---------------------------------------------------------------------------------------------------------------------
# onnxruntime


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_the_models_logits_for_any_batch_and_length(exported, sources, kind):
    loaded = load(sources[kind])
    for shape in [(1, 1), (3, loaded.model.config.block_size), (5, 7)]:
        ids = ids_for(loaded, *shape)
        logits = session_of(exported(kind))(ids)
        assert_close(logits, expected_logits(loaded, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing(exported, sources, kind):
    loaded, session = load(sources[kind]), session_of(exported(kind))
    ids = ids_for(loaded, 3, 16)
    steps = [ids[:, :5], ids[:, 5:9], *np.split(ids[:, 9:], 7, axis=1)]  # a prompt, several tokens, single tokens
    logits = torch.cat([session(step) for step in steps], dim=1)
    assert_close(logits, expected_logits(loaded, ids), atol=1e-4, rtol=0)


def test_a_row_padded_on_the_left_has_the_logits_of_its_text_alone(exported, sources):
    loaded, session = load(sources["bpe"]), session_of(exported("bpe"))
    ids, padding = ids_for(loaded, 3, 12), (0, 6, 3)
    mask = np.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    logits = torch.cat([session(ids[:, :8], mask[:, :8]), session(ids[:, 8:], mask)], dim=1)
    for row, count in enumerate(padding):
        expected = expected_logits(loaded, ids[row : row + 1, count:])
        assert_close(logits[row : row + 1, count:], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, bound", [("fp16", 0.03), ("q8", 0.25)])
def test_a_smaller_dtype_stays_close(exported, sources, dtype, bound):
    loaded = load(sources["bpe"])
    ids = ids_for(loaded, 3, 16)
    expected = expected_logits(loaded, ids)
    session = session_of(exported("bpe", dtype), dtype)
    logits = torch.cat([session(ids[:, :9]), session(ids[:, 9:])], dim=1)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < bound * expected.std()


# ---------------------------------------------------------------------------------------------------------------------
# transformers.js


@needs_transformers_js
def test_transformers_js_continues_a_batch_as_transformers_does_each_text(exported, sources):
    chosen = [*((kind, "fp32") for kind in KINDS), ("bpe", "fp16"), ("bpe", "q8")]
    request = {
        "folder": node_packages("@huggingface/transformers"),
        "models": [{"path": str(exported(*each)), "prompts": PROMPTS} for each in chosen],
        "tokens": NEW,
    }
    script = Path(__file__).parent / "support" / "run_onnx.mjs"
    done = subprocess.run(
        ["node", script], input=json.dumps(request), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    for (kind, dtype), answer in zip(chosen, json.loads(done.stdout), strict=True):
        loaded, same = load(sources[kind]), 0
        for prompt, text in zip(PROMPTS, answer["texts"], strict=True):
            inputs = loaded.tokenizer(prompt, return_tensors="pt")
            ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0]
            same += text == loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert same >= {"fp32": 4, "fp16": 4, "q8": 1}[dtype], (kind, dtype, answer)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_model_that_an_onnx_file_cannot_hold_is_refused(sources):
    check_size(NanoGPTConfig(vocab_size=50257, block_size=1024, n_layer=24, n_head=16, n_embd=1024))
    with pytest.raises(ValueError, match="less than 2 GiB, but 77.,...,... parameters take 2.9 GiB"):
        check_size(NanoGPTConfig(vocab_size=50257, block_size=1024, n_layer=36, n_head=20, n_embd=1280))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dtype=f16"], "--dtype=f16, but for --to=onnx it must be one of fp32, fp16, q8"),
        (["--cdn"], "--node_modules and --cdn are for --to=web: leave them out for --to=onnx"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(sources, tmp_path, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_convert(monkeypatch, sources["char"], tmp_path / "out", "--to=onnx", *flags)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
