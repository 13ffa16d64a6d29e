# make venv: everything by pip into .venv. Needs python3 with venv, g++ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.moe_xe-installed

# Installed only where torch is missing, so that an XPU build stays. Where the
# package index has CUDA builds only, name the CPU build's index as well:
# make venv TORCH='torch==2.13.0 --index-url <index of torch CPU builds>'.
TORCH  ?= torch==2.13.0
EXTRAS ?= cpu,test,bench

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard sycl_kernels/runtime/*)

.PHONY: venv demo test clean

venv: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[$(EXTRAS)]'
	touch $@

demo: venv
	$(BIN)/python examples/moe_gemm.py

test: venv
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info moe_xe/*.so moe_xe/bin
