"""The configurations of `accelerate launch` that come with the project, and what each would start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from modeling_nanogpt import NanoGPTForCausalLM
from support import ROOT
from support.runs import launch, recipe_of

FOLDER = ROOT / "hub_configs" / "accelerate"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CHAPTER = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_all_of_them_are_tested():
    assert NAMES == ["cpu", "ddp", "fsdp2", "two_machines"]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_short_commented_and_read_by_accelerate(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 20 and text.startswith("# ")
    assert f"--config_file hub_configs/accelerate/{name}.yaml" in text  # its own command
    config, written = load_config_from_file(str(FOLDER / f"{name}.yaml")), yaml.safe_load(text)
    assert written.items() <= config.to_dict().items()


def test_one_process_is_started_without_torchrun():
    launcher, environment = launch("cpu")
    assert launcher == "python"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment["ACCELERATE_USE_CPU"] == "True"
    assert "ACCELERATE_USE_FSDP" not in environment and environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"


@pytest.mark.parametrize(("name", "count"), [("ddp", 8), ("fsdp2", 8), ("two_machines", 8)], ids=str)
def test_several_processes_are_started_by_torchrun(name, count):
    launcher, environment = launch(name)
    assert launcher == "torchrun" and environment["nproc_per_node"] == str(count)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert launch("ddp", "--num_processes=4")[1]["nproc_per_node"] == "4"  # as their comments say


def test_fsdp2_is_what_the_tests_run():
    environment = launch("fsdp2")[1]
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == environment["FSDP_OFFLOAD_PARAMS"] == "false"
    assert NanoGPTForCausalLM._no_split_modules  # what is wrapped
    assert "ACCELERATE_USE_FSDP" not in launch("ddp")[1]


def test_two_machines_meet_where_the_command_says():
    environment = launch("two_machines", "--machine_rank=1", "--main_process_ip=10.1.2.3")[1]
    assert environment["nnodes"] == "2" and environment["node_rank"] == 1
    assert environment["rdzv_endpoint"] == "10.1.2.3:29500"


def test_the_chapter_on_training_names_each_of_them():
    assert set(re.findall(r"hub_configs/accelerate/(\w+)\.yaml", CHAPTER)) == set(NAMES)


def test_the_cpu_configuration_trains(tmp_path):
    recipe = recipe_of(tmp_path, max_iters=2, out_dir=tmp_path / "out")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / "cpu.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [*command, Path(ROOT / "train_accelerate.py"), recipe], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 process (cpu, ") and "float32" in result.stdout.splitlines()[0]
    assert (tmp_path / "out" / "model.safetensors").exists()
