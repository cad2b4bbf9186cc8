# `make demo` and `make test` need Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/wsss demo --out runs/demo

test: $(VENV)/installed $(VENV)/crf
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# The dense CRF is an extra that has to be compiled; where it can't be, its tests are skipped.
$(VENV)/crf: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[crf]" \
		|| echo "pydensecrf2 does not build here: the tests of the dense CRF are skipped"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
