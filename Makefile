# make quickstart    set everything up, train the quickstart recipe (or go on with a stopped run), print samples that begin as code does
# make test          set everything up, run the tests
# make torture       set everything up, end runs at random moments and start them again (minutes)
# make conformance   set everything up, run transformers' own model tests on this model (downloads them once)
# make style         set everything up, check style and types
#
# PYTHON=python3.12 names the Python that makes the environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --no-compile -c constraints.txt

# Python keeps the bytecode of what it imports, unless this variable is set, as in some images. Then each command would
# compile the libraries anew, for a quarter of a minute. pip would compile all of their files, which takes longer still.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test torture conformance style python

# A stopped run goes on, and a complete run is not trained again.
quickstart: .venv/installed
	$(BIN)/python train_accelerate.py hub_configs/quickstart.yaml \
		$(if $(wildcard out/quickstart/checkpoints/step-*),--init_from=resume)
	$(BIN)/python -m modeling_nanogpt.sample out/quickstart --seed 3 --num_samples 1 --max_new_tokens 150 \
		--prompt 'def ' --prompt 'class ' --prompt '"""'

# Several processes share the tests, one for each core: a fifth would gain little, and each takes a gigabyte.
test: .venv/complete
	$(BIN)/python -m pytest -n logical --maxprocesses=4 --dist=worksteal

torture: .venv/complete
	$(BIN)/python -W ignore::UserWarning:multiprocessing.resource_tracker tests/support/torture.py

conformance: .venv/complete
	$(PIP_INSTALL) --quiet -e ".[conformance]"
	$(BIN)/python tests/conformance/suite.py -n auto

style: .venv/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# What training and sampling need. To pip, an interrupted installation may look complete, so .venv is then made anew.
.venv/installed: pyproject.toml constraints.txt | python
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "$(PYTHON) must be Python 3.10 or later: make PYTHON=python3.11 $(MAKECMDGOALS) takes another"; exit 2; }
	@if [ -e .venv/unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/unfinished
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e ".[fast]"
	@mv .venv/unfinished $@

# What tests and style need besides. Until it is there, the environment counts as unfinished.
.venv/complete: .venv/installed
	@mv .venv/installed .venv/unfinished
	$(PIP_INSTALL) -e ".[fast,test,dev]"
	@mv .venv/unfinished .venv/installed
	@touch $@

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
