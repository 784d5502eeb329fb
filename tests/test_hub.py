"""A run and the Hub, end to end: real processes with empty caches, and a Hub on loopback between them."""

import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_tensorboard_available
from huggingface_hub import ModelCard

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.convert import convert
from support import ROOT
from support.hub import Hub
from support.texts import write_words
from support.tiny_run import TINY, train, write_recipe

SHORT = {"max_iters": 10, "lr_decay_iters": 20, "eval_interval": 5, "dropout": 0.1}  # half of a run
TRACKER = "tensorboard" if is_tensorboard_available() else "none"

# Several commands in one process, because importing takes longer than the commands: each is [module, argument, ...],
# and its output stands between two lines.
COMMANDS = """
import json, runpy, sys
from accelerate.state import AcceleratorState, GradientState
for module, *argv in json.load(open("commands.json")):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    print("=====", flush=True)
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print("exit:", end.code, flush=True)
"""


def python(hub, home, code, token="hf_alice"):
    done = hub.run(home, [sys.executable, "-c", textwrap.dedent(code)], token, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_commands(hub, home, commands, token="hf_alice"):
    """What each command printed."""
    home.mkdir()
    (home / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = hub.run(home, [sys.executable, "-c", COMMANDS], token, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("=====\n")[1:]


def run_trainer(hub, home, token="hf_alice", **flags):
    """A process that trains in `home`, as if on a machine of its own."""
    home.mkdir()
    flags = {"data_dir": home / "data", "out_dir": home / "out"} | TINY | SHORT | flags
    recipe = write_recipe(home / "recipe.yaml", **flags)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return hub.run(home, [sys.executable, ROOT / "train_accelerate.py", recipe], token, **environment)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="module")
def shared():
    """A Hub for the whole module."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def first(shared, corpus, tmp_path_factory):
    """Half of a run, done and pushed by the first machine. Returns that machine's home."""
    home = tmp_path_factory.mktemp("machines") / "first"
    flags = {"push_to_hub": True, "hub_model_id": "alice/run", "hub_strategy": "checkpoint", "report_to": TRACKER}
    done = run_trainer(shared, home, corpus=corpus, **flags)
    assert done.returncode == 0, done.stderr
    assert f"is on the Hub: {shared.url}/alice/run" in done.stdout
    (home / "said.txt").write_text(done.stdout + done.stderr)
    return home


def history_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def val_losses(history):
    return {entry["step"]: entry["val_loss"] for entry in history if "val_loss" in entry}


# ---------------------------------------------------------------------------------------------------------------------
# From a run to the Hub, and from there to anyone


def test_the_repository_is_the_folder(shared, first):
    repository = shared.model("alice/run")
    files = {path.relative_to(first / "out").as_posix(): path for path in (first / "out").rglob("*") if path.is_file()}
    pushed = {name: content for name, content in repository.files.items() if not name.startswith("last-checkpoint/")}
    own = {name: path for name, path in files.items() if not name.startswith(("checkpoints/", ".lock"))}
    assert pushed == {name: path.read_bytes() for name, path in own.items()}
    needed = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    needed |= {"configuration_nanogpt.py", "modeling_nanogpt.py", "README.md", "loss.png", "run.yaml", "history.jsonl"}
    assert needed <= pushed.keys()
    assert any("tfevents" in name for name in pushed) == (TRACKER == "tensorboard")
    assert repository.private


def test_each_save_is_a_commit_that_says_how_good_the_model_is(shared, first):
    losses = val_losses(history_of(first / "out"))
    titles = [f"step {step}: val loss {losses[step]:.4f}" for step in (5, 10)]
    assert shared.model("alice/run").titles[1:3] == titles


def test_optimizer_state_goes_where_it_was_asked_for(shared, first):
    name = "last-checkpoint/step-00000010"
    checkpoint = first / "out" / "checkpoints" / "step-00000010"
    files = {path: content for path, content in shared.model("alice/run").files.items() if path.startswith("last-")}
    assert files == {f"{name}/{path.name}": path.read_bytes() for path in checkpoint.iterdir()}


def test_a_process_without_the_project_loads_the_model_and_the_card_says_how(shared, first, tmp_path):
    upload = [Path(sys.executable).with_name("hf"), "upload", "alice/by-hand", first / "out", "."]
    done = shared.run(tmp_path, [*upload, "--exclude=checkpoints/*"])
    assert done.returncode == 0, done.stderr
    card = shared.model("alice/run").files["README.md"].decode()
    assert ModelCard(card).data.model_name == "run"
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    check = """
import sys
from pathlib import Path
import torch
assert isinstance(model.config.block_size, int) and len(tokenizer("to be").input_ids) == 5
other = AutoModelForCausalLM.from_pretrained("alice/by-hand", trust_remote_code=True)
ids = torch.arange(16)[None]
torch.save([each(ids).logits for each in (model, other)], "logits.pt")
assert "modeling_nanogpt" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
"""
    python(shared, tmp_path / "anyone", code + check)
    with torch.no_grad():
        expected = NanoGPTForCausalLM.from_pretrained(first / "out")(torch.arange(16)[None]).logits
    for logits in torch.load(tmp_path / "anyone" / "logits.pt"):
        assert torch.equal(logits, expected)


def test_no_token_is_written_anywhere(shared, first):
    places = [path for path in first.rglob("*") if path.is_file() and "tests" not in path.parts]
    assert (first / "said.txt") in places
    for path in places:
        assert b"hf_alice" not in path.read_bytes(), path
    for name, content in shared.model("alice/run").files.items():
        assert b"hf_alice" not in content, name


# ---------------------------------------------------------------------------------------------------------------------
# From the Hub


def test_commands_take_a_hub_id_and_a_revision(shared, first, corpus, tmp_path):
    repository = shared.model("alice/run")
    earlier = repository.commits[1].sha
    losses = val_losses(history_of(first / "out"))
    data = [f"--corpus={corpus}", f"--data_dir={first}/data"]
    prompt = ["--prompt", "to be ", "--max_new_tokens", "20"]
    recipe = write_recipe(tmp_path / "recipe.yaml", eval_only=True, out_dir=tmp_path / "out", batch_size=8)
    evaluate, out = ["train_accelerate", recipe, *data, "--init_from=alice/run"], first / "out"
    stock = tmp_path / "stock"
    convert(str(out), stock, "gpt2", None)
    shared.put("models", "bob/gpt2", {path.name: path.read_bytes() for path in stock.iterdir()})
    said = run_commands(
        shared,
        tmp_path / "second",
        [
            evaluate,
            [*evaluate, f"--revision={earlier}"],
            [*evaluate, "--revision=nowhere"],
            ["train_accelerate", recipe, *data, f"--init_from={out}", "--revision=main"],
            ["modeling_nanogpt.sample", "alice/run", *prompt],
            ["modeling_nanogpt.sample", out, *prompt],
            ["modeling_nanogpt.sample", "alice/run", *prompt, "--revision", earlier],
            ["modeling_nanogpt.sample", out, *prompt, "--revision", earlier],
            ["modeling_nanogpt.convert", "alice/run", "now", "--to", "gpt2"],
            ["modeling_nanogpt.convert", "alice/run", "then", "--to", "gpt2", "--revision", earlier],
            ["modeling_nanogpt.convert", out, "here", "--to", "gpt2"],
            ["modeling_nanogpt.convert", out, "no", "--to", "gpt2", "--revision", earlier],
            [*evaluate, "--init_from=bob/gpt2"],
            [*evaluate, f"--init_from={stock}"],
        ],
    )
    assert f"val loss {losses[10]:.4f}" in said[0]
    assert f"val loss {losses[5]:.4f}" in said[1] and losses[5] != losses[10]
    assert said[2].startswith("exit: train_accelerate.py: error: init_from=alice/run") and "nowhere" in said[2]
    assert said[3].startswith("exit: train_accelerate.py: error: init_from=") and "revision=main" in said[3]
    assert said[4] == said[5] != said[6] and len(said[4]) > 60
    assert said[7] == said[11] == "exit: 2\n"
    assert said[12].replace("bob/gpt2", str(stock)) == said[13] and "val loss" in said[12]
    files = [tmp_path / "second" / name / "model.safetensors" for name in ("now", "then", "here")]
    now, then, here = (file.read_bytes() for file in files)
    assert now == here != then


def test_a_run_that_is_resumed_on_another_machine_is_the_run_that_would_have_been(shared, first, corpus, tmp_path):
    shared.put("models", "alice/run", {"notes.txt": b"of a person"})
    whole = train(tmp_path, **SHORT | {"max_iters": 20, "corpus": corpus})
    flags = {"max_iters": 20, "corpus": corpus, "init_from": "auto", "hub_model_id": "alice/run"}
    push = {"push_to_hub": True, "hub_strategy": "checkpoint", "report_to": TRACKER}
    done = run_trainer(shared, tmp_path / "second", **flags, **push)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "second" / "out"
    kept = ("step", "loss", "lr", "val_loss", "eval_train_loss", "grad_norm")
    histories = (whole.history, history_of(out))
    expected, found = [[[entry.get(key) for key in kept] for entry in history] for history in histories]
    assert found == expected
    weights = (whole.out_dir / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights
    repository = shared.model("alice/run")
    assert repository.files["model.safetensors"] == weights
    assert {name.split("/")[1] for name in repository.files if name.startswith("last-")} == {"step-00000020"}
    assert (out / "notes.txt").read_bytes() == repository.files["notes.txt"] == b"of a person"
    if TRACKER == "tensorboard":  # the entries of both machines
        assert sum("tfevents" in name for name in repository.files) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# What may go wrong


def test_a_run_whose_hub_is_gone_ends_as_any_other_and_says_how_to_push_it(hub, corpus, tmp_path):
    hub.stop()
    done = run_trainer(hub, tmp_path / "alone", corpus=corpus, push_to_hub=True, hub_model_id="alice/run")
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "the Hub cannot be reached" in warned[0] and "step 10: val loss" in warned[-1]
    assert 3 <= len(warned) <= 4 and "Traceback" not in done.stderr  # at the start, a save or two, and the end
    hub.start()
    command = shlex.split(done.stdout.splitlines()[-1])
    brought = hub.run(tmp_path / "alone", [Path(sys.executable).with_name("hf"), *command[1:]])
    assert brought.returncode == 0, brought.stderr
    out = tmp_path / "alone" / "out"
    own = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != ".lock"}
    assert hub.model("alice/run").files == own and hub.model("alice/run").private


def test_what_the_hub_refuses_is_refused_in_one_line_before_training(hub, corpus, tmp_path):
    hub.put("models", "bob/run", {"config.json": b"{}"})
    recipe = write_recipe(
        tmp_path / "recipe.yaml", **TINY, corpus=corpus, data_dir=tmp_path / "data", push_to_hub=True
    )
    flags = ["--hub_model_id=alice/x--y", "--hub_model_id=bob/run", "--hub_model_id=bob/new"]
    resumes = ["--hub_model_id=alice/nothing --init_from=resume", "--hub_model_id=bob/run --init_from=resume"]
    commands = [["train_accelerate", recipe, f"--out_dir={tmp_path}/out", *flag.split()] for flag in flags + resumes]
    said = run_commands(hub, tmp_path / "machine", commands)
    for flag, line in zip(flags + resumes, said, strict=True):
        assert line.startswith("exit: train_accelerate.py: error: ") and line.count("\n") == 1, line
        assert flag.split()[0][2:] in line
    assert "last-checkpoint" in said[-1]
    assert not (tmp_path / "out").exists() and hub.repositories.keys() == {("models", "bob/run")}


def test_a_wrong_token_is_refused_before_training_by_both_of_two_processes(hub, corpus, tmp_path):
    flags = {"corpus": corpus, "data_dir": tmp_path / "data", "out_dir": tmp_path / "out", "push_to_hub": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", **TINY | flags | {"gradient_accumulation_steps": 2})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = hub.run(tmp_path, [*launch, ROOT / "train_accelerate.py", recipe], "hf_nobody", **environment)
    assert done.returncode != 0 and "[rank" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "train_accelerate.py: error: " in line]
    assert lines and all("hub_model_id=out: the Hub refuses" in line and "401" in line for line in lines)
    assert not (tmp_path / "out").exists()
