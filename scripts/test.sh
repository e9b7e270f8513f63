#!/usr/bin/env bash
# Runs the checks that a change must pass: lint, format, types, tests. Makes or reuses .venv like quickstart.sh.
#
#   bash scripts/test.sh [--dry-run] [ARGUMENT of pytest ...]
#   bash scripts/test.sh tests/test_smmix.py -k lam
#
# --dry-run    show the commands and end
# PYTHON=...   the interpreter that makes .venv (Python 3.10 or later)

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
cd "$root"
use_environment requirements.txt requirements-dev.txt
run python -m ruff check
run python -m ruff format --check
run python -m mypy .
run python -m pytest "$@" # last, so that its summary is the last line
