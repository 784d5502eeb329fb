"""Encoding: whichever way is taken, the ids are the tokenizer's own, and tiktoken's if it is GPT-2's."""

import json
import random
import time

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.needs import needs_gpt2
from support.texts import END, HARD_TEXTS, TEXT, random_texts
from tokenization.documents import last_cut
from tokenization.encoders import (
    OTHER_WORDS,
    GigatokenEncoder,
    LibraryEncoder,
    TableEncoder,
    TiktokenEncoder,
    byte_letters,
    has_long_run,
    make_encoder,
    ranks_of,
)
from tokenization.making import encode_texts
from tokenization.vocabularies import (
    make_gpt2_tokenizer,
    read_char_tokenizer,
    train_bpe_tokenizer,
    train_char_tokenizer,
)

WAYS = ["gigatoken", "tiktoken", "tokenizers"]


def encoder_by(way, tokenizer):
    """The encoder of a tokenizer that is chosen if there is nothing faster than this way; skips what is not here."""
    if way == "gigatoken":
        pytest.importorskip("gigatoken")
    backend = tokenizer.backend_tokenizer
    tokenizer_json = backend.to_str()
    if way == "tokenizers":
        return LibraryEncoder(tokenizer_json)
    return make_encoder(tokenizer_json, fastest=way == "gigatoken")


def library_ids(tokenizer, texts):
    """The ids that the tokenizer itself gives, one text at a time."""
    return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]


def train_on_words(pattern, ignore_merges=False):
    """A byte-level BPE as later models have it: words by a pattern, then bytes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT, *HARD_TEXTS], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def every_character():
    """Characters of every plane in the neighbourhoods that a pattern tells apart: all of the first, some of others."""
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 17)]
    for start in range(0, len(codes), 2**13):
        yield "".join(f"a{chr(c)} '{chr(c)}1{chr(c)}\n{chr(c)} {chr(c)}" for c in codes[start : start + 2**13])


@pytest.fixture(scope="module")
def made():
    tokenizers = {
        "char": train_char_tokenizer([TEXT]),
        "bpe": train_bpe_tokenizer([TEXT], 900),
        **{f"words {i}": train_on_words(pattern, bool(i)) for i, pattern in enumerate(sorted(OTHER_WORDS))},
    }
    return tokenizers


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


NAMES = ["char", "bpe", "words 0", "words 1"]


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_way_is_taken(made, name, way):
    encoder = encoder_by(way, made[name])
    expected = {"gigatoken": GigatokenEncoder, "tiktoken": TiktokenEncoder, "tokenizers": LibraryEncoder}[way]
    if name == "char" and way != "tokenizers":
        expected = TableEncoder
    assert type(encoder) is expected
    assert encoder.cuts == (way != "tokenizers" and not name.startswith("words"))


@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_random_texts_have_the_tokenizers_ids(made, name, way):
    tokenizer, encoder = made[name], encoder_by(way, made[name])
    texts = HARD_TEXTS + random_texts(3000, seed=3) + [TEXT[i : i + 50] for i in range(0, len(TEXT), 7)]
    for text, ids, expected in zip(texts, encoder.encode(texts), library_ids(tokenizer, texts), strict=True):
        assert ids.tolist() == expected, ascii(text)


@pytest.mark.parametrize("name", ["bpe", "words 0", "words 1"])
@pytest.mark.parametrize("way", WAYS[:2])
def test_every_character_has_the_tokenizers_ids(made, name, way):
    encoder, slow = encoder_by(way, made[name]), LibraryEncoder(made[name].backend_tokenizer.to_str())
    for text in every_character():
        np.testing.assert_array_equal(encoder.encode([text])[0], slow.encode([text])[0])


@settings(
    deadline=None,
    derandomize=True,
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(max_size=60))
def test_any_text_has_the_tokenizers_ids(made, encoders, text):
    for name, tokenizer in made.items():
        (ids,) = encoders[name].encode([text])
        assert [ids.tolist()] == library_ids(tokenizer, [text])
        assert tokenizer.decode(ids) == text


@pytest.fixture
def encoders(made, way):
    return {name: encoder_by(way, tokenizer) for name, tokenizer in made.items()}


@needs_gpt2
@pytest.mark.parametrize("way", WAYS[:2])
def test_gpt2_has_tiktokens_ids(way):
    tokenizer, reference = make_gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    encoder = encoder_by(way, tokenizer)
    assert isinstance(encoder, TiktokenEncoder) and encoder.cuts
    assert len(tokenizer) == 50_257 and tokenizer.eos_token_id == reference.eot_token == 50_256
    texts = HARD_TEXTS + random_texts(5000, seed=4) + [TEXT]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        expected = reference.encode_ordinary(text)
        assert ids.tolist() == expected, ascii(text)
    assert library_ids(tokenizer, texts[::10]) == [ids.tolist() for ids in encoder.encode(texts[::10])]
    for text in every_character():
        assert encoder.encode([text])[0].tolist() == reference.encode_ordinary(text)


SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\u00a0", "\u2003", "\u3000", " \n \n"]
WORDS = ["fox", "'s", "'", "42", "!?", "caf\u00e9", "\U0001f600", "\u0301", "\u200d", "don't", "_", "\x00", "\u200b"]


def spaced_texts(count):
    """Words of every kind between white space of every kind."""
    dice = random.Random(0)
    return ["".join(dice.choice(dice.choice([SPACES, WORDS])) for _ in range(40)) for _ in range(count)]


def test_words_between_all_kinds_of_space_have_the_tokenizers_ids(made, way):
    tokenizer, encoder = made["bpe"], encoder_by(way, made["bpe"])
    texts = [TEXT, *spaced_texts(2000), *(f"{text} \ue000\n \n{text}" for text in HARD_TEXTS)]
    assert [ids.tolist() for ids in encoder.encode(texts)] == library_ids(tokenizer, texts)


@pytest.mark.parametrize("name", ["char", "bpe"])
@pytest.mark.parametrize("way", WAYS[:2])
def test_pieces_have_the_ids_of_the_whole(made, name, way):
    # Real and random text with every kind of white space, cut wherever read_text may cut it.
    encoder = encoder_by(way, made[name])
    dice = random.Random(0)
    for text in [TEXT, *random_texts(300, seed=5), *spaced_texts(700)]:
        (whole,) = encoder.encode([text])
        pieces, rest = [], text
        while cut := last_cut(rest[: dice.randint(1, 30)]):
            pieces.append(rest[:cut])
            rest = rest[cut:]
        assert np.concatenate(encoder.encode([*pieces, rest])).tolist() == whole.tolist(), ascii(text)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers for which the fast way would be wrong


def change(tokenizer, **changes):
    """A tokenizer with parts of its description changed, `model__key` within the model."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in changes.items():
        holder = spec["model"] if key.startswith("model__") else spec
        holder[key.removeprefix("model__")] = value
    return Tokenizer.from_str(json.dumps(spec))


def test_what_tiktoken_would_encode_otherwise_is_left_to_the_library(made):
    bpe = made["bpe"]
    model = json.loads(bpe.backend_tokenizer.to_str())["model"]
    first, second, *others = model["merges"]
    a, b = ("".join(merge) for merge in (first, second))
    swapped = model["vocab"] | {a: model["vocab"][b], b: model["vocab"][a]}
    byte = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    words = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
    cases = {
        "ids that fall along the merges": change(bpe, model__vocab=swapped),
        "merges in another order": change(bpe, model__merges=[second, first, *others]),
        "a space put before the text": change(bpe, pre_tokenizer=byte),
        "a normalizer": change(bpe, normalizer={"type": "NFC"}),
        "dropout": change(bpe, model__dropout=0.5),
        "another pattern": change(bpe, pre_tokenizer=words),
    }
    added = change(bpe)
    added.add_tokens(["fox"])  # cut out of any text, special or not
    cases["an added token that is not special"] = added
    for name, tokenizer in cases.items():
        assert type(make_encoder(tokenizer.to_str())) is LibraryEncoder, name


def test_merges_that_skip_a_step_are_left_to_the_library():
    # ("ab", "c") is a merge, but "ab" never forms in "abc": "bc" comes first. tiktoken would look "abc" up whole.
    letters = byte_letters()
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"bc": 256, "ab": 257, "abc": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert tokenizer.encode("abc").ids == [vocabulary["a"], vocabulary["bc"]]
    assert type(make_encoder(tokenizer.to_str())) is LibraryEncoder


def test_a_merge_whose_token_is_missing_is_left_to_the_library():
    # The library would not load it; a description of it is refused all the same.
    letters = byte_letters()
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]}
    assert ranks_of(model, set()) is None
    assert ranks_of(model | {"merges": []}, set()) == {bytes([i]): i for i in range(0xFF)}  # 0xFF is in no text


def word_level(words, **options):
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=options.get("unk", "?!"))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.normalizer = options.get("normalizer")
    return tokenizer


def test_any_other_tokenizer_is_encoded_in_batches_with_its_unknowns_counted():
    tokenizer = word_level(["<unk>", "fox", "dog"], unk="<unk>", normalizer=normalizers.Lowercase())
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(2)
    encoder = make_encoder(tokenizer.to_str())
    texts = ["Fox dog cat", "", "emu dog dog fox"]
    ids = encoder.encode(texts)
    assert [each.tolist() for each in ids] == [[1, 2, 0], [], [0, 2, 2, 1]]
    assert encoder.count_unknowns(texts, ids) == len("cat") + len("emu")
    assert tokenizer.padding and tokenizer.truncation  # it is left as it was


def test_characters_that_a_bpe_drops_are_counted():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = make_encoder(tokenizer.to_str())
    texts = ["ab ab", "a\u20acb \U0001f600\nX"]
    ids = encoder.encode(texts)
    assert [each.tolist() for each in ids] == [[2, 2], [0, 1]]
    assert encoder.count_unknowns(texts, ids) == 3


def test_unknown_pieces_of_a_unigram_are_counted():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    encoder = make_encoder(tokenizer.to_str())
    ids = encoder.encode(["abxa"])
    assert ids[0].tolist() == [1, 2, 0, 1] and encoder.count_unknowns(["abxa"], ids) == 1


def test_a_tokenizer_that_has_no_token_for_a_word_is_one_line():
    encoder = make_encoder(word_level(["fox"], unk="missing").to_str())
    with pytest.raises(ValueError, match="cannot encode some of the text: WordLevel error"):
        encoder.encode(["dog"])


def test_text_that_spells_a_special_token_is_text_by_the_library_as_well(made):
    tokenizer = change(made["bpe"], normalizer={"type": "NFC"})
    encoder = make_encoder(tokenizer.to_str())
    (ids,) = encoder.encode([f"a {END} b"])
    assert type(encoder) is LibraryEncoder and tokenizer.token_to_id(END) not in ids
    assert tokenizer.decode(ids.tolist()) == f"a {END} b"


def test_characters_without_a_token_are_spelled_and_counted_or_refused(tmp_path):
    tokenizer = train_char_tokenizer(["abc"])
    encoder = make_encoder(tokenizer.backend_tokenizer.to_str())
    text = "a\u20acb\U0001f600\u00e9c"
    (ids,) = encoder.encode([text])
    assert ids.tolist() == library_ids(tokenizer, [text])[0] and len(ids) == 3 + 3 + 4 + 2
    assert encoder.count_unknowns([text, "abc"], [ids, ids]) == 3
    (tmp_path / "text.txt").write_text("abc")
    strict = make_encoder(read_char_tokenizer(tmp_path / "text.txt").backend_tokenizer.to_str())
    assert type(strict) is TableEncoder and strict.encode(["cab"])[0].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="no token for '\u20ac'"):
        strict.encode([text])


@pytest.mark.parametrize("spaces", [" ", "\n", "\t ", "\r\n"])
def test_a_desert_of_white_space_is_encoded_as_any_text(made, spaces, way):
    # On a million spaces before a word, tiktoken's stack overflows.
    tokenizer, encoder = made["bpe"], encoder_by(way, made["bpe"])
    text = "a" + spaces * (1_000_000 // len(spaces)) + "b"
    assert has_long_run(text) and not has_long_run("a " * 500_000) and not has_long_run("\n" * 60_000 + "a")
    assert [encoder.encode([text])[0].tolist()] == library_ids(tokenizer, [text])


@pytest.mark.parametrize("word", ["a", "ACGT", "\u6f22\u5b57", "!"])
def test_a_word_without_end_is_encoded_as_any_text(made, word, way):
    # tiktoken takes a minute for a word of a million letters.
    text = "x " + word * (600_000 // len(word))
    assert has_long_run(text)
    started = time.process_time()
    (ids,) = encoder_by(way, made["bpe"]).encode([text])
    assert time.process_time() - started < 30
    assert [ids.tolist()] == library_ids(made["bpe"], [text])


def test_gigatoken_starts_afresh_before_its_memory_grows(made, monkeypatch):
    encoder = encoder_by("gigatoken", made["bpe"])
    monkeypatch.setattr("tokenization.encoders.RENEWAL", 1000)
    used = set()
    for text in random_texts(300, seed=6):
        assert [encoder.encode([text])[0].tolist()] == library_ids(made["bpe"], [text])
        used.add(id(encoder.tokenizer_of_words))
        assert encoder.encoded <= 1000
    assert len(used) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_joined_split_by_split_with_an_end_after_each_document(made, name, end):
    tokenizer = made[name]
    pieces = [("train", f"a{END}", False), ("val", "b\u20ac", True), ("train", " c", True), ("train", "d", True)]
    splits, texts, ends = zip(*pieces, strict=True)
    end_id = tokenizer.eos_token_id if end else None
    ending = [end_id] if end else []
    a, b, c, d = library_ids(tokenizer, texts)
    rows = pa.table({"split": splits, "content": texts, "ends": ends})
    train, val = encode_texts(rows, tokenizer.backend_tokenizer.to_str(), end_id, "uint16").to_pylist()
    assert (train["split"], val["split"]) == ("train", "val")
    assert train["input_ids"] == a + c + ending + d + ending
    assert val["input_ids"] == b + ending
    assert (train["bytes"], val["bytes"]) == (len(END) + 4, 4)
    assert (train["documents"], val["documents"]) == (2, 1)
