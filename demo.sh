#!/usr/bin/env bash
# The method on the bundled tiny model: standard SFT and SFT with MAE and PKT, then PPO: ./demo.sh [folder for the runs]
# Each training and each evaluation takes one core; two run side by side.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh requirements.txt
runs="${1:-runs}"
started=$SECONDS
# A second thread makes the tiny model a quarter faster, and several times slower where other work shares the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$runs/logs"

say() { echo "$(( (SECONDS - started) / 60 )):$(printf %02d $(( (SECONDS - started) % 60 )))  $*"; }
logged() { # NAME COMMAND...: with its output in a log, shown if it fails
    "${@:2}" >"$runs/logs/$1.txt" 2>&1 || { tail -n 5 "$runs/logs/$1.txt" >&2; return 1; }
}
train_sft() { logged "$1" "$python" run_sft.py --output "$runs/$1" "${@:2}"; }
train_ppo() { # NAME START: four responses to each of 400 prompts, two passes over each batch of 32
    logged "$1" "$python" run_ppo.py --model "$runs/$2/final" --output "$runs/$1" --data "$runs/data/first_400.json" \
        --epochs 1 --ppo_epochs 2 --responses_per_prompt 4 --rollout_batch_size 32 --minibatch_size 32 --micro_batch_size 16 \
        --policy_learning_rate 2e-4 --value_learning_rate 5e-4 --kl_coef 0.2 --critic_only_iterations 4
}
evaluate() { # MODEL NAME
    logged "eval_$2" "$python" run_eval.py --model "$1" --output "$runs/eval_$2" --max_new_tokens 48 \
        --benchmarks tiny-seen,tiny-unseen,tiny-hard --benchmark_dir "$runs/data"
}
both() { # PID PID: wait for two, and fail if one does
    wait "$1"
    wait "$2"
}
stop_all() { # Ctrl-C does not reach what runs in the background
    for pid in $(jobs -p); do
        kill $(cat "/proc/$pid/task/$pid/children" 2>/dev/null) "$pid" 2>/dev/null || true
    done
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "1/6 300 held-out prompts each: tools of the training data, unseen tools, tools that the teacher often calls wrongly"
for split in seen:21 unseen:22 hard:23; do
    "$python" -m toolbox.make --only_tests "$runs/data/test_${split%:*}.jsonl" --split "${split%:*}" --tests 300 --seed "${split#*:}"
done
for count in 140 400; do # the first of train.json
    "$python" -m toolbox.make --only_trajectories "$runs/data/first_$count.json" --trajectories $count
done

say "2/6 SFT on 1,217 trajectories: standard (runs/standard) and with MAE and PKT (runs/sft), 305 steps each"
train_sft standard --error_filter none --key_tokens off & first=$!
train_sft sft & both $first $!

say "3/6 PPO with the paper's reward: from runs/sft (runs/ppo), and from a light SFT on 140 trajectories (runs/light_ppo)"
train_ppo ppo sft & first=$!
train_sft light --data "$runs/data/first_140.json" && train_ppo light_ppo light & both $first $!

say "4/6 greedy calls of all models, and of the base"
(for name in standard sft ppo; do evaluate "$runs/$name/final" $name; done) & first=$!
(evaluate assets/tiny_model base; for name in light light_ppo; do evaluate "$runs/$name/final" $name; done) & both $first $!

say "5/6 reward of sampled calls (temperature 1), which is what PPO maximises"
reward() { logged "reward_$1" "$python" -m rl.evaluate_reward --model "$runs/$2/final" "$runs/$1/final" --temperature 1 \
    --data "$runs/data/test_seen.jsonl" --output "$runs/reward_$1.jsonl"; }
reward ppo sft & first=$!
reward light_ppo light & both $first $!

say "6/6 the page: curves, sample responses and the same prompts answered by each model"
"$python" -m eval.run_page "$runs"/{sft,ppo,light_ppo} "$runs"/eval_{base,standard,sft,ppo,light,light_ppo} --html "$runs/page.html"
say "done"

compare() { # TITLE BASELINE OTHER NAMES
    echo
    echo "$1"
    "$python" -m eval.reports.compare "$runs/eval_$2" "$runs/eval_$3" --names "$4" --mcnemar --examples 1
}
compare "MAE and PKT against standard SFT" standard sft "standard,MAE+PKT"
compare "PPO after all of SFT" sft ppo "SFT,SFT+PPO"
compare "PPO after a light SFT" light light_ppo "light SFT,light SFT+PPO"
echo
echo "reward of sampled calls on tiny-seen, after all of SFT and after the light SFT"
grep -hv '^{' "$runs"/logs/reward_{ppo,light_ppo}.txt
echo
echo "to open in a browser: $runs/page.html"
