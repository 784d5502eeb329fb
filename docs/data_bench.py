"""How fast text becomes tokens and tokens become batches, beside nanoGPT's own code on the same text.

    python docs/data_bench.py [--nanogpt CHECKOUT] [--corpus CORPUS] [--copies 24] [--repeats 3]

Each figure is the median of some repeats, with the lowest and the highest; ours and nanoGPT's take turns, each in a
fresh process, one process at a time. A prepare is timed from the start of its process to the end. nanoGPT's code runs
from its own files: prepare.py of openwebtext, given these documents for those it would download, and get_batch of
train.py.
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tokenization.arguments import DataArguments  # noqa: E402  found by the path above
from tokenization.corpora import STDLIB, open_corpus  # noqa: E402

WEB = "web-like"
WEB_BYTES = 13_850_000  # in one copy: 24 copies have 75 million tokens
BATCHES = [(12, 1024), (64, 256)]  # windows, tokens in one: nanoGPT's defaults for GPT-2 and for characters

# nanoGPT's prepare.py runs beside documents.jsonl, in one process. Only the source of its documents is another. It
# writes 1024 parts of each split, and must be told if there are fewer documents.
THEIR_PREPARE = """
import datasets, sys
load = datasets.load_dataset
datasets.load_dataset = lambda name, num_proc: load("json", data_files="documents.jsonl")
datasets.config.HF_DATASETS_CACHE = "cache"
source = open("prepare.py").read().replace("num_proc = 8", "num_proc = None")
source = source.replace("total_batches = 1024", "total_batches = min(1024, len(dset))")
exec(compile(source, "prepare.py", "exec"), {"__name__": "__main__", "__file__": "prepare.py"})
"""

# get_batch as it stands in train.py, with the names that it takes from there.
THEIR_BATCHES = """
import json, os, re, statistics, sys, time
import numpy as np, torch
(source,) = re.findall(r"^def get_batch.*?^    return x, y$", open(sys.argv[1]).read(), re.M | re.S)
data_dir, device_type, device = ".", "cpu", "cpu"
exec(source)
times = []
for batch_size, block_size in json.loads(sys.argv[2]):
    taken = []
    for _ in range(1000):
        started = time.perf_counter()
        get_batch("train")
        taken.append((time.perf_counter() - started) * 1e6)
    times.append(statistics.median(taken))
print(json.dumps(times))
"""

OUR_BATCHES = """
import json, statistics, sys, time
import torch
from tokenization.windows import open_stream, training_windows
stream, times = open_stream("data", "train"), []
for batch_size, block_size in json.loads(sys.argv[2]):
    taken = []
    for step in range(1000):
        started = time.perf_counter()
        drawn = training_windows(
            stream, order="random", seed=1337, step=step, count=batch_size, block_size=block_size
        )
        x, y = (torch.from_numpy(ids) for ids in stream.batch(drawn, block_size))
        taken.append((time.perf_counter() - started) * 1e6)
    times.append(statistics.median(taken))
print(json.dumps(times))
"""


def run(folder: Path, *command) -> tuple[str, float, float]:
    """What a Python process printed, the seconds it took, and those of the processor; ValueError if it failed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, command))[:80]} failed: {process.stderr.strip().splitlines()[-1]}")
    return process.stdout, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_documents(corpus: str) -> Iterator[str]:
    held = []
    for text, ends, _ in open_corpus(DataArguments(corpus=corpus)).read():
        held.append(text)
        if ends:
            yield "".join(held)
            held = []


def make_documents(words: Counter, seed: int) -> Iterator[str]:
    """Documents like those of the web, WEB_BYTES in all: words as frequent as given, and names that come once.

    A third of the sentences has such a name. Without them, an encoder that remembers words would look too fast.
    """
    draw = random.Random(seed)
    known, bounds = list(words), list(itertools.accumulate(words.values()))
    size = 0
    while size < WEB_BYTES:
        sentences = []
        for _ in range(draw.randint(4, 60)):
            sentence = draw.choices(known, cum_weights=bounds, k=draw.randint(5, 25))
            if draw.random() < 1 / 3:
                name = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(5, 10)))
                sentence.insert(draw.randrange(len(sentence)), name.capitalize())
            sentences.append(" ".join(sentence).capitalize() + ".")
        text = " ".join(sentences)
        size += len(text)
        yield text


def write_documents(corpus: str, copies: int, folder: Path) -> None:
    """The documents of a corpus, some times over, as a table that both sides read. Copies of WEB differ."""
    words = Counter()
    if corpus == WEB:
        for text in read_documents(STDLIB):
            words.update(re.findall("[A-Za-z]+", text))
    with (folder / "documents.jsonl").open("w") as file:
        for seed in range(copies):
            for text in make_documents(words, seed) if corpus == WEB else read_documents(corpus):
                file.write(json.dumps({"text": text}) + "\n")


def our_prepare(folder: Path) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, tokens."""
    flags = ["--corpus=documents.jsonl", "--tokenizer=gpt2", "--data_dir=data", "--val_fraction=0.0005"]
    run(folder, "-c", "import shutil; shutil.rmtree('data', ignore_errors=True)")
    _, *seconds = run(folder, "-m", "tokenization.prepare", *flags)
    return *seconds, sum(json.loads((folder / "data" / "prepared.json").read_text())["tokens"].values())


def their_prepare(folder: Path) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, tokens."""
    run(folder, "-c", "import shutil; shutil.rmtree('cache', ignore_errors=True)")
    _, *seconds = run(folder, "-c", THEIR_PREPARE)
    return *seconds, sum((folder / name).stat().st_size // 2 for name in ("train.bin", "val.bin"))


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def measure(sides: dict[str, Callable], repeats: int) -> dict[str, list]:
    """What each side's function returns, time after time, the sides taking turns."""
    results = {side: [] for side in sides}
    for _ in range(repeats):
        for side, function in sides.items():
            results[side].append(function())
    return results


def bench(corpus: str, copies: int, nanogpt: Path | None, repeats: int) -> None:
    """Print the table; raises ValueError if a side cannot run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(corpus, copies, folder)
        prepares = {"ours": lambda: our_prepare(folder)}
        batches = {"ours": lambda: json.loads(run(folder, "-c", OUR_BATCHES, "", json.dumps(BATCHES))[0])}
        if nanogpt is not None:
            try:
                (folder / "prepare.py").write_text((nanogpt / "data" / "openwebtext" / "prepare.py").read_text())
                train = (nanogpt / "train.py").resolve(strict=True)
            except OSError as error:
                raise ValueError(f"--nanogpt={nanogpt} is no checkout of nanoGPT: {error.strerror}") from None
            prepares["nanoGPT"] = lambda: their_prepare(folder)
            batches["nanoGPT"] = lambda: json.loads(run(folder, "-c", THEIR_BATCHES, train, json.dumps(BATCHES))[0])
        prepared = measure(prepares, repeats)
        drawn = measure(batches, repeats)
    counts = {side: taken[0][2] for side, taken in prepared.items()}
    print(f"{corpus}, {copies} times: " + ", ".join(f"{count:,} tokens ({side})" for side, count in counts.items()))
    print("prepare, from the start of the process to its end: seconds; Mtok/s; Mtok/s of processor time")
    for side, taken in prepared.items():
        seconds = spread([each[0] for each in taken], ".2f")
        rate = spread([each[2] / each[0] / 1e6 for each in taken], ".2f")
        print(f"  {side:8} {seconds:26} {rate:26} {spread([each[2] / each[1] / 1e6 for each in taken], '.2f')}")
    for i, (windows, length) in enumerate(BATCHES):
        print(f"a batch of {windows} x {length}: microseconds")
        for side, taken in drawn.items():
            print(f"  {side:8} {spread([each[i] for each in taken], '.0f')}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python docs/data_bench.py",
        usage=argparse.SUPPRESS,  # it would stand above each error
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--corpus", default=STDLIB, help=f"{WEB}, or as in training; default: {STDLIB}")
    parser.add_argument("--copies", type=int, default=24, help="how often over, as it is short; default: 24")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, whose own code is then run as well")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    try:
        bench(args.corpus, args.copies, args.nanogpt, args.repeats)
    except ValueError as mistake:
        parser.error(" ".join(str(mistake).split()))


if __name__ == "__main__":
    main()
