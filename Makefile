# Every target needs Python >= 3.10 and nothing else; the first one that runs builds .venv.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest-$(notdir $(PYTHON))
# Two processes share the cores: more threads in each only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

.PHONY: demo test test-exhaustive test-fast test-lowest lint format clean

# All stages on generated images: runs/demo/report.html.
demo: $(VENV)/installed
	$(VENV)/bin/wsss demo --out runs/demo

# The suite.
test: $(VENV)/installed $(VENV)/crf
	$(PYTEST) -n 2 --dist worksteal -m "not exhaustive"

# Every kill of every stage, every damaged file: half an hour.
test-exhaustive: $(VENV)/installed $(VENV)/crf
	$(PYTEST) -n 2 -m exhaustive

# Without the tests marked slow.
test-fast: $(VENV)/installed
	$(PYTEST) -n auto --dist worksteal -m "not slow"

# The whole suite with the lowest versions that pyproject.toml allows, in a venv of its own for each PYTHON.
test-lowest: $(LOWEST)/installed $(LOWEST)/crf
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 -m "not exhaustive"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

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

# pymatting compiles its functions when it is first imported: a minute, which would count as the time of a test.
$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[test]"
	$(LOWEST)/bin/python -c "import pymatting"
	touch $@

$(LOWEST)/crf: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[crf]" \
		|| echo "pydensecrf2 does not build here: the tests of the dense CRF are skipped"
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest-* runs build *.egg-info
