# make venv: everything by pip into .venv. Needs python3 with venv, g++ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.moe_xe-installed

# The CPU build of torch; an unpinned torch fetches gigabytes of CUDA. An XPU
# build that is already in the environment is left alone.
TORCH       ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
EXTRAS      ?= cpu,test,bench

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard sycl_kernels/runtime/*)

.PHONY: venv demo test clean

venv: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/pip install -e '.[$(EXTRAS)]'
	touch $@

demo: venv
	$(BIN)/python examples/moe_gemm.py

test: venv
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info moe_xe/*.so moe_xe/bin
