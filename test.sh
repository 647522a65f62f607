#!/usr/bin/env bash
# The whole test suite in its own environment: ./test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
# Peers and extras make more tests run; without them those tests skip and say why.
extras=(requirements-optional.txt requirements-peers.txt)
# A CUDA build of torch has the bindings and NVRTC already, in versions that torch itself pins: leave them alone.
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' && extras+=(requirements-cuda.txt)
for extra in "${extras[@]}"; do
    (. ./setup_venv.sh "$extra") || echo "could not install $extra: its tests will be skipped"
done
exec "$python" -m pytest "$@"
