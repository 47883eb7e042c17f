# `make demo` and `make test` are all a newcomer needs. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
# PyTorch's CPU index, for machines without a GPU: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
TOOLS := .venv/.tools
PYTEST := $(BIN)/pytest

.PHONY: help install demo serve check format test test-tools test-all test-gpu bench clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

install: $(READY)  ## .venv with everything: .venv/bin/ropeway

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Ropeway needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "This Python has no ensurepip; on Debian or Ubuntu install it with: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: install    ## start the server on the embedded model and watch eight requests share one batch
	$(BIN)/python -m ropeway.server.demo

serve: install   ## serve the embedded model on port 8000 until Ctrl-C
	$(BIN)/ropeway serve

check: install   ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict -p ropeway

format: install  ## rewrite what `make check` would complain about, where that is safe
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install    ## the tests (under 15 minutes on 2 cores)
	$(PYTEST)

test-tools: $(TOOLS)  ## what long tests run: other clients, in .venv; nginx and promtool (root on Debian or Ubuntu), never started
	@sh tests/deploy/install_tools.sh

$(TOOLS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,clients,zoo]'
	@! command -v npm > /dev/null || npm install --silent --no-audit --no-fund --prefix .venv openai@6
	@touch $@

test-all: test test-tools  ## the long ones too; installs what test-tools says
	$(PYTEST) -m 'slow and not gpu'

test-gpu: install  ## kernels, families and runner on this machine's GPU, a process per file
	ls tests/gpu/test_*.py | xargs -P 8 -I{} $(PYTEST) -q -m gpu {}

bench: install   ## the benchmarks behind the README's figures
	$(BIN)/python bench/http_load.py -c 1 --requests 8
	$(BIN)/python bench/http_load.py -c 32 --requests 128

clean:           ## remove .venv and caches
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
