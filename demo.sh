#!/usr/bin/env bash
# Base -> SFT -> PPO on the bundled tiny model, scored after each: ./demo.sh [folder for the runs]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
runs="${1:-runs}"
started=$SECONDS
# A second thread gains the tiny model a quarter, and costs it a multiple where other work shares the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Right dialogues of tiny-multi need at most 27 tokens for a turn and 289 in all; a model that goes astray is let go on to 512.
evaluate() { # MODEL FORM FOLDER BENCHMARKS
    "$python" run_eval.py --model "$1" --prompt_format "$2" --benchmarks "$4" --output "$runs/$3" \
        --max_new_tokens 48 --max_turn_tokens 32 --max_dialogue_tokens 512
}
calls=tiny-seen,tiny-unseen
all=$calls,tiny-multi

echo "1/6 score the base: in the paper's call form, which it never learned, and in the plain form of its own"
evaluate assets/tiny_model tl eval_base $all >/dev/null
evaluate assets/tiny_model plain eval_base_plain $calls >/dev/null
echo "2/6 fine-tune it on 1,217 trajectories with MAE and PKT"
"$python" run_sft.py --output "$runs/sft"
echo "3/6 score the result"
evaluate "$runs/sft/final" tl eval_sft $all >/dev/null
echo "4/6 train it further by PPO with the paper's reward, three passes over 1,217 prompts"
"$python" run_ppo.py --model "$runs/sft/final" --output "$runs/ppo"
echo "5/6 score the result"
evaluate "$runs/ppo/final" tl eval_ppo $all >/dev/null
echo "6/6 greedy calls and dialogues of the three, $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s after the installation"
"$python" -m eval.reports.compare "$runs/eval_base" "$runs/eval_sft" "$runs/eval_ppo" --names base,SFT,PPO
echo
echo "reward of sampled calls (temperature 1), which is what PPO maximises"
for split in seen unseen; do
    "$python" -m rl.evaluate_reward --model "$runs/sft/final" "$runs/ppo/final" --data "assets/tiny_data/test_$split.jsonl" \
        --temperature 1 --samples_per_prompt 2 --output "$runs/reward_$split.jsonl" | grep -v '^{'
done
echo
echo "what the base can do in its own call form, beside the fine-tuned model in the paper's"
"$python" -m eval.reports.compare "$runs/eval_base_plain" "$runs/eval_sft" --names "base (own form),SFT"
