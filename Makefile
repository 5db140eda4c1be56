# make demo | test | test-all | lint | bench. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
HF_VENV ?= .venv-hf
NEWEST ?= .triton-newest
# torch's OpenMP waits for a busy core by spinning: 300 to 2,600 tokens/s in training beside one busy process, against
# 5,600 where it yields early; a few per cent slower on a quiet machine.
export GOMP_SPINCOUNT = 1000
# Workers begin with half of the tests each and take from one another: most files' fixtures are made once.
XDIST = -n 2 --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST)

.PHONY: demo test test-all test-wheel test-hf-newest test-triton-newest test-slow lint bench clean

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt -e '.[dev,interpreter]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/linattn demo --out demo-out

test: $(VENV)/installed
	$(PYTEST) -m "not slow and not gpu"

test-all: lint test test-wheel test-hf-newest test-triton-newest test-slow

# Soak, load, the full demo, and every law of the kernels on every case, one after another and on all cores: about
# eighteen minutes on two.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 0 -m "slow and not gpu"

# The same tests against the built wheel, in a virtual environment that has never seen the source tree's package.
test-wheel: $(VENV)/installed
	rm -rf dist .venv-wheel
	$(BIN)/python -m build -q --wheel --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	wheel=$$(ls dist/*.whl) && .venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt "$$wheel[dev,interpreter]"
	OMP_NUM_THREADS=1 .venv-wheel/bin/python -m pytest $(XDIST) -m "not slow and not gpu"

# The tests of linattn.hf once more, with the newest transformers that installs: elsewhere it is the pinned one, the oldest.
test-hf-newest:
	$(PYTHON) -m venv $(HF_VENV)
	grep -v '^transformers' constraints-cpu.txt > $(HF_VENV)/constraints.txt
	$(HF_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(HF_VENV)/constraints.txt -e '.[dev,interpreter]' -U transformers
	$(HF_VENV)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 $(HF_VENV)/bin/python -m pytest $(XDIST) -m "not slow and not gpu" tests/hf

# The kernels compiled ahead of time by the newest Triton that installs, so that a release which breaks them is known the
# day it is out; elsewhere it is the pinned one. Interpreted they are by the pinned one alone: 3.9's interpreter takes no
# mask that a scalar was broadcast to.
test-triton-newest: $(VENV)/installed
	rm -rf $(NEWEST)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(NEWEST) -U triton
	PYTHONPATH=$(NEWEST) $(BIN)/python -c "import triton; print('triton', triton.__version__)"
	PYTHONPATH=$(NEWEST) $(PYTEST) -m "not slow and not gpu" -k ahead_of_time --ignore tests/test_taylor_cuda.py --ignore tests/test_taylor_cuda_step.py tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/installed
	$(BIN)/linattn bench cpu --record

clean:
	rm -rf $(VENV) .venv-wheel $(HF_VENV) $(NEWEST) dist demo-out
