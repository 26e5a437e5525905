#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, the import contract, the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check --quiet .
mypy
lint-imports
python -m pytest "$@"
