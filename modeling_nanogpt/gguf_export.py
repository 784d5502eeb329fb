"""A model as one GGUF file, which llama.cpp and the programs that are built on llama.cpp run.

The file holds a GPT-2 with its tokenizer. llama.cpp has two kinds of tokenizer that can give the ids of ours:

    gpt2    a byte-level BPE that cuts text into GPT-2's words: GPT-2's own, and what `--tokenizer=bpe` makes
    llama   SentencePiece's BPE. Without merges, it gives one token for each character of the vocabulary, and the
            tokens of the UTF-8 bytes for any other character

llama.cpp always computes GPT-2's tanh form of GELU. docs/clients.md says how far its log-probabilities are from ours.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from .configuration_nanogpt import NanoGPTConfig
from .conversion import StateDict, weights_from_gpt2, weights_to_gpt2

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # what llama.cpp calls such files
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # llama.cpp's types of tokens
SPACE = "\u2581"  # the character that stands for a space in the tokens of SentencePiece
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(0xFF)}  # 0xFF is in no text
# GPT-2 cuts this text into other words than its successors do: contractions, numbers, line ends, runs of spaces.
PROBE = "We'll DON'T  go: 12345 times\n\n\tif x==-1:\r\n  r\u00e9sum\u00e9 \u4e2d\u6587 _a1  "


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it: the lists go by id."""

    kind: str  # "gpt2" or "llama"
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The vocabulary with which llama.cpp gives the ids of this tokenizer. Raises ValueError if there is none."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    if spec["model"]["type"] == "WordLevel":
        raise ValueError(
            "the tokenizer has no tokens for bytes (its model is a WordLevel), and llama.cpp crashes at a character "
            "that has no token: train with --tokenizer=char, which has tokens for bytes"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, and llama.cpp would end texts at another token: name a tokenizer "
            "that has one by --tokenizer"
        )
    if sorted(ids.values()) != list(range(len(tokenizer))):
        raise ValueError(
            "the tokenizer has no token for some ids, and llama.cpp needs a token for each id: name another by "
            "--tokenizer"
        )
    ends_added(tokenizer)  # raises ValueError if llama.cpp cannot add the same tokens
    if is_characters(spec):
        return character_vocabulary(spec, ids)
    if is_byte_level(spec, tokenizer):
        return byte_level_vocabulary(spec, ids)
    raise ValueError(
        "llama.cpp would give other ids than this tokenizer: --to=gguf can write a character tokenizer (char), or a "
        "byte-level BPE that cuts text into GPT-2's words (bpe, gpt2)"
    )


def is_characters(spec: dict) -> bool:
    """Whether each token is a character or a byte, and a character without a token becomes the tokens of its bytes."""
    model = spec["model"]
    takes_text_as_it_is = spec["normalizer"] is None and spec["pre_tokenizer"] is None
    falls_back_to_bytes = model["type"] == "BPE" and model["byte_fallback"] and not model["merges"]
    return takes_text_as_it_is and falls_back_to_bytes and model["vocab"].keys() >= BYTE_TOKENS


def is_byte_level(spec: dict, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is a BPE on GPT-2's words. One pattern has many spellings, so the words of a text are compared."""
    model = spec["model"]
    if model["type"] != "BPE" or spec["normalizer"] or spec["pre_tokenizer"] is None:
        return False
    foreign_to_gpt2 = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if any(map(model.get, foreign_to_gpt2)):
        return False
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(PROBE)
    if [word for word, _ in words] != [word for word, _ in gpt2_words]:
        return False
    letters = set(pre_tokenizers.ByteLevel.alphabet()) - {"ÿ"}  # the letter for 0xFF, which is in no text
    return model["vocab"].keys() >= letters and (not model.get("ignore_merges") or merges_make_all_tokens(spec))


def merges_make_all_tokens(spec: dict) -> bool:
    """Whether the merges lead from the letters of each token to the token.

    llama.cpp always merges. A tokenizer with ignore_merges takes a word that is a token as it is, without merges. If
    all tokens can be merged, both give the same ids.
    """
    vocabulary = spec["model"]["vocab"]
    added = types_of_added(spec)
    pairs = [(left, right) for left, right in (pair.split(" ") for pair in merges_of(spec))]
    bpe = models.BPE(vocab=vocabulary, merges=pairs)
    return all(len(bpe.tokenize(token)) == 1 for token in vocabulary if token not in added)


def merges_of(spec: dict) -> list[str]:
    """The pairs of letters or tokens that a BPE joins, each with a space between."""
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]


def byte_level_vocabulary(spec: dict, ids: dict[str, int]) -> Vocabulary:
    """The tokens of a byte-level BPE, in the order of their ids."""
    tokens = sorted(ids, key=ids.__getitem__)
    added = types_of_added(spec)
    return Vocabulary("gpt2", tokens, [added.get(token, NORMAL) for token in tokens], merges_of(spec))


def character_vocabulary(spec: dict, ids: dict[str, int]) -> Vocabulary:
    """The tokens of a character tokenizer, in the order of their ids, as SentencePiece writes them.

    Raises ValueError if llama.cpp cannot tell a character from another one.
    """
    for character, reason in ((SPACE, "takes for a space"), ("\0", "takes for the end of a token")):
        if character in ids:
            raise ValueError(
                f"the tokenizer has the character U+{ord(character):04X}, which llama.cpp {reason}: prepare the data "
                "again without this character"
            )
    added = types_of_added(spec)
    tokens, types = [], []
    for token in sorted(ids, key=ids.__getitem__):
        kind = BYTE if token in BYTE_TOKENS else added.get(token, NORMAL)
        if token == "<0x20>" and " " not in ids:  # llama.cpp looks for a space only under its SentencePiece name
            token, kind = " ", NORMAL
        tokens.append(token.replace(" ", SPACE) if kind == NORMAL else token)
        types.append(kind)
    return Vocabulary("llama", tokens, types)


def types_of_added(spec: dict) -> dict[str, int]:
    """llama.cpp's types of the tokens that were added to a vocabulary. llama.cpp does not print a control token."""
    return {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in spec["added_tokens"]}


def ends_added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its token for the beginning before a text, and its end-of-text token behind it.

    Raises ValueError if the tokenizer adds other tokens.
    """
    plain, full = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for behind in (False, True):
            if full == begin * before + plain + end * behind:
                return before, behind
    added = " ".join(tokenizer.convert_ids_to_tokens(full))
    raise ValueError(
        f"the tokenizer encodes the text a as {added}, but llama.cpp only adds one token at each end: name another "
        "tokenizer by --tokenizer"
    )


def write_gguf(
    path: Path, name: str, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write a model and its tokenizer into one file, without the rows that pad our vocabulary.

    `dtype` is a key of FILE_TYPES: the number format of the matrices. llama.cpp expects vectors and positions in
    float32. q8_0 has one scale for each 32 numbers of a row. If the length of the rows is not a multiple of 32, the
    matrix is stored as f16.
    """
    import gguf  # of the extra `clients`

    formats = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, arch="gpt2")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.intermediate_size or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    add_tokenizer(writer, tokenizer)

    # GPT-2 always has biases. Through its own layout and back, the matrices lie as llama.cpp wants them: (out, in).
    weights = weights_from_gpt2(weights_to_gpt2(weights, len(tokenizer)))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for ours, tensor in weights.items():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        stored = formats[dtype.upper()]
        if tensor.ndim == 1 or theirs == "position_embd.weight":
            stored = formats.F32
        elif stored == formats.Q8_0 and tensor.shape[-1] % 32:
            stored = formats.F16
        data = gguf.quantize(tensor.to(torch.float32).numpy(), stored)
        writer.add_tensor(theirs, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Describe the tokenizer. The file names all special tokens: llama.cpp chooses those that a file leaves out."""
    vocabulary = read_vocabulary(tokenizer)
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre("gpt-2" if vocabulary.kind == "gpt2" else "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores([0.0] * len(vocabulary.tokens))
        writer.add_add_space_prefix(False)
    end = tokenizer.eos_token_id
    for write, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, end),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        write(end if token is None else token)
    before, behind = ends_added(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(behind)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
