"""Text to token ids: `datasets` tokenizes the documents and packs their ids into rows of one length."""

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

ROW = 1024  # tokens in a stored row; a unit of storage, not a context: windows cross rows


def encode(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, end_documents: bool, description: str
) -> tuple[Dataset, int]:
    """The token ids of all documents in order, as rows of ROW ids in the column `input_ids`, and their number.

    end_documents puts the tokenizer's end-of-text id after each document. Text that spells a special token stays text.
    Ids are uint16 where the vocabulary allows it, else uint32. The last row is filled up with zeros: the count tells
    where the stream ends.
    """
    id_type = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    ending = np.array([tokenizer.eos_token_id] if end_documents else [], dtype=id_type)

    def tokenize(batch):
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return {"input_ids": [np.append(np.array(ids, dtype=id_type), ending) for ids in encoded["input_ids"]]}

    tokens = texts.map(
        tokenize,
        batched=True,
        batch_size=100,
        remove_columns=["text"],
        features=Features({"input_ids": List(Value(id_type.name))}),
        desc=description,
    )
    documents = tokens.with_format("arrow")[:]["input_ids"]  # a chunked array of lists
    ids = pa.concat_arrays([chunk.flatten() for chunk in documents.chunks])
    padding = pa.array(np.zeros(-len(ids) % ROW, dtype=id_type))
    rows = pa.FixedSizeListArray.from_arrays(pa.concat_arrays([ids, padding]), ROW)
    return Dataset(pa.table({"input_ids": rows})), len(ids)
