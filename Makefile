# `make demo` and `make test` each set up .venv by themselves; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: demo test faults lint clean

demo: $(INSTALLED)
	$(VENV)/bin/python jobs/demo.py

test: $(INSTALLED) lint
	$(VENV)/bin/python -m pytest

faults: $(INSTALLED)
	$(VENV)/bin/python -m tests.faults.table

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo
