# Two commands for a new user: `make demo` and `make test`. Both make .venv on first use and reuse it afterwards.
# Paths are relative, so a folder with spaces in its name is fine.
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: demo test check clean help

help:
	@echo "make demo   tune the embedded tiny model and open the way to runs/demo/report.html (CPU, no network once installed)"
	@echo "make test   every check: notebooks, directives, README, pytest"
	@echo "make clean  remove .venv and caches"

demo: .venv/demo.stamp
	$(BIN)/python -m medibuddy demo --run runs/demo

test: .venv/dev.stamp
	$(BIN)/python .ci/check.py

# A virtual environment of its own; uv installs from its cache in seconds after the first time. Bytecode is compiled here once:
# where PYTHONDONTWRITEBYTECODE is set, every start would otherwise compile seven seconds of imports anew.
.venv/uv.stamp:
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 12), f"medibuddy needs Python 3.10 to 3.12, found {sys.version.split()[0]}; try: make PYTHON=python3.11 demo"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	@touch $@

.venv/demo.stamp: .venv/uv.stamp constraints.txt settings.ini setup.py
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/dev.stamp: .venv/uv.stamp constraints.txt settings.ini setup.py
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/demo.stamp

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
