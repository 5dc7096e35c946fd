# make demo, make test, make bench, make lint: each sets up what it needs in .venv, once.
PYTHON ?= python3
# 2.13 is what the project is tested with; any torch from 2.9 on that is in .venv already is kept.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# What the CUDA library is made of; DSPA_BUILD_CUDA, in the environment, says whether it is.
CSRC := $(wildcard csrc/build.py csrc/*.cu csrc/*.cuh csrc/*.h csrc/device/*)

.PHONY: demo test test-triton36 bench lint clean

demo: .venv/installed
	$(BIN)/dspa demo

test: .venv/tested
	$(BIN)/pytest -n auto --dist loadfile

# With a GPU, at the sizes of real models, and into the README's table; without one, a quick trial at tiny sizes.
bench: .venv/tested
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest bench --benchmark-quiet
	$(BIN)/python -m bench.report

# What the compiler of another Triton makes of the kernels: 3.6 is the oldest that is supported.
test-triton36: .venv/tested
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton36 triton==3.6.0
	PYTHONPATH=build/triton36 $(BIN)/pytest tests/kernels/test_compiled.py

lint: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first: left to another package, it may come as a CUDA build of several GB.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/installed: .venv/torch pyproject.toml setup.py $(CSRC)
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet -e ".[saelens,train,dev]"
	touch $@

clean:
	rm -rf .venv build dist ./*.egg-info dspa_kernels/libdspa_kernels.so dspa_kernels/cuda_build.json
