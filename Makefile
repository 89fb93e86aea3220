# One runner (weightsum_lib.run) decides by content what is to be done; make only sets up and calls it.
PROFILE ?= quick
DATA_DIR ?=
SEEDS ?=
DEVICE ?=
PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
# named after the content of what it was installed from, so that a touch installs nothing
INSTALLED := $(VENV)/installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
RUN = $(PY) -m weightsum_lib.run
# uv where it is there: several times as fast
INSTALL = $(if $(shell command -v uv),uv pip install --python "$(PY)",$(PY) -m pip install --disable-pip-version-check) -q
# through the environment, so that no shell reads a value as a program
export PROFILE DATA_DIR SEEDS DEVICE
OPTIONS = --profile "$$PROFILE" --data-dir "$$DATA_DIR" --seeds "$$SEEDS" --device "$$DEVICE"

# glibc's malloc gives large blocks back at once, so that each tensor's pages are new: a tenth of a training step
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.DEFAULT_GOAL := help
# one notebook trains at a time anyway; `make -j2 notebooks book` must not build before it has run
.NOTPARALLEL:
.PHONY: help all setup plan train notebooks book publish bench lab test lock clean

help:  ## Print this help.
	@echo "make TARGET [PROFILE=smoke|quick|hour|day|full] [DATA_DIR=folder] [SEEDS=n] [DEVICE=cpu|cuda]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PROFILE   smoke: seconds, for tests; quick (default): a laptop; hour: the same with"
	@echo "            intervals and parts, an hour or so of training on two cores; day: VGG16, all images;"
	@echo "            full: one GPU, real data only;"
	@echo "            published: the stored run of the report, for 'make book' only"
	@echo "  DATA_DIR  folder of the prepared datasets (default: data)"
	@echo "  SEEDS     seeds of each method, for intervals"
	@echo "  DEVICE    cpu or cuda (default: cuda where there is one)"

all: setup  ## Set up, run the notebooks of PROFILE, build the report, say where it is.
	@$(RUN) all $(OPTIONS)

setup: $(INSTALLED)  ## Make .venv with the locked packages.

$(INSTALLED): | $(VENV)/bin/python
	@echo "installing the locked packages into $(VENV) (a few minutes, once)"
	@$(INSTALL) -r requirements.lock
	@$(INSTALL) --no-deps -e .
	@rm -f $(VENV)/installed-*
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make all PYTHON=python3.12" >&2; exit 1; }
	@test ! -e "$(VENV)" || \
		{ echo "$(VENV) is there, and is no environment; delete it, or name another: make setup VENV=.env" >&2; exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }

plan: setup  ## List the runs of PROFILE that are missing, and the hours that they take on this machine.
	@$(RUN) plan $(OPTIONS)

train: setup  ## Train them, in the order that makes a whole report early; goes on where it was stopped.
	@$(RUN) train $(OPTIONS)

notebooks: setup  ## Run the notebooks of PROFILE, but for those that nothing has changed for.
	@$(RUN) notebooks $(OPTIONS)

book: setup  ## Build the report from what has been run (also PROFILE=published: no training).
	@$(RUN) book $(OPTIONS)

publish: setup  ## Keep the finished run of PROFILE as book/published, and its table in the README.
	@$(RUN) publish $(OPTIONS)

bench: setup  ## Measure the speed of a training step, about five minutes; the book's page on speed shows it.
	@$(PY) -m weightsum_lib.bench --device "$$DEVICE"

lab: setup  ## Open JupyterLab on the paired notebooks, the first of them open.
	@$(PY) -m jupytext --quiet --sync notebooks/*.py
	@$(PY) -m jupyterlab notebooks/00_how_to_sum.ipynb

test: setup  ## Check the style and run the tests.
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --cov=weightsum_lib --cov-branch --cov-fail-under=90 --cov-report=term:skip-covered

lock: setup  ## Resolve the newest packages into requirements.lock, for Linux, macOS and Windows.
	@$(INSTALL) uv
	@$(PY) -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade -q \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -o requirements.lock

clean:  ## Delete the built report (results and trained networks stay).
	@rm -rf book/_build
