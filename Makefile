# Two commands: `make demo` learns the demo stream, `make test` runs the tests. Both set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo demo-compare demo-data test test-slow test-quantised test-harness lint docs
.DEFAULT_GOAL := help

help:
	@echo "make demo          learn four real tasks in SmolLM2-135M and print what was forgotten (about 10 minutes, two cores)"
	@echo "make demo-compare  the same stream by plain sequential fine-tuning, beside it"
	@echo "make test          lint, types and the fast tests"
	@echo "make test-slow     the tests on the real model and data"
	@echo "make test-quantised  the tests on quantised base models (bitsandbytes, torchao)"
	@echo "make test-harness  the tests of the LM Evaluation Harness as a general probe"
	@echo "make docs          write the generated pages of docs/ anew"

# pip, not uv: it finds a torch wheel that the machine may hold on disk. Every version is pinned in constraints.txt.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo-data: $(INSTALLED)
	@$(BIN)/python -m flows.demo .neft/demo

demo: demo-data
	@$(BIN)/neft run configs/demo.yaml

demo-compare: demo
	@$(BIN)/neft run configs/demo.yaml --set stream=demo-full --set method.baseline=full \
		--set training.learning_rate=2.0e-5
	@$(BIN)/neft report demo demo-full

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, each file in one of them, so that what a file's tests share is made once; the streams, which take
# longest, come first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: demo-data
	$(BIN)/pytest -m slow

# In a folder of their own, for these two make every import of peft slower, and loud.
test-quantised: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target .venv/quantised bitsandbytes torchao
	PYTHONPATH=.venv/quantised $(BIN)/pytest tests/neft/test_quantised.py

# In a folder of their own too, so that the other tests show what is done without them.
test-harness: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target .venv/harness lm-eval evaluate sacrebleu pytablewriter sqlitedict word2number more-itertools \
		dataproperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet portalocker tabulate lxml
	PYTHONPATH=.venv/harness $(BIN)/pytest tests/neft/test_harness.py

docs: $(INSTALLED)
	$(BIN)/python -m flows.reference docs/config.md
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.forgetting
