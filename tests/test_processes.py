"""A run is the same with any number of processes: the same windows, the same losses, the same folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from modeling_nanogpt import NanoGPTForCausalLM, muon
from modeling_nanogpt.training import saving
from modeling_nanogpt.training.checkpointing import list_checkpoints, newest_complete
from support import PATIENCE, ROOT
from support.runs import (
    HOOKS,
    at_evaluation,
    at_step,
    finish,
    free_port,
    launch,
    log_windows,
    read_windows,
    recipe_of,
    send_itself,
    start,
    start_together,
    wait_for_signal,
)
from tokenization.windows import open_stream, training_windows

STEPS = 50
FLAGS = {"max_iters": STEPS, "lr_decay_iters": STEPS, "eval_interval": 25, "learning_rate": 3e-3, "save_interval": 20}
FLAGS |= {"gradient_accumulation_steps": 4, "batch_size": 2, "eval_tokens": 64}


def read_run(out_dir: Path, log: Path) -> SimpleNamespace:
    history = [json.loads(line) for line in (out_dir / "history.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        out_dir=out_dir,
        said=log.read_text(),
        steps=[entry["step"] for entry in history if "loss" in entry],
        losses=[entry["loss"] for entry in history if "loss" in entry],
        norms=[entry["grad_norm"] for entry in history if "loss" in entry],
        rates=[entry["lr"] for entry in history if "lr" in entry],
        val_losses=[entry["val_loss"] for entry in history if "val_loss" in entry],
        skipped=sum(entry.get("skipped", 0) for entry in history),
    )


def run_together(folder, out_dir, processes, *flags, before=lambda rank: (), environment=None):
    """Train to the end in so many processes. Returns what they wrote."""
    log = folder / f"{out_dir.name}.log"
    flags = (f"--out_dir={out_dir}", *flags)
    if processes == 1:
        log = Path(f"{log}.0")
        running = [start(folder / "recipe.yaml", log, *flags, before=before(0), environment=environment)]
    else:
        recipe = folder / "recipe.yaml"
        running = start_together(processes, recipe, log, *flags, before=before, environment=environment)
        log = Path(f"{log}.0")
    assert finish(*running) == [0] * processes, log.read_text()
    return read_run(out_dir, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    recipe_of(folder, **FLAGS)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return run_together(folder, folder / "alone", 1, before=lambda rank: ((log_windows, str(folder / "alone.0")),))


@pytest.fixture(scope="module")
def two(folder):
    return run_together(folder, folder / "two", 2, before=lambda rank: ((log_windows, str(folder / f"two.{rank}")),))


@pytest.fixture(scope="module")
def four(folder, alone):
    return run_together(folder, folder / "four", 4, before=lambda rank: ((log_windows, str(folder / f"four.{rank}")),))


@pytest.fixture(params=["two", "four"])
def together(request):
    """The same run by several processes."""
    return request.getfixturevalue(request.param)


def assert_close(run, expected, tolerance=1e-5):
    assert run.steps == expected.steps and run.rates == expected.rates
    assert run.losses == pytest.approx(expected.losses, abs=tolerance)
    assert run.norms == pytest.approx(expected.norms, rel=100 * tolerance)
    assert run.val_losses == pytest.approx(expected.val_losses, abs=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# DDP


def test_any_number_of_processes_logs_the_same_losses_and_learning_rates(together, alone):
    assert alone.steps == list(range(1, STEPS + 1)) and alone.losses[-1] < 3 < alone.losses[0]
    assert_close(together, alone)


def drawn(stream, step):
    """The windows of a step of these runs."""
    return training_windows(stream, order="random", seed=1337, step=step, count=8, block_size=16)


def test_the_first_line_says_how_many_processes_run_and_how(alone, two, four):
    for run, words in ((alone, "1 process"), (two, "2 processes by DDP"), (four, "4 processes by DDP")):
        said = [line for line in run.said.splitlines() if "process" in line]
        assert re.match(rf"{words} \(cpu, \d+ threads?( each)?\), float32", said[0])


@pytest.mark.parametrize(("name", "processes"), [("alone", 1), ("two", 2), ("four", 4)])
def test_each_process_trains_on_its_share_of_the_steps_windows(request, folder, name, processes):
    request.getfixturevalue(name)
    stream = open_stream(str(folder / "data"), "train")
    shares = []
    for rank in range(processes):
        first, batches = read_windows(folder / f"{name}.{rank}")
        assert first == 0
        shares.append(np.array(batches)[: STEPS * 4 // processes].reshape(STEPS, 4 // processes, 2))
    for step in range(STEPS):
        ours = np.stack([share[step] for share in shares], axis=1).ravel()  # micro-batch by micro-batch
        assert ours.tolist() == drawn(stream, step).offsets.tolist()


def test_what_several_processes_saved_is_the_same_folder(together, alone):
    names = [{str(path.relative_to(run.out_dir)) for path in run.out_dir.rglob("*")} for run in (together, alone)]
    assert names[0] == names[1]
    for name in ("config.json", "generation_config.json", "modeling_nanogpt.py", "configuration_nanogpt.py"):
        assert (together.out_dir / name).read_bytes() == (alone.out_dir / name).read_bytes()
    ours, theirs = (load_file(run.out_dir / "model.safetensors") for run in (together, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)
    assert AutoModelForCausalLM.from_pretrained(together.out_dir).num_parameters() > 30_000


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(folder, alone, tmp_path, first, then):
    out_dir = tmp_path / "out"
    begun = run_together(folder, out_dir, first, "--max_iters=20")
    again = run_together(folder, out_dir, then, "--init_from=resume")
    assert again.losses[:20] == begun.losses
    assert_close(again, alone)


def test_two_processes_go_on_bit_for_bit(folder, two, tmp_path):
    out_dir = tmp_path / "out"
    run_together(folder, out_dir, 2, "--max_iters=20")
    assert_bitwise_equal(run_together(folder, out_dir, 2, "--init_from=resume"), two)


def assert_bitwise_equal(run, expected):
    ours, theirs = (load_file(each.out_dir / "model.safetensors") for each in (run, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run.losses == expected.losses


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def torchrun(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_two_machines_are_one_run(folder, alone, tmp_path):
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    trainer = [ROOT / "train_accelerate.py", folder / "recipe.yaml", f"--out_dir={tmp_path / 'out'}"]
    machines = [torchrun(f"--node_rank={rank}", *where, *trainer) for rank in (0, 1)]
    said = [machine.communicate(timeout=PATIENCE) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 processes on 2 machines by DDP" in said[0][0] and "step 50: " not in said[1][0]
    (tmp_path / "log").write_text(said[0][0])
    assert_close(read_run(tmp_path / "out", tmp_path / "log"), alone)


@pytest.mark.parametrize("to", ["launcher", "worker"])
def test_a_signal_stops_all_processes_after_the_same_step(folder, two, tmp_path, to):
    out_dir = tmp_path / "out"
    noted, waiting = ([tmp_path / f"{name}.{rank}" for rank in (0, 1)] for name in ("windows", "waiting"))
    if to == "launcher":
        script = tmp_path / "script.py"
        script.write_text(
            "import os, signal, sys, train_accelerate\n"
            "from support import runs\n"
            f"runs.log_windows('{tmp_path}/windows.' + os.environ['RANK'])\n"
            f"waiting = '{tmp_path}/waiting.' + os.environ['RANK']\n"
            "runs.at_step(6, runs.wait_for_signal, signal.SIGTERM, waiting)\n"
            "train_accelerate.run(sys.argv[1:], runs.HOOKS)\n"
        )
        arguments = ["--standalone", "--nproc_per_node=2", script, folder / "recipe.yaml", f"--out_dir={out_dir}"]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_files(waiting, launcher.poll)
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=PATIENCE)
        assert "stopped by a signal after step" in out and out.count("SIGTERM: saving") <= 2, err
        assert "SIGTERM: saving after this step" in err and "train_accelerate.py" not in err.split("Traceback")[-1]
    else:
        waits = (at_step, 6, wait_for_signal, signal.SIGTERM, str(waiting[1]))

        def first(rank):
            return ((log_windows, str(noted[rank])), *([waits] if rank == 1 else []))

        log = tmp_path / "log"
        running = start_together(2, folder / "recipe.yaml", log, f"--out_dir={out_dir}", before=first)
        wait_for_files(waiting[1:], lambda: running[1].exitcode)
        os.kill(running[1].pid, signal.SIGTERM)
        assert finish(*running) == [143, 143]
        out = Path(f"{log}.0").read_text()
    stopped = int(re.search(r"stopped by a signal after step (\d+);", out).group(1))
    assert 5 <= stopped < STEPS
    # each process has fetched one micro-batch beyond its last step, and not more
    assert [len(read_windows(path)[1]) for path in noted] == [2 * stopped + 1] * 2
    assert newest_complete(out_dir) == list_checkpoints(out_dir)[-1]
    assert newest_complete(out_dir).name == f"step-{stopped:08d}"
    assert_bitwise_equal(run_together(folder, out_dir, 2, "--init_from=resume"), two)


def wait_for_files(paths, status):
    """Wait for files that a run makes."""
    while not all(path.exists() for path in paths):
        assert status() is None, "the run has ended"
        time.sleep(0.005)


def test_a_signal_to_one_process_leaves_the_evaluation_of_all(folder, two, tmp_path):
    out_dir, log = tmp_path / "out", tmp_path / "log"
    actions = [(), ((at_evaluation, 25, send_itself, signal.SIGTERM),)]  # of process 0 and of process 1
    recipe = folder / "recipe.yaml"
    running = start_together(2, recipe, log, f"--out_dir={out_dir}", before=lambda rank: actions[rank])
    assert finish(*running) == [143, 143]
    assert newest_complete(out_dir).name == "step-00000025"
    again = run_together(folder, out_dir, 2, "--init_from=resume")
    assert_bitwise_equal(again, two)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2. Accelerate allows it on GPUs only, so it is told here that the CPUs are GPUs.

SHARDED = {key: value for key, value in launch("fsdp2")[1].items() if key.startswith(("FSDP", "ACCELERATE_USE_FSDP"))}


def take_cpus_for_gpus() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def note_plan(path: str) -> None:
    """Write down how the model is sharded, at its first save."""
    gather = saving.gather_tensors

    def noted(model, optimizer, average):
        units = [name for name, each in model.named_modules() if type(each).__name__.startswith("FSDP")]
        shards = {
            name: [list(each.shape), list(each.to_local().shape), str(each.placements)]
            for name, each in model.named_parameters()
            if isinstance(each, DTensor)
        }
        whole = [name for name, each in model.named_parameters() if not isinstance(each, DTensor)]
        moments = {type(each["exp_avg"]).__name__ for each in optimizer.state.values()}
        plan = {"units": units, "shards": shards, "whole": whole, "moments": sorted(moments)}
        Path(path).write_text(json.dumps(plan))
        return gather(model, optimizer, average)

    saving.gather_tensors = noted


def run_sharded(folder, out_dir, *flags, before=(), processes=2):
    hooks = ((take_cpus_for_gpus,), *before)
    return run_together(folder, out_dir, processes, *flags, before=lambda rank: hooks, environment=SHARDED)


@pytest.fixture(scope="module")
def sharded(folder, alone):
    """The same run, with a sharded model."""
    return run_sharded(folder, folder / "sharded", before=((note_plan, str(folder / "plan.json")),))


def test_fsdp2_shards_every_parameter_block_by_block(sharded, folder):
    plan = json.loads((folder / "plan.json").read_text())
    assert "2 processes by FSDP2" in sharded.said
    assert {"", "transformer.h.0", "transformer.h.1"} <= set(plan["units"])  # the embedding is a unit too
    assert plan["whole"] == [] and "transformer.wte.weight" in plan["shards"] and len(plan["shards"]) == 15
    for whole, local, placements in plan["shards"].values():
        assert placements == "(Shard(dim=0),)" and [2 * local[0], *local[1:]] == whole
    assert plan["moments"] == ["DTensor"]


def test_fsdp2_computes_the_same(sharded, alone):
    assert_close(sharded, alone, tolerance=1e-4)
    assert max(alone.norms) > 1  # so that some gradients are clipped


def test_fsdp2_saves_the_plain_folder(sharded, alone):
    names = [{str(path.relative_to(run.out_dir)) for path in run.out_dir.rglob("*")} for run in (sharded, alone)]
    assert names[0] == names[1]
    for name in ("config.json", "generation_config.json", "modeling_nanogpt.py", "configuration_nanogpt.py"):
        assert (sharded.out_dir / name).read_bytes() == (alone.out_dir / name).read_bytes()
    ours, theirs = (load_file(run.out_dir / "model.safetensors") for run in (sharded, alone))
    assert ours.keys() == theirs.keys()
    model = AutoModelForCausalLM.from_pretrained(sharded.out_dir)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_fsdp2_goes_on_bit_for_bit(folder, sharded, tmp_path):
    run_sharded(folder, tmp_path / "out", "--max_iters=20")
    assert_bitwise_equal(run_sharded(folder, tmp_path / "out", "--init_from=resume"), sharded)


def test_fsdp2_and_one_process_take_turns(folder, alone, tmp_path):
    out_dir = tmp_path / "out"
    run_sharded(folder, out_dir, "--max_iters=15")
    run_together(folder, out_dir, 1, "--init_from=resume", "--max_iters=30")
    assert_close(run_sharded(folder, out_dir, "--init_from=resume"), alone, tolerance=1e-4)


def orthogonalise_in_float32() -> None:
    """bfloat16 rounds so much that the sums of several processes, in another order, would show."""
    muon.arithmetic_dtype = lambda device: torch.float32


def test_several_processes_train_with_muon_as_one_does(folder, tmp_path):
    flags = ("--optimizer=muon", "--learning_rate=0.02", "--max_iters=20", "--save_interval=10")
    flags += ("--lr_decay_iters=20", "--eval_interval=20", "--gradient_accumulation_steps=4")
    exact = ((orthogonalise_in_float32,),)
    one = run_together(folder, tmp_path / "one", 1, *flags, before=lambda rank: exact)
    runs = [run_sharded(folder, tmp_path / str(count), *flags, before=exact, processes=count) for count in (2, 4)]
    runs.append(run_together(folder, tmp_path / "ddp", 2, *flags, before=lambda rank: exact))
    for run in runs:
        assert_close(run, one, tolerance=1e-4)
        ours, theirs = (load_file(each.out_dir / "model.safetensors") for each in (run, one))
        assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5
    # a checkpoint of two processes is read by one process, and by four
    (tmp_path / "2" / "checkpoints" / "step-00000020" / "state.json").unlink()
    shutil.copytree(tmp_path / "2", tmp_path / "again")
    again = run_together(folder, tmp_path / "again", 1, *flags, "--init_from=resume", before=lambda rank: exact)
    assert_close(again, one, tolerance=1e-4)
    again = run_sharded(folder, tmp_path / "2", *flags, "--init_from=resume", before=exact, processes=4)
    assert_close(again, one, tolerance=1e-4)


def test_fsdp2_averages_the_weights_as_one_process_does(folder, tmp_path):
    flags = ("--average_decay=0.8", "--max_iters=12", "--lr_decay_iters=12", "--eval_interval=4", "--save_interval=6")
    one = run_together(folder, tmp_path / "one", 1, *flags)
    two = run_sharded(folder, tmp_path / "two", *flags)
    assert_close(two, one, tolerance=1e-4)
    ours, theirs = (load_file(run.out_dir / "model.safetensors") for run in (two, one))
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5
    (tmp_path / "two" / "checkpoints" / "step-00000012" / "state.json").unlink()
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    assert_bitwise_equal(run_sharded(folder, tmp_path / "again", *flags, "--init_from=resume"), two)
    again = run_together(folder, tmp_path / "two", 1, *flags, "--init_from=resume")
    assert_close(again, one, tolerance=1e-4)


def spoil(steps: tuple, rank: int) -> None:
    """Make the loss of a process NaN in these steps."""
    forward = NanoGPTForCausalLM.forward

    def spoiled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training and HOOKS.step in steps and int(os.environ.get("RANK", 0)) == rank:
            output.loss = output.loss * float("nan")
        return output

    NanoGPTForCausalLM.forward = spoiled


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_all(folder, tmp_path, kind):
    hooks = ((spoil, (6,), 1),)
    flags = ("--max_iters=10", "--eval_interval=5")
    if kind == "FSDP2":
        run = run_sharded(folder, tmp_path / "out", *flags, before=hooks)
    else:
        run = run_together(folder, tmp_path / "out", 2, *flags, before=lambda rank: hooks)
    stream = open_stream(str(folder / "data"), "train")
    offsets = drawn(stream, 6).offsets.reshape(2, 2, 2)[:, 1].ravel().tolist()
    where = f"(windows at tokens {', '.join(map(str, offsets))} of train)"
    assert f"step 7: the loss is not finite, and its update is skipped {where}" in run.said
    assert run.skipped == 1
    assert np.isfinite(run.losses).all() and len(run.losses) == 9  # a skipped step has no loss
    assert np.isfinite(run.val_losses).all()


# ---------------------------------------------------------------------------------------------------------------------
# What cannot run as it was launched


def refused(folder, out_dir, processes, environment, before=(), flags=()):
    """What each of several processes says before it stops. They must have written nothing."""
    log = out_dir.with_suffix(".log")
    running = start_together(
        processes,
        folder / "recipe.yaml",
        log,
        f"--out_dir={out_dir}",
        *flags,
        before=lambda rank: before,
        environment=environment,
    )
    assert finish(*running) == [1] * processes
    assert not out_dir.exists()
    said = [Path(f"{log}.{rank}").read_text() for rank in range(processes)]
    assert "Traceback" not in "".join(said)
    # torch may add that it lost the other process, because that one ended earlier
    (line,) = {line for text in said for line in text.splitlines() if "error: " in line}
    assert line.startswith("train_accelerate.py: error: ")
    return line


def test_fsdp_that_would_not_run_is_refused(folder, tmp_path):
    assert "FSDP, which needs several GPUs" in refused(folder, tmp_path / "out", 2, SHARDED)


def test_fsdp1_is_refused(folder, tmp_path):
    line = refused(folder, tmp_path / "out", 2, SHARDED | {"FSDP_VERSION": "1"})
    assert "FSDP 1" in line and "fsdp_version: 2" in line


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["dynamo", "--compile=true"]),
        ({"WORLD_SIZE": "2"}, ["2 processes were started", "ACCELERATE_USE_CPU=true"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["FSDP", "several GPUs"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["FSDP 1", "fsdp_version: 2"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DEEPSPEED", "DDP or FSDP2"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM", "DDP or FSDP2"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}, ["mixed_precision=fp16", "GPU"]),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else "",
)
def test_a_launch_that_cannot_be_what_it_says_is_refused(folder, tmp_path, environment, said):
    log = tmp_path / "log"
    process = start(folder / "recipe.yaml", log, f"--out_dir={tmp_path / 'out'}", environment=environment)
    assert finish(process) == [1]
    line = log.read_text()
    assert line.count("\n") == 1 and line.startswith("train_accelerate.py: error: ")
    assert all(part in line for part in said), line
    assert not (tmp_path / "out").exists()


def test_accelerate_launch_with_two_processes_on_cpus_is_refused(folder, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    result = subprocess.run(
        [*launch, ROOT / "train_accelerate.py", folder / "recipe.yaml", f"--out_dir={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    (line,) = re.findall(r"^train_accelerate\.py: error: .*$", result.stderr, re.M)
    assert "several processes, but starts only one" in line and "torchrun --standalone --nproc_per_node" in line
    assert result.returncode != 0 and result.stdout == "" and not (tmp_path / "out").exists()


def test_every_process_reports_a_mistake_that_the_main_process_finds(folder, tmp_path):
    flags = ("--corpus=nowhere.txt", f"--data_dir={tmp_path / 'data'}")
    line = refused(folder, tmp_path / "out", 2, {}, flags=flags)
    assert "corpus=nowhere.txt" in line
