"""docs/scaling_out.md says what processes send each other: its formulas are what runs of the trainer send."""

import json
import os
import sys

import pytest

from modeling_nanogpt import NanoGPTConfig
from support import ROOT
from support.runs import at_step, call_together, finish, recipe_of, run_trainer

sys.path.insert(0, str(ROOT / "docs"))  # the scripts that measure are not a package
import count_bytes

PAGE = (ROOT / "docs" / "scaling_out.md").read_text(encoding="utf-8")


def train_and_count(argv: list[str], kind: str, path: str) -> None:
    """What each process does: count the collectives of the second step."""
    os.environ.update(count_bytes.environment_of(kind))
    before = [(count_bytes.take_cpus_for_gpus,)] if kind == "fsdp2" else []
    before += [(at_step, 1, count_bytes.begin_counting), (at_step, 2, count_bytes.end_counting, path)]
    run_trainer(argv, before)


@pytest.mark.parametrize(("kind", "optimizer"), [("ddp", "muon"), ("fsdp2", "muon")])
def test_two_processes_send_what_the_formula_says(tmp_path, kind, optimizer):
    flags = {"optimizer": optimizer, "dtype": "bfloat16", "gradient_accumulation_steps": 4}
    flags |= {"max_iters": 3, "eval_tokens": 64, "log_interval": 3, "out_dir": tmp_path / "out", "n_embd": 64}
    recipe = recipe_of(tmp_path, **flags)
    path = tmp_path / "counted"
    running = call_together(2, train_and_count, [str(recipe)], kind, str(path), log=tmp_path / "log")
    assert finish(*running) == [0, 0], (tmp_path / "log.0").read_text()
    config = NanoGPTConfig.from_pretrained(tmp_path / "out")
    expected = count_bytes.step_bytes(config, kind, optimizer, "bfloat16", processes=2, micro_steps=2)
    assert json.loads(path.read_text())["whole"] == expected


def test_the_tables_of_the_page_are_those_of_the_script(capsys):
    for table in count_bytes.TABLES:
        table()
        assert capsys.readouterr().out in PAGE
