# `make demo` and `make test` set up what they need; both may be run again at any time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU_PYTHON ?= $(BIN)/python
GPU_OPTIONS ?=

# Idle OpenMP threads that spin take the other core's time; sleeping ones do not.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-smollm2 test lint types bench gpu wheel clean install

install: $(STAMP)

# What is installed as "deliberate" is this project before it was renamed, or another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip uninstall --quiet --disable-pip-version-check --yes deliberate 2>/dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gguf,hub,lm-eval,lora,onnx,otel,ray,redis,serve,structured,wandb]'
	touch $@

demo: $(STAMP)
	$(BIN)/deliberate demo

# As demo, with a real model: downloads 98 MB once. GSM8K's questions where DELIBERATE_DATA has them.
demo-smollm2: $(STAMP)
	$(BIN)/deliberate fetch smollm2
	$(BIN)/deliberate demo --model smollm2-draft --out reports/demo-smollm2

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the package as it is installed: the top-level folders under their import names.
types: $(STAMP)
	rm -rf build/typecheck
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typecheck .
	cd build/typecheck && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml -p deliberate

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/deliberate bench decode

# On a CUDA machine, with its own Python: make gpu GPU_PYTHON=python3. Nothing is fetched or
# installed: the folders are linked under their import names, and a step that lacks a package is
# skipped by name.
STAGED := build/staged
gpu:
	rm -rf $(STAGED)
	mkdir -p $(STAGED)/deliberate
	for entry in deliberate/* kernels configs train eval; do \
	  ln -s "$(CURDIR)/$$entry" $(STAGED)/deliberate/; done
	PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/$(STAGED)" \
	  $(GPU_PYTHON) -m deliberate.kernels.tools.gpu_session $(GPU_OPTIONS)

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info reports outputs
