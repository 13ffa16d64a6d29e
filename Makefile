# make venv: everything by pip into .venv. Needs python3 with venv, g++ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.moe_xe-installed

# The versions that are known to work; make CONSTRAINED= takes the newest.
CONSTRAINED ?= yes

# Installed only where torch is missing, so that an XPU build stays, and what it
# pins itself. Where the package index has CUDA builds only, name the CPU build's
# index as well: make venv TORCH='torch==2.13.0 --index-url <index of torch CPU builds>'.
TORCH  ?= $(if $(CONSTRAINED),$(shell grep '^torch==' constraints.txt),torch)
EXTRAS ?= cpu,test,bench

SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt build-constraints.txt $(wildcard sycl_kernels/runtime/*)

# The build's own versions: from the first name before pip 25.3, and from the second since.
BUILD_VERSIONS := $(if $(CONSTRAINED),PIP_CONSTRAINT=build-constraints.txt PIP_BUILD_CONSTRAINT=build-constraints.txt)

# A copy of the tree, since an editable build lies in it.
NEWEST := .newest

.PHONY: venv demo test test-all newest clean

venv: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BUILD_VERSIONS) $(BIN)/pip install --no-deps -e .
	$(if $(CONSTRAINED),$(BIN)/python tools/versions.py constraints >,:) $(VENV)/constraints.txt
	$(BIN)/pip install $(if $(CONSTRAINED),-c $(VENV)/constraints.txt) 'moe_xe[$(EXTRAS)]'
	touch $@

demo: venv
	$(BIN)/python examples/moe_gemm.py

# 15 to 30 minutes on two cores: of every grid of cases a sample that has each value.
test: venv
	$(BIN)/python -m pytest

# Every case, on the CPU device and on the simulated card, with CPU tensors and with torch's xpu.
test-all: venv
	$(BIN)/python -m pytest --full
	$(BIN)/python -m pytest --full --device simulated
	$(BIN)/python -m pytest --full --device simulated-xpu

# The tests with the newest version of everything, and what differs.
newest:
	rm -rf $(NEWEST)
	mkdir $(NEWEST)
	tar -c --exclude='./.*' --exclude=./build --exclude='*.so' . | tar -x -C $(NEWEST)
	$(MAKE) -C $(NEWEST) venv CONSTRAINED=
	$(MAKE) -C $(NEWEST) test CONSTRAINED=; status=$$?; $(NEWEST)/$(BIN)/python tools/versions.py differences; exit $$status

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info moe_xe/*.so moe_xe/bin
