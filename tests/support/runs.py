"""Runs of the trainer in processes of their own, which a test can kill, and which meet over loopback."""

import os
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

import train_accelerate
from modeling_nanogpt.training.hooks import Hooks
from support import PATIENCE, ROOT
from support.forks import fork
from support.texts import write_words
from support.tiny_run import TINY, write_recipe

HELD = []  # sockets that are bound and never closed, so that the system gives their ports to nobody else


def recipe_of(folder: Path, **flags) -> Path:
    """The tiny recipe in a file, with a text beside it."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_words(corpus)
    return write_recipe(folder / "recipe.yaml", **{"corpus": corpus, "data_dir": folder / "data"} | TINY | flags)


def start(recipe: Path, log: Path, *flags: str, before: tuple = (), environment: dict | None = None) -> BaseProcess:
    """Start the trainer, with its output in `log`. `before` are (function, *arguments) that it calls first."""
    return fork(call, run_trainer, ([str(recipe), *flags], before), str(log), environment or {})


def start_together(
    count: int, recipe: Path, log: Path, *flags: str, before=lambda rank: (), environment: dict | None = None
) -> list[BaseProcess]:
    """Start `count` processes that train together, as torchrun would. The output of process N goes to `log`.N."""
    running = []
    for rank, place in enumerate(places(count)):
        ours = place | (environment or {})
        running.append(start(recipe, Path(f"{log}.{rank}"), *flags, before=before(rank), environment=ours))
    return running


def call_together(count: int, function: Callable, *arguments, log: Path) -> list[BaseProcess]:
    """Start `count` processes that find each other and call a function. The output of process N goes to `log`.N."""
    return [fork(call, function, arguments, f"{log}.{rank}", place) for rank, place in enumerate(places(count))]


def places(count: int) -> list[dict]:
    """What torchrun would set in the environment of each of `count` processes, on CPUs."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]


def free_port() -> int:
    """A port on which nobody listens. The system gives it to nobody else while this process lives."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a trainer that is told the port may listen there
    held.bind(("127.0.0.1", 0))
    HELD.append(held)
    return held.getsockname()[1]


def call(function: Callable, arguments: tuple, log: str, environment: dict) -> None:
    """What such a process does."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)


def run_trainer(argv: list[str], before: tuple) -> None:
    for function, *arguments in before:
        function(*arguments)
    train_accelerate.run(argv, HOOKS)


def finish(*processes: BaseProcess, seconds: float = PATIENCE) -> list[int]:
    """Wait for all. If one fails, end the others. Returns the exit statuses, -N for a process that signal N killed."""
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes):
        late = time.monotonic() > deadline
        if late or any(process.exitcode for process in processes):
            # a launcher would end the others at once; here, each may still end by itself
            for process in processes:
                process.join(0 if late else 5)
                process.kill()
        time.sleep(0.01)
    for process in processes:
        process.join()
    assert time.monotonic() < deadline, "a process hung"
    return [process.exitcode for process in processes]


# ---------------------------------------------------------------------------------------------------------------------
# What may be done to a run from within


class LoggedStream:
    """A token stream that notes which windows are fetched: a line of offsets for each micro-batch."""

    def __init__(self, stream, descriptor):
        self.stream, self.descriptor = stream, descriptor

    def __len__(self):
        return len(self.stream)

    def batch(self, windows, block_size):
        os.write(self.descriptor, (" ".join(map(str, windows.offsets.tolist())) + "\n").encode())
        return self.stream.batch(windows, block_size)


class RunHooks(Hooks):
    """Hooks that call functions at given steps, and note in a file the windows that are trained on."""

    def __init__(self):
        self.step = None  # the step that the run is in
        self.at_steps, self.at_evaluations = defaultdict(list), defaultdict(list)
        self.windows_log = None  # a file descriptor

    def before_step(self, step):
        self.step = step
        for function, arguments in self.at_steps[step]:
            function(*arguments)

    def before_evaluation(self, step):
        for function, arguments in self.at_evaluations[step]:
            function(*arguments)

    def training_stream(self, stream, first_step):
        if self.windows_log is None:
            return stream
        os.write(self.windows_log, f"{first_step}\n".encode())
        return LoggedStream(stream, self.windows_log)


HOOKS = RunHooks()  # of the run in this process


def log_windows(path: str) -> None:
    """Note in a file the step that training begins with, and then the windows that are trained on."""
    HOOKS.windows_log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def read_windows(path: Path) -> tuple[int, list[list[int]]]:
    """The notes of log_windows."""
    first, *batches = path.read_text().splitlines()
    return int(first), [[int(offset) for offset in batch.split()] for batch in batches]


def die_at_file_operation(count: int, folder: str) -> None:
    """SIGKILL this process before its count-th file operation below a folder: open, mkdir, rename, remove ..."""
    left = count

    def hook(event, args):
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(args[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def at_step(step: int, function: Callable, *arguments) -> None:
    """Call a function when training comes to a step, before its windows are looked at."""
    HOOKS.at_steps[step].append((function, arguments))


def at_evaluation(step: int, function: Callable, *arguments) -> None:
    """Call a function when the model is about to be evaluated after so many steps."""
    HOOKS.at_evaluations[step].append((function, arguments))


def wait_for_signal(number: int, waiting: str) -> None:
    """Make a file to say that this process waits, and wait until the signal has come and has been handled."""
    handler, come = signal.getsignal(number), []

    def handle_and_note(*arguments):
        handler(*arguments)
        come.append(number)

    signal.signal(number, handle_and_note)
    Path(waiting).touch()
    while not come:
        time.sleep(0.005)
    signal.signal(number, handler)


def send_itself(number: int) -> None:
    """Send a signal to this very process."""
    os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------------------------------------------------
# What `accelerate launch` would start


def launch(configuration: str, *flags: str) -> tuple[str, dict]:
    """The launcher and the environment with which `accelerate launch` starts a script by one of our configurations."""
    parser = launch_command_parser()
    path = ROOT / "hub_configs" / "accelerate" / f"{configuration}.yaml"
    args = parser.parse_args(["--config_file", str(path), *flags, str(ROOT / "train_accelerate.py")])
    args, _, _ = _validate_launch_command(args)
    if not (args.use_fsdp or args.multi_gpu):
        return "python", prepare_simple_launcher_cmd_env(args)[1]
    environment = prepare_multi_gpu_env(args)  # fills in the options that torchrun is given, too
    options = ("nnodes", "node_rank", "nproc_per_node", "rdzv_endpoint")
    return "torchrun", environment | {key: vars(args).get(key) for key in options}
