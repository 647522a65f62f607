#!/usr/bin/env bash
# The test suite in its own environment. Arguments go to pytest:
#   ./test.sh                      format, lint, all tests, sized for two cores
#   ./test.sh -m "not slow"        the same without the slow tests: the daily loop
#   ./test.sh tests/x/test_y.py    one file, in one process, without format and lint
#   ./test.sh --fresh              build the CUDA emulation and run the kernel mutants again (no cache)
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt requirements-dev.txt
# Peers and extras make more tests run; without them those tests skip and say why.
extras=(requirements-optional.txt requirements-peers.txt)
# A CUDA build of torch has the bindings and NVRTC already, in versions that torch itself pins: leave them alone.
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' && extras+=(requirements-cuda.txt)
for extra in "${extras[@]}"; do
    (. ./setup_venv.sh "$extra") || echo "could not install $extra: its tests will be skipped"
done

for argument in "$@"; do
    if [ -e "${argument%%::*}" ]; then exec "$python" -m pytest "$@"; fi
done
"$python" -m ruff format --check . || { echo "the format differs: run .venv/bin/ruff format ." >&2; exit 1; }
"$python" -m ruff check . || { echo "the linter objects, see above; .venv/bin/ruff check --fix . mends some" >&2; exit 1; }
unset PYTHONDONTWRITEBYTECODE  # without bytecode each process of the suite compiles the repository again
# One process more than cores: tests of ranks, kills and timeouts wait for long.
exec "$python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
