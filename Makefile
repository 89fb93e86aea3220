# One runner (weightsum_lib.run) decides by content what is to be done; make only sets up and calls it.
PROFILE ?= quick
DATA_DIR ?=
SEEDS ?=
DEVICE ?=
CLUSTER ?=
NOTEBOOK ?=
FORCE ?=
PYTHON ?= python3
# an active conda environment, but for conda's own, is used as it is
VENV ?= $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)

NAMED := $(if $(filter-out file,$(origin PYTHON)),named)
# what was typed, letter by letter: neither make nor a shell reads a value as a program
VARIABLES := PROFILE DATA_DIR SEEDS DEVICE CLUSTER NOTEBOOK FORCE PYTHON VENV
$(foreach name,PROFILE DATA_DIR SEEDS DEVICE CLUSTER NOTEBOOK FORCE PYTHON,$(eval override $(name) := $$(value $(name))))
VENV_TYPED := $(if $(filter file,$(origin VENV)),$(VENV),$(value VENV))
override VENV := $(VENV_TYPED)
export $(VARIABLES)
export WEIGHTSUM_CLUSTER := $(CLUSTER)
PY = "$$VENV/bin/python"
RUN = $(PY) -m weightsum_lib.run
OPTIONS = --profile "$$PROFILE" --data-dir "$$DATA_DIR" --seeds "$$SEEDS" --device "$$DEVICE"

# glibc's malloc gives large blocks back at once, so that each tensor's pages are new: a tenth of a training step
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.DEFAULT_GOAL := help
# one notebook trains at a time anyway; `make -j2 notebooks book` must not build before it has run
.NOTPARALLEL:
.PHONY: help all setup plan train notebooks book publish bench lab test test-hard lock clean

help:  ## Print this help.
	@echo "make TARGET [PROFILE=smoke|quick|evening|literal|residual|deep|day|full] [DATA_DIR=folder] [SEEDS=n] [DEVICE=cpu|cuda] [CLUSTER=address] [NOTEBOOK=03] [FORCE=1]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PROFILE   smoke: seconds, for tests; quick (default): a laptop; evening: the same with"
	@echo "            intervals and parts, hours of training on two cores; literal: task 1 alone, with the"
	@echo "            network that was asked about; residual, deep: the page beside others alone, on a"
	@echo "            ResNet-20 and on VGG16; day: the page of the recipe alone, on VGG16 and all"
	@echo "            images; full: one GPU, real data only;"
	@echo "            published: the stored run of the report, for 'make book' only"
	@echo "  DATA_DIR  folder of the prepared datasets (default: data)"
	@echo "  SEEDS     seeds of each method, for intervals"
	@echo "  DEVICE    cpu or cuda (default: cuda where there is one)"
	@echo "  CLUSTER   a Dask scheduler, tcp://host:8786, whose workers train and measure, or local:4, started here"
	@echo "  NOTEBOOK  how the name of the one to run begins; the others stay as they are"
	@echo "  FORCE     1: run notebooks again though nothing has changed; trained networks stay"
	@echo "  VENV      environment (default: the active conda environment, else .venv); PYTHON makes it"

all: setup  ## Set up, run the notebooks of PROFILE, build the report, say where it is.
	@$(RUN) all $(OPTIONS) --notebook "$$NOTEBOOK" --force "$$FORCE"

setup:  ## Make .venv with the locked packages, or find that it is whole.
	@"$$PYTHON" install.py "$$VENV" $(NAMED)

plan: setup  ## List the runs of PROFILE that are missing, and the hours that they take on this machine.
	@$(RUN) plan $(OPTIONS)

train: setup  ## Train them, in the order that makes a whole report early; goes on where it was stopped.
	@$(RUN) train $(OPTIONS)

notebooks: setup  ## Run the notebooks of PROFILE, but for those that nothing has changed for.
	@$(RUN) notebooks $(OPTIONS) --notebook "$$NOTEBOOK" --force "$$FORCE"

book: setup  ## Build the report from what has been run (also PROFILE=published: no training).
	@$(RUN) book $(OPTIONS)

publish: setup  ## Keep the finished run of PROFILE as book/published, and its table in the README.
	@$(RUN) publish $(OPTIONS)

bench: setup  ## Measure the speed of a training step, and what a cluster gains, about ten minutes; the book's pages on speed and size show it.
	@$(RUN) bench --device "$$DEVICE"

lab: setup  ## Open JupyterLab on the paired notebooks, the first of them open.
	@$(RUN) lab
	@$(PY) -m jupytext --quiet --sync notebooks/*.py
	@$(PY) -m jupyterlab notebooks/00_how_to_sum.ipynb

test: setup  ## Check the style and run the tests.
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-hard: setup  ## Break it for real: kills, damage, rubbish, by the hundred (an hour).
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m hard -n auto --dist loadfile

lock: setup  ## Resolve the newest packages into requirements.lock, for Linux, macOS and Windows.
	@$(PY) -m pip install -q --disable-pip-version-check uv
	@$(PY) -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade -q \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -o requirements.lock

clean:  ## Delete the built report (results and trained networks stay).
	@rm -rf book/_build
