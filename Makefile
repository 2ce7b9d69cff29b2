# Each target makes its virtual environment and installs what it needs; a second call starts at once.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help tune test test-all lint check bench bench-engine bench-replay gpu-check gpu-bench clean
help:
	@echo "make tune      tune the bundled demo model on this machine and write a profile   (ARGS='--max-memory 1GiB …')"
	@echo "make test      lint, types and the fast tests"
	@echo "make test-all  every test that this machine can run"
	@echo "make check     do the engine's decisions still count as committed?   (ARGS='--base origin/main': is it slower?)"
	@echo "make bench     the tuned engine beside plain transformers and accelerate"
	@echo "make bench-engine  decoding, prefill, batches and loading of the demo, as pytest-benchmark tests"
	@echo "make bench-replay  how fast traces are replayed and requests are grouped"
	@echo "make gpu-check  exactness, a shape, bandwidth, a short tune and tests on a GPU; JSON in OUT   (PY=python3 where all is installed)"
	@echo "make gpu-bench  systems on a GPU at the expert width SHAPE: olmoe-1b-7b, deepseek-v2-lite, qwen3-30b-a3b, or a size"
	@echo "make lint      ruff and mypy"

$(VENV)/.core: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes, once) ..."
	@$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@$(PY) -m pip install --quiet --editable '.[test,compare]'
	@touch $@

$(VENV)/.compare: $(VENV)/.core
	@$(PY) -m pip install --quiet --editable '.[compare]'
	@touch $@

# The demo would fit any machine; --demo limits the memory, the GPU's if there is one, so that it does not.
tune: ARGS ?= --demo
tune: $(VENV)/.core
	@$(PY) -m harness.tune $(ARGS)

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Two at a time, as many as the machines that CI has have cores; TEST_JOBS=0, for a debugger, runs them in one process.
TEST_JOBS ?= 2
PYTEST := $(PY) -m pytest --numprocesses=$(TEST_JOBS) --dist=worksteal

test: lint
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.test
	$(PYTEST) -m "not gpu" $(ARGS)

check: $(VENV)/.test
	@$(PY) -m harness.check $(ARGS)

bench: $(VENV)/.compare
	@$(PY) -m harness.bench $(ARGS)

bench-engine: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/benchmarks/test_engine_speed.py -m slow --benchmark-enable \
		--benchmark-columns=min,median,max,rounds $(ARGS)

bench-replay: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/benchmarks/test_replay_speed.py -m slow --benchmark-enable \
		--benchmark-timer=time.process_time \
		--benchmark-columns=min,median,max,rounds $(ARGS)

# No prerequisites: they run offline, with what is installed. Nine minutes each at most.
OUT   ?= results/gpu
SHAPE ?= olmoe-1b-7b
gpu-check:
	$(PY) -m harness.gpu_check --out $(OUT) $(ARGS)

gpu-bench:
	$(PY) -m harness.gpu_bench --shape $(SHAPE) --out $(OUT) --profile resident --profile "100 %" $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
