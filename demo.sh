#!/usr/bin/env bash
# Base -> SFT on the bundled tiny model, scored before and after: ./demo.sh [folder for the runs]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
runs="${1:-runs/demo}"
started=$SECONDS
# A second thread gains the tiny model a quarter, and costs it a multiple where other work shares the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

evaluate() { # MODEL FORM FOLDER
    "$python" run_eval.py --model "$1" --prompt_format "$2" --max_new_tokens 48 --benchmarks tiny-seen,tiny-unseen --output "$runs/$3"
}

echo "1/4 score the base: in the paper's call form, which it never learned, and in the plain form of its own"
evaluate assets/tiny_model tl eval_base >/dev/null
evaluate assets/tiny_model plain eval_base_plain >/dev/null
echo "2/4 fine-tune it on 1,217 trajectories with MAE and PKT"
"$python" run_sft.py --output "$runs/sft"
echo "3/4 score the result"
evaluate "$runs/sft/final" tl eval_sft >/dev/null
echo "4/4 before and after, $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s after the installation"
"$python" -m eval.compare "$runs/eval_base" "$runs/eval_sft" --names base,SFT
echo
echo "what the base can do in its own call form, beside the fine-tuned model in the paper's"
"$python" -m eval.compare "$runs/eval_base_plain" "$runs/eval_sft" --names "base (own form),SFT"
