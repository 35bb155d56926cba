# make demo: the bundled model solves 16 chained problems while SCOPE evicts; make test: the whole suite.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/ready
	$(BIN)/python generate.py --policy discontinuous

test: .venv/ready lint
	$(BIN)/python -m pytest -n auto --cov --cov-report=term --cov-fail-under=95

lint: .venv/ready
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@
