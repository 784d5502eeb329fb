"""Sampling: what continue_prompt draws, also once the context is full and tokens are dropped, and the command."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, decoding, sample
from modeling_nanogpt.decoding import Diverged, FixedReader, choose, continue_prompt
from support import PATIENCE, ROOT
from support.tiny_run import TINY

BLOCK, VOCABULARY = 8, 32
SEPARATOR = "-" * 15

# Prompt lengths and numbers of new tokens on either side of block_size, and across it.
LENGTHS = [(1, 3), (1, 7), (1, 8), (3, 20), (7, 1), (7, 2), (8, 1), (8, 9), (9, 1), (20, 12)]


@pytest.fixture(scope="module")
def model():
    """Weights so large that one token is always far likelier than the others. The model has no end-of-text token."""
    torch.manual_seed(0)
    config = NanoGPTConfig(
        vocab_size=VOCABULARY, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32, initializer_range=0.5
    )
    return NanoGPTForCausalLM(config).double().eval()


def make_prompts(rows, length, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy_by_hand(model, ids, count, stride=1):
    """Add the likeliest token after the context, one row and one token at a time; a full context loses `stride`."""
    rows = []
    for row in ids.tolist():
        context = row[-BLOCK:]
        for _ in range(count):
            context = context if len(context) <= BLOCK else context[stride:]
            logits = model(torch.tensor([context]), use_cache=False).logits[0, -1]
            row.append(logits.argmax().item())
            context = context + row[-1:]
        rows.append(row)
    return torch.tensor(rows)


def continued(model, ids, count, **sampling):
    """Prompts (B, T) with what continue_prompt puts after them."""
    settings = {"temperature": 1.0, "top_k": 0, "stride": 1} | sampling
    return torch.cat([ids, *(token[:, None] for token in continue_prompt(model, ids, count, **settings))], dim=1)


def greedy(model, ids, count, **sampling):
    return continued(model, ids, count, temperature=0, **sampling)


def sampled(model, ids, count, seed=0, **sampling):
    set_seed(seed)
    return continued(model, ids, count, **sampling)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are drawn


@pytest.mark.parametrize(("length", "count"), LENGTHS)
def test_greedy_is_the_likeliest_token_after_the_last_block_size_tokens(model, length, count):
    prompts = make_prompts(3, length)
    assert torch.equal(greedy(model, prompts, count), greedy_by_hand(model, prompts, count))


@pytest.mark.parametrize(("length", "count"), LENGTHS)
@pytest.mark.parametrize("stride", [1, 3, BLOCK // 2, BLOCK])
def test_a_full_context_loses_its_oldest_tokens(model, length, count, stride):
    prompts = make_prompts(3, length)
    expected = greedy_by_hand(model, prompts, count, stride)
    assert torch.equal(greedy(model, prompts, count, stride=stride), expected)
    if stride == BLOCK // 2:
        assert torch.equal(greedy(model, prompts, count, stride=None), expected)


@pytest.mark.parametrize(("length", "count"), LENGTHS)
def test_a_cache_of_a_fixed_size_gives_the_same_tokens(model, length, count):
    prompts = make_prompts(3, length)
    expected = greedy(model, prompts, count, stride=None)
    reader = FixedReader(model, length + count)
    for _ in range(2):  # the second time, the cache is full of earlier tokens
        assert torch.equal(greedy(model, prompts, count, stride=None, reader=reader), expected)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_token_is_what_torch_draws(top_k):
    logits = torch.randn(1000, VOCABULARY, generator=torch.Generator().manual_seed(0))
    best, tokens = logits.topk(top_k or VOCABULARY)
    if not top_k:
        best, tokens = logits, torch.arange(VOCABULARY).expand_as(logits)
    drawn = best.softmax(dim=-1).multinomial(1, generator=torch.Generator().manual_seed(1))
    ours = choose(logits, 1.0, top_k, torch.Generator().manual_seed(1))
    assert torch.equal(ours, tokens.gather(1, drawn)[:, 0])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
def test_a_model_that_predicts_no_numbers_is_an_error(temperature, logit):
    model = known_distribution([0.0, 1.0, logit])
    with pytest.raises(Diverged):
        sampled(model, torch.zeros(2, 1, dtype=torch.long), 3, temperature=temperature)


def test_each_token_is_read_once_until_the_context_is_full_and_half_of_it_again_then(model):
    read = []
    hook = model.register_forward_hook(lambda module, given, made: read.append(given[0].shape[1]))
    greedy(model, make_prompts(1, 3), 14, stride=None)
    hook.remove()
    refill = [BLOCK // 2 + 1]
    assert read == [3, *[1] * (BLOCK - 3), *refill, *[1] * (BLOCK // 2 - 1), *refill, *[1] * (BLOCK // 2 - 1)]


@pytest.mark.parametrize(("rows", "expected"), [(2, 1), (3, 2)])
def test_small_steps_take_one_thread_and_give_the_others_back(model, monkeypatch, rows, expected):
    monkeypatch.setattr(decoding, "FEW_FLOPS", 2 * 2.5 * model.num_parameters())  # of a step of two and a half rows
    before, used = torch.get_num_threads(), set()
    hook = model.register_forward_hook(lambda *_: used.add(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        greedy(model, make_prompts(rows, 7), 9, stride=None)
        assert (used, torch.get_num_threads()) == ({expected}, 2)
    finally:
        torch.set_num_threads(before)
        hook.remove()


def test_a_model_of_transformers_is_continued_as_it_generates():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    prompt = torch.randint(50, (1, 5))
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    assert torch.equal(greedy(model, prompt, 20), expected)


@pytest.mark.parametrize(("length", "count"), [(3, 4), (3, 20), (20, 5)])
def test_a_batch_is_what_each_prompt_is_alone(model, length, count):
    prompts = make_prompts(4, length)
    alone = torch.cat([greedy(model, prompt[None], count) for prompt in prompts])
    assert torch.equal(greedy(model, prompts, count), alone)


@pytest.mark.parametrize(("length", "count"), [(3, 4), (3, 20), (20, 5)])
def test_the_seed_decides_what_is_drawn(model, length, count):
    prompts = make_prompts(5, length)
    first = sampled(model, prompts, count)
    assert first.shape == (5, length + count) and torch.equal(first[:, :length], prompts)
    assert torch.equal(sampled(model, prompts, count), first)
    assert not torch.equal(sampled(model, prompts, count, seed=1), first)


@pytest.mark.parametrize(("length", "count"), [(3, 4), (3, 20), (20, 5)])
@pytest.mark.parametrize("sampling", [{"temperature": 1e-5}, {"top_k": 1}, {"temperature": 1e-5, "top_k": 3}], ids=str)
def test_sampling_nears_greedy_as_its_choice_narrows(model, length, count, sampling):
    prompts = make_prompts(3, length)
    assert torch.equal(sampled(model, prompts, count, **sampling), greedy(model, prompts, count))


def test_rows_of_a_batch_are_drawn_independently(model):
    rows = sampled(model, make_prompts(1, 3).expand(8, -1), 12)
    assert len({tuple(row) for row in rows.tolist()}) == 8


def known_distribution(logits):
    """A model with these next-token logits, whatever it has read, because its last norm puts out a constant."""
    size = len(logits)
    config = NanoGPTConfig(
        vocab_size=size, block_size=4, n_layer=1, n_head=1, n_embd=8, bias=True, tie_word_embeddings=False
    )
    model = NanoGPTForCausalLM(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(8)[0])
        model.lm_head.weight.zero_()[:, 0] = torch.tensor(logits)
    return model


@pytest.mark.parametrize(
    ("temperature", "top_k", "kept"), [(1.0, 0, 6), (0.5, 0, 6), (2.0, 0, 6), (1.0, 3, 3), (0.7, 100, 6)]
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature, top_k, kept):
    logits = [2.0, 1.5, 1.0, 0.0, -0.5, -1.0]
    probabilities = torch.tensor(logits[:kept], dtype=torch.float64).div(temperature).softmax(0)
    start = torch.zeros(4000, 2, dtype=torch.long)
    # three tokens within block_size, and one beyond it
    drawn = sampled(known_distribution(logits), start, 3, temperature=temperature, top_k=top_k)[:, 2:]
    # the 99.9th percentile of chi-square for each number of degrees of freedom
    critical = {2: 13.82, 5: 20.52}[kept - 1]
    for column in drawn.T:
        counts = torch.bincount(column, minlength=len(logits))
        assert counts[kept:].sum() == 0
        expected = 4000 * probabilities
        assert ((counts[:kept] - expected) ** 2 / expected).sum() < critical


def test_ids_beyond_the_tokenizer_are_never_drawn(run):
    model, tokenizer = (auto.from_pretrained(run.out_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size > len(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)  # every id is as likely as any other
    model.generation_config.eos_token_id = None
    drawn = sampled(model, torch.zeros(50, 1, dtype=torch.long), 2 * TINY["block_size"])
    assert drawn.max() < len(tokenizer)
    assert drawn.unique().numel() > 0.9 * len(tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# How a text ends


def counting_model(last):
    """A model that counts: t + 1 follows token t, and `last` is the end of text. Its block_size is 4."""
    size = last + 1
    config = NanoGPTConfig(
        vocab_size=size,
        block_size=4,
        n_layer=1,
        n_head=1,
        n_embd=size,
        tie_word_embeddings=False,
        eos_token_id=last,
        pad_token_id=last,
    )
    model = NanoGPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.ndim == 2:
                parameter.zero_()  # the blocks add nothing, and positions have no effect
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(torch.eye(size).roll(1, dims=0))
    return model


def test_rows_that_end_are_filled_with_the_end_and_the_rest_goes_on():
    ids = greedy(counting_model(last=9), torch.tensor([[0], [7], [5], [8]]), 20)
    assert ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [7, 8, 9, 9, 9, 9, 9, 9, 9, 9],
        [5, 6, 7, 8, 9, 9, 9, 9, 9, 9],
        [8, 9, 9, 9, 9, 9, 9, 9, 9, 9],
    ]


@pytest.mark.parametrize(("start", "tokens"), [(8, 1), (7, 2), (6, 3), (5, 4), (3, 6)])
def test_nothing_is_computed_once_all_rows_have_ended(start, tokens):
    model = counting_model(last=9)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert greedy(model, torch.tensor([[start], [8]]), 50).shape == (2, 1 + tokens)
    assert len(calls) == tokens


def test_a_text_may_end_with_its_very_last_token():
    assert greedy(counting_model(last=9), torch.tensor([[3]]), 6)[0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert greedy(counting_model(last=9), torch.tensor([[3]]), 5)[0].tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("prompt", [[9, 0], [0, 9, 1], [0, 1, 9, 3, 4, 5]])
def test_an_end_within_the_prompt_ends_nothing(prompt):
    continued = greedy(counting_model(last=9), torch.tensor([prompt]), 3)[0].tolist()
    assert continued == prompt + [prompt[-1] + 1, prompt[-1] + 2, prompt[-1] + 3]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_the_prompt_and_what_follows(run):
    prompt = "ńot 日本 \N{OWL} to be, or"  # the corpus does not hold these characters, so their bytes spell them
    flags = ["--prompt", prompt, "--num_samples", "4", "--max_new_tokens", "40"]
    process = subprocess.run(
        [sys.executable, "-m", "modeling_nanogpt.sample", run.out_dir, *flags],
        cwd=run.out_dir.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert process.returncode == 0
    assert re.fullmatch(r"160 tokens in \d+\.\d\d s: [\d,]+ tokens/s\n", process.stderr)
    *samples, rest = process.stdout.split(f"\n{SEPARATOR}\n")
    assert rest == ""
    assert len(samples) == 4 and len(set(samples)) == 4
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text in samples)


@pytest.fixture
def say(monkeypatch, capsys):
    """Run the command in this process; returns what it printed."""
    verbosity = logging.get_verbosity()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        sample.main(sample.parse_arguments())
        return capsys.readouterr().out

    yield call
    logging.set_verbosity(verbosity)


@pytest.fixture
def refusal(say, capsys):
    """Run the command with something that it must refuse. Returns the line that says why."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as stop:  # anything else would be a traceback
            say(*arguments)
        shown = capsys.readouterr()
        assert stop.value.code == 2
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert line.startswith("python -m modeling_nanogpt.sample: error: ")
        return line.partition(": error: ")[2]

    return refuse


def test_a_prompt_is_read_from_a_file_as_it_is(run, say, tmp_path):
    path = tmp_path / "a prompt.txt"
    path.write_bytes("to be\tor\r\n\n not  é".encode())
    said = say(run.out_dir, "--prompt", f"FILE:{path}", "--num_samples", 2, "--temperature", 0, "--max_new_tokens", 30)
    first, second, rest = said.split(f"\n{SEPARATOR}\n")
    assert first.startswith("to be\tor\r\n\n not  é")
    assert first == second and rest == ""  # the likeliest tokens


def test_several_prompts_are_continued_one_after_the_other(run, say):
    settings = ["--num_samples", 2, "--temperature", 0, "--max_new_tokens", 10]
    prompts = ["to be", "or not to"]
    apart = "".join(say(run.out_dir, "--prompt", prompt, *settings) for prompt in prompts)
    assert say(run.out_dir, "--prompt", prompts[0], "--prompt", prompts[1], *settings) == apart


def test_a_text_without_a_prompt_begins_with_a_newline_or_with_the_end_of_text(run):
    tokenizer = AutoTokenizer.from_pretrained(run.out_dir)
    assert tokenizer.decode(sample.encode(tokenizer, None)[0]) == "\n"
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "end": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # a newline has no token
    assert sample.encode(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end"), None).tolist() == [[2]]


def test_the_seed_repeats_the_samples(run, say):
    first = say(run.out_dir, "--max_new_tokens", 30)
    assert say(run.out_dir, "--max_new_tokens", 30) == first
    assert say(run.out_dir, "--max_new_tokens", 30, "--seed", 7) != first
    assert first.count(SEPARATOR) == 3


def test_a_greedy_sample_is_the_likeliest_text(run, say):
    model, tokenizer = (auto.from_pretrained(run.out_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("to be or", return_tensors="pt").input_ids
    expected = greedy(model.eval(), ids, 40, stride=None)[0]
    said = say(run.out_dir, "--prompt", "to be or", "--num_samples", 1, "--temperature", 0, "--max_new_tokens", 40)
    assert said == f"{tokenizer.decode(expected)}\n{SEPARATOR}\n"


def test_a_stream_says_what_a_sample_says(run, say):
    flags = ["--prompt", "to be or", "--temperature", 0, "--max_new_tokens", 40, "--num_samples", 2]
    assert say(run.out_dir, *flags, "--stream") == say(run.out_dir, *flags)


def test_what_follows_the_end_of_a_text_is_not_printed(run, say, tmp_path):
    model, tokenizer = (auto.from_pretrained(run.out_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
    direction = torch.linspace(-1, 1, TINY["n_embd"])
    with torch.no_grad():  # the end of text is always the likeliest, because all other logits are zero
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wpe.weight.copy_(direction)
        model.transformer.ln_f.weight.fill_(1)
        model.lm_head.weight[tokenizer.eos_token_id] = direction
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for flags in ([], ["--stream"]):
        said = say(tmp_path, "--prompt", "to be", "--num_samples", 2, "--temperature", 0, *flags)
        assert said == f"to be\n{SEPARATOR}\n" * 2


def test_help_names_every_flag(say, capsys):
    with pytest.raises(SystemExit) as stop:
        say("--help")
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.err == ""
    for flag in (
        "--prompt",
        "--num_samples",
        "--max_new_tokens",
        "--temperature",
        "--top_k",
        "--stride",
        "--seed",
        "--stream",
    ):
        assert flag in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_samples", "0"], ["--num_samples=0", "at least 1"]),
        (["--max_new_tokens", "0"], ["--max_new_tokens=0", "at least 1"]),
        (["--temperature", "-1"], ["--temperature=-1", "at least 0"]),
        (["--temperature", "nan"], ["--temperature=nan"]),
        (["--temperature", "inf"], ["--temperature=inf"]),
        (["--temperature", "warm"], ["--temperature", "warm"]),
        (["--top_k", "-1"], ["--top_k=-1", "at least 0"]),
        (["--top_k", "1.5"], ["--top_k", "1.5"]),
        (["--stride", "-1"], ["--stride=-1", "at least 0"]),
        (["--seed", "-1"], ["--seed=-1"]),
        (["--seed", str(2**32)], ["--seed=4294967296"]),
        (["--prompt", ""], ["--prompt", "empty"]),
        (["--prompt", "FILE:missing.txt"], ["--prompt", "missing.txt"]),
        (["--prompt", "FILE:."], ["--prompt", "directory"]),
        (["--prompt", "FILE:latin.txt"], ["--prompt", "latin.txt", "UTF-8", "byte 3"]),
        (["--prompt", "FILE:empty.txt"], ["--prompt", "empty"]),
        (["--prompt", "caf\udce9"], ["--prompt"]),  # how Python passes a byte that is not UTF-8
        (["--promt", "x"], ["--promt"]),
        (["--num", "3"], ["--num"]),  # no abbreviations
        (["second"], ["second"]),
    ],
    ids=ascii,
)
def test_a_mistake_in_the_flags_is_one_line(run, refusal, tmp_path, monkeypatch, arguments, said):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    message = refusal(run.out_dir, *arguments)
    assert all(part in message for part in said)


def test_a_model_must_be_named(refusal):
    assert "MODEL" in refusal()


@pytest.mark.parametrize("name", ["missing", "no/where", "no/such/folder", "empty-folder", "text.txt"])
def test_a_name_that_is_not_a_model_is_one_line(refusal, tmp_path, monkeypatch, name):
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "text.txt").write_text("to be")
    monkeypatch.chdir(tmp_path)
    assert f"{name} is not a folder or Hub id with a model" in refusal(name)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_folder_that_is_not_whole_is_one_line(run, refusal, tmp_path, file, damage):
    folder = shutil.copytree(run.out_dir, tmp_path / "model")
    if damage == "missing":
        (folder / file).unlink()
    else:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])
    assert str(folder) in refusal(folder)
