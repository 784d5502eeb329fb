"""A saved folder is a complete transformers model: another process loads it without this project."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import modeling_nanogpt
from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel
from support import PATIENCE

TEXT = "to be or not to be"
AUTO_MAP = {
    "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
    "AutoModel": "modeling_nanogpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nanogpt.NanoGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nanogpt.NanoGPTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_nanogpt.NanoGPTForQuestionAnswering",
}

# Arguments: the folder to load, the folder to save again to, the file for what was seen.
VISITOR = """
import importlib, json, sys

PROJECT = ("modeling_nanogpt", "tokenization", "train_accelerate", "hub_configs")


class Blocker:
    # The copies that transformers makes are transformers_modules.<folder>.modeling_nanogpt, and stay importable.
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)


sys.meta_path.insert(0, Blocker())
for name in PROJECT:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported: this process would show nothing")

import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers import pipeline

folder, again, report = sys.argv[1:]
text = json.loads(sys.stdin.read())
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
kinds = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
autos = [getattr(transformers, f"AutoModelFor{kind}") for kind in kinds]
heads = [auto.from_pretrained(folder, trust_remote_code=True) for auto in autos]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
generator = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
inputs = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits, hidden = model(**inputs).logits, base(**inputs).last_hidden_state
generated = generator(text, do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
arguments = TrainingArguments(again, label_smoothing_factor=0.2, use_cpu=True, report_to="none")
with torch.no_grad():
    smoothed = Trainer(model, arguments).compute_loss(model, dict(inputs) | {"labels": inputs["input_ids"]})

model.save_pretrained(again)
tokenizer.save_pretrained(again)
base.save_pretrained(again + "-base")
heads[0].save_pretrained(again + "-head")
with open(report, "w") as file:
    json.dump(
        {
            "classes": [
                f"{type(x).__module__} {type(x).__name__}" for x in (config, base, model, generator.model, *heads)
            ],
            "bases_of_heads": [head.transformer(**inputs).last_hidden_state.tolist() for head in heads],
            "tokenizer_is_fast": tokenizer.is_fast,
            "tied": model.lm_head.weight is model.transformer.wte.weight,
            "ids": inputs["input_ids"].tolist(),
            "logits": logits.tolist(),
            "hidden": hidden.tolist(),
            "generated": generated,
            "smoothed": smoothed.item(),
        },
        file,
    )
"""


def make_tokenizer():
    """A character-level fast tokenizer, which needs no code of its own."""
    vocab = {character: index for index, character in enumerate(sorted(set(TEXT)) + ["?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model and its tokenizer, in a folder whose name cannot be a module's, and their results for a text."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = NanoGPTConfig(
        vocab_size=len(tokenizer), block_size=64, n_layer=2, n_head=2, n_embd=32, bias=True, initializer_range=0.3
    )
    model = NanoGPTForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("models") / "my.model-v1.0"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, len(TEXT) :]
        return SimpleNamespace(
            folder=folder,
            model=model,
            ids=inputs["input_ids"],
            logits=model(**inputs).logits,
            hidden=model.transformer(**inputs).last_hidden_state,
            generated=tokenizer.decode(generated),
        )


def visit(folder, tmp_path):
    """Load the folder in a new process, with an empty folder and cache, without the network and this project."""
    again, report, cwd = tmp_path / "my.model-v1.1", tmp_path / "report.json", tmp_path / "empty"
    cwd.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "visitor.py"
    script.write_text(VISITOR)
    process = subprocess.run(
        [sys.executable, str(script), str(folder), str(again), str(report)],
        input=json.dumps(TEXT),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    others = [Path(f"{again}-{name}") for name in ("base", "head")]
    return SimpleNamespace(again=again, others=others, **json.loads(report.read_text()))


@pytest.fixture(scope="module")
def first(original, tmp_path_factory):
    return visit(original.folder, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    return visit(first.again, tmp_path_factory.mktemp("second"))


@pytest.fixture(params=["first", "second"])
def visitor(request):
    """The process that loaded the original folder, and a second one that loaded what the first had saved again."""
    return request.getfixturevalue(request.param)


def test_folder_holds_the_code_and_names_every_auto_class(original):
    names = {path.name for path in original.folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert {name for name in names if name.endswith(".py")} == {"configuration_nanogpt.py", "modeling_nanogpt.py"}
    assert json.loads((original.folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_base_model_alone_names_every_auto_class_too(original, tmp_path):
    original.model.transformer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_nanogpt.py", "modeling_nanogpt.py"}


def test_another_process_uses_the_classes_in_the_folder(visitor):
    modules, names = zip(*(each.split() for each in visitor.classes), strict=True)
    heads = [AUTO_MAP[auto].split(".")[1] for auto in list(AUTO_MAP)[3:]]
    assert names == ("NanoGPTConfig", "NanoGPTModel", "NanoGPTForCausalLM", "NanoGPTForCausalLM", *heads)
    assert all(module.startswith("transformers_modules.") for module in modules), modules


def test_another_process_computes_the_same_logits_and_hidden_states(original, visitor):
    assert visitor.ids == original.ids.tolist()
    assert_close(torch.tensor(visitor.logits), original.logits, atol=1e-6, rtol=1e-6)
    for hidden in (visitor.hidden, *visitor.bases_of_heads):
        assert_close(torch.tensor(hidden), original.hidden, atol=1e-6, rtol=1e-6)
    assert visitor.tied


def test_another_process_generates_the_same_text_through_a_pipeline(original, visitor):
    assert visitor.tokenizer_is_fast
    assert len(visitor.generated) == 8
    assert visitor.generated == original.generated


def test_trainer_in_another_process_smooths_the_label_of_the_next_token(original, visitor):
    expected = F.cross_entropy(original.logits[0, :-1], original.ids[0, 1:], label_smoothing=0.2)
    assert visitor.smoothed == pytest.approx(expected.item(), rel=1e-5)


def test_the_code_loads_if_transformers_has_no_table_of_names(original):
    script = f"""
from transformers.models.auto import modeling_auto
del modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(original.folder)!r}, trust_remote_code=True)).__name__)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert process.stdout.strip() == "NanoGPTForCausalLM", process.stderr


def test_what_another_process_saves_holds_code_and_every_auto_class(original, visitor):
    for folder in (visitor.again, *visitor.others):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        for name in ("configuration_nanogpt.py", "modeling_nanogpt.py"):
            assert (folder / name).read_text() == (original.folder / name).read_text()


@pytest.mark.parametrize("trust", [False, True])
def test_if_the_project_is_imported_its_own_classes_load_the_folder(original, trust):
    folder = original.folder
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is NanoGPTConfig
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is NanoGPTModel
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is NanoGPTForCausalLM
    assert_close(model(original.ids).logits, original.logits)
    assert (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)(TEXT)["input_ids"] == original.ids[0].tolist()
    )


@pytest.mark.parametrize("name", ["configuration_nanogpt.py", "modeling_nanogpt.py"])
def test_copied_files_import_only_torch_transformers_and_each_other(name):
    # Everyone who loads a folder has to install what these files import.
    allowed = {"torch", "transformers", "huggingface_hub", "math", "collections", "warnings"}
    source = (Path(modeling_nanogpt.__file__).parent / name).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed, ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            relative = (node.level, node.module) == (1, "configuration_nanogpt")
            assert relative or (node.level == 0 and node.module.split(".")[0] in allowed), ast.unparse(node)
