# On a fresh machine with Python 3.11: `make demo`, then `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY = PASSIVE

$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints-cpu.txt -e ".[dev]"
	touch $@

.PHONY: install demo test test-fast check format clean
install: $(VENV)/.installed

demo: install                     ## the main job: PPO on a reward ensemble, offline
	$(BIN)/python -m rlhf_exp algo=ppo reward=ensemble

test: install                     ## everything that runs without a GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

test-fast: install                ## what takes seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

check: install                    ## lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) artifacts build dist
