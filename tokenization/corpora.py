"""Where text comes from: a corpus by its name becomes documents, and documents become a train and a val split."""

import glob
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value

STDLIB = "python-stdlib"
# Left out of the standard library: tests, generated tables, what pip installed, and what differs between machines.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}


def find_documents(corpus: str) -> list[Path]:
    """The files of a corpus, sorted: `python-stdlib`, one text file, a folder of .txt files, or a glob.

    Raises ValueError where there are none.
    """
    if corpus == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not STDLIB_SKIPPED & set(path.relative_to(root).parts)]
        paths = [path for path in paths if not path.name.startswith("_sysconfigdata")]
    elif Path(corpus).is_file():
        paths = [Path(corpus)]
    elif Path(corpus).is_dir():
        paths = [path for path in Path(corpus).rglob("*.txt") if path.is_file()]
        if not paths:
            raise ValueError(f"corpus={corpus}: the folder holds no .txt file; a glob such as {corpus}/**/*.md may do")
    else:
        paths = [Path(path) for path in glob.glob(corpus, recursive=True) if Path(path).is_file()]
    if not paths:
        raise ValueError(f"corpus={corpus}: no such file, folder or glob; {STDLIB} is always there")
    return sorted(paths, key=lambda path: path.as_posix())


def read_document(path: Path) -> str:
    """The text of a file to the last character, line ends as they are; raises ValueError where it is not UTF-8."""
    try:
        if path.suffix == ".py":  # a Python file may name an encoding of its own in its first lines
            with tokenize.open(path) as file:
                file.reconfigure(newline="")
                return file.read()
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {path} is not UTF-8 text (at byte {error.start})") from None
    except (OSError, SyntaxError, LookupError) as error:  # LookupError: an encoding that is none of text
        raise ValueError(f"corpus: {path} cannot be read: {error}") from None


def read_corpus(corpus: str) -> Iterator[str]:
    """Its documents in a fixed order, empty files left out; raises ValueError where nothing is left."""
    empty = True
    for path in find_documents(corpus):
        text = read_document(path)
        if text:
            empty = False
            yield text
    if empty:
        raise ValueError(f"corpus={corpus}: there is no text in it")


def split_documents(documents: list[str]) -> dict[str, list[str]]:
    """Nine tenths for training and one for validation: several documents whole, a single one by position.

    The validation documents are evenly spaced, so the split is the same on every machine.
    """
    if len(documents) == 1:
        cut = int(0.9 * len(documents[0]))  # characters; nanoGPT's own cut
        return {"train": [documents[0][:cut]], "val": [documents[0][cut:]]}
    held_out = max(1, len(documents) // 10)
    val = {(k + 1) * len(documents) // held_out - 1 for k in range(held_out)}
    return {
        "train": [text for i, text in enumerate(documents) if i not in val],
        "val": [text for i, text in enumerate(documents) if i in val],
    }


def load_corpus(documents: list[str]) -> DatasetDict:
    """The splits as datasets with one column, `text`, a row for each document."""
    features = Features({"text": Value("large_string")})
    return DatasetDict(
        {split: Dataset.from_dict({"text": texts}, features) for split, texts in split_documents(documents).items()}
    )
