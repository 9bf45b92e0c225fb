# Two commands do everything: `make demo` and `make test`. Each builds the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0+cpu
PYTORCH_CPU_WHEELS := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint env clean

demo: $(READY)
	$(BIN)/dpo-ray run pipelines/configs/demo_cpu.yaml

test: $(READY) lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(READY)

$(READY): requirements-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported: name one from 3.11 to 3.13, as in: make PYTHON=python3.11 env")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch (CPU build), then the pinned packages: a few minutes the first time."
	@$(PIP) install --no-deps "$(TORCH)" 2>/dev/null \
	  || $(PIP) install --no-deps --index-url $(PYTORCH_CPU_WHEELS) "$(TORCH)" \
	  || { echo "No CPU build of PyTorch could be found ($(TORCH)): neither where pip looks on this machine nor at $(PYTORCH_CPU_WHEELS)." >&2; \
	       echo "Way out: download its wheel where there is a network and point pip at its folder: PIP_FIND_LINKS=/path/to/wheels make env" >&2; exit 1; }
	$(PIP) install --no-deps -r requirements-cpu.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
