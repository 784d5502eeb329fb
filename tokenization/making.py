"""A data_dir is made by `datasets`: one map tokenizes, another cuts rows of 1,024 tokens, save_to_disk writes them.

Text is read a shard at a time, and never stored as text: a shard is a Dataset in memory, whose map writes token ids
to a cache file. A run that was killed finds those files again. The data_dir appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from .arguments import DataArguments
from .corpora import Corpus, Unreached
from .encoders import Encoder, count_bytes, make_encoder
from .provenance import RECORD, asked_for, check_length
from .vocabularies import END_OF_TEXT, check_tokens, named_tokenizer, train_bpe_tokenizer, train_char_tokenizer
from .windows import TokenStream, views_of
from .workers import leave_if_worker, watched_workers

SHARD = 2**25  # characters, or ids, that are read before they are tokenized: what a kill can cost, seconds of work
STRETCH = 2**21  # characters that map hands to the encoder at a time
ROW = 1024  # tokens in a stored row; a unit of storage, not a context: windows cross rows
ROWS, PART = 2**12, 2**16  # rows that are cut at a time, and that a file holds
BPE_SAMPLE = 2**30  # bytes of the train split, from its start, that a bpe tokenizer is trained on
STAMP, TOKENIZER, LOCK = "made_from.json", "tokenizer", "lock"
COUNTS = ("documents", "bytes", "unknowns")


def make_data_dir(
    data_dir: Path,
    corpus: Corpus,
    arguments: DataArguments,
    minimum_tokens: int,
    model_tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Read, tokenize and store the corpus in a new data_dir, or go on from where a killed run has stopped.

    If another run is making it, wait until it has. Raises ValueError if it cannot be made.
    """
    leave_if_worker()
    staging = data_dir.with_name(data_dir.name + ".partial")
    new_parents = [parent for parent in staging.parents if not parent.exists()]
    try:
        with locked_folder(staging), calm(), watched_workers():
            if not (data_dir / RECORD).exists():  # else the run that was waited for has made it
                fill(staging, corpus, arguments, minimum_tokens, model_tokenizer)
                if data_dir.exists():
                    data_dir.rmdir()  # empty, as prepare has seen
                (staging / "whole").rename(data_dir)
                forget(staging)
    except OSError as error:
        kept = f"; what is done waits in {staging}" if staging.exists() else ""
        raise ValueError(f"data_dir={data_dir} cannot be written: {error}{kept}") from None
    finally:
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
    if corpus.left_out:
        kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in corpus.left_out.most_common(9))
        print(f"corpus={corpus.name}: left out {sum(corpus.left_out.values())} files: {kinds}", file=sys.stderr)
    for ending, count in corpus.spelled.items():
        print(
            f"corpus={corpus.name}: its text spells {ending} {count:,} times, which is text like any other: "
            f"--document_separator='{ending}' ends documents there",
            file=sys.stderr,
        )


def fill(
    staging: Path,
    corpus: Corpus,
    arguments: DataArguments,
    minimum_tokens: int,
    model_tokenizer: PreTrainedTokenizerFast | None,
) -> None:
    """Write all that a data_dir holds into the folder `whole`."""
    made_from = {"fingerprint": corpus.fingerprint, **asked_for(arguments, corpus)}
    cut = find_cut(corpus, arguments.val_fraction) if corpus.is_text else None
    stamp = {**made_from, "shard": SHARD}
    if goes_on(staging, stamp):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(staging / TOKENIZER)
    else:
        tokenizer = make_tokenizer(corpus, cut, arguments)
        save_tokenizer(tokenizer, staging / TOKENIZER)
        (staging / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    check_tokens(tokenizer, model_tokenizer, arguments.data_dir)
    if corpus.is_text and cut is None and tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={arguments.tokenizer} has no end-of-text token, which separates documents")

    id_type = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    stretches = concatenate_datasets(list(tokenize(staging, corpus, tokenizer, cut, arguments, id_type)))
    counts = stretches.select_columns(["split", *COUNTS]).to_pandas().groupby("split").sum().to_dict()
    if cut is not None:
        counts["documents"] = {"train": 1, "val": 1}  # half of one
    files = [file["filename"] for file in stretches.cache_files]
    sizes = {split: [len(open_tokens(file, split)) for file in files] for split in ("train", "val")}
    tokens = {split: sum(each) for split, each in sizes.items()}
    check_length(tokens, minimum_tokens)

    identity = hashlib.sha256(f"{corpus.sha256} {tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()[:11]
    whole = staging / "whole"
    for split in tokens:
        save_rows(whole / split, files, sizes[split], split, id_type, f"{identity}-{split}")
    (whole / "dataset_dict.json").write_text(json.dumps({"splits": list(tokens)}), encoding="utf-8")
    shutil.copytree(staging / TOKENIZER, whole, dirs_exist_ok=True)
    record = {
        "corpus": arguments.corpus,
        "sha256": corpus.sha256,
        "revision": corpus.revision,
        **made_from,
        "vocab_size": len(tokenizer),
        "tokens": tokens,
        **counts,
        "versions": {package: version(package) for package in ("datasets", "tokenizers", "transformers")},
    }
    (whole / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(corpus: Corpus, cut: int | None, arguments: DataArguments) -> PreTrainedTokenizerFast:
    """The tokenizer that the flags name. Raises ValueError if it cannot be had."""
    name = arguments.tokenizer
    if name not in ("char", "bpe"):
        return named_tokenizer(name)
    if not corpus.is_text:
        raise ValueError(
            f"corpus={corpus.name} is tokens already, and tokenizer={name} is made from text: --tokenizer names the "
            "one that they were made with: gpt2, a folder, or the text file whose characters they are"
        )
    if name == "char":  # of both splits, as in nanoGPT
        return train_char_tokenizer(str(text) for text, *_ in corpus.read())
    return train_bpe_tokenizer(train_texts(corpus, cut, arguments.val_fraction), arguments.vocab_size)


def train_texts(corpus: Corpus, cut: int | None, val_fraction: float) -> Iterator[str]:
    """The texts of the train split, as far as a bpe tokenizer is trained on them."""
    size = 0
    for split, text, _ in split_pieces(corpus, cut, val_fraction):
        if split == "train":
            yield text
            size += len(text.encode())
        if size >= BPE_SAMPLE:
            return


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the `tokenizers` library has no other for a disk that is full
        raise OSError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Splits: which text is for training and which for validation, the same on every machine


def find_cut(corpus: Corpus, val_fraction: float) -> int | None:
    """Where a single document is cut into train and val, in characters: nanoGPT's int(0.9 * len).

    None if there are several documents, which stay whole. Raises ValueError if the corpus has no text.
    """
    characters = documents = 0
    for text, ends, held_out in corpus.read():
        if documents or held_out is not None:
            return None
        characters += len(text)
        documents += ends
    if not documents:
        raise ValueError(f"corpus={corpus.name}: there is no text in it")
    return int(characters * (1 - exactly(val_fraction)))


def is_val(document: int, val_fraction: float) -> bool:
    """Whether the document of this number, from 0, is for validation: the second, then evenly spaced ones.

    So both splits have one as soon as there are two, and no later document has a say.
    """
    over, under = exactly(val_fraction).as_integer_ratio()
    return -(-document * over // under) > -((1 - document) * over // under)


@lru_cache
def exactly(fraction: float) -> Fraction:
    """What was meant: 0.1 is a tenth."""
    return Fraction(str(fraction))


def split_pieces(corpus: Corpus, cut: int | None, val_fraction: float, whole: bool = False) -> Iterator[tuple]:
    """The pieces of a corpus, each of one split: (split, text or ids, whether the document ends).

    A single document is cut at `cut`, and neither half ends. `whole` joins the pieces of a document, or of a half.
    """
    documents = characters = 0
    held: list[str] = []
    held_split = ""
    for content, ends, held_out in corpus.read():
        if cut is not None:
            at = min(max(cut - characters, 0), len(content))
            parts = [(split, part, False) for split, part in (("train", content[:at]), ("val", content[at:])) if part]
        else:
            held_out = is_val(documents, val_fraction) if held_out is None else held_out
            parts = [("val" if held_out else "train", content, ends)]
        documents, characters = documents + ends, characters + len(content)
        for split, part, ends in parts:
            if not whole:
                yield split, part, ends
                continue
            if held and split != held_split:
                yield held_split, "".join(held), False
                held = []
            held, held_split = [*held, str(part)], split
            if ends:
                yield split, "".join(held), True
                held = []
    if held:
        yield held_split, "".join(held), False


def shards_of(pieces: Iterator[tuple]) -> Iterator[list]:
    """Pieces in lists of at least SHARD characters or ids."""
    shard, size = [], 0
    for piece in pieces:
        shard.append(piece)
        size += len(piece[1])
        if size >= SHARD:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


# ---------------------------------------------------------------------------------------------------------------------
# The maps. Their functions take and return Arrow tables, which costs `datasets` next to nothing.


def tokenize(
    staging: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    cut: int | None,
    arguments: DataArguments,
    id_type: str,
) -> Iterator[Dataset]:
    """Tokenize the corpus shard by shard, unless a killed run has done so.

    A row of the result is a stretch of one split: its ids, and how much of what they were made from.
    """
    whole, end_id = False, tokenizer.eos_token_id
    if corpus.is_text:
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        whole = not open_encoder(tokenizer_json).cuts
        after = end_id if cut is None else None
        function = partial(encode_texts, tokenizer_json=tokenizer_json, end_id=after, id_type=id_type)
    else:
        corpus.vocab_size = len(tokenizer)
        function = partial(count_ids, sizes=count_bytes(tokenizer), end_id=end_id)
    counts = {key: Value("int64") for key in COUNTS}
    features = Features({"split": Value("string"), "input_ids": List(Value(id_type)), **counts})
    pieces = split_pieces(corpus, cut, arguments.val_fraction, whole)
    endings = {token for token in (END_OF_TEXT, tokenizer.eos_token) if token and token.startswith("<")}
    for number, shard in enumerate(shards_of(pieces)):
        size = sum(len(content) for _, content, _ in shard)
        for ending in endings if corpus.is_text else ():
            corpus.spelled += Counter({ending: sum(content.count(ending) for _, content, _ in shard)})
        splits, contents, ends = zip(*shard, strict=True)
        kind = pa.large_string() if corpus.is_text else pa.large_list(pa.uint32())
        name = f"tokens-{number:05d}"  # also the fingerprint: `datasets` would read the whole text to find one
        table = pa.table({"split": splits, "content": pa.array(contents, kind), "ends": ends})
        rows = Dataset(table, fingerprint=name)
        yield rows.with_format("arrow").map(
            function,
            batched=True,
            batch_size=max(1, len(rows) * STRETCH // size),
            num_proc=arguments.num_proc if arguments.num_proc > 1 else None,
            features=features,
            remove_columns=rows.column_names,
            cache_file_name=str(staging / f"{name}.arrow"),
            new_fingerprint=name,
            desc=f"Tokenizing shard {number + 1}",
        )


@lru_cache(maxsize=1)
def open_encoder(tokenizer_json: str) -> Encoder:
    """The encoder of a tokenizer.json, made once in each process."""
    return make_encoder(tokenizer_json)


def encode_texts(rows: pa.Table, tokenizer_json: str, end_id: int | None, id_type: str) -> pa.Table:
    """The ids of pieces of text, joined split by split; end_id, if there is one, follows each document."""
    encoder, stretches = open_encoder(tokenizer_json), []
    ending = np.array([] if end_id is None else [end_id], dtype=id_type)
    pieces = list(zip(*(rows[name].to_pylist() for name in ("split", "content", "ends")), strict=True))
    for split in ("train", "val"):
        mine = [(text, ends) for of_split, text, ends in pieces if of_split == split]
        texts, ends = [text for text, _ in mine], [each for _, each in mine]
        encoded, ids = encoder.encode(texts), [ending[:0]]
        for text_ids, ends_here in zip(encoded, ends, strict=True):
            ids += [text_ids, ending] if ends_here else [text_ids]
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        together = np.concatenate(ids, dtype=id_type, casting="same_kind")
        stretches.append((split, together, sum(ends), size, encoder.count_unknowns(texts, encoded)))
    return table_of(stretches)


def count_ids(rows: pa.Table, sizes: np.ndarray, end_id: int | None) -> pa.Table:
    """Ids that someone else made, as they are, joined split by split."""
    stretches = []
    for split in ("train", "val"):
        ids = rows.filter(pc.equal(rows["split"], split))["content"].combine_chunks().flatten().to_numpy()
        documents = 0 if end_id is None else int((ids == end_id).sum())
        stretches.append((split, ids, documents, int(sizes[ids].sum()), 0))
    return table_of(stretches)


def table_of(stretches: list[tuple]) -> pa.Table:
    """A row for each stretch: its split, its ids, and COUNTS."""
    splits, ids, *counts = zip(*stretches, strict=True)
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids)))
    return pa.table({"split": splits, "input_ids": lists, **dict(zip(COUNTS, counts, strict=True))})


@lru_cache(maxsize=2)  # a file that is closed again takes no memory
def open_tokens(file: str, split: str) -> TokenStream:
    """The ids of a split in a file that tokenize has written, without a copy."""
    chunks = []
    for batch in Dataset.from_file(file).data.to_batches():
        (ids,) = views_of(pa.chunked_array([batch["input_ids"]]))
        bounds = batch["input_ids"].offsets.to_numpy()
        bounds = bounds - bounds[0]
        parts = zip(batch["split"].to_pylist(), bounds, bounds[1:], strict=False)
        chunks += [ids[start:end] for name, start, end in parts if name == split and end > start]
    return TokenStream(chunks, sum(map(len, chunks)))


def save_rows(folder: Path, files: list[str], sizes: list[int], split: str, id_type: str, fingerprint: str) -> None:
    """Save the ids of a split as rows of ROW ids, of which only the last is shorter; a part at a time is in memory."""
    starts = np.cumsum([0, *sizes]).tolist()  # where each file begins in the stream
    count = -(-starts[-1] // ROW)
    names = [f"data-{part:05d}-of-{-(-count // PART):05d}.arrow" for part in range(-(-count // PART))]
    saved = folder / "part"
    for part, name in enumerate(names):
        rows = Dataset(pa.table({"row": np.arange(part * PART, min((part + 1) * PART, count))})).with_format("arrow")
        rows = rows.map(
            cut_rows,
            fn_kwargs={"files": files, "starts": starts, "split": split},
            batched=True,
            batch_size=ROWS,
            features=Features({"input_ids": List(Value(id_type))}),
            remove_columns=["row"],
            keep_in_memory=True,
            new_fingerprint=fingerprint,
            desc=f"Cutting {split} into rows",
        )
        rows.with_format(None).save_to_disk(saved, num_shards=1)
        (saved / "data-00000-of-00001.arrow").rename(folder / name)
    # The parts are one dataset: `datasets` opens the files that state.json lists.
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (saved / "dataset_info.json").rename(folder / "dataset_info.json")
    shutil.rmtree(saved)


def cut_rows(rows: pa.Table, files: list[str], starts: list[int], split: str) -> pa.Table:
    """Row i holds the ids from ROW * i on, before ROW * (i + 1)."""
    numbers = rows["row"].to_numpy()
    start, end = int(numbers[0]) * ROW, min((int(numbers[-1]) + 1) * ROW, starts[-1])
    parts = [
        open_tokens(file, split).read(max(start - first, 0), min(end, last) - first)
        for file, first, last in zip(files, starts, starts[1:], strict=False)
        if max(start, first) < min(end, last)  # a file may have no token of a split
    ]
    offsets = np.minimum(np.arange(len(numbers) + 1) * ROW, end - start).astype(np.int32)
    return pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)))})


# ---------------------------------------------------------------------------------------------------------------------
# Kills, other runs, and workers


def goes_on(staging: Path, stamp: dict) -> bool:
    """Whether a killed run has left tokens there that were made from the same; what is of no use is removed."""
    try:
        same = json.loads((staging / STAMP).read_text(encoding="utf-8")) == stamp
    except (OSError, ValueError):
        same = False
    for path in staging.iterdir():
        if same and path.name.startswith(("tokens-", TOKENIZER, STAMP)) or path.name == LOCK:
            continue  # what was half written has another name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return same


def forget(staging: Path) -> None:
    open_tokens.cache_clear()  # Windows removes no file that is open
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against other runs; waits for one that has it, and says so once.

    At the end the folder is removed, unless it holds tokens that the next run may go on from.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{folder}: another run is at work there; waiting for it", file=sys.stderr, flush=True)
            with suppress(FileNotFoundError):  # it has finished, and removed the folder
                lock.acquire()
        if lock.is_locked and (folder / LOCK).exists():
            break
        lock.release()
    try:
        yield
    except ValueError as mistake:
        if not isinstance(mistake, Unreached):  # what a network has broken off can go on; a mistake can not
            forget(folder)
        raise
    finally:
        if not list(folder.glob("tokens-*.arrow")):
            forget(folder)
        lock.release()


@contextmanager
def calm() -> Iterator[None]:
    """Keep the log of `datasets` off the screen, and Ctrl-C from the processes that tokenize: this one ends them."""
    level, handler, ours = datasets.logging.get_verbosity(), signal.getsignal(signal.SIGINT), os.getpid()
    interrupted = []

    def interrupt(*_):
        if os.getpid() == ours:
            interrupted.append(True)
            raise KeyboardInterrupt

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with suppress(ValueError):  # a thread that is not the main one gets no signals
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if interrupted:  # on its way out, `datasets` may raise something else
            raise KeyboardInterrupt from None
        raise
    finally:
        datasets.logging.set_verbosity(level)
        with suppress(ValueError):
            signal.signal(signal.SIGINT, handler)
        open_tokens.cache_clear()
