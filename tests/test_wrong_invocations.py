"""Wrong invocations of every command: one line that names the mistake, at once, and nothing is written.

One process that has imported nothing forks for each invocation, so each is as fresh as a new process, and costs less.
"""

import json
import subprocess
import sys
from functools import partial

import pytest

import command_start
from support import PATIENCE, ROOT

SECONDS = 2  # a shell waits no longer for its answer; torch alone takes longer to import on a busy machine

# Forks for each [module, arguments] on stdin; a line of JSON for each: status, was torch loaded, output, seconds.
ZYGOTE = """
import json, os, runpy, sys, tempfile, time
import argparse, difflib, pathlib, yaml

for name, argv in json.load(sys.stdin):
    files = [tempfile.TemporaryFile() for _ in range(3)]
    began = time.perf_counter()
    child = os.fork()
    if not child:
        for number, file in zip((1, 2), files):
            os.dup2(file.fileno(), number)
        status = 0
        try:
            sys.orig_argv = [sys.executable, "-m", name, *argv]  # as command_start.py starts a command
            sys.argv = ["-m", *argv]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = -1
        sys.stdout.flush(), sys.stderr.flush()
        os.write(files[2].fileno(), json.dumps([status, "torch" in sys.modules]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    seconds = time.perf_counter() - began
    out, err, end = [os.pread(file.fileno(), 100_000, 0).decode() for file in files]
    print(json.dumps([*json.loads(end or "[null, null]"), out, err, seconds]), flush=True)
"""

TRAIN, PREPARE = "train_accelerate", "tokenization.prepare"
SAMPLE, CONVERT, EVALUATE, SIZING, COMPARE, BENCH, DEMO = (
    f"modeling_nanogpt.{name}" for name in ("sample", "convert", "evaluate", "sizing", "compare", "bench", "demo")
)
WRONG = [  # a command, its arguments, and what the answer names
    (TRAIN, "missing.yaml", "missing.yaml cannot be read"),
    (TRAIN, "config/train.py", "is Python, as in nanoGPT"),
    (TRAIN, "broken.yaml", "is not YAML"),
    (TRAIN, "list.yaml", "is not a list of `key: value` lines"),
    (TRAIN, "nested.yaml", "n_layer must be a single value"),
    (TRAIN, "good.yaml other.yaml", "at most one recipe"),
    (TRAIN, "good.yaml --batch_size=0", "batch_size=0"),
    (TRAIN, "good.yaml --batch_size=two", "'two' is not a whole number"),
    (TRAIN, "good.yaml --learning_rate=nan", "learning_rate=nan"),
    (TRAIN, "good.yaml --optimiser=adamw", "did you mean 'optimizer'"),
    (TRAIN, "good.yaml --optimizer=sgd", "invalid choice: 'sgd'"),
    (TRAIN, "good.yaml --eval_iters=200", "eval_iters is a flag of nanoGPT"),
    (TRAIN, "good.yaml --out_dir=$NOT_A_VARIABLE/out", "no variable NOT_A_VARIABLE"),
    (PREPARE, "--val_fraction=2", "val_fraction=2.0"),
    (PREPARE, "--tokenizer=bpe --vocab_size=10", "vocab_size=10"),
    (PREPARE, "--num_proc=0", "num_proc=0"),
    (PREPARE, "--n_layer=3", "n_layer"),
    (PREPARE, "corpus.txt", "corpus.txt"),
    (SAMPLE, "", "MODEL"),
    (SAMPLE, "model --temperature=-1", "--temperature=-1.0"),
    (SAMPLE, "model --top_k=many", "'many'"),
    (SAMPLE, "model --num_samples=0", "--num_samples=0"),
    (SAMPLE, "model --prompt=", "--prompt is empty"),
    (SAMPLE, "model --prompt=FILE:missing.txt", "missing.txt cannot be read"),
    (SAMPLE, "model --prompt=FILE:latin.txt", "latin.txt is not UTF-8"),
    (SAMPLE, "model --start=hello", "use --prompt"),
    (SAMPLE, "model another", "unexpected 'another'"),
    (SAMPLE, "model --revision=main", "--revision=main is for a Hub id"),
    (CONVERT, "", "SOURCE"),
    (CONVERT, "model", "DESTINATION"),
    (CONVERT, "model new --to=pickle", "invalid choice: 'pickle'"),
    (CONVERT, "model new third", "unexpected 'third'"),
    (CONVERT, "model new --tokeniser=x", "did you mean --tokenizer"),
    (CONVERT, "model empty.txt", "empty.txt is there already"),
    (CONVERT, "model new --to=gguf", "name a new .gguf file"),
    (CONVERT, "model new --dtype=f16", "keeps the dtype of the weights"),
    (CONVERT, "model new --cdn", "leave them out for --to=nanogpt"),
    (EVALUATE, "", "MODEL"),
    (EVALUATE, "model", "give --data_dir, --text or --tasks"),
    (EVALUATE, "model --data_dir=model", "is not a folder that tokenization.prepare made"),
    (EVALUATE, "model --text=missing.txt", "missing.txt cannot be read"),
    (EVALUATE, "model --text=latin.txt", "latin.txt is not UTF-8"),
    (EVALUATE, "model --text=empty.txt", "empty.txt is empty"),
    (EVALUATE, "model --text=good.yaml --tasks=lambada_openai", "cannot be combined"),
    (EVALUATE, "model --text=good.yaml --card", "README.md"),
    (EVALUATE, "model --text=good.yaml --batch_size=0", "--batch_size=0"),
    (EVALUATE, "model --text=good.yaml --split=test", "invalid choice: 'test'"),
    (EVALUATE, "model --eval_iters=3", "--eval_iters is a flag of nanoGPT"),
    (SIZING, "", "RECIPE|MODEL"),
    (SIZING, "missing.yaml", "missing.yaml cannot be read"),
    (SIZING, "broken.yaml", "is not YAML"),
    (SIZING, "list.yaml", "is not a list of `key: value` lines"),
    (SIZING, "good.yaml --memory=24", "24GiB"),
    (SIZING, "good.yaml --gpu=Voodoo2", "--gpu=Voodoo2"),
    (SIZING, "good.yaml --mfu=1.5", "--mfu=1.5"),
    (SIZING, "good.yaml --mfu=0", "--mfu=0.0"),
    (SIZING, "good.yaml --gpus=3", "--gpus=3"),
    (SIZING, "good.yaml --n_layer=many", "n_layer=many"),
    (SIZING, "good.yaml --batch_size=0", "batch_size=0"),
    (SIZING, "good.yaml --optimizer=sgd", "optimizer=sgd"),
    (SIZING, "good.yaml --bias=perhaps", "bias=perhaps"),
    (SIZING, "good.yaml --plot=picture.txt", "--plot=picture.txt"),
    (SIZING, "good.yaml --plot=nowhere/picture.png", "no such folder"),
    (SIZING, "model --n_layer=3", "--n_layer is for a recipe"),
    (COMPARE, "", "OUT_DIR"),
    (COMPARE, "missing", "history.jsonl cannot be read"),
    (COMPARE, "model", "history.jsonl cannot be read"),
    (COMPARE, "model --plot=picture.gif", "--plot=picture.gif"),
    (COMPARE, "model --loss=-1", "--loss=-1.0"),
    (DEMO, "", "MODEL"),
    (DEMO, "model --port=0", "--port=0"),
    (DEMO, "model --revision=main", "--revision=main is for a Hub id"),
    (DEMO, "model --prot=7860", "did you mean --port"),
    (BENCH, "", "train|sample"),
    (BENCH, "fly model", "invalid choice: 'fly'"),
    (BENCH, "train good.yaml --steps=3", "--steps=3"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What was answered to each invocation, and the names of the files that are there afterwards."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "model").mkdir()
    (folder / "good.yaml").write_text("block_size: 64\ngradient_accumulation_steps: 4\n")
    (folder / "broken.yaml").write_text("n_layer: [\n")
    (folder / "list.yaml").write_text("- n_layer\n")
    (folder / "nested.yaml").write_text("n_layer:\n  a: 1\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    before = sorted(folder.rglob("*"))
    process = subprocess.run(
        [sys.executable, "-c", ZYGOTE],
        input=json.dumps([[module, argv.split(" ") if argv else []] for module, argv, _ in WRONG]),
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    assert sorted(folder.rglob("*")) == before
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[f"{module} {argv}" for module, argv, _ in WRONG])
def test_a_mistake_is_answered_in_one_line_at_once(answers, number):
    module, _, named = WRONG[number]
    status, torch_was_loaded, out, err, seconds = answers[number]
    assert (status, out, torch_was_loaded) == (2, "", False), err
    (line,) = err.splitlines()
    program = "train_accelerate.py" if module == TRAIN else f"python -m {module}"
    assert line.startswith(f"{program}: error: ") and named in line
    assert seconds < SECONDS


def test_every_command_is_tried():
    installed = {command.args[0] for command in vars(command_start).values() if isinstance(command, partial)}
    assert len(installed) == 8 and installed <= {module for module, _, _ in WRONG}
    assert len(WRONG) >= 60
