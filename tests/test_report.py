"""What a person sees of a run: a model card whose facts are true and whose code runs, and a plot of any history."""

import hashlib
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoTokenizer

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.throughput import flops_per_token
from modeling_nanogpt.training.checkpointing import TrainState
from modeling_nanogpt.training.describing import RunFacts
from modeling_nanogpt.training.report import (
    Report,
    draw_samples,
    find_commit,
    in_one_line,
    plot_losses,
    training_seconds,
)
from support.tiny_run import TINY, train
from train_accelerate import RECIPES

LOGGED, TRAINING, VALIDATION = (198, 219, 239), (31, 119, 180), (255, 127, 14)
SMALLEST_CONTEXT = min(
    yaml.safe_load(path.read_text(encoding="utf-8")).get("block_size", 1024) for path in RECIPES.glob("*.yaml")
)


@pytest.fixture(scope="module")
def card(run):
    return (run.out_dir / "README.md").read_text(encoding="utf-8")


def table_of(card):
    """The table of losses in the card, as a dict of headings and values."""
    headings, _, values = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")][:3]
    return dict(zip(headings, values, strict=True))


def facts_of(card):
    """The table of facts in the card."""
    rows = re.findall(r"^\| ([a-z ]+) \| (.*) \|$", card.split("## How it was made")[1], re.M)
    return dict(rows)


def samples_of(card):
    return re.findall(r"^(`{3,})text\n(.*?)\n\1$", card.split("## Samples")[1].split("## How it")[0], re.S | re.M)


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


RECORD = {
    "corpus": "x.txt",
    "sha256": "0",
    "tokenizer": "char",
    "vocab_size": 300,
    "tokens": {"train": 90, "val": 10},
    "bytes": {"val": 10},
}


def read_back(folder):
    """The history and the record of a run, read from its files."""
    history = [json.loads(line) for line in (folder.out_dir / "history.jsonl").read_text().splitlines()]
    record = json.loads((folder.data_dir / "prepared.json").read_text())
    return history, record


def make_model(block_size):
    """A model with as many tokens as the model of the run."""
    return NanoGPTForCausalLM(NanoGPTConfig(vocab_size=320, block_size=block_size, n_layer=2, n_head=2, n_embd=32))


def make_report(record, name="a-model", block_size=16, recipe=None):
    template = (RECIPES / "MODEL_CARD.md").read_text()
    model = make_model(block_size)
    facts = RunFacts(
        out_dir=Path("out"),
        recipe=recipe or {},
        config=model.config,
        parameters=model.num_parameters(),
        data=record,
        step_tokens=50,
        hardware="a machine",
        precision="no",
        attention="sdpa",
        compiled=False,
        resumed_from=None,
        introduction="",
    )
    return Report(facts, template, name, "abc")


def write(folder, history, record, samples=(), learned=(), earlier=None, **kwargs):
    """Write the report on a run that never took place. Returns the card."""
    folder.mkdir(exist_ok=True)
    report = make_report(record, **kwargs)
    state = TrainState(step=history[-1]["step"], history=history, samples=learned)
    report.write(folder, state, samples, earlier or folder / "README.md")
    return (folder / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def test_the_hub_can_read_the_cards_metadata(run):
    data = ModelCard.load(run.out_dir / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["nanogpt"]
    history, _ = read_back(run)
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results.keys() == {"loss", "perplexity", "bits_per_byte"}
    assert results["loss"] == pytest.approx(history[-1]["val_loss"], abs=5e-5)
    assert {result.dataset_name for result in data.eval_results} == {"corpus.txt, held-out part"}


def test_every_name_in_the_template_is_filled_in(card):
    assert not re.search(r"\$\w|\$\{", card)
    assert "None" not in card


def test_the_losses_in_the_card_are_those_of_the_last_evaluation(run, card):
    history, record = read_back(run)
    val_loss = [entry["val_loss"] for entry in history if "val_loss" in entry][-1]
    facts = table_of(card)
    assert float(facts["validation loss (nats a token)"]) == pytest.approx(val_loss, abs=5e-5)
    assert float(facts["perplexity"]) == pytest.approx(math.e**val_loss, abs=5e-3)
    # bits of the whole split over its bytes
    bits = math.log2(math.e) * val_loss * record["tokens"]["val"]
    assert float(facts["bits a byte"]) == pytest.approx(bits / record["bytes"]["val"], abs=5e-5)


def test_bits_a_byte_count_bytes_and_not_tokens(run, tmp_path):
    history, record = read_back(run)
    record = record | {"tokens": {"train": 1, "val": 100}, "bytes": {"val": 400}}
    card = write(tmp_path, [{"step": 3, "val_loss": 2 * math.log(2)}], record)
    assert table_of(card) == {
        "validation loss (nats a token)": "1.3863",
        "perplexity": "4.00",
        "bits a byte": "0.5000",
    }


def test_the_card_counts_the_tokens_that_were_trained_on(card):
    tokens = TINY["max_iters"] * TINY["gradient_accumulation_steps"] * TINY["batch_size"] * TINY["block_size"]
    assert f"for {TINY['max_iters']} optimizer steps ({tokens:,} tokens)" in " ".join(card.split())


def test_the_card_describes_the_model_and_the_text(run, card):
    words = " ".join(card.split())
    parameters = sum(p.numel() for p in NanoGPTForCausalLM.from_pretrained(run.out_dir).parameters())
    assert f"A GPT of {parameters:,} parameters (2 layers, 2 heads, width 32) with a context of 16 tokens" in words
    corpus = run.data_dir.parent / "corpus.txt"
    assert f"trained from scratch on `{corpus}`" in words
    facts = facts_of(card)
    assert facts["text"] == f"`{corpus}`, sha256 `{hashlib.sha256(corpus.read_bytes()).hexdigest()}`"
    tokens = len(AutoTokenizer.from_pretrained(run.out_dir))
    assert facts["tokenizer"] == f"`char`, {tokens} tokens"
    assert facts["tokens"] == "5,400 to train on, 600 held out"


def test_the_card_counts_the_arithmetic(run, card):
    tokens = TINY["max_iters"] * TINY["gradient_accumulation_steps"] * TINY["batch_size"] * TINY["block_size"]
    flops = tokens * flops_per_token(NanoGPTConfig.from_pretrained(run.out_dir))
    assert facts_of(card)["trained on"] == f"{tokens:,} tokens ({tokens / 5400:.2f} times the text), {flops:.2e} FLOPs"


def test_the_card_holds_the_recipe_and_the_command_that_repeats_it(run, card):
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.S)
    assert yaml.safe_load(recipe) == yaml.safe_load((run.out_dir / "run.yaml").read_text())
    assert "\naccelerate launch train_accelerate.py run.yaml --out_dir=out/again\n" in card


def test_a_repeated_run_pushes_nowhere(tmp_path):
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD, recipe={"push_to_hub": True})
    assert " run.yaml --out_dir=out/again --push_to_hub=false\n" in card


def test_the_card_says_what_the_run_went_on_from(tmp_path):
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD, recipe={"init_from": "alice/tiny"})
    assert "trained from `alice/tiny` on" in card
    assert ModelCard(card).data.base_model == "alice/tiny"
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD, recipe={"init_from": str(tmp_path)})
    assert f"trained from `{tmp_path}` on" in card and ModelCard(card).data.base_model is None


def test_the_card_names_a_text_of_the_hub_and_its_revision(tmp_path):
    record = RECORD | {"corpus": "alice/texts", "revision": "0123abc"}
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], record)
    assert ModelCard(card).data.datasets == ["alice/texts"]
    assert facts_of(card)["text"] == "`alice/texts` at revision `0123abc`, sha256 `0`"


def test_the_card_says_how_long_and_on_what(card):
    facts = facts_of(card)
    assert float(facts["time"].split()[0]) > 0
    assert re.fullmatch(r"1 process \(.+\), (float32|bfloat16|float16)", facts["hardware"])
    assert facts["commit"] == f"`{find_commit()}`" and re.fullmatch(r"`[0-9a-f]{40}(-dirty)?`", facts["commit"])


def test_time_counts_each_logged_interval_at_its_own_rate():
    history = [{"step": 0, "val_loss": 1.0}, {"step": 10, "tokens_per_second": 50.0, "loss": 1.0}]
    history += [{"step": 30, "tokens_per_second": 100.0, "loss": 1.0}, {"step": 31, "val_loss": 1.0}]
    assert training_seconds(history, step_tokens=5) == 10 * 5 / 50 + 20 * 5 / 100


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_the_card_shows_three_samples_of_the_model_that_was_saved(run, card):
    model = NanoGPTForCausalLM.from_pretrained(run.out_dir).train()
    tokenizer = AutoTokenizer.from_pretrained(run.out_dir)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    drawn = draw_samples(model, tokenizer)
    assert [text.strip() for _, text in samples_of(card)] == [text.strip() for text in drawn]
    assert len(set(drawn)) == 3 and all(len(text) == 15 for text in drawn)
    assert torch.equal(torch.random.get_rng_state(), before) and model.training


def test_samples_are_drawn_from_the_probabilities_of_the_model(run):
    model = NanoGPTForCausalLM.from_pretrained(run.out_dir, dropout=0.5).train()
    tokenizer = AutoTokenizer.from_pretrained(run.out_dir)
    with torch.no_grad():
        model.transformer.wpe.weight.normal_(generator=torch.Generator().manual_seed(0))  # positions count
    unused = torch.arange(model.config.vocab_size) >= len(tokenizer)  # likely, but no token of the tokenizer,
    unused[tokenizer.pad_token_id] = True  # or none of a text
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + 100.0 * unused)
    drawn = draw_samples(model, tokenizer)
    model.eval()
    generator = torch.Generator().manual_seed(1337)
    ids = torch.tensor([tokenizer("\n").input_ids] * 3)
    with torch.no_grad():
        while ids.shape[1] < 16:
            logits = model(ids, use_cache=False).logits[:, -1].masked_fill(unused, -math.inf)
            chances = torch.softmax(logits / 0.8, -1)
            likeliest = chances.topk(200)
            new = likeliest.indices.gather(1, torch.multinomial(likeliest.values, 1, generator=generator))
            ids = torch.cat([ids, new], dim=1)
    assert drawn == [tokenizer.decode(row[1:]) for row in ids]


def test_a_sample_ends_where_its_text_ends(run):
    model = NanoGPTForCausalLM.from_pretrained(run.out_dir)
    tokenizer = AutoTokenizer.from_pretrained(run.out_dir)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()  # every token is as likely as any other ...
        model.lm_head.weight.zero_()
    kept = [(tokenizer("e", add_special_tokens=False).input_ids[0], 0.0), (tokenizer.eos_token_id, 0.0)]
    bias = torch.full((model.config.vocab_size,), -1e9)
    bias[[token for token, _ in kept]] = 0.0  # ... of these two
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    for text in draw_samples(model, tokenizer):
        assert set(text) <= {"e"} and len(text) < 15


@pytest.mark.parametrize(
    "text", ["```\n# no heading\n```", "a\0b\x1b[31mc\ufffe", "````", "$loss ${x} $", "---\nx: 1\n---"]
)
def test_the_card_stays_valid_whatever_a_sample_holds(tmp_path, text):
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD, samples=[text, "second"])
    (_, first), (_, second) = samples_of(card)
    assert second == "second"
    assert first == re.sub("[\0\x1b\ufffe]", "\ufffd", text)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"


# ---------------------------------------------------------------------------------------------------------------------
# A person's notes


def test_notes_survive_the_next_save(tmp_path):
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD)
    notes = "Ask **Ana** first. $loss\n\n<!-- hidden -->\n\\1"
    edited = card.replace("<!-- your notes -->\n", f"<!-- your notes -->\n{notes}\n") + "lost"
    (tmp_path / "README.md").write_text(edited)
    again = write(tmp_path, [{"step": 2, "val_loss": 1.0}], RECORD)
    assert again == write(tmp_path / "other", [{"step": 2, "val_loss": 1.0}], RECORD).replace(
        "<!-- your notes -->\n", f"<!-- your notes -->\n{notes}\n"
    )


@pytest.mark.parametrize("earlier", ["", "# my own card", "<!-- your notes -->\nno end"])
def test_a_card_without_marks_is_written_anew(tmp_path, earlier):
    (tmp_path / "README.md").write_text(earlier)
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD)
    assert card == write(tmp_path / "other", [{"step": 1, "val_loss": 2.0}], RECORD)


def test_the_card_names_the_versions_that_the_run_used(card):
    for package in ("torch", "transformers", "accelerate"):
        assert f"{package} {__import__(package).__version__.split('+')[0]}" in card


def test_the_files_that_the_card_points_to_are_there(run, card):
    links = re.findall(r"\]\(([^):]+)\)", card)
    assert {"loss.png", "run.yaml", "history.jsonl", "samples.jsonl"} == set(links)
    assert all((run.out_dir / link).is_file() for link in links)


@pytest.mark.parametrize("block_size", sorted({TINY["block_size"], SMALLEST_CONTEXT}))
def test_the_code_in_the_card_runs(run, tmp_path, monkeypatch, capsys, block_size):
    # also with a context that is shorter than the text to generate
    folder = tmp_path / "a-model"
    write(folder, *read_back(run), block_size=block_size)
    make_model(block_size).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run.out_dir).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)  # here, the name in the card is the folder's
    scope = {}
    exec(code_of((folder / "README.md").read_text()), scope)
    assert len(capsys.readouterr().out) > 1
    assert isinstance(scope["model"], NanoGPTForCausalLM)  # no copy of the code, because the project is imported


def test_the_code_in_a_runs_own_card_runs(run, card, monkeypatch, capsys):
    monkeypatch.chdir(run.out_dir.parent)
    exec(code_of(card), {})
    assert len(capsys.readouterr().out) > 1


def test_each_save_leaves_a_sample_and_a_line(tmp_path, capsys):
    run = train(tmp_path, eval_interval=5, max_iters=15)
    samples = [json.loads(line) for line in (run.out_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["step"] for each in samples] == [5, 10, 15]
    said = capsys.readouterr().out
    for each in samples:
        assert f"step {each['step']}: sample: {in_one_line(each['text'])}\n" in said
    assert len({each["text"] for each in samples}) > 1  # the model has changed
    model, tokenizer = NanoGPTForCausalLM.from_pretrained(run.out_dir), AutoTokenizer.from_pretrained(run.out_dir)
    assert samples[-1]["text"] == draw_samples(model, tokenizer)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reports on made-up runs


def test_the_card_shows_how_the_model_learned(tmp_path):
    learned = [{"step": step, "text": f"text of step {step}"} for step in (10, 20, 30, 40, 50)]
    card = write(tmp_path, [{"step": 50, "val_loss": 2.0}], RECORD, learned=learned)
    part = card.split("## How it learned")[1].split("## Use it")[0]
    assert re.findall(r"text of step (\d+)", part) == ["10", "30", "50"]
    card = write(tmp_path, [{"step": 10, "val_loss": 2.0}], RECORD, learned=learned[:1])
    assert card.count("text of step 10") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\nb", "a b"), ("\n\n  a\tb ", "a b"), ("a\x1b[31mb", "a [31mb"), ("", ""), ("x" * 200, "x" * 89 + "…")],
)
def test_a_sample_is_shown_in_one_line(text, line):
    assert in_one_line(text) == line


@pytest.mark.parametrize("val_loss", [0.0, 709.0, 710.0, 1e30, math.inf, math.nan])
def test_a_run_that_diverged_can_be_reported(tmp_path, val_loss):
    history = [{"step": 0, "val_loss": 5.0}, {"step": 1, "loss": val_loss}, {"step": 2, "val_loss": val_loss}]
    facts = table_of(write(tmp_path, history, RECORD))
    written = [float(value) for value in facts.values()]
    assert written[0] == pytest.approx(val_loss, nan_ok=True)
    assert written[1] >= 1 or math.isnan(val_loss)
    again = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    loss = val_loss if math.isfinite(val_loss) else None  # JSON has no nan and no infinity
    assert again == [{"step": 0, "val_loss": 5.0}, {"step": 1, "loss": loss}, {"step": 2, "val_loss": loss}]
    results = ModelCard.load(tmp_path / "README.md").data.eval_results or []
    assert all(math.isfinite(result.metric_value) for result in results)


def test_a_name_or_a_text_may_hold_any_character(tmp_path):
    record = RECORD | {"corpus": "Über $name/日本.txt"}
    card = write(tmp_path, [{"step": 1, "val_loss": 2.0}], record, name="$step ${é}")
    assert "# $step ${é}\n" in card and "`Über $name/日本.txt`" in card


# ---------------------------------------------------------------------------------------------------------------------
# The loss plot


def look_at(path):
    """Its format, and its pixels (height, width, 3) uint8."""
    with Image.open(path) as image:
        return image.format, np.asarray(image.convert("RGB"))


def count(pixels, colour):
    return (pixels == colour).all(axis=2).sum()


def test_the_plot_of_a_run_is_a_picture_with_its_lines(run):
    kind, pixels = look_at(run.out_dir / "loss.png")
    assert kind == "PNG"
    assert 300 <= pixels.shape[0] <= 1500 and 500 <= pixels.shape[1] <= 2000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert all(count(pixels, colour) > 100 for colour in (LOGGED, TRAINING, VALIDATION))


def steps(values, key="loss"):
    return [{"step": i, key: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    "history",
    [
        steps([5.0, math.nan, 3.0, math.inf, 2.0, -math.inf]),
        steps([5.0, math.nan, 3.0], "val_loss"),
        steps([4.0], "val_loss"),
        steps([1e300, 1.0]),
        steps([math.nan, math.inf]),
    ],
    ids=["training with gaps", "no training", "one evaluation", "huge", "nothing finite"],
)
def test_any_history_can_be_drawn_in_silence(tmp_path, history):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses(tmp_path / "loss.png", history, 100)
    _, pixels = look_at(tmp_path / "loss.png")
    finite = any(math.isfinite(value) for entry in history for key, value in entry.items() if key != "step")
    coloured = (np.ptp(pixels, axis=2) > 30).sum()  # the frame, the grid and the text are grey
    assert (coloured > 10) == finite


def test_the_plot_shows_the_losses_and_nothing_else(tmp_path):
    pictures = []
    for last in (1.0, 1.0, 1.5):
        plot_losses(tmp_path / "loss.png", steps([3.0, 2.0, last]), 100)
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_fall_at_the_start_does_not_flatten_the_rest(tmp_path):
    falling = [10.0, 9.0, 3.0] + [2.0 - i / 100 for i in range(100)]
    plot_losses(tmp_path / "loss.png", steps(falling, "val_loss"), 100)
    _, pixels = look_at(tmp_path / "loss.png")
    rows = np.nonzero((pixels == VALIDATION).all(axis=2).any(axis=1))[0]
    at_the_end = np.nonzero((pixels[:, -80:] == VALIDATION).all(axis=2).any(axis=1))[0]
    half = pixels.shape[0] / 2
    assert rows.min() < 20 and at_the_end.min() > half
    middle = np.nonzero((pixels[:, pixels.shape[1] // 2] == VALIDATION).all(axis=1))[0]
    assert 0.3 * pixels.shape[0] < middle.mean() < 0.7 * pixels.shape[0]  # halfway down, as 1.5 is between 2.0 and 1.0


def test_an_evaluation_above_the_picture_draws_no_line_into_it(tmp_path):
    logged = [{"step": i, "loss": 2.0 - i / 100} for i in range(1, 101)]
    evaluated = [{"step": i, "val_loss": 2.0 - i / 100} for i in (50, 100)]
    pictures = []
    for history in (logged + evaluated, [{"step": 0, "val_loss": 10.0}] + logged + evaluated):
        plot_losses(tmp_path / "loss.png", history, 100)
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] == pictures[1]
