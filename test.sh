#!/usr/bin/env bash
# The whole test suite in its own environment: ./test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
# Peers and extras make more tests run; without them those tests skip and say why.
for extra in requirements-optional.txt requirements-peers.txt requirements-cuda.txt; do
    (. ./setup_venv.sh "$extra") || echo "could not install $extra: its tests will be skipped"
done
exec "$python" -m pytest "$@"
