# `make quickstart` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
VENV ?= .venv
BIN = $(VENV)/bin
RUNS ?= runs
WORKERS ?= 2

.PHONY: setup quickstart test test-all lint report-shots clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "protojax needs Python >= 3.11 on the PATH (or: make PYTHON=/path/to/python3.12)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

# The decoupled arm and its joint twin on the embedded photographs, compared: at most 10 minutes on two cores.
quickstart: setup
	$(BIN)/python -m protojax.main --config=configs/quickstart.py:decoupled --workdir=$(RUNS)/quickstart-decoupled
	$(BIN)/python -m protojax.main --config=configs/quickstart.py:joint --workdir=$(RUNS)/quickstart-joint
	$(BIN)/protojax compare $(RUNS)/quickstart-decoupled $(RUNS)/quickstart-joint --out=$(RUNS)/quickstart.html
	@echo "Open $(RUNS)/quickstart-decoupled/report.html and $(RUNS)/quickstart.html in a browser."

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The fast tier: one Python, about 15 minutes on two cores from nothing.
test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist=loadfile -m 'not slow and not parity'

# Everything, on Python 3.11 and 3.12 (both must be installed); run before a release.
test-all:
	$(MAKE) lint
	bash tests/run_all.sh

report-shots: setup
	$(BIN)/python -m protojax.reporting.shots $(RUNS)

clean:
	rm -rf .venv* .cache build dist *.egg-info
