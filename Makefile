# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# a file's tests share a process; threads that wait must not keep the other process from a core
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lint docs help-docs readme

demo: $(READY)  ## the main job on the built-in model
	$(BIN)/tinier run demo

test: lint  ## lint, types and every test
	$(PYTEST)

check: lint  ## lint, types and the fast tests
	$(PYTEST) -m "not slow and not network"

lint: $(READY)  ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

help-docs: $(READY)  ## write docs/cli.md from the program's help
	$(BIN)/python -m scripts.write_cli_docs

docs: $(READY)  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

readme: $(READY)  ## paste the table and the picture of runs/demo into README.md
	$(BIN)/python -m scripts.update_readme runs/demo

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/setup.sh
	touch $(READY)
