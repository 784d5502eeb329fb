"""nanoGPT's own prepared folder as a corpus: train.bin and val.bin, token ids in uint16.

Its meta.pkl is not read, as a pickle runs what it holds: the tokenizer is named by flag.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .documents import fingerprint_files
from .encoding import Encoded, TableEncoder, TiktokenEncoder, make_encoder

BLOCK = 2**22  # tokens read at a time
FILES = {"train": "train.bin", "val": "val.bin"}


def is_bins(name: str) -> bool:
    return all((Path(name) / file).is_file() for file in FILES.values())


class BinCorpus:
    """The ids of train.bin and val.bin. `fingerprint`, `sha256` and `revision` are as those of a FileCorpus."""

    is_text, flags = False, ()

    def __init__(self, name: str):
        self.name, self.revision, self.sha256 = name, None, ""
        self.paths = {split: Path(name) / file for split, file in FILES.items()}
        self.bytes = None
        self.fingerprint = fingerprint_files(list(self.paths.values()))
        for path in self.paths.values():
            size = path.stat().st_size
            if size % 2:
                raise ValueError(f"corpus: {path} has {size} bytes, but a token takes 2: it is cut short")

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """The ids in blocks, split by split."""
        digest = hashlib.sha256()
        for split, path in self.paths.items():
            with path.open("rb") as file:
                while block := file.read(2 * BLOCK):
                    digest.update(block)
                    yield split, np.frombuffer(block, dtype="<u2")
        self.sha256 = digest.hexdigest()

    def encoded(self, tokenizer, id_type: str) -> Iterator[dict[str, Encoded]]:
        """The ids, counted; raises ValueError where they are not those of the tokenizer."""
        sizes = count_bytes(tokenizer)
        for split, ids in self.read():
            if ids.max() >= len(tokenizer):
                raise ValueError(
                    f"corpus: {self.paths[split]} has the id {ids.max()}, but its tokenizer only "
                    f"{len(tokenizer)} tokens: --tokenizer names the one that it was made with"
                )
            documents = 0 if tokenizer.eos_token_id is None else int((ids == tokenizer.eos_token_id).sum())
            yield {split: Encoded(ids.astype(id_type), int(sizes[ids].sum()), documents, 0)}


def count_bytes(tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for (V,) int64; special tokens stand for none."""
    encoder, vocabulary = make_encoder(tokenizer.backend_tokenizer), tokenizer.get_vocab()
    if isinstance(encoder, TiktokenEncoder):  # its tokens are spelled in letters that stand for bytes
        sizes = [len(token) for token in vocabulary]
    elif isinstance(encoder, TableEncoder):
        sizes = [len(token.encode()) if len(token) == 1 else 1 for token in vocabulary]
    else:
        sizes = [len(tokenizer.decode([i]).encode()) for i in vocabulary.values()]
    result = np.zeros(len(tokenizer), dtype=np.int64)
    result[list(vocabulary.values())] = sizes
    result[tokenizer.all_special_ids] = 0
    return result
