# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= examples/configs/quickstart.json

.PHONY: demo demo-lm run test check lint bench fuzz schema

demo: $(VENV)/.runtime
	$(BIN)/python research_eval/main.py --json_config_path examples/configs/quickstart.json

# A language model of the documentation: two minutes of training, then a page that it makes up.
demo-lm: $(VENV)/.runtime
	cat README.md docs/*.md > lm_demo.txt
	$(BIN)/goe run --json_config_path examples/configs/lm_demo.json
	$(BIN)/goe generate --run latest --prompt "The model " --max_new_tokens 400

run: $(VENV)/.runtime
	$(BIN)/python research_eval/main.py --json_config_path $(CONFIG)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/overhead.py

# Hostile configs and data files, made up for ten minutes; `make fuzz SECONDS=60` for one.
SECONDS ?= 600
fuzz: $(VENV)/.dev
	GOE_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/test_hostile_input.py -k "any_value or any_text or any_bytes" --timeout 0

# The JSON Schema for editors follows from the code.
schema: $(VENV)/.runtime
	$(BIN)/python -m research_eval.schema > research_eval/experiment.schema.json

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: $(VENV)/.created requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
