"""Run folders as run_sft.py, run_ppo.py and run_eval.py leave them, written by hand so that every number is known."""

import json
from pathlib import Path

from data.json_records import write_json_lines
from eval.predict.generate import answers_sha256
from eval.rates import rates

CATEGORIES = ("unparsable", "wrong_tool", "correct")
N_STEPS = 40
TINY_SEEN = Path(__file__).resolve().parents[2] / "assets/tiny_data/test_seen.jsonl"


def write_object(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_sft(folder: Path, *, word: str = "x", n_steps: int = N_STEPS) -> Path:
    """A finished SFT run whose loss is 3 - step / 20; `word` is in every text of it."""
    write_object(
        folder / "config.json", {"max_key_token_weight": 9.0, "learning_rate": 4e-4, "max_steps": 40, "data": word}
    )
    write_object(
        folder / "environment.json",
        {"python": "3.11", "command": ["run_sft.py", word], "changed_from": {"max_steps": 0, "data": "train.json"}},
    )
    write_object(folder / "run_identity.json", {"total_steps": 305})
    example = {"id": word, "source": word, "message_index": 3, "call": word, "matched_text": word, "feedback": word}
    masked = [{"category": word, "rule": word, "turns": 12, "examples": [example]}]
    write_object(folder / "data_report.json", {"trajectories": 1217, "masked": masked, "notes": [f"dropped {word}"]})
    rows = [
        {
            "step": step,
            "sft/loss": 3 - step / 20,
            "sft/learning_rate": 4e-4,
            "sft/grad_norm": 2.0,
            "time/tokens_per_second": 1500.0,
        }
        for step in range(1, n_steps + 1)
    ]
    write_json_lines(folder / "metrics.jsonl", rows)
    write_json_lines(folder / "history.jsonl", [{"step": 20, "setting": "learning_rate", "old": 1e-3, "new": word}])
    write_object(folder / "final" / "config.json", {})
    write_object(folder / "finished.json", {"step": n_steps})
    return folder


def write_ppo(folder: Path, *, word: str = "x", n_steps: int = N_STEPS) -> Path:
    """A PPO run killed after n_steps of 459 steps, one per iteration with two responses each of reward -2 and 1."""
    write_object(folder / "config.json", {"kl_coef": 0.3, "critic_only_iterations": 10, "max_steps": 0, "data": word})
    write_object(folder / "environment.json", {"python": "3.11", "changed_from": {}})
    write_object(folder / "run_identity.json", {"total_steps": 459})
    write_object(folder / "data_report.json", {"prompts": 1217, "notes": [f"prompts {word}"]})
    shares = dict(zip([f"ppo/share_{name}" for name in CATEGORIES], (0.25, 0.25, 0.5)))
    metrics = [
        {"step": i + 1, "iteration": i, "ppo/score": -0.5, "ppo/kl_sequence": i / 10, "ppo/value_loss": 1.0, **shares}
        for i in range(n_steps)
    ]
    write_json_lines(folder / "metrics.jsonl", metrics)
    sample = {"turn": 0, "tokens": 4, "ended": True, "kl": 0.5}
    texts = {
        "id": word,
        "prompt": f"System: tools\nUser: {word}\nAssistant:",
        "gold": f"f({word})",
        "explanation": word,
    }
    samples = [
        {"step": i + 1, "iteration": i, "reward": reward, "category": category, "response": f"g({word})"}
        | sample
        | texts
        for i in range(n_steps)
        for reward, category in ((-2.0, "unparsable"), (1.0, "correct"))
    ]
    write_json_lines(folder / "samples.jsonl", samples)
    summary = {"mean_reward": 0.5, "interval_95": [0.25, 0.75]}
    write_json_lines(folder / "evaluations.jsonl", [{"step": 0, "greedy": summary, "sampled": summary}])
    return folder


def write_evaluation(folder: Path, right: list[int], *, word: str = "x", benchmark: str = "tiny-seen") -> Path:
    """An evaluation of the bundled test_seen.jsonl: `right` has 0 or 1 for its first records."""
    write_object(
        folder / "config.json", {"model": word, "benchmarks": benchmark, "benchmark_dir": str(TINY_SEEN.parent)}
    )
    write_object(folder / "environment.json", {"python": "3.11", "changed_from": {"model": "runs/sft/final"}})
    rows = [
        {"index": i, "TS": value, "PI": value, "CF": value, "reason": "" if value else f"wrong tool: {word}"}
        for i, value in enumerate(right)
    ]
    summary = {**rates(rows), "errors": {word: right.count(0)}, "answers_sha256": answers_sha256(TINY_SEEN)}
    write_object(folder / "summary.json", {"model": word, "benchmarks": {benchmark: summary}})
    write_json_lines(folder / "results" / f"{benchmark}.jsonl", rows)
    outputs = [{"index": i, "output": f" call(a={value}, {word})"} for i, value in enumerate(right)]
    write_json_lines(folder / "predictions" / f"{benchmark}.jsonl", outputs)
    return folder
