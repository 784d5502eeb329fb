# make quickstart    set everything up, train the quickstart recipe (or go on with a stopped run), print samples that begin as code does
# make test          set everything up, run the tests
# make torture       set everything up, end runs at random moments and start them again (minutes)
# make conformance   set everything up, run transformers' own model tests on this model (downloads them once)
# make style         set everything up, check style and types
#
# PYTHON=python3.12 names the Python that makes the environment in .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test torture conformance style python

# A stopped run goes on, and a complete run is not trained again.
quickstart: .venv/installed
	$(BIN)/python train_accelerate.py hub_configs/quickstart.yaml \
		$(if $(wildcard out/quickstart/checkpoints/step-*),--init_from=resume)
	$(BIN)/python -m modeling_nanogpt.sample out/quickstart --seed 3 --num_samples 1 --max_new_tokens 150 \
		--prompt 'def ' --prompt 'class ' --prompt '"""'

# Several processes share the tests, one for each core: a fifth would gain little, and each takes a gigabyte.
test: .venv/installed
	$(BIN)/python -m pytest -n logical --maxprocesses=4 --dist=worksteal

torture: .venv/installed
	$(BIN)/python -W ignore::UserWarning:multiprocessing.resource_tracker tests/support/torture.py

conformance: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[conformance]"
	$(BIN)/python tests/conformance/suite.py -n auto

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# To pip, an interrupted installation may look complete, so .venv is made anew after an interruption. pip would compile
# all packages on one core; compileall takes all cores. It may fail at a file that is for a later Python: no matter.
.venv/installed: pyproject.toml constraints.txt | python
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "$(PYTHON) must be Python 3.10 or later: make PYTHON=python3.11 $(MAKECMDGOALS) takes another"; exit 2; }
	@if [ -e .venv/unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/unfinished
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[test,dev,fast]"
	@$(BIN)/python -m compileall -qq -j 0 .venv || true
	@mv .venv/unfinished $@

# Refuse a Python that does not run, and an environment whose Python is gone or is another than PYTHON names.
python:
	@[ ! -e .venv/installed ] || $(BIN)/python -c "" || { \
		echo "the Python that made .venv is gone: remove .venv, and make sets it up anew"; exit 2; }
ifneq ($(origin PYTHON),file)
	@$(PYTHON) -V > /dev/null 2>&1 || { \
		echo "PYTHON=$(PYTHON) does not run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS) names another"; exit 2; }
	@[ ! -e .venv/installed ] || [ "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" ] || { \
		echo ".venv has $$($(BIN)/python -V), but PYTHON=$(PYTHON) is $$($(PYTHON) -V): remove .venv first"; exit 2; }
endif
