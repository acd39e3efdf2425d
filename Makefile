# make setup | cuda | test | test-slow | test-triton | test-cuda-emulator | test-timm | fuzz | sanitize | test-upstream | lint | bench | bench-all | bench-cpu | gpu-check | gpu-sanitize | triton-table | cuda-table | readme | clean          PYTHON=python3.12 VENV=.venv-312 make test
PYTHON ?= python3
VENV ?= .venv
# Arguments for the command behind a target: make bench ARGS="--quick", make test ARGS="-k masks".
ARGS ?=
# Here nvcc's minutes are asked for (make cuda, or EFFICIENT_ATTN_CUDA=1 make setup), not spent wherever it happens to be.
EFFICIENT_ATTN_CUDA ?= 0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc kernels benchmarks efficient_attn -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: setup cuda test test-slow test-triton test-cuda-emulator test-timm fuzz sanitize test-upstream lint format bench bench-all bench-cpu gpu-check gpu-sanitize triton-table cuda-table readme clean

setup: $(STAMP)

# The environment is complete when the stamp is newer than everything that it was made from; C++ sources count, since the
# editable install holds what they compile to. Build isolation keeps PyTorch out of the build.
$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	EFFICIENT_ATTN_CPU=1 EFFICIENT_ATTN_CUDA=$(EFFICIENT_ATTN_CUDA) $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,dev]'
	touch $@

# efficient_attn._cuda in place, with nvcc: EFFICIENT_ATTN_CUDA_ARCHS=90a make cuda for one GPU. Only what changed is compiled again.
cuda: $(STAMP)
	EFFICIENT_ATTN_CPU=0 EFFICIENT_ATTN_CUDA=1 $(BIN)/python setup.py build_ext --inplace --build-temp build/native

test: $(STAMP)
	$(BIN)/python -m pytest -q -m 'not slow and not gpu' $(ARGS) tests

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m 'slow and not gpu' $(ARGS) tests

# Every case and dtype on the Triton kernels in Triton's interpreter, then every configuration compiled for sm_80 and sm_90.
test-triton: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -W ignore $(ARGS) tests/contract/test_conformance.py tests/kernels/triton/interpreted_*.py
	$(BIN)/python -m pytest -q $(ARGS) tests/kernels/triton/test_triton_compile.py

# timm, open_clip and torchvision. They need torchvision, whose wheels want PyTorch's CUDA build (=== keeps 2.13.0+cpu out), so
# they get an environment of their own: 5 GB, minutes to download.
TIMM_VENV ?= .venv-timm
$(TIMM_VENV)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(TIMM_VENV)/bin/python || $(PYTHON) -m venv $(TIMM_VENV)
	EFFICIENT_ATTN_CPU=1 EFFICIENT_ATTN_CUDA=$(EFFICIENT_ATTN_CUDA) $(TIMM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		'torch===2.13.0' torchvision timm open_clip_torch pytest matplotlib -e .
	touch $@

test-timm: $(TIMM_VENV)/.installed
	$(TIMM_VENV)/bin/python -m pytest -q -p no:cacheprovider $(ARGS) tests/integrations/test_timm.py

# Every case in both half dtypes on the CUDA kernels in their emulator (g++, no GPU), and the faults that it must find.
test-cuda-emulator: $(STAMP)
	$(BIN)/python -m pytest -q $(ARGS) tests/kernels/cuda/test_cuda_emulator.py

# Random calls of the native kernel against the definition: make fuzz CASES=100000
CASES ?= 20000
fuzz: $(STAMP)
	EFFICIENT_ATTN_FUZZ=$(CASES) $(BIN)/python -m pytest -q tests/contract/test_fuzz.py
	@echo "$(CASES) random cases, forward and backward"

# Random calls of the native kernels alone, between guard pages, under AddressSanitizer and UBSan: make sanitize RANDOM_CALLS=1000
RANDOM_CALLS ?= 10000
sanitize: $(STAMP)
	$(BIN)/python tests/kernels/cpu/native/build_harness.py build/sanitize
	OMP_WAIT_POLICY=passive build/sanitize/harness --count $(RANDOM_CALLS) $(ARGS)

# PyTorch's own tests of nn.MultiheadAttention on ours: make test-upstream PYTORCH=/path/to/a/pytorch/checkout
test-upstream: $(STAMP)
	$(BIN)/python tests/upstream/run.py $(PYTORCH) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/kernels/cpu/native/*' 'tests/kernels/cuda/emulator/*' 'tests/kernels/cuda/cuda_launch/*' | grep -v '\.py$$' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/kernels/cpu/native/*' 'tests/kernels/cuda/emulator/*' 'tests/kernels/cuda/cuda_launch/*' | grep -v '\.py$$' | xargs -r $(BIN)/clang-format -i

bench: $(STAMP)
	$(BIN)/efficient-attn bench $(ARGS)

# Every suite for BUDGET minutes, and the report: make bench-all ARGS=--quick; once more with OUT=<folder> ARGS="--quick --resume" goes on.
BUDGET ?= 10
bench-all: OUT = benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S)
bench-all: $(STAMP)
	@out="$(OUT)" && $(BIN)/efficient-attn bench all --budget $(BUDGET) --out "$$out" $(ARGS) && $(BIN)/efficient-attn report "$$out/results.jsonl" --html "$$out/report.html"

bench-cpu: $(STAMP)
	$(BIN)/efficient-attn bench cpu --out benchmarks/results/cpu/$(shell date +%Y%m%d-%H%M%S) $(ARGS)

# Needs a GPU and a Python with PyTorch and Triton; no network, no .venv: make gpu-check PYTHON=python3 OUT=dir
OUT ?= bench-results/gpu-check
gpu-check:
	$(PYTHON) benchmarks/tools/gpu_check.py --out $(OUT) $(ARGS)

# Needs a GPU, compute-sanitizer and what gpu-check needs: the CUDA kernels under memcheck, racecheck, initcheck and synccheck.
gpu-sanitize:
	$(PYTHON) benchmarks/tools/gpu_sanitize.py --out $(OUT) $(ARGS)

# Registers, spills and shared memory of every kernel for sm_80 and sm_90: benchmarks/results/triton/compile.jsonl
triton-table: $(STAMP)
	$(BIN)/python -m efficient_attn.benchmarks.tools.triton_table $(ARGS)

# Registers, spills and shared memory of every CUDA kernel as nvcc compiles it: benchmarks/results/cuda/compile.jsonl
cuda-table: $(STAMP)
	$(BIN)/python -m efficient_attn.benchmarks.tools.cuda_table $(ARGS)

# Writes the generated parts of README.md anew: the table of methods, and with ARGS=<results.jsonl> the picture and figures.
readme: $(STAMP)
	$(BIN)/python docs/readme.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache $(STAMP)
