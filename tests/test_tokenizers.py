"""The char and bpe tokenizers: no text is lost, their ids are the expected ones, and they load without the project."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from support import PATIENCE
from support.needs import needs_gpt2
from support.texts import END, HARD_TEXTS, TEXT, random_texts
from tokenization import encoders, vocabularies
from tokenization.vocabularies import (
    make_gpt2_tokenizer,
    read_char_tokenizer,
    same_tokenizer,
    train_bpe_tokenizer,
    train_char_tokenizer,
)

BPE_SIZE = 600

MODES = ["char", "bpe"]


def make_tokenizer(mode):
    return train_char_tokenizer([TEXT]) if mode == "char" else train_bpe_tokenizer([TEXT], BPE_SIZE)


@pytest.fixture(scope="module")
def tokenizers():
    return {mode: make_tokenizer(mode) for mode in MODES}


@pytest.fixture(params=MODES)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def encode(tokenizer, text):
    """The ids of text as training text is encoded: what spells a special token stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# No text is lost


@pytest.mark.parametrize("text", HARD_TEXTS, ids=ascii)
def test_a_hard_text_round_trips(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_random_unicode_round_trips(tokenizer):
    texts = random_texts(600, seed=0)
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert tokenizer.decode(ids) == text, ascii(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, ascii(text)


def test_every_id_is_below_the_vocabulary_size(tokenizer):
    largest = max(max(ids) for ids in encode(tokenizer, random_texts(200, seed=1)))
    assert largest < len(tokenizer)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))  # no holes: the ids fit an embedding


def test_every_single_id_decodes(tokenizer):
    assert all(isinstance(tokenizer.decode([i]), str) for i in range(len(tokenizer)))


def test_no_loader_is_told_to_tidy_what_it_decodes(tokenizer):
    assert tokenizer.clean_up_tokenization_spaces is False  # some versions of transformers heed it for these, some not


def test_text_that_spells_the_special_token_is_text_in_training_and_special_in_a_prompt(tokenizer):
    assert tokenizer.eos_token_id not in encode(tokenizer, f"a{END}b{END}")
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]


def test_nothing_is_added_to_a_prompt(tokenizer):
    assert tokenizer(TEXT[:200])["input_ids"] == encode(tokenizer, TEXT[:200])


# ---------------------------------------------------------------------------------------------------------------------
# What a batch of prompts gets


def test_end_of_text_begins_and_ends_and_is_the_unknown_token(tokenizer):
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.unk_token == END
    assert tokenizer.eos_token_id == tokenizer.bos_token_id
    assert tokenizer.decode([tokenizer.eos_token_id]) == END
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_padding_has_a_token_of_its_own_which_no_text_has(tokenizer):
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    letters = "".join(map(chr, range(0x20, 0x250)))  # among them those that GPT-2 writes for bytes
    for text in [*HARD_TEXTS, "<|pad|> <0xFF>", letters]:
        ids = encode(tokenizer, text)
        assert tokenizer.pad_token_id not in ids and tokenizer.decode(ids) == text
    assert len(tokenizer) == len(tokenizer.get_vocab()) == max(tokenizer.get_vocab().values()) + 1
    assert tokenizer.decode([tokenizer.pad_token_id], skip_special_tokens=True) == ""


def test_ends_of_texts_are_targets_and_padding_is_not(tokenizer):
    rows = [tokenizer(text + tokenizer.eos_token) for text in ("to be", "or not to be")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    ends, padding = (batch["input_ids"] == i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id))
    assert ends.sum() == 2 and padding.any()
    assert (batch["labels"][ends] != -100).all() and (batch["labels"][padding] == -100).all()


def padding_with_the_end(tokenizer):
    """The same tokenizer as earlier releases made it: the byte 0xFF has its token, the end-of-text token pads."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == END]
    name = "<0xFF>" if "<0xFE>" in spec["model"]["vocab"] else "ÿ"
    spec["model"]["vocab"][name] = spec["model"]["vocab"].pop("<|pad|>")
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **tokens)


def test_a_tokenizer_of_an_earlier_release_is_the_same(tokenizer):
    earlier = padding_with_the_end(tokenizer)
    assert earlier.get_vocab() != tokenizer.get_vocab()
    assert same_tokenizer(earlier, tokenizer) and same_tokenizer(tokenizer, earlier)
    assert encode(earlier, TEXT) == encode(tokenizer, TEXT)


def test_a_batch_is_padded_on_the_left(tokenizer):
    prompts = ["def f(x):", "def f(x):\n    return some(x)", "d"]
    batch = tokenizer(prompts, padding=True)
    width = max(len(encode(tokenizer, prompt)) for prompt in prompts)
    for prompt, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        own = encode(tokenizer, prompt)
        missing = width - len(own)
        assert ids == [tokenizer.pad_token_id] * missing + own
        assert mask == [0] * missing + [1] * len(own)


# ---------------------------------------------------------------------------------------------------------------------
# char: nanoGPT's ids


def test_char_ids_are_nanogpts(tokenizers):
    characters = sorted(set(TEXT))  # as nanoGPT's data/shakespeare_char/prepare.py has it
    stoi = {character: i for i, character in enumerate(characters)}
    assert encode(tokenizers["char"], TEXT) == [stoi[character] for character in TEXT]


def test_char_vocabulary_is_the_characters_then_256_bytes_then_end_of_text(tokenizers):
    count = len(set(TEXT))
    assert len(tokenizers["char"]) == tokenizers["char"].vocab_size + 1 == count + 256 + 1
    assert tokenizers["char"].eos_token_id == count + 256


def test_char_spells_an_unseen_character_by_its_bytes(tokenizers):
    count = len(set(TEXT))
    assert "\N{EURO SIGN}" not in TEXT
    assert encode(tokenizers["char"], "a\N{EURO SIGN}") == [
        sorted(set(TEXT)).index("a"),
        *(count + byte for byte in "\N{EURO SIGN}".encode()),
    ]


def test_char_ids_do_not_depend_on_the_order_of_the_texts():
    texts = ["zebra", "\U0001f600", "apple\n", "\u00e9"]
    assert train_char_tokenizer(texts).get_vocab() == train_char_tokenizer(reversed(texts)).get_vocab()


def test_char_sees_characters_of_the_astral_plane_as_one_token():
    tokenizer = train_char_tokenizer(["\U0001f600b\U0010ffff"])
    assert encode(tokenizer, "\U0001f600\U0010ffffb") == [1, 2, 0]


# ---------------------------------------------------------------------------------------------------------------------
# bpe: GPT-2's algorithm

GPT2_WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_letters():
    """GPT-2's letter for each byte: the byte itself if it prints, else the next letter from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def slow_bpe(text, vocabulary, merges):
    """The ids of text: in each word the pair that was merged first is joined, until there is none."""
    letters = byte_letters()
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    ids = []
    for word in GPT2_WORDS.findall(text):
        parts = [letters[byte] for byte in word.encode()]
        while True:
            pairs = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocabulary[part] for part in parts]
    return ids


def read_model(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))["model"]


def test_bpe_ids_are_those_of_a_slow_bpe_over_its_merges(tokenizers, tmp_path):
    model = read_model(tokenizers["bpe"], tmp_path)
    assert len(model["merges"]) == BPE_SIZE - 257
    for text in [TEXT, *HARD_TEXTS, *(TEXT[i : i + 97] for i in range(0, 2000, 61))]:
        assert encode(tokenizers["bpe"], text) == slow_bpe(text, model["vocab"], model["merges"]), ascii(text[:99])


def test_bpe_vocabulary_is_end_of_text_then_256_bytes_then_merges_in_order(tokenizers, tmp_path):
    tokenizer = tokenizers["bpe"]
    model = read_model(tokenizer, tmp_path)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert tokens[0] == END and tokenizer.eos_token_id == 0
    assert set(tokens[1:257]) == set(byte_letters().values()) - {"ÿ"} | {"<|pad|>"}
    assert tokens[257:] == [left + right for left, right in model["merges"]]


@pytest.mark.parametrize("size", [257, 258, 300, BPE_SIZE])
def test_bpe_has_as_many_tokens_as_were_asked_for(size):
    assert len(train_bpe_tokenizer([TEXT], size)) == size


def test_bpe_of_a_short_text_has_fewer_tokens_and_still_loses_nothing():
    tokenizer = train_bpe_tokenizer(["aaaa bbbb"], 4096)
    assert 257 < len(tokenizer) < 300
    for text in HARD_TEXTS:
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_bpe_merges_join_no_two_words(tokenizers):
    # Every token that is more than one byte is, as text, one word of GPT-2's pattern; a character may be cut in two.
    letters = {letter: byte for byte, letter in byte_letters().items()}
    for token in tokenizers["bpe"].get_vocab():
        text = bytes(letters[letter] for letter in token).decode(errors="ignore") if token[:2] != "<|" else ""
        assert len(GPT2_WORDS.findall(text)) <= 1, ascii(text)


def test_the_same_texts_give_the_same_tokenizer():
    for mode in MODES:
        first, second = (make_tokenizer(mode).backend_tokenizer.to_str() for _ in range(2))
        assert first == second


# ---------------------------------------------------------------------------------------------------------------------
# Loading, in a process that has transformers alone

FRESH_PROCESS = """
import json, sys

class NoProject:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tokenization", "modeling_nanogpt", "train_accelerate"):
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, NoProject())
try:
    import tokenization
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the project is not blocked")
from transformers import AutoTokenizer

texts = json.loads(sys.stdin.read())
loaded = {mode: AutoTokenizer.from_pretrained(mode) for mode in ("char", "bpe")}
encoded = {
    mode: [tokenizer(texts)["input_ids"], tokenizer(texts, split_special_tokens=True)["input_ids"]]
    for mode, tokenizer in loaded.items()
}
decoded = {
    mode: [tokenizer.decode(ids) for ids in encoded[mode][1]] for mode, tokenizer in loaded.items()
}
facts = {
    mode: [len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side]
    for mode, tokenizer in loaded.items()
}
print(json.dumps([encoded, decoded, facts]))
"""


def test_a_saved_tokenizer_loads_where_this_project_is_not(tokenizers, tmp_path):
    for mode, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / mode)
    texts = [*HARD_TEXTS[1:], *random_texts(50, seed=2), TEXT[:3000]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS],
        input=json.dumps(texts),
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=environment,
        timeout=PATIENCE,
    )
    assert child.returncode == 0, child.stderr
    encoded, decoded, facts = json.loads(child.stdout)
    for mode, tokenizer in tokenizers.items():
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        training = [encode(tokenizer, text) for text in texts]
        assert encoded[mode] == [prompts, training]
        assert decoded[mode] == texts
        assert facts[mode] == [len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, "left"]


def test_encoding_training_text_does_not_change_what_is_saved(tmp_path):
    for mode in MODES:
        tokenizer = make_tokenizer(mode)
        tokenizer.save_pretrained(tmp_path / mode / "before")
        encode(tokenizer, [f"a {END}", "b"])
        tokenizer.save_pretrained(tmp_path / mode / "after")
        for file in (tmp_path / mode / "before").iterdir():
            assert file.read_bytes() == (tmp_path / mode / "after" / file.name).read_bytes()
        assert AutoTokenizer.from_pretrained(tmp_path / mode / "after")(END)["input_ids"] == [tokenizer.eos_token_id]


# ---------------------------------------------------------------------------------------------------------------------
# Made from a text file, as nanoGPT has it


def test_the_characters_of_a_file_are_the_whole_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    tokenizer = read_char_tokenizer(tmp_path / "text.txt")
    characters = sorted(set(TEXT))
    assert tokenizer.get_vocab() == {character: i for i, character in enumerate(characters)}
    assert encode(tokenizer, TEXT) == [characters.index(character) for character in TEXT]
    assert tokenizer.decode(encode(tokenizer, TEXT)) == TEXT


# ---------------------------------------------------------------------------------------------------------------------
# gpt2


@needs_gpt2
def test_gpt2_is_an_ordinary_tokenizer_that_loses_nothing(tmp_path):
    make_gpt2_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 50_257 and tokenizer.eos_token == END and tokenizer.eos_token_id == 50_256
    assert encode(tokenizer, "Hello world") == [15496, 995] and tokenizer.decode([tokenizer.pad_token_id]) == "<|pad|>"
    for text in [TEXT, *HARD_TEXTS, *random_texts(200, seed=6)]:
        assert tokenizer.decode(encode(tokenizer, text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# The same or not


def test_two_tokenizers_are_the_same_where_they_give_the_same_ids(tokenizers):
    def spelled(**changes):
        spec = json.loads(tokenizers["bpe"].backend_tokenizer.to_str()) | changes
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=END)

    def cut_by(pattern):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return spelled(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]})

    bpe, smaller = tokenizers["bpe"], train_bpe_tokenizer([TEXT], BPE_SIZE - 1)
    assert same_tokenizer(bpe, spelled())
    assert all(same_tokenizer(bpe, cut_by(pattern)) for pattern in encoders.GPT2_WORDS)  # however spelled
    assert not any(same_tokenizer(bpe, cut_by(pattern)) for pattern in encoders.OTHER_WORDS)
    assert not same_tokenizer(bpe, smaller) and not same_tokenizer(bpe, tokenizers["char"])
    another_end = PreTrainedTokenizerFast(
        tokenizer_object=cut_by(max(encoders.GPT2_WORDS)).backend_tokenizer, eos_token="!"
    )
    assert not same_tokenizer(bpe, another_end)  # documents end otherwise


# ---------------------------------------------------------------------------------------------------------------------
# Text without spaces


def letters(kind, count):
    """Text of one word: bases of DNA, Chinese characters, or one letter again and again."""
    alphabet = {"DNA": "ACGT", "Chinese": "".join(map(chr, range(0x4E00, 0x5000))), "one letter": "a"}[kind]
    draw = random.Random(0)
    return "".join(draw.choice(alphabet) for _ in range(count))


@pytest.mark.parametrize("kind", ["DNA", "Chinese", "one letter"])
def test_bpe_learns_from_a_text_without_spaces_in_seconds(kind, capsys):
    text = letters(kind, 2_000_000 if kind != "Chinese" else 500_000)
    started = time.process_time()
    tokenizer = train_bpe_tokenizer([text], 1000)
    encoded = encoders.make_encoder(tokenizer.backend_tokenizer.to_str()).encode([text])[0]
    assert time.process_time() - started < 120  # 6 seconds on an idle machine, and hours if words are not cut
    assert (
        len(encoded) < 2 / 3 * len(text.encode())
        and tokenizer.decode(encoded[:5000]) == text[: len(tokenizer.decode(encoded[:5000]))]
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (kind != "Chinese") and all("words of 1,000 characters" in line for line in said)


def test_no_more_than_so_many_characters_of_long_words_are_learned_from(monkeypatch, capsys):
    monkeypatch.setattr(vocabularies, "LONG_WORDS", 5000)
    monkeypatch.setattr(vocabularies, "MENTIONED", 3000)
    texts = ["short " + letters("DNA", 3500) + " words", "a" * 1500, "b" * 2500 + " end", "c" * 1000, "last"]
    parts = list(vocabularies.cut_long_words(iter(texts)))
    assert sum(len(part) for part in parts if len(part) >= 1000) <= 5000 + len("short ")
    assert not any("c" in part for part in parts) and max(map(len, parts)) <= 1000 + len("short ")
    joined = "".join(parts)
    assert joined.startswith("short ") and joined.endswith("last") and " words" in joined and " end" in joined
    (line,) = capsys.readouterr().err.splitlines()
    assert "5,000 characters" in line
