# Two commands: `make demo` (a federated study and its report) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export POLYCLINIC_DATA ?=

.PHONY: demo test test-slow check format bench docs mutation clean

demo: $(READY)
	$(BIN)/polyclinic demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow" tests

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow tests

check: $(READY)
	$(BIN)/ruff check polyclinic tests benchmarks examples tools
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format polyclinic tests benchmarks examples tools

bench: $(READY)
	$(BIN)/python benchmarks/speed.py --quick

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dicom,privacy,flare,dev]"
	touch $@

docs: $(READY)
	$(BIN)/python -m polyclinic.methods.page docs/methods

# Changes modules in one place after another and lists what no test notices: make mutation MODULES="core/check"
mutation: $(READY)
	$(BIN)/python -m pip install --quiet --requirement tools/mutation/requirements.txt
	$(BIN)/python tools/mutation/run.py $(MODULES)

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
