"""Greedy predictions of a model for one benchmark, journaled per item, resumable, split over ranks.

While running, rank 0 appends to PREDICTIONS/<benchmark>.jsonl itself and rank r to <benchmark>.rank<r>.jsonl; each
item is one line, flushed. At the start and at the end rank 0 merges all of them into the first, sorted by index, by an
atomic rename. So a killed run leaves at most one partial line per rank, and any number of ranks can take up the rest.
"""
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data.prompt_format import encode_prompt
from data.trajectories import DataError
from eval.benchmark_data import EvalExample
from eval.json_lines import read_json_lines, write_json_lines, write_text
from eval.prediction_files import read_predictions
from model.sampling import generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer

HASH_BLOCK = 1 << 20  # bytes read at a time


# ------------------------------------------------------------------------------------------------------------- identity


def folder_sha256(model_dir: Path) -> str:
    """sha256 over names and contents of the files that decide a model's outputs (weights, config, tokenizer)."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".model"):
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def check_settings(path: Path, settings: dict[str, str | int], *, resume: str, is_writer: bool) -> None:
    """Make sure that predictions at `path` were or will be made with `settings`, kept beside them as .settings.json.

    Every rank calls it, so that all of them stop; only the one with `is_writer` writes. Raises DataError if earlier
    predictions have other settings or none, or if there are any and `resume` is "never": nothing is ever overwritten.
    """
    settings_path = path.with_suffix(".settings.json")
    if not path.exists() and not _rank_journals(path):
        if is_writer:
            write_text(settings_path, json.dumps(settings, indent=2) + "\n")
        return
    if resume == "never":
        raise DataError(f"{path}: found predictions, expected none for --resume never; choose another --output")
    try:
        found = json.loads(settings_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{settings_path}: found no settings beside earlier predictions, expected those of this run; "
                        "choose another --output")
    for name, value in settings.items():
        if found.get(name) != value:
            raise DataError(f"{settings_path}: found {name} {found.get(name)!a}, expected {value!a}: the predictions "
                            "belong to another run; choose another --output")


# -------------------------------------------------------------------------------------------------------------- journal


def _journal(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank:04d}.jsonl")


def _rank_journals(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.rank[0-9]*.jsonl"))


def read_journals(path: Path) -> tuple[list[dict], int]:
    """The lines of all ranks, sorted by index, and how many partial lines killed writers left.

    Raises DataError for malformed lines and for an index with two different outputs.
    """
    row_of_index: dict[int, dict] = {}
    dropped = 0
    for source in (path, *_rank_journals(path)):
        if not source.exists():
            continue
        read_predictions(source)  # raises on anything malformed
        rows, has_dropped = read_json_lines(source, drop_partial_last_line=True)
        dropped += has_dropped
        for line, row in rows:
            # A kill between the rename and the removal in merge_journals leaves lines in both files: no conflict.
            if row_of_index.setdefault(row["index"], row) != row:
                raise DataError(f"{source}:{line}: found a second, different output for index {row['index']}")
    return [row_of_index[index] for index in sorted(row_of_index)], dropped


def merge_journals(path: Path, rank: int) -> tuple[list[dict], int]:
    """Put the lines of all journals into `path`, remove the other ranks' files; returns what read_journals does.

    A collective: all ranks wait for each other before they read, and again before any of them may append. Raises
    DataError, on all ranks, as read_journals does.
    """
    _wait_for_all_ranks()
    rows, dropped = read_journals(path)
    _wait_for_all_ranks()
    if rank == 0:
        write_json_lines(path, rows)
        for source in _rank_journals(path):
            source.unlink()
    _wait_for_all_ranks()
    return rows, dropped


def _wait_for_all_ranks() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


# ----------------------------------------------------------------------------------------------------------- generation


def length_sorted_batches(prompts: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of near-equal prompt length, longest first, so that a lack of memory shows at once."""
    ordered = sorted(prompts, key=lambda index: (-len(prompts[index]), index))
    return [ordered[start:start + batch_size] for start in range(0, len(ordered), batch_size)]


def generate_predictions(model: Transformer, tokenizer: Tokenizer, examples: Sequence[EvalExample], path: Path, *,
                         prompt_format: str, max_new_tokens: int, batch_size: int, rank: int,
                         world_size: int) -> list[str]:
    """Write the greedy output for every example to the JSONL file `path`; what is already there is not made again.

    All ranks call it with the same arguments but `rank`. A prompt that leaves less than `max_new_tokens` of the model's
    positions gets the empty output with `"stop": "prompt_too_long"`. The result does not depend on batch_size or ranks.
    Returns notices for the user. Raises DataError, on all ranks, for journals that cannot be continued.
    """
    # 1. Everything that earlier processes left becomes one file, before any rank appends to its own journal.
    earlier, dropped = merge_journals(path, rank)

    # 2. The prompts that are left, and this rank's batches. Both formats share the prompt; only the answers differ.
    done = {row["index"] for row in earlier}
    prompts = {example.index: encode_prompt(example.tools, example.messages, tokenizer)
               for example in examples if example.index not in done}
    own_batches = length_sorted_batches(prompts, batch_size)[rank::world_size]

    # 3. Generate, and append item by item.
    label = {} if prompt_format == "tl" else {"format": prompt_format}
    is_quiet = rank != 0 or not own_batches
    with open(_journal(path, rank), "a", encoding="utf-8") as journal, \
            tqdm(total=sum(map(len, own_batches)), desc=path.stem, unit="item", disable=is_quiet) as bar:
        for batch in own_batches:
            for row in _predict_batch(model, tokenizer, {index: prompts[index] for index in batch}, max_new_tokens):
                journal.write(json.dumps({**row, **label}) + "\n")
                journal.flush()
                bar.update()

    # 4. The complete file, in order.
    rows, _ = merge_journals(path, rank)
    return _notices(path, rows, resumed=len(examples) - len(prompts), dropped=dropped)


def _predict_batch(model: Transformer, tokenizer: Tokenizer, prompts: dict[int, list[int]],
                   max_new_tokens: int) -> list[dict]:
    """One row per prompt, in their order; prompts that do not fit the model are not generated."""
    room = model.config.max_positions - max_new_tokens
    fitting = [index for index, prompt in prompts.items() if len(prompt) <= room]
    responses = generate(model, [prompts[index] for index in fitting], max_new_tokens=max_new_tokens,
                         eos_id=tokenizer.eos_id) if fitting else []
    ids_of_index = {index: response_ids for index, (response_ids, _) in zip(fitting, responses, strict=True)}
    return [_row(index, ids_of_index[index], tokenizer) if index in ids_of_index else
            {"index": index, "output": "", "stop": "prompt_too_long"} for index in prompts]


def _row(index: int, response_ids: Sequence[int], tokenizer: Tokenizer) -> dict:
    has_ended = bool(response_ids) and response_ids[-1] == tokenizer.eos_id
    text_ids = list(response_ids[:-1] if has_ended else response_ids)
    return {"index": index, "output": tokenizer.decode(text_ids), "stop": "end" if has_ended else "max_new_tokens"}


def _notices(path: Path, rows: Sequence[dict], *, resumed: int, dropped: int) -> list[str]:
    too_long = [row["index"] for row in rows if row.get("stop") == "prompt_too_long"]
    notices = []
    if resumed:
        notices.append(f"{path}: kept {resumed} predictions of an earlier run")
    if dropped:
        notices.append(f"{path}: dropped {dropped} partial line(s) of a killed run")
    if too_long:
        notices.append(f"{path}: {len(too_long)} prompts too long for the model, counted as wrong: {too_long}")
    return notices
