# Two commands do everything: `make demo` and `make test`. Each builds the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0+cpu
PYTORCH_CPU_WHEELS := https://download.pytorch.org/whl/cpu
PIP_OPTIONS := -m pip --disable-pip-version-check --quiet
PIP := $(BIN)/python $(PIP_OPTIONS)
# TRL lives apart: no environment has both. Name the Python of another one with TRL_PYTHON, and none is built.
TRL_VENV ?= .venv-trl
TRL_READY := $(TRL_VENV)/.ready
TRL_PYTHON ?= $(TRL_VENV)/bin/python
TRL_NEEDED = $(if $(filter $(TRL_VENV)/bin/python,$(TRL_PYTHON)),$(TRL_READY))
TRL_PIP := $(TRL_VENV)/bin/python $(PIP_OPTIONS)
# The project with the libraries of extras that its own environment does without.
LM_EVAL_VENV ?= .venv-lm-eval
LM_EVAL_READY := $(LM_EVAL_VENV)/.ready
MLFLOW_VENV ?= .venv-mlflow
MLFLOW_READY := $(MLFLOW_VENV)/.ready
WANDB_VENV ?= .venv-wandb
WANDB_READY := $(WANDB_VENV)/.ready
# Orchestrators live apart, without the project: they start it as a process.
DAGSTER_VENV ?= .venv-dagster
DAGSTER_READY := $(DAGSTER_VENV)/.ready
AIRFLOW_VENV ?= .venv-airflow
AIRFLOW_READY := $(AIRFLOW_VENV)/.ready
# Playwright's Python package, beside the project's own environment; Chromium is the machine's.
BROWSER_PACKAGES ?= .browser-packages
BROWSER_READY := $(BROWSER_PACKAGES)/.ready
# Further arguments of benchmarks.speed.
BENCH ?=
# The site of docs/ is built apart, by mkdocs.
DOCS_VENV ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
# Processes of pytest that run side by side, each a file of tests at a time. Most of them wait for Ray; memory bounds them.
WORKERS ?= 3
# Which faults `make chaos` has, by the names in its table, as in "killed_raylet or full_disk[step]"; all unless told. With
# WRITE=1 the table goes to benchmarks/chaos.md.
FAULTS ?=
WRITE ?=
# How often `make kills` kills, and what draws the moments.
KILLS ?= 10
KILL_SEED ?= $(shell date +%s)

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Which of the tests run.
SELECTED ?= -m "not long and not chaos"
# Which lines run is measured in every process, and each leaves its data in this folder.
MEASURED := $(CURDIR)/.coverage-data
COVERED := DPO_RAY_COVERAGE=$(MEASURED)/.coverage PYTHONPATH=$(CURDIR)/tests/every_process$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-all test-integrations test-lm-eval test-trl test-dagster test-airflow test-mlflow test-wandb test-browser chaos kills lint style types tests docs docs-site test-docs env bench clean

# PyTorch's CPU build into the environment whose pip is $(1): from where pip looks, or else from PyTorch's own index.
define install_torch
@$(1) install --no-deps "$(TORCH)" 2>/dev/null \
  || $(1) install --no-deps --index-url $(PYTORCH_CPU_WHEELS) "$(TORCH)" \
  || { echo "No CPU build of PyTorch could be found ($(TORCH)): neither where pip looks on this machine nor at $(PYTORCH_CPU_WHEELS)." >&2; \
       echo "Way out: download its wheel where there is a network and point pip at its folder: PIP_FIND_LINKS=/path/to/wheels make $(2)" >&2; exit 1; }
endef

# An environment $(1) of the pinned packages of $(2), and nothing else.
define install_orchestrator
$(PYTHON) -m venv $(1)
$(1)/bin/python $(PIP_OPTIONS) install --no-deps -r $(2)
endef

# An environment $(1) of the project, with the pinned packages of $(2) on top of its own.
define install_with
$(call require_python,test-integrations)
$(PYTHON) -m venv $(1)
@echo "Installing PyTorch (CPU build), the project's pinned packages, then those of $(2): some minutes the first time."
$(call install_torch,$(1)/bin/python $(PIP_OPTIONS),test-integrations)
$(1)/bin/python $(PIP_OPTIONS) install --no-deps -r requirements-cpu.txt
$(1)/bin/python $(PIP_OPTIONS) install --no-deps -r $(2)
$(1)/bin/python $(PIP_OPTIONS) install --no-deps --no-build-isolation --editable .
endef

demo: $(READY)
	$(BIN)/dpo-ray run pipelines/configs/demo_cpu.yaml

# The types beside the tests, for they take a minute of one core.
test: $(READY) style
	@$(MAKE) --no-print-directory --jobs=2 types tests

# With those runs too that take longest, each of a path that shorter tests hold in its parts.
test-all: export SELECTED := -m "not chaos"
test-all: test

tests: $(READY)
	$(COVERED) $(PYTEST) $(SELECTED)

test-integrations: test-lm-eval test-trl test-dagster test-airflow test-mlflow test-wandb test-docs test-browser

test-lm-eval: $(LM_EVAL_READY)
	$(LM_EVAL_VENV)/bin/python -m pytest -m integration tests/integrations/test_lm_eval.py

test-trl: $(READY) $(TRL_NEEDED)
	DPO_RAY_TRL_PYTHON=$(TRL_PYTHON) $(BIN)/python -m pytest -m integration tests/integrations/test_trl.py

test-dagster: $(READY) $(DAGSTER_READY)
	DPO_RAY_DAGSTER_PYTHON=$(abspath $(DAGSTER_VENV))/bin/python \
	  $(BIN)/python -m pytest -m integration tests/integrations/test_dagster.py

test-airflow: $(READY) $(AIRFLOW_READY)
	DPO_RAY_AIRFLOW_PYTHON=$(abspath $(AIRFLOW_VENV))/bin/python \
	  $(BIN)/python -m pytest -m integration tests/integrations/test_airflow.py

test-docs: $(READY) $(DOCS_READY)
	DPO_RAY_DOCS_PYTHON=$(abspath $(DOCS_VENV))/bin/python \
	  $(BIN)/python -m pytest -m integration tests/integrations/test_docs_site.py

test-mlflow: $(MLFLOW_READY)
	$(MLFLOW_VENV)/bin/python -m pytest -m integration tests/integrations/test_mlflow.py

test-wandb: $(WANDB_READY)
	$(WANDB_VENV)/bin/python -m pytest -m integration tests/integrations/test_wandb.py

test-browser: $(READY) $(BROWSER_READY)
	PYTHONPATH=$(abspath $(BROWSER_PACKAGES)) \
	  $(BIN)/python -m pytest -m browser tests/integrations/test_report_in_browser.py

# Faults in the stages of a run, one after the other, each against a run that nothing happened to.
chaos: $(READY)
	CHAOS_WRITE=$(WRITE) $(BIN)/python -m pytest -v -m chaos tests/chaos $(if $(FAULTS),-k "$(FAULTS)")

# The same kills again and again, and many more examples: for a machine that has the time.
kills: $(READY)
	@echo "Kills are drawn by KILL_SEED=$(KILL_SEED)."
	DPO_RAY_KILLS=$(KILLS) DPO_RAY_KILL_SEED=$(KILL_SEED) $(PYTEST) -m "faults or hypothesis" --hypothesis-profile=chaos

lint: style types

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# After a change to an option, a message, a loss, a command or an example: the pages that are made from the code, and the notebooks.
docs: $(READY)
	$(BIN)/dpo-ray schema > docs/schema.json
	$(BIN)/dpo-ray schema --markdown > docs/configuration.md
	$(BIN)/python -m docs.make
	$(BIN)/python -m tests.notebooks

# The site from docs/ as it stands, into site/; a warning fails it.
docs-site: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

env: $(READY)

bench: $(READY) $(TRL_NEEDED)
	$(BIN)/python -m benchmarks.speed --trl-python $(TRL_PYTHON) $(BENCH)

# Refuses a Python that is not supported.
define require_python
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} is not supported: name one from 3.11 to 3.13, as in: make PYTHON=python3.11 $(1)")'
endef

$(READY): requirements-cpu.txt pyproject.toml
	$(call require_python,env)
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch (CPU build), then the pinned packages: a few minutes the first time."
	$(call install_torch,$(PIP),env)
	$(PIP) install --no-deps -r requirements-cpu.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $(READY)

# After $(READY), which refuses a Python that is not supported.
$(TRL_READY): benchmarks/requirements-trl.txt | $(READY)
	$(PYTHON) -m venv $(TRL_VENV)
	@echo "Installing PyTorch (CPU build), then TRL's pinned packages: a few minutes the first time."
	$(call install_torch,$(TRL_PIP),bench)
	$(TRL_PIP) install --no-deps -r benchmarks/requirements-trl.txt
	touch $(TRL_READY)

$(LM_EVAL_READY): requirements-cpu.txt requirements-lm-eval.txt pyproject.toml
	$(call install_with,$(LM_EVAL_VENV),requirements-lm-eval.txt)
	touch $(LM_EVAL_READY)

$(MLFLOW_READY): requirements-cpu.txt requirements-mlflow.txt pyproject.toml
	$(call install_with,$(MLFLOW_VENV),requirements-mlflow.txt)
	touch $(MLFLOW_READY)

$(WANDB_READY): requirements-cpu.txt requirements-wandb.txt pyproject.toml
	$(call install_with,$(WANDB_VENV),requirements-wandb.txt)
	touch $(WANDB_READY)

# After $(READY), which refuses a Python that is not supported.
$(DAGSTER_READY): requirements-dagster.txt | $(READY)
	$(call install_orchestrator,$(DAGSTER_VENV),requirements-dagster.txt)
	touch $(DAGSTER_READY)

$(DOCS_READY): requirements-docs.txt
	$(call require_python,docs-site)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(PIP_OPTIONS) install --no-deps -r requirements-docs.txt
	touch $(DOCS_READY)

$(AIRFLOW_READY): requirements-airflow.txt | $(READY)
	$(call install_orchestrator,$(AIRFLOW_VENV),requirements-airflow.txt)
	touch $(AIRFLOW_READY)

$(BROWSER_READY): requirements-browser.txt | $(READY)
	$(PIP) install --no-deps --target $(BROWSER_PACKAGES) --upgrade -r requirements-browser.txt
	touch $(BROWSER_READY)

clean:
	rm -rf $(VENV) $(TRL_VENV) $(LM_EVAL_VENV) $(MLFLOW_VENV) $(WANDB_VENV) $(DAGSTER_VENV) $(AIRFLOW_VENV) $(DOCS_VENV) $(BROWSER_PACKAGES)
	rm -rf site
	rm -rf $(MEASURED) .coverage .pytest_cache .ruff_cache .mypy_cache
