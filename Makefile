# Every target makes its own .venv when it needs one; a target that is up to date does nothing.
#   PYTHON       interpreter for the .venv, 3.11 or newer            make test PYTHON=python3.12
#   TORCH_INDEX  package index to take torch from, for a CUDA or CPU build other than the one that is found
#   ARGS         more arguments for pytest                            make test ARGS="-k metrics"
#   WORKERS      processes that share the tests, each with a file at a time      make test WORKERS=8
#   GPU_PYTHON   for gpu-test and gpu-bench, an interpreter that has torch and triton: nothing is installed then
#                                                                     make gpu-bench GPU_PYTHON=python3
#   SIZES        networks that gpu-bench measures                     make gpu-bench SIZES="s m"

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2
GPU_PYTHON ?=
SIZES ?= s m l
EXTRAS := distributed,data,quality,tracking,eval,hf,device,report,law,llama3,kernels,peers,dev
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
BIN := .venv/bin
ON_GPU := $(or $(GPU_PYTHON),$(BIN)/python)
FOR_GPU := $(if $(GPU_PYTHON),,.venv/.installed)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

define NEED_GPU
$(ON_GPU) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
  { echo "error: $(ON_GPU) finds no GPU: it needs a CUDA device, and a torch that is built for it"; exit 1; }
endef

.PHONY: help install quickstart test gpu-test gpu-bench lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## make .venv and install everything into it

quickstart: .venv/.installed ## the whole pipeline on real text, small enough for two CPU cores; continues where it stopped
	@launch/quickstart.sh

# one thread each: sums that are compared bit for bit need one order, and matrices this small are quicker so
test: .venv/.installed ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

gpu-test: $(FOR_GPU) ## run the tests that need a GPU
	@$(NEED_GPU)
	@$(ON_GPU) -m pytest -m gpu $(ARGS)

gpu-bench: $(FOR_GPU) ## measure kernels and a training step on a GPU: tables and JSON under runs/bench
	@$(NEED_GPU)
	@mkdir -p runs/bench; failed=""; for size in $(SIZES); do \
	  $(ON_GPU) -m kernels.bench --size $$size --json runs/bench/$$size.json >runs/bench/$$size.txt || failed="$$failed $$size"; \
	  cat runs/bench/$$size.txt; echo; \
	done; [ -z "$$failed" ] || { echo "error: gpu-bench failed for$$failed"; exit 1; }

lint: .venv/.installed ## check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: .venv/.installed ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove caches and build output; .venv, data and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch first and by itself: the small CPU build where there is no NVIDIA GPU and that build can be had.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer ($$($(PYTHON) --version 2>&1)); try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a .venv; its venv module has to be installed"; exit 1; }
	@echo "installing into .venv: $(TORCH), then the project with its extras (some minutes the first time)"
ifneq ($(TORCH_INDEX),)
	@$(PIP) --index-url $(TORCH_INDEX) $(TORCH)
else
	@if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then $(PIP) $(TORCH); \
	  else $(PIP) $(TORCH)+cpu 2>/dev/null || $(PIP) $(TORCH); fi
endif
	@$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@
