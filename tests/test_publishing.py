"""What a person sees of a run: a model card whose facts and code are true, and a plot of any history."""

import hashlib
import json
import math
import re
import warnings

import numpy as np
import pytest
import yaml
from conftest import TINY
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoTokenizer

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.publishing import plot_losses, write_report
from train_accelerate import RECIPES

TRAINING, VALIDATION = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours
SMALLEST_CONTEXT = min(
    yaml.safe_load(path.read_text(encoding="utf-8")).get("block_size", 1024) for path in RECIPES.glob("*.yaml")
)


@pytest.fixture(scope="module")
def card(run):
    return (run.out_dir / "README.md").read_text(encoding="utf-8")


def table_of(card):
    """The card's one table, heading by heading."""
    headings, _, values = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|"))
    return dict(zip(headings, values, strict=True))


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def read_back(folder):
    """The history and the record of a run, read as anyone could."""
    history = [json.loads(line) for line in (folder.out_dir / "history.jsonl").read_text().splitlines()]
    record = json.loads((folder.data_dir / "prepared.json").read_text())
    return history, record


def make_model(block_size):
    """A model of as many tokens as the run's."""
    return NanoGPTForCausalLM(NanoGPTConfig(vocab_size=320, block_size=block_size, n_layer=2, n_head=2, n_embd=32))


def write(folder, history, record, name="a-model", block_size=16):
    """Write the report on a run that was never made."""
    folder.mkdir(exist_ok=True)
    template = (RECIPES / "MODEL_CARD.md").read_text()
    write_report(folder, template, name, make_model(block_size).config, record, history, history[-1]["step"], 1000)


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def test_the_hub_can_read_the_cards_metadata(run):
    data = ModelCard.load(run.out_dir / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["nanogpt"]


def test_no_blank_of_the_template_is_left(card):
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
    record = record | {"tokens": {"val": 100}, "bytes": {"val": 400}}
    write(tmp_path, [{"step": 3, "val_loss": 2 * math.log(2)}], record)
    card = (tmp_path / "README.md").read_text()
    assert table_of(card) == {
        "validation loss (nats a token)": "1.3863",
        "perplexity": "4.00",
        "bits a byte": "0.5000",
    }


def test_the_card_counts_the_tokens_that_were_trained_on(card):
    tokens = TINY["max_iters"] * TINY["gradient_accumulation_steps"] * TINY["batch_size"] * TINY["block_size"]
    assert f"for {TINY['max_iters']} optimizer steps ({tokens:,} tokens)" in " ".join(card.split())


def test_the_card_describes_the_model_and_the_text(run, card):
    assert "2 layers with 2 heads, width 32 and a context of 16 tokens" in " ".join(card.split())
    corpus = run.data_dir.parent / "corpus.txt"
    assert f"`{corpus}`" in card
    assert f"sha256 is `{hashlib.sha256(corpus.read_bytes()).hexdigest()}`" in " ".join(card.split())
    assert "tokenizer is `char`" in " ".join(card.split())


def test_the_card_names_the_versions_that_the_run_used(card):
    for package in ("torch", "transformers", "accelerate"):
        assert f"{package} {__import__(package).__version__.split('+')[0]}" in card


def test_the_files_that_the_card_points_to_are_there(run, card):
    links = re.findall(r"\]\(([^):]+)\)", card)
    assert {"loss.png", "run.yaml", "history.jsonl"} == set(links)
    assert all((run.out_dir / link).is_file() for link in links)


@pytest.mark.parametrize("block_size", sorted({TINY["block_size"], SMALLEST_CONTEXT}))
def test_the_code_in_the_card_runs(run, tmp_path, monkeypatch, capsys, block_size):
    # with a context shorter than the text that one may wish for as well
    folder = tmp_path / "a-model"
    write(folder, *read_back(run), block_size=block_size)
    make_model(block_size).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run.out_dir).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)  # where the name in the card is the folder's
    scope = {}
    exec(code_of((folder / "README.md").read_text()), scope)
    assert len(capsys.readouterr().out) > 1
    assert isinstance(scope["model"], NanoGPTForCausalLM)  # no copy of the code, as the project is imported


def test_the_code_in_a_runs_own_card_runs(run, card, monkeypatch, capsys):
    monkeypatch.chdir(run.out_dir.parent)
    exec(code_of(card), {})
    assert len(capsys.readouterr().out) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Reports on made-up runs


RECORD = {"corpus": "x.txt", "sha256": "0", "tokenizer": "char", "tokens": {"val": 10}, "bytes": {"val": 10}}


@pytest.mark.parametrize("val_loss", [0.0, 709.0, 710.0, 1e30, math.inf, math.nan])
def test_a_run_that_diverged_can_be_reported(tmp_path, val_loss):
    history = [{"step": 0, "val_loss": 5.0}, {"step": 1, "loss": val_loss}, {"step": 2, "val_loss": val_loss}]
    write(tmp_path, history, RECORD)
    facts = table_of((tmp_path / "README.md").read_text())
    written = [float(value) for value in facts.values()]
    assert written[0] == pytest.approx(val_loss, nan_ok=True)
    assert written[1] >= 1 or math.isnan(val_loss)
    again = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert repr(again) == repr(history)  # nan is not equal to itself


def test_a_name_or_a_text_may_hold_any_character(tmp_path):
    write(tmp_path, [{"step": 1, "val_loss": 2.0}], RECORD | {"corpus": "Über $name/日本.txt"}, name="$step ${é}")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# $step ${é}\n" in card and "`Über $name/日本.txt`" in card


# ---------------------------------------------------------------------------------------------------------------------
# The loss plot


def look_at(path):
    """Its format, and its pixels (height, width, 3) uint8."""
    with Image.open(path) as image:
        return image.format, np.asarray(image.convert("RGB"))


def count(pixels, colour):
    return (pixels == colour).all(axis=2).sum()


def test_the_plot_of_a_run_is_a_picture_with_two_lines(run):
    kind, pixels = look_at(run.out_dir / "loss.png")
    assert kind == "PNG"
    assert 300 <= pixels.shape[0] <= 1500 and 500 <= pixels.shape[1] <= 2000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert count(pixels, TRAINING) > 100 and count(pixels, VALIDATION) > 100


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
        plot_losses(tmp_path / "loss.png", history)
    _, pixels = look_at(tmp_path / "loss.png")
    finite = any(math.isfinite(value) for entry in history for key, value in entry.items() if key != "step")
    coloured = (np.ptp(pixels, axis=2) > 60).sum()  # frame, grid and text are grey
    assert (coloured > 10) == finite


def test_the_plot_shows_the_losses_and_nothing_else(tmp_path):
    pictures = []
    for last in (1.0, 1.0, 1.5):
        plot_losses(tmp_path / "loss.png", steps([3.0, 2.0, last]))
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
