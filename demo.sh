#!/usr/bin/env bash
# Base -> SFT -> PPO on the bundled tiny model, scored after each: ./demo.sh [folder for the runs]
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
runs="${1:-runs}"
started=$SECONDS
# A second thread makes the tiny model a quarter faster, and several times slower where other work shares the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# A right dialogue of tiny-multi needs at most 27 tokens per turn and 289 in all; a failing one may continue to 512.
evaluate() { # MODEL FOLDER
    "$python" run_eval.py --model "$1" --benchmarks tiny-seen,tiny-unseen,tiny-multi --output "$runs/$2" \
        --max_new_tokens 48 --max_turn_tokens 32 --max_dialogue_tokens 512 >/dev/null
}

echo "1/6 score the base, which has never seen the paper's call form"
evaluate assets/tiny_model eval_base
echo "2/6 fine-tune it on 1,217 trajectories with MAE and PKT"
"$python" run_sft.py --output "$runs/sft"
echo "3/6 score the result"
evaluate "$runs/sft/final" eval_sft
echo "4/6 train it further with PPO and the paper's reward, three passes over 1,217 prompts"
"$python" run_ppo.py --model "$runs/sft/final" --output "$runs/ppo"
echo "5/6 score the result"
evaluate "$runs/ppo/final" eval_ppo
echo "6/6 greedy calls and dialogues of the three, $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s after the installation"
"$python" -m eval.reports.compare "$runs/eval_base" "$runs/eval_sft" "$runs/eval_ppo" --names base,SFT,PPO
echo
echo "reward of sampled calls (temperature 1), which is what PPO maximises"
for split in seen unseen; do
    "$python" -m rl.evaluate_reward --model "$runs/sft/final" "$runs/ppo/final" --data "assets/tiny_data/test_$split.jsonl" \
        --temperature 1 --samples_per_prompt 2 --output "$runs/reward_$split.jsonl" | grep -v '^{'
done
echo
echo "curves, sample responses and the same prompts answered by the three, to open in a browser"
"$python" -m eval.run_page "$runs/sft" "$runs/ppo" "$runs/eval_base" "$runs/eval_sft" "$runs/eval_ppo" --html "$runs/page.html"
