"""Tokenizers of other projects: training and prompts get the same ids, and no character is lost without a count."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from support.checkpoints import write_ckpt
from support.commands import command
from support.data_dirs import prepare_flags, stored_ids
from support.prepare_command import Command, lines_of
from support.texts import write_words
from support.tiny_run import TINY, write_recipe

END = "<|endoftext|>"
TEXT = "the quick brown fox jumps over the lazy dog"

# ---------------------------------------------------------------------------------------------------------------------
# Tokens that a tokenizer puts around a text


def byte_level(folder, post_processor, **special):
    """A byte-level BPE with <s> as 0 and </s> as 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = post_processor
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def template(single):
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])


def bert(folder):
    words = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + [".", ",", "'"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)


KINDS = {  # and the tokens that each puts around a text
    "begins, as Llama's": (lambda folder: byte_level(folder, template("<s> $A")), "<s>"),
    "ends, as T5's": (lambda folder: byte_level(folder, template("$A </s>")), "</s>"),
    "both, after another step, as Llama 3's": (
        lambda folder: byte_level(
            folder, processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s> $A </s>")])
        ),
        "<s> </s>",
    ),
    "none, but a token of its own that begins a text": (
        lambda folder: byte_level(folder, processors.ByteLevel(trim_offsets=False)),
        "",
    ),
    "types of tokens": (
        lambda folder: byte_level(folder, template("<s> $A"), model_input_names=["input_ids", "token_type_ids"]),
        "<s>",
    ),
    "BERT's": (bert, "[CLS] [SEP]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_gets_the_ids_that_training_has_seen(tmp_path, kind):
    make, added = KINDS[kind]
    make(tmp_path / "tokenizer")
    write_words(tmp_path / "words.txt")
    text = (tmp_path / "words.txt").read_text()
    names = {"corpus": tmp_path / "words.txt", "data_dir": tmp_path / "data", "out_dir": tmp_path / "out"}
    flags = TINY | names | {"tokenizer": tmp_path / "tokenizer", "max_iters": 2, "eval_interval": 2}
    status, said = command(tmp_path, "train_accelerate", write_recipe(tmp_path / "recipe.yaml", **flags))
    assert status == 0, said
    about = [line for line in said if "around a text" in line]
    assert len(about) == bool(added) and all(f"puts {added} around" in line for line in about)

    trained_on = stored_ids(tmp_path / "data", "train")
    for folder in (tmp_path / "out", tmp_path / "data"):  # one loads it as its own classes would
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(text[:200], return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert inputs.input_ids[0, :50].tolist() == trained_on[:50]
        assert (
            tokenizer.decode(inputs.input_ids[0]).split()
            == tokenizer.decode(trained_on[: inputs.input_ids.shape[1]]).split()
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    short = tokenizer("the", return_tensors="pt")
    assert model.generate(**short, max_new_tokens=2, min_new_tokens=2).shape[1] == short.input_ids.shape[1] + 2
    if tokenizer.eos_token_id is not None:  # a document begins behind the end of the one before
        assert model.config.bos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
        assert model.generate(max_new_tokens=1)[0, 0] == tokenizer.eos_token_id

    # a data_dir and a model with such a tokenizer go on with each other
    going_on = TINY | names | {"tokenizer": tmp_path / "tokenizer", "init_from": tmp_path / "out", "max_iters": 1}
    going_on |= {"out_dir": tmp_path / "more"} | dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd"), "")
    status, said = command(tmp_path, "train_accelerate", write_recipe(tmp_path / "more.yaml", **going_on))
    assert status == 0, said


@pytest.mark.parametrize(("single", "added"), [("<s> $A", "<s>"), ("$A", "")])
def test_converting_nanogpts_checkpoint_names_what_a_tokenizer_adds(tmp_path, single, added):
    byte_level(tmp_path / "tokenizer", template(single))
    write_ckpt(
        tmp_path, NanoGPTForCausalLM(NanoGPTConfig(vocab_size=320, block_size=8, n_layer=1, n_head=2, n_embd=8))
    )
    arguments = tmp_path / "ckpt.pt", tmp_path / "new", "--tokenizer", tmp_path / "tokenizer"
    status, said = command(tmp_path, "modeling_nanogpt.convert", *arguments)
    about = [line for line in said if "around a text" in line]
    assert status == 0 and len(about) == bool(added) and all(f"puts {added} around" in line for line in about)


def test_a_prompt_without_a_token_is_one_line(tmp_path):
    bert(tmp_path / "tokenizer")
    write_words(tmp_path / "words.txt")
    names = {"corpus": tmp_path / "words.txt", "data_dir": tmp_path / "data", "out_dir": tmp_path / "out"}
    flags = TINY | names | {"tokenizer": tmp_path / "tokenizer", "max_iters": 1}
    status, said = command(tmp_path, "train_accelerate", write_recipe(tmp_path / "recipe.yaml", **flags))
    assert status == 0, said
    for prompt in (["--prompt=" + " \n " * 3000], ["--prompt=\n"]):
        status, said = command(tmp_path, "modeling_nanogpt.sample", tmp_path / "out", *prompt)
        assert status == 2 and len(said) == 1 and "has no token" in said[0] and len(said[0]) < 300
    status, said = command(tmp_path, "modeling_nanogpt.sample", tmp_path / "out", "--prompt=the", "--max_new_tokens=2")
    assert status == 0 and said[0].startswith("the"), said


def test_a_model_that_has_diverged_is_named(run, tmp_path):
    for temperature in (0, 1):
        model, tokenizer = (auto.from_pretrained(run.out_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[3, 4] = float("nan")
        model.save_pretrained(tmp_path / "out")
        tokenizer.save_pretrained(tmp_path / "out")
        status, said = command(
            tmp_path, "modeling_nanogpt.sample", tmp_path / "out", "--prompt=a", "--temperature", temperature
        )
        assert status == 2 and len(said) == 1
        assert "diverged" in said[0] and "transformer.h.1.mlp.c_fc.weight" in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Characters that a tokenizer does not know

LETTERS = sorted(set(TEXT) - {" "})
STRANGE = "The quick brown fox, 17 of them; \u00c4\u00d6\u00dc \u6f22\u5b57 \U0001f600\n"


def bpe_without_unknown():
    return Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))


def bpe_with_unknown():
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", *LETTERS])}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))


def bpe_that_joins_unknowns():
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", *LETTERS])}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))


def unigram():
    return Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in LETTERS)], unk_id=0))


def unigram_of_words():
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_pieces():
    pieces = ["<unk>", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))


def words():
    return Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}, unk_token="<unk>")
    )


def lower_case():
    tokenizer = bpe_with_unknown()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


LOST_BY_LETTER = sum(character not in LETTERS and not character.isspace() for character in STRANGE)
LOST_BY_WORD = sum(len(word) for word in STRANGE.split() if word not in TEXT.split())
LOST_BY_PIECES = sum(len(word) for word in STRANGE.split() if set(word) - set(LETTERS))


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (bpe_without_unknown, LOST_BY_LETTER),
        (bpe_with_unknown, LOST_BY_LETTER),
        (bpe_that_joins_unknowns, LOST_BY_LETTER),
        (unigram, LOST_BY_LETTER),
        (unigram_of_words, LOST_BY_LETTER),
        (word_pieces, LOST_BY_PIECES),
        (words, LOST_BY_WORD),
        (lower_case, LOST_BY_LETTER - 1),  # T
    ],
)
def test_characters_that_are_lost_are_counted(tmp_path, make, lost):
    tokenizer = make()
    if tokenizer.pre_tokenizer is None:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(STRANGE * 10)
    flags = {"corpus": tmp_path / "text.txt", "tokenizer": tmp_path / "tokenizer", "data_dir": tmp_path / "data"}
    result = Command(tmp_path / "said", *(f"--{key}={value}" for key, value in flags.items())).result()
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "data" / "prepared.json").read_text())["unknowns"] == {
        "train": 9 * lost,
        "val": lost,
    }
    assert f", {9 * lost:,} unknown" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Text between whose documents stands what ends a document

STORIES = [f"Once there was a cat named {number}.\n\nIt slept." for number in range(20)]
SPELLINGS = {
    "as TinyStories": "".join(f"{story}\n{END}\n" for story in STORIES),
    "in front": "\n".join(f"{END}\n{story}" for story in STORIES),
    "without line ends": END.join(STORIES),
    "of Windows": f"\r\n{END}\r\n".join(STORIES),
    "twice": f"\n{END}\n{END}\n".join(STORIES),
}


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("small", [None, 0.0], ids=["whole", "in many pieces"])
def test_a_separator_ends_documents_if_the_flag_says_so(tmp_path, spelling, tokenizer, small):
    (tmp_path / "text.txt").write_bytes(SPELLINGS[spelling].encode() * (1 if small is None else 20))
    names = {"corpus": tmp_path / "text.txt", "tokenizer": tokenizer, "vocab_size": 300, "data_dir": tmp_path / "data"}
    flags = [f"--{key}={value}" for key, value in names.items()]
    result = Command(tmp_path / "said", *flags, f"--document_separator={END}", small=small).result()
    assert result.returncode == 0 and not lines_of(result.stderr), result.stderr
    loaded = AutoTokenizer.from_pretrained(tmp_path / "data")
    found = []
    for split in ("train", "val"):
        text = loaded.decode(stored_ids(tmp_path / "data", split))
        assert text.endswith(END)
        found += text.removesuffix(END).split(END)
    if small is None:
        assert sorted(found) == sorted(STORIES)
    else:
        assert set(found) - set(STORIES) <= {STORIES[-1] + STORIES[0]}  # where a copy of the text meets the next


def test_a_separator_without_the_flag_is_text_and_one_line_says_so(tmp_path):
    (tmp_path / "text.txt").write_text(SPELLINGS["as TinyStories"])
    names = {"corpus": tmp_path / "text.txt", "tokenizer": "bpe", "vocab_size": 300, "data_dir": tmp_path / "data"}
    flags = [f"--{key}={value}" for key, value in names.items()]
    result = Command(tmp_path / "said", *flags).result()
    (line,) = lines_of(result.stderr)
    assert f"{END} {len(STORIES)} times" in line and f"--document_separator='{END}'" in line
    loaded = AutoTokenizer.from_pretrained(tmp_path / "data")
    ids = stored_ids(tmp_path / "data", "train")
    assert (
        loaded.eos_token_id not in ids and loaded.decode(ids) == SPELLINGS["as TinyStories"][: len(loaded.decode(ids))]
    )
    # the same data_dir is not taken for one with documents, nor the other way round
    with pytest.raises(ValueError, match="document_separator"):
        prepare_flags(**names, document_separator=END)
    prepare_flags(**names | {"data_dir": tmp_path / "other"}, document_separator=END)
    with pytest.raises(ValueError, match="document_separator"):
        prepare_flags(**names | {"data_dir": tmp_path / "other"})
    prepare_flags(**names | {"data_dir": tmp_path / "other"}, document_separator=END)


@pytest.mark.parametrize("separator", ["a b", "\n", "x\ty"])
def test_a_separator_with_white_space_is_refused(tmp_path, separator):
    with pytest.raises(ValueError, match="white space"):
        prepare_flags(corpus="python-stdlib", data_dir=tmp_path / "data", document_separator=separator)


def test_a_separator_of_rows_and_of_token_ids(tmp_path):
    rows = [{"text": f"one{END}two"}, {"text": "three"}, {"text": END}, {"text": f"four{END}"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = prepare_flags(corpus=tmp_path / "rows.jsonl", data_dir=tmp_path / "data", document_separator=END)
    assert sum(record["documents"].values()) == 2 * len(["one", "two", "three", "four"])
    ids = [json.dumps({"input_ids": [1, 2, 3]}) + "\n"] * 20
    (tmp_path / "ids.jsonl").write_text("".join(ids))
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(range(1, 101)))
    byte_level(tmp_path / "tokenizer", None)
    with pytest.raises(ValueError, match="tokens already"):
        prepare_flags(
            corpus=tmp_path, tokenizer=tmp_path / "tokenizer", data_dir=tmp_path / "ids", document_separator=END
        )
