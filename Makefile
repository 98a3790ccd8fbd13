# Every target works on a fresh machine: it makes .venv by itself, and installs what it needs there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most of what is installed is never imported: bytecode is written when it is.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
TORCH ?= 2.11.0
TRANSFORMERS ?= 5.17.0
# The drop-ins are also tested on the oldest version that is supported and on the newest.
TRANSFORMERS_OLDEST := 4.57.6
TRANSFORMERS_NEWEST := 5.23.0
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inl')
# Tests that load a model in two processes at once run out of neither cores nor memory on the smallest machine.
JOBS ?= 2

.PHONY: demo test test-dropin lint bench gpu gpu-rehearsal gpu-peers miniworld miniworld-report wheel wheel-matrix doctor clean
.DEFAULT_GOAL := demo

demo: $(VENV)/native  ## answer a question about a video, with and without selection
	$(BIN)/qts demo

test: $(VENV)/native  ## the whole test suite, the drop-ins on three transformers versions
	$(BIN)/python -m pytest tests -n $(JOBS)
	$(MAKE) test-dropin

test-dropin: $(VENV)/native $(VENV)/transformers-$(TRANSFORMERS_OLDEST) $(VENV)/transformers-$(TRANSFORMERS_NEWEST)
	for version in $(TRANSFORMERS_OLDEST) $(TRANSFORMERS_NEWEST); do \
	  PYTHONPATH=$(VENV)/transformers-$$version $(BIN)/python -m pytest tests/video/dropin -n $(JOBS) || exit; \
	done

lint: $(VENV)/python  ## ruff and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(VENV)/native  ## time every op against eager PyTorch and its peers, answers checked first
	$(BIN)/python -m pytest benchmarks --benchmark-only

MINIWORLD := build/miniworld
MINIWORLD_FIGURES := benchmarks/results/miniworld.json
miniworld: $(VENV)/native  ## train the embedded model and its selectors, from scratch, from one seed
	$(BIN)/python -m qts_video.miniworld train --output $(MINIWORLD)

miniworld-report: $(VENV)/native  ## what selection costs in answers: tables in docs/miniworld.md
	$(BIN)/python -m qts_video.miniworld report --model $(MINIWORLD) --json $(MINIWORLD_FIGURES) --markdown docs/miniworld.md --summary README.md
	$(BIN)/python -m qts_video.miniworld publish --model $(MINIWORLD) --json $(MINIWORLD_FIGURES)

STEPS ?= build tests sanitize benchmarks models
gpu:  ## on a GPU machine: build, test, sanitize, benchmark, in one call
	bash benchmarks/gpu.sh $(STEPS)

# Not those of the CPU alone, nor the growth to a million tokens.
gpu-rehearsal: $(VENV)/native  ## the benchmarks of a GPU on a pretended one: which rows would be lost there
	PYTHONPATH=tests:benchmarks $(BIN)/python -m pytest -p pretended_gpu.rehearsal benchmarks --benchmark-only \
	  $(foreach name,every_size threads growth,--ignore benchmarks/test_$(name).py)

gpu-peers:  ## the peers of those benchmarks as wheels in .whl/, for a GPU machine without a network
	bash benchmarks/peers.sh

# Built from the sdist, in an environment of its own; torch and the CUDA runtime come with the torch it is used with.
# (`python -m build` would take the folder build/ for the module.)
wheel: $(VENV)/python  ## the sdist and one abi3 manylinux wheel in dist/
	rm -rf build dist && mkdir -p build
	echo torch==$(TORCH) > build/constraints.txt
	PIP_CONSTRAINT=$(CURDIR)/build/constraints.txt $(BIN)/pyproject-build --outdir build/plain
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --wheel-dir dist build/plain/*.whl
	cp build/plain/*.tar.gz dist/

PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCHES ?= 2.10.0 2.11.0 2.13.0
wheel-matrix:  ## test the wheel in dist/ in a clean environment for each of PYTHONS and TORCHES
	tests/packaging/matrix.sh dist/*.whl "$(PYTHONS)" "$(TORCHES)"

doctor: $(VENV)/native  ## versions, devices, and what serves each op
	$(BIN)/qts doctor

clean:
	rm -rf $(VENV) build dist *.egg-info qts_kernels/*.so

# The environment: torch first, so that the extensions are built against the torch they will run with.
$(VENV)/python: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77,<82" wheel ninja numpy
	$(PIP) torch==$(TORCH) torchvision transformers==$(TRANSFORMERS)
	USE_NATIVE=0 $(PIP) --no-build-isolation --editable .[train,dev]
	touch $@

$(VENV)/native: $(VENV)/python $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/transformers-%: $(VENV)/python
	rm -rf $@
	$(PIP) --target $@ --no-deps transformers==$*
	if [ $* = $(TRANSFORMERS_OLDEST) ]; then $(PIP) --target $@ --upgrade --no-deps "huggingface_hub>=0.34,<1" "tokenizers>=0.22,<0.23"; fi
