"""A data_dir on the Hub: shared as a dataset that `load_dataset` loads, and found there by those who train on it."""

from pathlib import Path

from .documents import first_line
from .record import read_record

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train/*.arrow
  - split: val
    path: val/*.arrow
---

# {name}

`{corpus}` as token ids, {train:,} for training and {val:,} for validation, in rows of 1,024 (column `input_ids`). The
rows are one stream: a document ends with the tokenizer's end-of-text token, not with a row, and the last row is filled
up with zeros. The tokenizer ({tokenizer}, {vocab_size:,} tokens) is beside them; [prepared.json](prepared.json) says
what they were made from.

Train on it with `--corpus= --data_dir={name}`.
"""


def find_data_dir(name: str, corpus: str | None) -> Path:
    """The local folder of a data_dir: itself or, where there is neither that nor a corpus, its copy of the Hub's.

    Raises ValueError where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if corpus is not None or Path(name).exists() or name.count("/") != 1:
        return Path(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return Path(name)
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # of HTTP, of the Hub, of the disk
        raise ValueError(
            f"data_dir={name} is not prepared here, there is no --corpus to prepare it from, and from the Hub it "
            f"cannot be fetched: {type(error).__name__}: {first_line(error)}"
        ) from None


def push_data_dir(data_dir: Path, name: str) -> str:
    """Upload a data_dir as a private dataset of this name, with a card; returns its address."""
    from huggingface_hub import HfApi

    record = read_record(data_dir)
    card = CARD.format(
        name=name, **record["tokens"], **{key: record[key] for key in ("corpus", "tokenizer", "vocab_size")}
    )
    try:
        api = HfApi()
        address = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        name = address.repo_id
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name, repo_type="dataset")
        api.upload_folder(folder_path=data_dir, repo_id=name, repo_type="dataset")
    except Exception as error:
        raise ValueError(f"push_to_hub={name}: {type(error).__name__}: {first_line(error)}") from None
    return str(address)
