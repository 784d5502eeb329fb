"""evaluate beside the loss of the trainer, beside a loss computed by hand, and beside lm-eval."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_nanogpt.card_notes import notes_of, with_notes, with_results
from modeling_nanogpt.scoring import NO_TARGET, batches, read_split, windows
from support.commands import command, run_module
from support.runs import call_together, finish
from support.tiny_run import train

MODULE = "modeling_nanogpt.evaluate"


def evaluate(folder, *argv):
    """The results of the command as it prints them in JSON."""
    status, said = command(folder, MODULE, *argv, "--json")
    assert status == 0, said
    return json.loads("\n".join(said[said.index("{") :]))


def loss_by_hand(model, ids, block_size):
    """The sum of the losses of all ids but the first, one window after the other."""
    nats = 0.0
    for start in range(0, len(ids) - 1, block_size):
        window = torch.tensor(ids[start : start + block_size + 1])
        with torch.no_grad():
            chances = model(window[None, :-1]).logits[0].double().log_softmax(-1)
        nats -= chances.gather(1, window[1:, None]).sum().item()
    return nats


@pytest.fixture(scope="module")
def text(tmp_path_factory, run):
    """A text of whole windows, and its ids after the one that begins a text."""
    tokenizer = AutoTokenizer.from_pretrained(run.out_dir)
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text((run.out_dir.parent / "corpus.txt").read_text()[: 16 * 20])
    ids = tokenizer.encode(path.read_text(), add_special_tokens=False)
    assert len(ids) == 16 * 20 and tokenizer.eos_token_id is not None
    return SimpleNamespace(path=path, content=path.read_text(), ids=[tokenizer.eos_token_id, *ids])


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_loss_of_a_split_is_the_one_computed_by_hand(run, tmp_path, split):
    rows = datasets.load_from_disk(str(run.data_dir))[split]["input_ids"][:]
    ids = [i for row in rows for i in row]
    model = AutoModelForCausalLM.from_pretrained(run.out_dir).eval()
    results = evaluate(tmp_path, run.out_dir, "--data_dir", run.data_dir, "--split", split)
    expected = loss_by_hand(model, ids, 16) / (len(ids) - 1)
    size = json.loads((run.data_dir / "prepared.json").read_text())["bytes"][split]
    assert results["tokens"] == len(ids) - 1
    assert results["loss"] == pytest.approx(expected, abs=1e-6)
    assert results["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(expected / math.log(2) * len(ids) / size, rel=1e-6)


def test_the_trainer_says_the_same(run, tmp_path, capsys):
    results = evaluate(tmp_path, run.out_dir)  # its run.yaml names the data_dir
    assert results["loss"] == pytest.approx(run.val_losses[-1], abs=1e-6)
    train(tmp_path, init_from=run.out_dir, tokenizer=run.out_dir, data_dir=run.data_dir, corpus="null", eval_only=True)
    assert f"val loss {results['loss']:.4f}" in capsys.readouterr().out
    card = (run.out_dir / "README.md").read_text()
    assert f"| {results['loss']:.4f} | {results['perplexity']:.2f} | {results['bits_per_byte']:.4f} |" in card


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_does_not_matter(run, tmp_path, batch_size):
    results = evaluate(tmp_path, run.out_dir, "--batch_size", batch_size)
    assert results["loss"] == pytest.approx(run.val_losses[-1], abs=1e-6)


def test_several_processes_say_it_once(run, tmp_path):
    argv = [str(run.out_dir), "--json", "--batch_size=3"]
    assert finish(*call_together(2, run_module, MODULE, argv, log=tmp_path / "log")) == [0, 0]
    first, second = ((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    results = json.loads(first[first.index("{") :])
    assert results["loss"] == pytest.approx(run.val_losses[-1], abs=1e-6)
    assert "{" not in second


def test_bfloat16_is_close_and_not_the_same(run, tmp_path):
    lower = evaluate(tmp_path, run.out_dir, "--dtype=bfloat16")["loss"]
    assert lower == pytest.approx(run.val_losses[-1], abs=0.05) and lower != run.val_losses[-1]


def test_a_text_is_predicted_from_its_first_token_on(run, text, tmp_path):
    results = evaluate(tmp_path, run.out_dir, "--text", text.path, "--block_size=8")
    nats = loss_by_hand(AutoModelForCausalLM.from_pretrained(run.out_dir).eval(), text.ids, 8)
    assert results["tokens"] == len(text.ids) - 1
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.content.encode()), rel=1e-6)
    words = len(re.split(r"\s+", text.content))
    assert results["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)


def test_a_model_of_another_architecture_is_evaluated(run, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.out_dir)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **shape)).eval()
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = evaluate(tmp_path, folder, "--text", text.path)
    assert result["loss"] == pytest.approx(loss_by_hand(model, text.ids, 16) / 320, rel=1e-5)


def test_a_line_says_it_all(run, tmp_path):
    status, said = command(tmp_path, MODULE, run.out_dir, "--data_dir", run.data_dir)
    assert status == 0
    assert f"{run.out_dir} on {run.data_dir}, val: loss {run.val_losses[-1]:.4f} nats a token, perplexity " in said[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 6), st.integers(1, 4))
def test_each_token_but_the_first_is_a_target_once(sizes, block_size, batch_size):
    stream = np.arange(sum(sizes), dtype=np.uint16)
    pieces = np.split(stream, np.cumsum(sizes)[:-1]) if sizes else []
    found = list(windows(pieces, block_size))
    expected = [stream[i : i + block_size + 1] for i in range(0, len(stream) - 1, block_size)]
    assert [window.tolist() for window in found] == [window.tolist() for window in expected]
    targets = [t for _, rows in batches(iter(found), batch_size) for row in rows.tolist() for t in row]
    assert [t for t in targets if t != NO_TARGET] == stream[1:].tolist()
    inputs = [i for rows, ids in batches(iter(found), batch_size) for i in (rows[ids != NO_TARGET]).tolist()]
    assert inputs == stream[:-1].tolist()


def test_a_data_dir_as_the_hub_has_it_is_read_too(run, tmp_path):
    shared = tmp_path / "shared"
    rows = datasets.load_from_disk(str(run.data_dir))
    for split in rows:
        rows[split].to_parquet(str(shared / "data" / f"{split}-00000-of-00001.parquet"))
    tokens = json.loads((run.data_dir / "prepared.json").read_text())["tokens"]
    for split, count in tokens.items():
        ours, theirs = (np.concatenate(read_split(folder, split, count)) for folder in (shared, run.data_dir))
        assert ours.tolist() == theirs.tolist() and len(ours) == count


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval

ROLLING = """
task: {name}
dataset_path: text
dataset_kwargs: {{data_files: {{test: {data}}}, sample_by: document, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def task(text, tmp_path):
    """A folder with a task of lm-eval on the text."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    content = ROLLING.format(name="notes_alone", data=text.path, cache=tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "notes.yaml").write_text(content)
    return tmp_path / "tasks"


def test_lm_eval_says_the_same_of_a_text_and_its_table_goes_into_the_card(run, text, task, all_of_run, tmp_path):
    argv = [all_of_run, "--tasks=notes_alone", "--include_path", task, "--card"]
    status, said = command(tmp_path, MODULE, *argv)
    assert status == 0
    table = "\n".join(line for line in said if line.startswith("|"))
    card = (all_of_run / "README.md").read_text()
    ours = evaluate(tmp_path, run.out_dir, "--text", text.path)
    for measure in ("word_perplexity", "bits_per_byte"):
        printed = re.search(rf"\|{measure} *\|\S* *\| *([\d.]+)", table)
        written = re.search(rf"\| `lm-eval: notes_alone` \| {measure} \| ([\d.]+) \|", card)
        assert ours[measure] == pytest.approx(float(printed[1]), rel=1e-3)
        assert ours[measure] == pytest.approx(float(written[1]), rel=1e-3)


def test_an_unknown_task_is_named(run, task, tmp_path):
    status, said = command(tmp_path, MODULE, run.out_dir, "--tasks=notes_alone,helaswag")
    assert status == 2
    assert said[-1].startswith(f"python -m {MODULE}: error: --tasks=notes_alone,helaswag: lm-eval has no task ")


# ---------------------------------------------------------------------------------------------------------------------
# The model card


@pytest.fixture
def all_of_run(run, tmp_path):
    """A copy of a finished run, to write into."""
    return shutil.copytree(run.out_dir, tmp_path / "copy")


def test_results_stay_in_the_card_when_training_goes_on(run, text, all_of_run, tmp_path):
    card = all_of_run / "README.md"
    card.write_text(with_notes(card.read_text(), "My own words.\n"))
    for _ in range(2):  # the second time takes the place of the first
        evaluate(tmp_path, all_of_run, "--text", text.path, "--card")
    results = evaluate(tmp_path, all_of_run, "--card")
    row = f"| `{run.data_dir}, val` | loss (nats a token) | {results['loss']:.4f} |"
    assert card.read_text().count(row) == 1
    assert card.read_text().count(f"| `{text.path}` | bits a byte | ") == 1
    notes = notes_of(card.read_text())

    flags = {"data_dir": run.data_dir, "out_dir": all_of_run, "corpus": run.out_dir.parent / "corpus.txt"}
    train(tmp_path, init_from="resume", max_iters=30, lr_decay_iters=20, **flags)
    assert "for 30 optimizer steps" in card.read_text()
    assert notes_of(card.read_text()) == notes and "My own words." in notes and row in notes


def test_a_card_without_marks_gets_the_table_at_its_end():
    card = with_results("# A model\n", "notes.txt", {"loss": "1.0"})
    card = with_results(card, "other.txt", {"loss": "3.0"})
    card = with_results(card, "notes.txt", {"loss": "2.0", "perplexity": "7.4"})
    assert card.startswith("# A model\n\n<!--") and card.count("| evaluated on |") == 1
    assert re.findall(r"^\| `(.*)` \| (.*) \| (.*) \|$", card, re.M) == [
        ("other.txt", "loss", "3.0"),
        ("notes.txt", "loss", "2.0"),
        ("notes.txt", "perplexity", "7.4"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes that need the model


def test_tokens_of_another_tokenizer_are_refused(run, tmp_path):
    other = train(tmp_path, tokenizer="bpe", vocab_size=300, prepare_only=True)
    status, said = command(tmp_path, MODULE, run.out_dir, "--data_dir", other.data_dir)
    assert status == 2 and "was made with another tokenizer" in said[-1]


def test_a_window_longer_than_the_context_is_refused(run, tmp_path):
    status, said = command(tmp_path, MODULE, run.out_dir, "--block_size=17")
    assert status == 2 and said[-1].endswith("--block_size=17, but the context of the model is 16 tokens")
