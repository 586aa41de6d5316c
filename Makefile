# Two commands do everything on a bare machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all check bench docs clean

demo: $(VENV)/.demo
	mkdir -p demo
	$(BIN)/featherweight compress digits --budget "size<=2%, drop<=1pt" --trials 4 --out demo/model.fw --report demo/report.html
	$(BIN)/python examples/digits_input.py demo/x.npy demo/labels.npy
	$(BIN)/featherweight run demo/model.fw --input demo/x.npy --output demo/y.npy
	$(BIN)/python examples/digits_check.py demo/y.npy demo/labels.npy

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-all: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(PIP) --editable '.[dev,bench]'
	$(BIN)/python benchmarks/spine_digits.py
	$(BIN)/python benchmarks/spine_lenet300.py
	$(BIN)/python benchmarks/spine_resnet20.py
	$(BIN)/python benchmarks/spine_repeatable.py
	$(BIN)/python benchmarks/spine_small.py
	$(BIN)/python benchmarks/pruning_groups.py
	$(BIN)/python benchmarks/pruning_zoo.py
	$(BIN)/python benchmarks/pruning_resnet56.py
	$(BIN)/python benchmarks/pruning_lstm.py
	$(BIN)/python benchmarks/pruning_minilm.py
	$(BIN)/python benchmarks/pruning_lenet300.py
	$(BIN)/python benchmarks/pruning_unstructured.py
	$(BIN)/python benchmarks/pruning_sparse_bytes.py
	$(BIN)/python benchmarks/distillation_ensemble.py
	$(BIN)/python benchmarks/distillation_table.py
	$(BIN)/python benchmarks/distillation_unlabelled.py
	$(BIN)/python benchmarks/lowrank_sweep.py
	$(BIN)/python benchmarks/lowrank_lstm.py
	$(BIN)/python benchmarks/lowrank_vgg19.py
	$(BIN)/python benchmarks/lstm_combined.py
	$(BIN)/python benchmarks/quantization_qat.py
	$(BIN)/python benchmarks/bytes_coder.py
	$(BIN)/python benchmarks/bytes_open.py
	$(BIN)/python benchmarks/bytes_rdoq.py
	$(BIN)/python benchmarks/bytes_lenet.py
	$(BIN)/python benchmarks/bytes_vgg19.py
	$(BIN)/python benchmarks/evaluation_recipes.py
	$(BIN)/python benchmarks/evaluation_report.py
	$(BIN)/python benchmarks/evaluation_tables.py
	$(BIN)/python benchmarks/evaluation_robustness.py
	$(BIN)/python benchmarks/evaluation_newcomer.py
	$(BIN)/python benchmarks/budget_latency.py
	$(BIN)/python benchmarks/budget_resnet20.py
	$(BIN)/python benchmarks/budget_kill.py
	$(BIN)/python benchmarks/budget_ray.py
	$(BIN)/python benchmarks/budget_allocation.py
	$(BIN)/python benchmarks/budget_margins.py
	$(BIN)/python benchmarks/budget_amc.py resnet20 0 1 2
	$(BIN)/python benchmarks/budget_supernet.py resnet20 0 1 2
	$(BIN)/python benchmarks/budget_supernet.py transformer 0 1 2
	$(BIN)/python benchmarks/quantization_latency.py
	$(BIN)/python benchmarks/quantization_export.py
	$(BIN)/python benchmarks/quantization_time.py
	$(BIN)/python benchmarks/quantization_ptq.py
	$(BIN)/python benchmarks/unmeasured.py
	$(BIN)/python benchmarks/page.py

docs: $(VENV)/.dev
	$(PIP) --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir build/site

# torch goes first and alone: any package that asked for it would bring the registry's CUDA build
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch numpy
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[report,tasks]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 \
		|| echo "no chromium and no way to install it: the browser tests will be skipped"
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
