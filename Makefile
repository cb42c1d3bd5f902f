# Every target sets itself up: `make demo` or `make test` in a fresh clone needs nothing but Python 3.11 or newer.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.26.0
QUESTION ?= all
PEERS ?= gptqmodel optimum logbar tokenicer device-smi defuser pypcre threadpoolctl accelerate llama-cpp-python diskcache
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types unit peers bench clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python examples/encoder.py

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .

# The installed tree is what mypy checks: there, and only there, passes/ is qcompile.passes.
# An editable install maps the packages by an import hook, which mypy does not follow.
types: $(READY)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/installed .
	MYPYPATH=build/installed $(BIN)/mypy -p qcompile

unit: $(READY)
	$(BIN)/pytest $(PYTEST)

# Libraries whose own files ours are held against. They ask for other versions than they need, so they come without what they
# ask for, and lie apart: transformers behaves otherwise when it finds them.
peers: $(VENV)/.ready-peers
	PYTHONPATH=$(VENV)/peers GPTQMODEL_CPU_WORKERS=2 $(BIN)/pytest tests/test_checkpoints_integer.py tests/test_checkpoints_save.py tests/test_checkpoints_gguf.py -k "gptqmodel or exports_load or llama_cpp"

bench: $(VENV)/.ready-bench
	$(BIN)/python -m benchmarks $(QUESTION)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# Only torchvision's architectures are wanted, which are Python. Its operators fit one build of torch each, and where they
# do not fit transformers cannot be imported beside it, or the process ends: so it lies apart, without them.
# torch comes first and by itself, so that TORCH may name any build: TORCH='torch==2.11.0', TORCH=/path/to/a.whl.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'setuptools>=77'
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --no-build-isolation -e '.[test]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/torchvision '$(TORCHVISION)'
	rm -f $(VENV)/torchvision/torchvision/*.so
	touch $@

$(VENV)/.ready-peers: $(READY) Makefile
	$(BIN)/pip install --quiet cmake ninja scikit-build-core
	BUILD_CUDA_EXT=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade --target $(VENV)/peers $(PEERS)
	touch $@

$(VENV)/.ready-bench: $(READY)
	$(BIN)/pip install --quiet --no-build-isolation -e '.[bench]'
	touch $@
