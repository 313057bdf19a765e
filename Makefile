# RAC Engine. `make demo` and `make test` are all a newcomer needs; each makes .venv and installs into it first.
PYTHON ?= python3
# Installed before everything else, so that nothing pulls in another build of it. A GPU machine may name its own.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)

PEERS := .venv-peers
# An environment a tool, made by benchmarks/interop.py.
INTEROP := .venv-interop
# On a machine with a GPU: the Python that has its PyTorch and Triton.
GPU_PYTHON ?= python3
# After so many minutes it ends with what it has; the record goes to OUT, or to build/.
MINUTES ?= 9

.PHONY: help demo test soak lint bench real interop gpu clean
help:
	@echo "make demo    prune the example reasoning model to half and show what each calibration keeps"
	@echo "make test    lint, types and the test suite"
	@echo "make soak    every kill point, random kills and 100,000 hostile inputs: an hour or so"
	@echo "make lint    ruff, clang-format and mypy alone"
	@echo "make bench   the kernels against PyTorch, the published loop and llm-compressor, on this machine"
	@echo "make real    a real model, SmolLM2-135M, pruned by every method beside llm-compressor: half an hour, then a table"
	@echo "make interop a pruned model in vLLM, lm-eval, lighteval, peft, llm-compressor and llama.cpp's converter"
	@echo "make gpu     on a machine with a GPU: build in place, check, measure and test there, without network;"
	@echo "             make gpu MINUTES=9 OUT=folder"
	@echo "make clean   remove .venv and everything built"

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" ninja
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/rac doctor
	$(BIN)/python examples/english.py --split calibration --out examples/problems/english.txt
	@out=demo-out; n=1; while [ -e $$out ]; do n=$$((n + 1)); out=demo-out-$$n; done; \
		echo "rac run examples/demo.yaml $$out"; $(BIN)/rac run --restart examples/demo.yaml $$out

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*)
	$(BIN)/mypy

# As many workers as there are cores, within reason: each takes up to 2 GB. tests/conftest.py divides the tests among them.
test: lint
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --no-loadscope-reorder

soak: $(VENV)/.dev
	RAC_SOAK=1 $(BIN)/python -m pytest -q -s tests/faults tests/fuzz

# llm-compressor pins other versions of what the engine uses: it gets a folder of its own.
$(PEERS)/.ready: $(VENV)/.runtime
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet llmcompressor==0.14.0.1
	@touch $@

bench: $(PEERS)/.ready
	PYTHONPATH=kernels $(PEERS)/bin/python benchmarks/kernels.py --record

# Opens the GGUF file that the weights come in; nothing of the product needs it.
$(PEERS)/.gguf: $(PEERS)/.ready
	$(PEERS)/bin/python -m pip install --quiet gguf==0.19.0
	@touch $@

real: $(PEERS)/.gguf
	$(BIN)/python benchmarks/real.py --peers $(PEERS) --record

interop: $(PEERS)/.ready
	$(BIN)/python benchmarks/interop.py --environments $(INTEROP) --peers $(PEERS) --record

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --minutes $(MINUTES) $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) $(PEERS) $(INTEROP) build demo-out* *.egg-info
	find kernels rac_engine -name '_native*.so' -delete
