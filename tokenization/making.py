"""A data_dir is made: text streams through the tokenizer to disk, a kill is made good, and it appears whole."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .bins import BinCorpus
from .bpe import train_bpe_tokenizer
from .char import train_char_tokenizer
from .corpora import FileCorpus, HubCorpus
from .encoding import Encoded, encode_batches, make_encoder
from .loading import check_learned, load_tokenizer, named_tokenizer
from .record import RECORD, asked_for, check_length
from .shards import JOURNAL, LOCK, SHARD, SplitWriter, locked_folder, read_journal, write_journal
from .splits import Splitter, find_cut

BPE_SAMPLE = 2**30  # bytes of the train split, from its start, that a bpe tokenizer is trained on

Corpus = FileCorpus | HubCorpus | BinCorpus


def make_data_dir(
    data_dir: Path,
    corpus: Corpus,
    arguments: DataArguments,
    minimum_tokens: int,
    learned: PreTrainedTokenizerBase | None,
) -> None:
    """Read, tokenize and store the corpus in a new data_dir, or go on where a killed run has stopped.

    Where another run is making it, wait until it has. Raises ValueError where it cannot be made.
    """
    staging = data_dir.with_name(data_dir.name + ".partial")
    new_parents = [parent for parent in staging.parents if not parent.exists()]
    try:
        with locked_folder(staging):
            try:
                if (data_dir / RECORD).exists():  # the run that was waited for has made it
                    return
                fill(staging, corpus, arguments, minimum_tokens, learned)
                (staging / LOCK).unlink()
                if data_dir.exists():
                    data_dir.rmdir()  # empty, as prepare has seen
                staging.rename(data_dir)
            finally:
                if not (staging / JOURNAL).exists():  # nothing to go on from
                    shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        kept = f"; what is done waits in {staging}" if (staging / JOURNAL).exists() else ""
        raise ValueError(f"data_dir={data_dir} cannot be written: {error}{kept}") from None
    finally:
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def fill(
    staging: Path,
    corpus: Corpus,
    arguments: DataArguments,
    minimum_tokens: int,
    learned: PreTrainedTokenizerBase | None,
) -> None:
    """Write all that a data_dir holds."""
    made_from = {"fingerprint": corpus.fingerprint, **asked_for(arguments, corpus)}
    journal = read_journal(staging, made_from)
    if journal:
        tokenizer, cut = load_tokenizer(str(staging)), journal["cut"]
    else:
        cut = find_cut(corpus, arguments.val_fraction) if corpus.is_text else None
        tokenizer = make_tokenizer(corpus, cut, arguments)
        save_tokenizer(tokenizer, staging)
    check_learned(tokenizer, learned, arguments.data_dir)
    if corpus.is_text and cut is None and tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={arguments.tokenizer} has no end-of-text token, which separates documents")

    id_type = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    writers = {
        split: SplitWriter(staging / split, id_type, journal.get("splits", {}).get(split))
        for split in ("train", "val")
    }
    written = in_files = count_tokens(writers)
    started = time.perf_counter()
    bar = open_bar(corpus.bytes, sum(writer.state["bytes"] for writer in writers.values()))
    for parts, state in encode_corpus(corpus, tokenizer, cut, arguments, id_type, journal.get("state")):
        for split, part in parts.items():
            writers[split].write(part)
        tokens = count_tokens(writers)
        if state and tokens - in_files >= SHARD:
            in_files = tokens
            states = {split: writer.finish_file() for split, writer in writers.items()}
            write_journal(staging, {"made_from": made_from, "cut": cut, "state": state, "splits": states})
        bar.set_postfix_str(f"{(tokens - written) / (time.perf_counter() - started):,.0f} tok/s", refresh=False)
        bar.update(sum(part.bytes for part in parts.values()))
    bar.close()

    identity = hashlib.sha256(f"{corpus.sha256} {tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()
    for split, writer in writers.items():
        writer.finish(f"{identity[:11]}-{split}")
        if cut is not None:
            writer.state["documents"] = 1  # half of one
    (staging / "dataset_dict.json").write_text(json.dumps({"splits": list(writers)}))
    record = {
        "corpus": arguments.corpus,
        "sha256": corpus.sha256,
        "fingerprint": corpus.fingerprint,
        "revision": corpus.revision,
        **asked_for(arguments, corpus),
        "vocab_size": len(tokenizer),
        "vocab_size_asked": arguments.vocab_size,
        **{
            key: {split: writer.state[key] for split, writer in writers.items()}
            for key in ("documents", "bytes", "tokens", "unknowns")
        },
        "versions": {package: version(package) for package in ("datasets", "tokenizers", "transformers")},
    }
    check_length(record["tokens"], minimum_tokens)
    (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    (staging / JOURNAL).unlink(missing_ok=True)


def make_tokenizer(corpus: Corpus, cut: int | None, arguments: DataArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the flags name; raises ValueError where there is none."""
    name = arguments.tokenizer
    if name not in ("char", "bpe"):
        return named_tokenizer(name)
    if not corpus.is_text:
        raise ValueError(
            f"corpus={corpus.name} is tokens already, and tokenizer={name} is made from text: --tokenizer names the "
            "one that they were made with: gpt2, a folder, or the text file whose characters they are"
        )
    if name == "char":  # of both splits, as in nanoGPT
        return train_char_tokenizer(text for text, _ in corpus.read())
    return train_bpe_tokenizer(train_texts(corpus, cut, arguments.val_fraction), arguments.vocab_size)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the `tokenizers` library has no other for a disk that is full
        raise OSError(str(error)) from None


def train_texts(corpus: FileCorpus | HubCorpus, cut: int | None, val_fraction: float) -> Iterator[str]:
    """The texts of the train split, as far as a bpe tokenizer is trained on them."""
    size = 0
    for batch, _ in Splitter(corpus, cut, val_fraction, whole=False).batches():
        for text in (text for split, text, _ in batch if split == "train"):
            yield text
            size += len(text.encode())
        if size >= BPE_SAMPLE:
            return


def encode_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cut: int | None,
    arguments: DataArguments,
    id_type: str,
    state: dict | None,
) -> Iterator[tuple[dict[str, Encoded], dict | None]]:
    """The ids of the corpus in order, from a state on, each batch with the state after it."""
    if not corpus.is_text:
        return ((parts, None) for parts in corpus.encoded(tokenizer, id_type))
    encoder = make_encoder(tokenizer.backend_tokenizer)
    batches = Splitter(corpus, cut, arguments.val_fraction, not encoder.cuts, state).batches()
    end_id = tokenizer.eos_token_id if cut is None else None
    return encode_batches(batches, encoder, end_id, id_type, arguments.num_proc)


def count_tokens(writers: dict[str, SplitWriter]) -> int:
    return sum(writer.state["tokens"] for writer in writers.values())


def open_bar(size: int | None, done: int) -> tqdm:
    """A progress bar in bytes of text; where nobody watches, it only shows in long runs, and seldom."""
    watched = sys.stderr.isatty()
    return tqdm(
        desc="tokenize",
        total=size,
        initial=done,
        unit="B",
        unit_scale=True,
        mininterval=0.5 if watched else 10,
        delay=0 if watched else 10,
    )
