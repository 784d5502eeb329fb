# make quickstart    set everything up, train the embedded default, print three samples
# make test          set everything up, run the tests
# make torture       set everything up, kill runs at random moments and resume them (minutes)
# make conformance   set everything up, run transformers' own model tests on this model (downloads them once)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test torture conformance style

quickstart: .venv/installed
	$(BIN)/python train_accelerate.py hub_configs/quickstart.yaml
	$(BIN)/python -m modeling_nanogpt.sample out/quickstart --num_samples 3

test: .venv/installed
	$(BIN)/python -m pytest

torture: .venv/installed
	$(BIN)/python -W ignore::UserWarning:multiprocessing.resource_tracker tests/support/torture.py

conformance: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[conformance]"
	$(BIN)/python tests/conformance/suite.py

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,dev]"
	touch $@
