# make demo: the bundled model solves 16 chained problems while SCOPE evicts
# make real: SmolLM2-135M-Instruct, a real pretrained model, answers a question at length
# make test: the whole suite
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo real test lint

demo: .venv/ready
	$(BIN)/python generate.py --policy discontinuous

real: .venv/ready-dev
	$(BIN)/python generate.py --checkpoint "$$($(BIN)/python checkpoints/smollm2.py)" --chat \
		--prompt-file examples/question.txt --policy discontinuous --temperature 0.8 --top-p 0.95

test: .venv/ready-dev lint
	$(BIN)/python -m pytest -n auto --dist loadgroup --cov --cov-report=term --cov-fail-under=95

lint: .venv/ready-dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
