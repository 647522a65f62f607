#!/usr/bin/env bash
# Base -> SFT on the bundled tiny model, scored before and after: ./demo.sh [folder for the runs]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
runs="${1:-runs/demo}"
started=$SECONDS

echo "1/4 score the base, which speaks a call form of its own"
"$python" run_eval.py --model assets/tiny_model --benchmarks tiny-seen,tiny-unseen --output "$runs/eval_base"
echo "2/4 fine-tune it on 1,217 trajectories with MAE and PKT"
"$python" run_sft.py --output "$runs/sft"
echo "3/4 score the result"
"$python" run_eval.py --model "$runs/sft/final" --benchmarks tiny-seen,tiny-unseen --output "$runs/eval_sft"
echo "4/4 before and after, $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s"
"$python" -m eval.compare "$runs/eval_base" "$runs/eval_sft"
