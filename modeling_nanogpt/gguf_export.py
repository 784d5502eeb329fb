"""A model as one GGUF file, which llama.cpp and the programs that are built on llama.cpp run.

The file holds a GPT-2 with its tokenizer. llama.cpp has two kinds of tokenizer that can give the ids of ours:

    gpt2    a byte-level BPE that cuts text into GPT-2's words: GPT-2's own, and what `--tokenizer=bpe` makes
    llama   SentencePiece's BPE: without merges, it is one token for each character, and bytes for other characters

llama.cpp always computes GPT-2's tanh form of GELU. docs/clients.md says how far its logits are from ours.
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
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
# A text that GPT-2 cuts into other words than its successors do: contractions, numbers, line ends, runs of spaces.
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
    spec, ids = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    if spec["model"]["type"] == "WordLevel":
        raise ValueError(
            "the tokenizer has no tokens for bytes (its model is a WordLevel), and llama.cpp dies of a character that "
            "has no token: train with --tokenizer=char, which has both"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, and llama.cpp would take another token for one")
    if sorted(ids.values()) != list(range(len(tokenizer))):
        raise ValueError("the tokenizer has no token for some ids, and llama.cpp needs one for each")
    ends_added(tokenizer)
    if is_characters(spec):
        return character_vocabulary(spec, ids)
    if is_byte_level(spec, tokenizer):
        return byte_level_vocabulary(spec, ids)
    raise ValueError(
        "llama.cpp would give other ids than this tokenizer: --to=gguf can write a character tokenizer (char), and a "
        "byte-level BPE that cuts text into GPT-2's words (bpe, gpt2)"
    )


def is_characters(spec: dict) -> bool:
    """Whether the tokens are characters, and all bytes for characters that have no token."""
    model = spec["model"]
    plain = spec["normalizer"] is None and spec["pre_tokenizer"] is None
    fallback = model["type"] == "BPE" and model["byte_fallback"] and not model["merges"]
    return plain and fallback and model["vocab"].keys() >= BYTE_TOKENS


def is_byte_level(spec: dict, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is a BPE on GPT-2's words. The words of a text show that, whichever way the pattern is spelled."""
    model = spec["model"]
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or spec["normalizer"] or spec["pre_tokenizer"] is None or any(map(model.get, unlike)):
        return False
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(PROBE)
    if [word for word, _ in words] != [word for word, _ in gpt2_words]:
        return False
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    return model["vocab"].keys() >= letters and (not model.get("ignore_merges") or merges_make_all_tokens(spec))


def merges_make_all_tokens(spec: dict) -> bool:
    """Whether the merges lead from the letters of each token to the token: then it does not matter to ignore them."""
    added, vocabulary = types_of_added(spec), spec["model"]["vocab"]
    pairs = [(left, right) for left, right in (pair.split(" ") for pair in merges_of(spec))]
    library = models.BPE(vocab=vocabulary, merges=pairs)
    return all(len(library.tokenize(token)) == 1 for token in vocabulary if token not in added)


def merges_of(spec: dict) -> list[str]:
    """The pairs of letters or tokens that a BPE joins, each with a space between."""
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]


def byte_level_vocabulary(spec: dict, ids: dict[str, int]) -> Vocabulary:
    tokens = sorted(ids, key=ids.__getitem__)
    added = types_of_added(spec)
    return Vocabulary("gpt2", tokens, [added.get(token, NORMAL) for token in tokens], merges_of(spec))


def character_vocabulary(spec: dict, ids: dict[str, int]) -> Vocabulary:
    """Raises ValueError for a character that llama.cpp cannot tell from another one."""
    for character, reason in ((SPACE, "takes for a space"), ("\0", "takes for the end of a token")):
        if character in ids:
            raise ValueError(
                f"the tokenizer has the character U+{ord(character):04X}, which llama.cpp {reason}: prepare the data "
                "again without this character"
            )
    added, tokens, types = types_of_added(spec), [], []
    for token in sorted(ids, key=ids.__getitem__):
        kind = BYTE if token in BYTE_TOKENS else added.get(token, NORMAL)
        if token == "<0x20>" and " " not in ids:  # llama.cpp looks for a space under its SentencePiece name alone
            token, kind = " ", NORMAL
        tokens.append(token.replace(" ", SPACE) if kind == NORMAL else token)
        types.append(kind)
    return Vocabulary("llama", tokens, types)


def types_of_added(spec: dict) -> dict[str, int]:
    """The types of the tokens that were added to a vocabulary. llama.cpp shows no text for a control token."""
    return {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in spec["added_tokens"]}


def ends_added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts a token before a text, and behind it. Raises ValueError if it adds any others."""
    plain, full = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for behind in (False, True):
            if full == begin * before + plain + end * behind:
                return before, behind
    added = " ".join(tokenizer.convert_ids_to_tokens(full))
    raise ValueError(f"the tokenizer makes {added} of the text a, and llama.cpp only adds one token at each end")


def write_gguf(
    path: Path, name: str, config: NanoGPTConfig, weights: StateDict, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write a model and its tokenizer into one file. What pads our vocabulary is cut off, as in a stock GPT-2.

    `dtype` is a key of FILE_TYPES, and is for the matrices. llama.cpp expects vectors and positions in float32. q8_0
    has one scale for 32 numbers of a row: if the rows of a matrix have another length, the matrix is stored as f16.
    """
    import gguf  # of the extra `clients`

    f32, f16, q8_0, chosen = (gguf.GGMLQuantizationType[each.upper()] for each in ("f32", "f16", "q8_0", dtype))
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
        stored = f32 if tensor.ndim == 1 or theirs == "position_embd.weight" else chosen
        if stored == q8_0 and tensor.shape[-1] % 32:
            stored = f16
        data = gguf.quantize(tensor.to(torch.float32).numpy(), stored)
        writer.add_tensor(theirs, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Describe the tokenizer. What is not said, llama.cpp chooses: it would take some token for the end of a text."""
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
    for add, own in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, end),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        add(end if own is None else own)
    before, behind = ends_added(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(behind)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
