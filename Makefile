# `make demo` and `make test` each set up .venv by themselves; PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
FOR_DEMO := $(VENV)/installed-for-demo
FOR_TEST := $(VENV)/installed-for-test

.PHONY: demo test smoke faults lint clean

demo: $(FOR_DEMO)
	$(VENV)/bin/python jobs/demo.py

test: $(FOR_TEST) lint
	$(VENV)/bin/python -m pytest

smoke: $(FOR_TEST)
	$(VENV)/bin/python jobs/bench.py --smoke

faults: $(FOR_TEST)
	$(VENV)/bin/python -m tests.faults.table

lint: $(FOR_TEST)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(FOR_DEMO): pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[openvino,report]'
	touch $@

$(FOR_TEST): pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo
