# A fresh machine needs `make demo` and `make test`; both set up what they use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Installed without bytecode, which takes pip longer than all else: what is imported is compiled then, and kept.
PIP = $(BIN)/pip install --quiet --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-slow test-all lint docs site clean

# What the demo needs: the package alone.
$(VENV)/package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

# And what tests, lint and pages need: every extra, and what the tests measure against.
$(VENV)/ready: $(VENV)/package
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/package
	$(BIN)/understudy demo --output runs/demo

# A file's tests run in one process, which makes its fixtures once.
test: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist loadfile -m slow

test-all: test test-slow

lint: $(VENV)/ready
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/python docs/build.py
	$(BIN)/python docs/scaling.py

# Generated pages first: what they show is checked by tests, and the site is built from them.
site: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site
