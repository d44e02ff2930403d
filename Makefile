# `make demo` and `make test` need Python 3.11 or later, a C++ compiler and a package index.
# The rest is made in .venv, once; stamps there tell what is already done.
PYTHON ?= python3
# PyTorch to install: the plain name `torch` would bring gigabytes of CUDA on Linux.
TORCH ?= torch==2.13.0
# Arguments passed on: make demo ARGS="--steps 4", make test ARGS=tests/ops
ARGS ?=

# The tests compile CUDA C++: by the toolkit that is here, else by NVIDIA's wheels.
NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
COMMA := ,

VENV := .venv
PY := $(VENV)/bin/python
# Another TORCH is another stamp, so changing it installs again.
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := $(wildcard csrc/*.* csrc/*/*.* kernels/cuda/*.*)

.PHONY: help setup demo test bench bench-compare gpu tutorials wheel matrix cross lint sanitize fuzz clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24
	@echo "  PYTHON=$(PYTHON)  TORCH=$(TORCH)  ARGS=… is passed on"

setup: $(BUILT)  ## create .venv, install torch and fastft into it, compile the kernels

demo: $(BUILT)  ## fine-tune a real model with and without fastft, and compare
	$(VENV)/bin/fastft demo $(ARGS)

test: $(BUILT)  ## run the tests (the long ones: ARGS="-m slow")
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# A process for each file: gigabytes that another benchmark has freed would spare eager page faults.
bench: $(BUILT)  ## every benchmark against eager and its peers; rewrites the README's tables
	@failed=0; for file in $(or $(filter bench/%,$(ARGS)),$(wildcard bench/bench_*.py)); do \
	  $(PY) -m pytest "$$file" -s --record $(filter-out bench/%,$(ARGS)) || [ $$? = 5 ] || failed=1; \
	done; $(PY) -m bench.report && exit $$failed

bench-compare:  ## fail where a ratio has fallen by more than 10% since the last commit
	$(PY) -m bench.compare $(ARGS)

tutorials: $(BUILT)  ## fine-tune MiniLM on real reviews and entities, without and with fastft
	@for name in sentiment entities trainer; do for line in --eager ""; do \
	  $(PY) tests/tutorials/$$name.py $$line $(ARGS) || exit 1; done; done

# Installs nothing: a machine with a GPU has its torch, and no other is to take its place.
gpu:  ## build, prove and measure everything on a GPU, with the CUDA torch that PYTHON has
	$(PYTHON) -m bench.gpu $(ARGS)

# With CUDA C++ where nvcc is, for all usual architectures; TORCH_CUDA_ARCH_LIST= leaves it out. The
# extension loads on a torch without CUDA all the same, and on every torch from 2.11 on.
WHEEL_CUDA = $(or $(TORCH_CUDA_ARCH_LIST),$(if $(filter undefined,$(origin TORCH_CUDA_ARCH_LIST)),$(if $(NVCC),usual)))
wheel: $(BUILT)  ## build a wheel into dist/, for this Python and every torch from 2.11 on
	TORCH_CUDA_ARCH_LIST="$(WHEEL_CUDA)" \
	  $(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

matrix:  ## install the wheel of dist/ under other versions of Python, torch and the libraries
	$(PYTHON) tests/matrix.py $(ARGS)

cross: $(BUILT)  ## compile the sources for arm64 and for AVX2 alone, and try the kernels
	$(PY) tests/cross.py $(ARGS)

lint: $(BUILT)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  v < (3, 11) and sys.exit("fastft needs Python 3.11 or later, $(PYTHON) is %d.%d: make PYTHON=…" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH)
	@# setuptools-scm: seqeval is a source package that takes its version from it, without saying so.
	$(PY) -m pip install "setuptools>=71" ninja setuptools-scm
	@rm -f $(VENV)/.torch-*
	@# A torch with CUDA has a triton of its own; without one the tests take what they were tuned with.
	@$(PY) -c 'import importlib.metadata as m; own = [d.version for d in m.distributions(name="triton")]; \
	  print("torch==" + m.version("torch"), "triton" + ("==" + own[0] if own else "<3.7"), sep="\n")' > $@

# The constraint keeps dependencies from replacing the torch chosen above, and its triton.
$(INSTALLED): $(TORCH_STAMP) pyproject.toml setup.py
	$(PY) -m pip install --constraint $(TORCH_STAMP) --no-build-isolation -e ".[test$(if $(NVCC),,$(COMMA)nvcc)]"
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# A copy of the package with instrumented kernels, beside the one in use.
SANITIZED := build/sanitized
SANITIZE_FLAGS := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined \
  -fno-omit-frame-pointer -g -O1
sanitize: $(BUILT)  ## run the operators' tests under the address and undefined-behaviour sanitizers
	CC="$${CC:-gcc}" CXX="$${CXX:-g++}" CFLAGS="$(SANITIZE_FLAGS)" CXXFLAGS="$(SANITIZE_FLAGS)" \
	  LDFLAGS="-fsanitize=address,undefined" \
	  $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PY) -P -m pytest tests/ops -k "not compile" -p no:cacheprovider \
	  -o pythonpath="tests $(SANITIZED)/lib" $(ARGS)

fuzz: $(BUILT)  ## call the operators at random, with the kernels of make sanitize where it ran
	@if [ -d $(SANITIZED)/lib ]; then \
	  export LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib; fi; \
	  $(PY) -P tests/fuzz/operators.py $(ARGS)

clean:  ## remove what was built and installed here
	rm -rf $(VENV) .venv-wheel build dist *.egg-info fastft/*.so
