"""What the world around a run may do to it: a second run, other systems, paths, launchers, notebooks."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM

import train_accelerate
from modeling_nanogpt.training.checkpointing import newest_complete
from modeling_nanogpt.training.holding import LOCK
from support import PATIENCE, ROOT
from support.forks import fork
from support.runs import at_step, call, finish, recipe_of, start
from support.texts import write_words
from support.tiny_run import TINY, write_recipe

SHORT = {"max_iters": 4, "eval_interval": 2, "eval_tokens": 64, "save_interval": 2}
TRAIN = [sys.executable, str(ROOT / "train_accelerate.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    recipe_of(folder, **SHORT)
    return folder


def error_of(log):
    """The one line that a run says before it stops."""
    (line,) = [line for line in log.read_text().splitlines() if "error: " in line]
    assert "Traceback" not in log.read_text()
    return line


# ---------------------------------------------------------------------------------------------------------------------
# One out_dir, one run


def wait_for(path, come):
    """Say by a file that this run has come to its place, and wait for another file."""
    come.touch()
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("step", [0, 3], ids=["before any save", "after a save"])
def test_a_second_run_in_the_same_out_dir_is_refused_while_the_first_lives(folder, tmp_path, step):
    out_dir, go, come = tmp_path / "out", tmp_path / "go", tmp_path / "come"
    flag = f"--out_dir={out_dir}"
    first = start(folder / "recipe.yaml", tmp_path / "1", flag, before=((at_step, step, wait_for, go, come),))
    while not come.exists():
        assert first.exitcode is None, (tmp_path / "1").read_text()
        time.sleep(0.01)
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*") if path.name != LOCK}
    for more in ([], ["--init_from=resume"] if step else ["--seed=2"]):
        log = tmp_path / "2"
        log.unlink(missing_ok=True)
        assert finish(start(folder / "recipe.yaml", log, flag, *more)) == [1]
        assert f"out_dir={out_dir}: another run is at work there" in error_of(log)
    assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*") if path.name != LOCK}
    go.touch()
    assert finish(first) == [0]


def test_a_killed_run_leaves_no_lock_behind(folder, tmp_path):
    flag, never, come = f"--out_dir={tmp_path / 'out'}", tmp_path / "never", tmp_path / "come"
    first = start(folder / "recipe.yaml", tmp_path / "1", flag, before=((at_step, 3, wait_for, never, come),))
    while not come.exists():
        time.sleep(0.01)
    first.kill()
    first.join()
    assert finish(start(folder / "recipe.yaml", tmp_path / "2", flag, "--init_from=resume")) == [0]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_srun_without_a_launcher_is_refused(folder, tmp_path, rank):
    log = tmp_path / "log"
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_JOB_ID": "7"}
    flag = f"--out_dir={tmp_path / 'out'}"
    assert finish(start(folder / "recipe.yaml", log, flag, environment=slurm)) == [1]
    assert all(part in error_of(log) for part in ("SLURM_NTASKS=2", "torchrun", "unset SLURM_NTASKS"))
    assert not (tmp_path / "out").exists()
    one = slurm | {"SLURM_NTASKS": "1"}
    assert finish(start(folder / "recipe.yaml", log, flag, "--eval_only=true", environment=one)) == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Windows, as far as it can be emulated


def flush_as_windows_does():
    """os.fsync takes only a descriptor that may be written, and os.open opens no folder."""
    real_open, real_fsync, read_only = os.open, os.fsync, set()

    def opened(path, flags, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = real_open(path, flags, *rest, **options)
        (read_only.discard if flags & (os.O_WRONLY | os.O_RDWR) else read_only.add)(descriptor)
        return descriptor

    def fsync(descriptor):
        if descriptor in read_only:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_fsync(descriptor)

    os.open, os.fsync = opened, fsync
    shutil._use_fd_functions = False  # there, rmtree goes by names


def test_a_run_saves_where_only_files_that_may_be_written_can_be_flushed(folder, tmp_path):
    log, out_dir = tmp_path / "log", tmp_path / "out"
    before = ((flush_as_windows_does,),)
    assert finish(start(folder / "recipe.yaml", log, f"--out_dir={out_dir}", before=before)) == [0]
    assert "could not be saved" not in log.read_text()
    assert newest_complete(out_dir).name == "step-00000004"
    AutoModelForCausalLM.from_pretrained(out_dir)


# ---------------------------------------------------------------------------------------------------------------------
# A disk that several people or machines share


def serve_as_a_network_does():
    """os.fsync refuses folders, and there are no hard links."""
    real_fsync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    def link(source, target, **options):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    os.fsync, os.link = fsync, link


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_run_saves_on_a_network_file_system_what_the_umask_lets_others_read(folder, tmp_path, umask):
    log, data_dir, out_dir = tmp_path / "log", tmp_path / "data", tmp_path / "out"
    before = ((serve_as_a_network_does,), (os.umask, umask))
    flags = (f"--out_dir={out_dir}", f"--data_dir={data_dir}")
    assert finish(start(folder / "recipe.yaml", log, *flags, before=before)) == [0]
    assert "could not be saved" not in log.read_text() and newest_complete(out_dir).name == "step-00000004"
    for path in (*out_dir.rglob("*"), *data_dir.rglob("*")):
        allowed = 0o777 if path.is_dir() else 0o666
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(allowed & ~umask), path


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def run_in(folder, *command, **environment):
    """Run a command in a folder. Returns its exit status and the last line that it says."""
    process = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert "Traceback" not in process.stdout, process.stdout
    return process.returncode, (process.stdout.splitlines() or [""])[-1]


def test_a_home_is_a_home_in_every_path_flag_of_recipe_and_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    values = {
        "corpus": "~/t.txt",
        "out_dir": "~/out",
        "data_dir": "$SCRATCH/d",
        "tokenizer": "~/t",
        "init_from": "~/m",
    }
    expected = ["/home/me/t.txt", "/home/me/out", "/scratch/d", "/home/me/t", "/home/me/m"]
    recipe = write_recipe(tmp_path / "recipe.yaml", **values)
    for argv in ([str(recipe)], [f"--{key}={value}" for key, value in values.items()]):
        model, data, run = train_accelerate.parse_arguments(argv)
        assert [data.corpus, run.out_dir, data.data_dir, data.tokenizer, model.init_from] == expected


def test_a_variable_that_is_not_set_makes_no_folder_of_its_name(folder, capsys, monkeypatch):
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(SystemExit):
        train_accelerate.parse_arguments([str(folder / "recipe.yaml"), "--out_dir=${SCRATCH}/x"])
    assert "out_dir" in (said := capsys.readouterr().err) and "no variable SCRATCH" in said


def test_a_home_is_a_home_for_sample_and_convert(run, tmp_path):
    shutil.copytree(run.out_dir, tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("a")
    home, python = {"HOME": str(tmp_path)}, [sys.executable, "-m"]
    convert = [*python, "modeling_nanogpt.convert", "~/model", "~/gpt2", "--to=gpt2", "--tokenizer=~/model"]
    assert run_in("/", *convert, **home)[0] == 0 and (tmp_path / "gpt2" / "config.json").exists()
    sample = [*python, "modeling_nanogpt.sample", "~/gpt2", "--prompt=FILE:~/prompt.txt", "--max_new_tokens=1"]
    assert run_in("/", *sample, **home)[0] == 0


def test_a_model_in_a_folder_called_checkpoints_is_a_model(run, folder, tmp_path):
    shutil.copytree(run.out_dir, tmp_path / "checkpoints" / "my-model")
    data = [f"--data_dir={run.data_dir}", f"--tokenizer={run.data_dir}", "--eval_only=true"]
    for name in ("checkpoints/my-model", "checkpoints/my-model/"):
        log = tmp_path / "log"
        flags = [f"--init_from={tmp_path}/{name}", f"--out_dir={tmp_path / 'out'}", *data]
        assert finish(start(folder / "recipe.yaml", log, *flags)) == [0], log.read_text()


def test_a_checkpoint_is_a_checkpoint_under_any_name(run, folder, tmp_path):
    (checkpoint, *_) = (run.out_dir / "checkpoints").iterdir()
    shutil.copytree(checkpoint, tmp_path / "best")
    log = tmp_path / "log"
    flags = [f"--init_from={tmp_path / 'best'}", f"--out_dir={tmp_path / 'out'}", "--max_iters=20"]
    assert finish(start(folder / "recipe.yaml", log, *flags)) in ([0], [1])
    assert "is not a" not in log.read_text()  # a flag of its run may be missing, but the checkpoint is found
    flags[0] = f"--init_from={run.out_dir}/checkpoints/step-00009999"
    log.unlink()
    assert finish(start(folder / "recipe.yaml", log, *flags)) == [1]
    assert "not a complete checkpoint" in error_of(log)


def test_the_installed_commands_work_within_a_models_folder(run, tmp_path):
    model = shutil.copytree(run.out_dir, tmp_path / "model")
    (model / "tokenization.py").write_text("raise SystemExit('the wrong file')\n")
    script = tmp_path / "bin" / "nanogpt-sample"  # a script's own folder stands on the path, not the current one
    script.parent.mkdir()
    script.write_text("from command_start import sample\nsample()\n")
    assert run_in(model, sys.executable, script, ".", "--max_new_tokens=1")[0] == 0


@pytest.mark.parametrize("command", ["sample", "convert"])
def test_a_module_that_a_models_folder_hides_is_named_in_one_line(run, tmp_path, command):
    model = shutil.copytree(run.out_dir, tmp_path / "model")
    code, said = run_in(model, sys.executable, "-m", f"modeling_nanogpt.{command}", ".")
    assert code == 1
    (line,) = said.splitlines()
    assert "not the package modeling_nanogpt" in line and "nanogpt-sample" in line


@pytest.mark.parametrize("spoil", ["a file at checkpoints", "a link to nowhere"])
def test_out_dir_is_tested_where_saving_will_write(folder, tmp_path, spoil):
    out_dir, log = tmp_path / "out", tmp_path / "log"
    if spoil == "a link to nowhere":
        out_dir.symlink_to(tmp_path / "unmounted" / "disk")
    else:
        out_dir.mkdir()
        (out_dir / "checkpoints").write_text("")
    assert finish(start(folder / "recipe.yaml", log, f"--out_dir={out_dir}")) == [1]
    assert f"out_dir={out_dir} cannot be written" in error_of(log)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, threads and notebooks


def kill_a_child_of(process, which, delay):
    """SIGKILL to a process that the given one has just started, as from a system that is short of memory."""
    while process.poll() is None:
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if len(listed) > which:
            time.sleep(delay)
            os.kill(int(listed[which]), signal.SIGKILL)
            return


@pytest.mark.parametrize(("which", "delay"), [(0, 0), (0, 0.05), (1, 0.02), (2, 0)])  # two workers, and a manager
def test_a_worker_that_is_killed_while_it_starts_ends_in_one_line(which, delay, tmp_path):
    text = write_words(tmp_path / "corpus.txt").read_text()
    (tmp_path / "corpus.txt").write_text(text * 1000)
    command = [sys.executable, "-m", "tokenization.prepare", "--corpus=corpus.txt", "--data_dir=data", "--num_proc=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    kill_a_child_of(process, which, delay)
    said = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 2) and "Traceback" not in said  # it may have ended its work before
    if process.returncode:
        assert "a process that tokenizes has died, perhaps for want of memory" in said.splitlines()[-1]


def lose_a_worker(moment, held, in_thread=False):
    """Tokenize with three workers. The first to start dies `moment` seconds later, and holds the lock of this name.

    `datasets` looks 20 ms late at who works for it, as on a busy machine: before that, another worker may have come.
    """
    import datasets
    from datasets import arrow_dataset
    from multiprocess import Semaphore, pool

    from tokenization.workers import watched_workers

    once, work, flatmap = Semaphore(1), pool.worker, arrow_dataset.iflatmap_unordered

    def work_or_die(inqueue, outqueue, *rest):
        if once.acquire(block=False):
            time.sleep(moment)
            {"to read": inqueue._rlock, "to write": outqueue._wlock}.get(held, once).acquire(timeout=0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        work(inqueue, outqueue, *rest)

    def flatmap_late(*arguments, **keywords):
        time.sleep(0.02)
        yield from flatmap(*arguments, **keywords)

    def take_a_while(row):
        time.sleep(0.005)  # 33 rows of a process take longer than any `moment`

    def tokenize():
        with pytest.raises(OSError, match="^a process that tokenizes has died, .*$"), watched_workers():
            rows.map(take_a_while, num_proc=3)
        print("one line", flush=True)

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ["a"] * 99})
    with patch.object(pool, "worker", work_or_die), patch.object(arrow_dataset, "iflatmap_unordered", flatmap_late):
        if not in_thread:
            return tokenize()
        thread = threading.Thread(target=tokenize)
        thread.start()
        thread.join()


def lose_workers(held):
    for moment in (0, 0.002, 0.005, 0.01, 0.02, 0.05):
        lose_a_worker(moment, held)
    lose_a_worker(0.01, held, in_thread=True)


@pytest.mark.parametrize("held", ["nothing", "to read", "to write"])
def test_a_worker_that_dies_with_a_lock_ends_in_one_line(held, tmp_path):
    log = tmp_path / "log"
    assert finish(fork(call, lose_workers, (held,), str(log), {}), seconds=60) == [0]
    assert log.read_text() == "one line\n" * 7


UNGUARDED = """
import multiprocess
from tokenization.arguments import DataArguments
from tokenization.prepare import prepare

multiprocess.set_start_method("spawn", force=True)  # as on Windows and macOS
try:
    prepare(DataArguments(corpus="corpus.txt", data_dir="data", num_proc=2))
except ValueError as mistake:
    print(mistake)
"""


def test_a_script_without_a_guard_ends_with_a_line_that_names_it(tmp_path):
    text = write_words(tmp_path / "corpus.txt").read_text()
    (tmp_path / "corpus.txt").write_text(text * 1000)
    (tmp_path / "script.py").write_text(UNGUARDED)
    status, said = run_in(tmp_path, sys.executable, "script.py")
    assert status == 0 and 'needs `if __name__ == "__main__":`' in said


def run_as_a_notebook_does(folder, flags):
    """Three runs in one process: another precision each time, the second one in a thread."""

    def train(*more):
        train_accelerate.main(*train_accelerate.parse_arguments([str(folder / "recipe.yaml"), *flags, *more]))

    train("--dtype=float32")
    thread = threading.Thread(target=train, args=("--dtype=bfloat16",))
    thread.start()
    thread.join()
    train("--dtype=float32")
    os.write(1, b"done\n")


def test_a_notebook_trains_twice_and_in_a_thread(folder, tmp_path):
    log, flags = tmp_path / "log", [f"--out_dir={tmp_path / 'out'}"]
    assert finish(fork(call, run_as_a_notebook_does, (folder, flags), str(log), {})) == [0]
    said = log.read_text()
    assert said.count("best val loss") == 3 and said.count("), bfloat16, ") == 1 and "done" in said


# ---------------------------------------------------------------------------------------------------------------------
# Messages


MISSING = ["device", "backend", "eval_iters", "dataset", "wandb_log", "wandb_project", "wandb_run_name"]
MISSING += ["start", "num_samples", "top_k"]


@pytest.mark.parametrize("flag", MISSING)
def test_a_flag_of_nanogpt_is_answered_with_what_to_use_instead(flag, capsys):
    for argv in ([f"--{flag}=1"], [f"--{flag}", "1"]):
        with pytest.raises(SystemExit):
            train_accelerate.parse_arguments(argv)
        said = capsys.readouterr().err
        assert f"{flag} is a flag of nanoGPT: " in said and said.count("\n") == 1


def test_nanogpts_other_flags_are_flags_here(folder):
    line = "--compile=False --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128"
    line += " --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --decay_lr=False --learning_rate=1e-3 --bias=False"
    train_accelerate.parse_arguments([str(folder / "recipe.yaml"), *line.split()])


@pytest.mark.parametrize("flag", ["--seed", "--out_dir", "--corpus", "--dtype", "--no_such", "--tokenizer"])
def test_no_message_quotes_without_end(flag, tmp_path):
    write_words(tmp_path / "corpus.txt")
    command = [*TRAIN, write_recipe(tmp_path / "r.yaml", **TINY), "--corpus=corpus.txt", "--data_dir=data"]
    status, said = run_in(tmp_path, *command, f"{flag}={'x y' * 10_000}")
    assert status in (1, 2) and ": error: " in said and len(said) < 1200


def test_a_model_that_diverged_is_named_by_the_run_and_by_sample(folder, tmp_path):
    out_dir, log = tmp_path / "out", tmp_path / "log"
    flags = ["--learning_rate=1e20", "--grad_clip=0", "--max_iters=6", f"--out_dir={out_dir}"]
    assert finish(start(folder / "recipe.yaml", log, *flags)) == [1]
    assert "training has diverged" in error_of(log) and "learning_rate" in error_of(log)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for path in (out_dir / "history.jsonl", newest_complete(out_dir) / "state.json"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    status, said = run_in(tmp_path, sys.executable, "-m", "modeling_nanogpt.sample", "out")
    assert status == 2 and "has diverged" in said


def test_compile_without_a_compiler_is_refused_before_training(folder, tmp_path):
    (tmp_path / "bin").mkdir()
    lacking = {"PATH": str(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = ["--compile=true", f"--out_dir={tmp_path / 'out'}"]
    status, said = run_in(tmp_path, *TRAIN, str(folder / "recipe.yaml"), *flags, **lacking)
    assert status == 1 and "compile=true, but torch cannot compile here" in said
    assert not (tmp_path / "out").exists()
