"""A dialogue of nine turns: keys and values kept between turns over re-encoding every turn, and batched over alone.

    OMP_NUM_THREADS=1 python -m benchmarks.benchmark_multi_turn --clock cpu
    python -m benchmarks.benchmark_multi_turn --models tiny --repeats 9

A turn is a prompt and a greedy response of fixed length (no stop ids); the next prompt is that prompt, the response and
random feedback. All sides run the same turns of the same dialogues, alternating in one process; a figure is the median
of the rounds' ratios. On a machine with other work use `--clock cpu` with OMP_NUM_THREADS=1: seconds of processor
time, which waiting for the processor does not lengthen. Sides:
    kept       DialogueDecoder: a turn forwards what follows its row's longest common prefix
    reworded   the same, but the first id of every response is changed in the prompt, as if the text were rewritten
    whole      generate() on the whole prompt of every turn
With several dialogues, `kept` and `whole` run all of them at once; `alone` is `kept`, one dialogue after the other.
Tokens forwarded are counted by DialogueDecoder; of `whole` they are all tokens of all prompts, and of responses all but
the last. Models as in benchmark_rollout: tiny (the bundled one) and 135m (random). Goal, at one dialogue, `whole`
over `kept`: tokens >= 5, seconds >= 1.25 (what is left of them is decoding, the same on all sides). Exit code 1 if
missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from benchmarks.benchmark_rollout import make_model, random_prompts
from model.dialogue_decoding import DialogueDecoder
from model.sampling import generate
from model.transformer import Transformer

TOKENS_GOAL, SECONDS_GOAL = 5.0, 1.25
SHAPES = {"tiny": (400, 24, 32), "135m": (200, 8, 16)}  # tokens of the first prompt, a response, a feedback

Turns = list[list[int]]  # responses of one dialogue


class Dialogues:
    """What the users and tools say: a first prompt and a feedback per turn for each dialogue."""

    def __init__(self, name: str, vocab_size: int, *, n_dialogues: int, n_turns: int, seed: int) -> None:
        n_prompt, self.n_response, n_feedback = SHAPES[name]
        self.n_dialogues, self.n_turns = n_dialogues, n_turns
        self.first = random_prompts([n_prompt] * n_dialogues, vocab_size, seed)
        self.feedback = [random_prompts([n_feedback] * n_turns, vocab_size, seed + 1 + i) for i in range(n_dialogues)]
        self.max_tokens = n_prompt + n_turns * (self.n_response + n_feedback)

    def prompt(self, dialogue: int, responses: Turns, is_reworded: bool = False) -> list[int]:
        """The prompt of the turn after these responses."""
        ids = list(self.first[dialogue])
        for response, feedback in zip(responses, self.feedback[dialogue]):
            first = 3 if is_reworded and response[0] != 3 else response[0]
            ids += [first, *response[1:], *feedback]
        return ids


# ---------------------------------------------------------------------------------------------------------------------
# Sides


def kept(
    model: Transformer, dialogues: Dialogues, chosen: list[int], is_reworded: bool = False
) -> tuple[dict[int, Turns], int, int]:
    """Responses of the chosen dialogues, all at once; tokens forwarded and reused."""
    decoder = DialogueDecoder(
        model,
        n_rows=len(chosen),
        max_tokens=dialogues.max_tokens,
        max_new_tokens=dialogues.n_response,
        stop_ids=frozenset(),
    )
    responses: dict[int, Turns] = {dialogue: [] for dialogue in chosen}
    for dialogue in chosen:
        decoder.ask(dialogue, dialogues.prompt(dialogue, []))
    while not decoder.is_idle():
        for dialogue, ids, _ in decoder.step():
            responses[dialogue].append(ids)
            if len(responses[dialogue]) < dialogues.n_turns:
                decoder.ask(dialogue, dialogues.prompt(dialogue, responses[dialogue], is_reworded))
    return responses, decoder.tokens_forwarded, decoder.tokens_reused


def alone(model: Transformer, dialogues: Dialogues) -> dict[int, Turns]:
    responses: dict[int, Turns] = {}
    for dialogue in range(dialogues.n_dialogues):
        responses |= kept(model, dialogues, [dialogue])[0]
    return responses


def whole(model: Transformer, dialogues: Dialogues) -> tuple[dict[int, Turns], int]:
    """Responses of all dialogues, every turn from its first token; tokens forwarded."""
    responses: dict[int, Turns] = {dialogue: [] for dialogue in range(dialogues.n_dialogues)}
    n_forwarded = 0
    for _ in range(dialogues.n_turns):
        prompts = [dialogues.prompt(dialogue, turns) for dialogue, turns in responses.items()]
        answers = generate(model, prompts, max_new_tokens=dialogues.n_response, eos_id=None)
        for turns, prompt, (ids, _) in zip(responses.values(), prompts, answers, strict=True):
            turns.append(ids)
            n_forwarded += len(prompt) + len(ids) - 1
    return responses, n_forwarded


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def timed_rounds(sides: dict, repeats: int, clock) -> tuple[dict, dict]:
    """(seconds per side, list over rounds; results of the last round). The first side runs once before, untimed."""
    next(iter(sides.values()))()
    seconds, results = {name: [] for name in sides}, {}
    for _ in range(repeats):
        for name, side in sides.items():
            start = clock()
            results[name] = side()
            seconds[name].append(clock() - start)
    return seconds, results


def ratio(seconds: dict, numerator: str, denominator: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def measure_one(args, name: str, model: Transformer, clock) -> dict:
    dialogues = Dialogues(name, model.config.vocab_size, n_dialogues=1, n_turns=args.turns, seed=args.seed)
    seconds, results = timed_rounds(
        {
            "kept": lambda: kept(model, dialogues, [0]),
            "reworded": lambda: kept(model, dialogues, [0], is_reworded=True),
            "whole": lambda: whole(model, dialogues),
        },
        args.repeats,
        clock,
    )
    tokens = {side: result[1] for side, result in results.items()}
    n_equal = sum(a == b for a, b in zip(results["kept"][0][0], results["whole"][0][0], strict=True))
    return {
        "model": name,
        "tokens_forwarded": tokens,
        "tokens_reused": results["kept"][2],
        "equal_turns": n_equal,
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "whole_over_kept_tokens": tokens["whole"] / tokens["kept"],
        "whole_over_reworded_tokens": tokens["whole"] / tokens["reworded"],
        "whole_over_kept_seconds": ratio(seconds, "whole", "kept"),
        "whole_over_reworded_seconds": ratio(seconds, "whole", "reworded"),
    }


def measure_batch(args, name: str, model: Transformer, batch: int, clock) -> dict:
    dialogues = Dialogues(name, model.config.vocab_size, n_dialogues=batch, n_turns=args.turns, seed=args.seed)
    sides = {
        "kept": lambda: kept(model, dialogues, list(range(batch)))[0],
        "alone": lambda: alone(model, dialogues),
        "whole": lambda: whole(model, dialogues)[0],
    }
    if name == "135m":  # minutes, and one dialogue shows it
        del sides["whole"]
    seconds, results = timed_rounds(sides, args.repeats, clock)
    if results["kept"] != results["alone"]:
        raise SystemExit("a response depended on the other dialogues")
    return {
        "model": name,
        "batch": batch,
        "seconds": {side: statistics.median(seconds[side]) for side in sides},
        "alone_over_kept_seconds": ratio(seconds, "alone", "kept"),
        "whole_over_kept_seconds": ratio(seconds, "whole", "kept") if "whole" in sides else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,135m", help="comma-separated: tiny, 135m")
    parser.add_argument("--turns", type=int, default=9, help="turns per dialogue")
    parser.add_argument("--batches", default="8,16", help="comma-separated: dialogues at once")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds over the sides")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="wall time, or processor time")
    args = parser.parse_args()
    unknown = set(args.models.split(",")) - set(SHAPES)
    if unknown:
        parser.error(f"--models: found {sorted(unknown)}, expected tiny or 135m")
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    print(
        f"{args.turns} turns, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeats} "
        f"alternating rounds, {args.clock} time"
    )
    singles, batches = [], []
    for name in args.models.split(","):
        n_prompt, n_response, n_feedback = SHAPES[name]
        print(f"{name}: prompt of {n_prompt} tokens, responses of {n_response}, feedback of {n_feedback}")
        model = make_model(name, args.seed)
        singles.append(row := measure_one(args, name, model, clock))
        tokens, seconds = row["tokens_forwarded"], row["seconds"]
        print(
            f"  one dialogue: tokens forwarded {tokens['kept']} kept, {tokens['reworded']} reworded, "
            f"{tokens['whole']} whole; whole/kept {row['whole_over_kept_tokens']:.2f} in tokens, "
            f"{row['whole_over_kept_seconds']:.2f} in seconds ({seconds['whole']:.2f} s, {seconds['kept']:.2f} s); "
            f"whole/reworded {row['whole_over_reworded_tokens']:.2f}, {row['whole_over_reworded_seconds']:.2f}; "
            f"{row['equal_turns']} of {args.turns} turns equal",
            flush=True,
        )
        for batch in [int(each) for each in args.batches.split(",") if each]:
            batches.append(row := measure_batch(args, name, model, batch, clock))
            against_whole = row["whole_over_kept_seconds"]
            print(
                f"  {batch} dialogues at once: alone/kept {row['alone_over_kept_seconds']:.2f} in seconds "
                f"({row['seconds']['alone']:.2f} s, {row['seconds']['kept']:.2f} s)"
                + (f", whole/kept {against_whole:.2f}" if against_whole else ""),
                flush=True,
            )
    met = all(
        row["whole_over_kept_tokens"] >= TOKENS_GOAL and row["whole_over_kept_seconds"] >= SECONDS_GOAL
        for row in singles
    )
    print(json.dumps({"benchmark": "multi_turn", "one_dialogue": singles, "batches": batches, "goal_met": met}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
