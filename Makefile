# Each target takes VENV=DIRECTORY; what it needs is set up first, and set up again when its inputs change.
VENV ?= .venv
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=

IN_VENV := $(VENV)/bin/python
# Named after this checkout and its nvcc: an environment that another checkout was installed into counts as not set up,
# and so does one from before nvcc came or went.
STAMP := $(VENV)/.setup-$(shell printf '%s' '$(CURDIR) $(CUDA_HOME)' "$$(command -v nvcc)" | cksum | cut -d ' ' -f 1)
INPUTS := pyproject.toml setup.py constraints.txt tools/setup_environment.sh \
	$(shell find csrc -name __pycache__ -prune -o -name emulator -prune -o -type f -print)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-gpu check bench bench-gpu clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## the environment in VENV (default .venv) and the compiled modules

$(STAMP): $(INPUTS)
	@tools/setup_environment.sh '$(VENV)'
	@rm -f '$(VENV)'/.setup-* && touch '$@'

# The compiled modules lie in the source tree, where a clean can take them from under the stamp.
MODULES := megatron_lite/data/_index megatron_lite/corpus/_text $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),megatron_lite/ops/_kernels)
ifneq ($(strip $(foreach module,$(MODULES),$(if $(wildcard $(module)*.so),,missing))),)
$(STAMP): FORCE
endif

train: setup ## the main job on an embedded default, end to end (about 6 minutes on two cores)
	$(IN_VENV) examples/quickstart.py

test: setup ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -m 'not gpu' $(PYTEST_ARGS)

# The targets for a GPU set nothing up, since such machines often reach no package index: they take PYTHON=INTERPRETER,
# else that of VENV if it is there, else python3, and need torch, a C++ compiler and nvcc; each ends within 8 minutes.
HERE = $(or $(PYTHON),$(wildcard $(IN_VENV)),python3)
DEVICE ?= cuda

test-gpu: ## the tests that need a CUDA device, and nothing else; sets nothing up
	$(HERE) tools/build_in_place.py
	OMP_NUM_THREADS=1 $(HERE) -m tests.gpu

check: setup ## lint, formatting, types and the floor plan
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m mypy
	$(IN_VENV) -m pytest -q tests/test_floor_plan.py

bench: setup ## paired benchmarks on the CPU: operations, the step, parallel layouts
	$(IN_VENV) benchmarks/ops.py $(BENCH_ARGS)
	$(IN_VENV) benchmarks/step.py $(BENCH_ARGS)
	$(IN_VENV) benchmarks/parallel.py $(BENCH_ARGS)

bench-gpu: ## operations and the step on a GPU, in 8 minutes; sets nothing up
	begun=$$(date +%s) status=0; $(HERE) tools/build_in_place.py || exit; \
	$(HERE) benchmarks/ops.py --device $(DEVICE) --until $$((begun + 220)) $(BENCH_ARGS) || status=$$?; \
	$(HERE) benchmarks/step.py --device $(DEVICE) --until $$((begun + 420)) --rounds 3 --steps 4 $(BENCH_ARGS) || \
	status=$$?; exit $$status

clean: ## remove builds and caches; VENV and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis '$(VENV)'/.setup-*
	find $(wildcard megatron_lite csrc tools tests examples benchmarks) -name __pycache__ -prune -exec rm -rf {} +
	find megatron_lite -name '*.so' -delete
