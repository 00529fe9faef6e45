.PHONY: serve test lint format

serve:
	./scripts/serve

test:
	./scripts/test

lint:
	./scripts/test lint format imports types

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
