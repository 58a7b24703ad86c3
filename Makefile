# Every target brings the environment up to date first (venv.sh: $VENV_PATH, the active one, or .venv).
.PHONY: test lint check format

python = $$(bash venv.sh dev)

# A process for each core, up to 8, with one thread each; the tests of a file share its fixtures.
test:
	@bash venv.sh dev >/dev/null
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) -m pytest -q -n auto --maxprocesses 8 --dist loadfile

lint:
	@bash venv.sh dev >/dev/null
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright --pythonpath $(python)
	$(python) -c "from importlinter.cli import lint_imports_command as lint; lint()"

# What CI runs (.ci/run).
check: lint test

format:
	@bash venv.sh dev >/dev/null
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
