PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

CACHE ?= $(or $(OLDLOGITS_CACHE),$(HOME)/.cache/oldlogits)
VLLM ?= $(CACHE)/vllm-$(shell sha256sum constraints-vllm.txt | cut -c1-12)

.PHONY: demo test test-ray test-vllm lint types install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oldlogits needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/oldlogits train recipes/desk.toml

test: lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not ray and not vllm"

test-ray: install
	$(BIN)/python -m pytest tests/ray

test-vllm: install
	PYTHON=$(PYTHON) tests/vllm/install.sh $(VLLM)
	OLDLOGITS_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf .venv
