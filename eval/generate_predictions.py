"""Greedy predictions of a model for one benchmark, journaled per item, resumable, split over ranks.

While running, rank 0 appends to PREDICTIONS/<benchmark>.jsonl itself and rank r to <benchmark>.rank<r>.jsonl; each item is
one line, flushed. At the start and at the end rank 0 merges all of them into the first, sorted by index, by an atomic
rename. So a killed run leaves at most one partial line per rank, and any number of ranks can take up the rest.
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


# --------------------------------------------------------------------------------------------------------------- identity


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


def check_settings(path: Path, settings: dict[str, str | int], *, resume: str) -> None:
    """Make sure that predictions at `path` were or will be made with `settings`, kept beside them as .settings.json.

    Raises DataError if earlier predictions have other settings or none, or if there are any and `resume` is "never":
    earlier results are never overwritten.
    """
    settings_path = path.with_suffix(".settings.json")
    if not path.exists() and not _rank_journals(path):
        write_text(settings_path, json.dumps(settings, indent=2) + "\n")
        return
    if resume == "never":
        raise DataError(f"{path}: found predictions, expected none for --resume never; choose another --output")
    try:
        found = json.loads(settings_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{settings_path}: found no settings beside earlier predictions, expected those of this run; "
                        "choose another --output") from None
    for name, value in settings.items():
        if not isinstance(found, dict) or found.get(name) != value:
            earlier = found.get(name) if isinstance(found, dict) else found
            raise DataError(f"{settings_path}: found {name} {earlier!a}, expected {value!a}: the predictions belong to "
                            "another run; choose another --output")


# ---------------------------------------------------------------------------------------------------------------- journal


def _journal(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank:04d}.jsonl")


def _rank_journals(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.rank[0-9]*.jsonl"))


def merge_journals(path: Path) -> int:
    """Gather the lines of all ranks into `path`, sorted by index; returns how many partial lines were dropped.

    Raises DataError for malformed lines and for an index with two different outputs.
    """
    row_of_index: dict[int, dict] = {}
    dropped = 0
    sources = [source for source in (path, *_rank_journals(path)) if source.exists()]
    for source in sources:
        read_predictions(source)  # raises on anything malformed
        rows, has_dropped = read_json_lines(source, drop_partial_last_line=True)
        dropped += has_dropped
        for line, row in rows:
            # A kill between the rename and the removal below leaves lines in both files: equal ones are no conflict.
            if row_of_index.setdefault(row["index"], row) != row:
                raise DataError(f"{source}:{line}: found a second, different output for index {row['index']}")
    if sources:
        write_json_lines(path, [row_of_index[index] for index in sorted(row_of_index)])
    for source in _rank_journals(path):
        source.unlink()
    return dropped


def _wait_for_all_ranks() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------- generation


def length_sorted_batches(prompts: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of near-equal prompt length, longest first, so that a lack of memory shows at once."""
    ordered = sorted(prompts, key=lambda index: (-len(prompts[index]), index))
    return [ordered[start:start + batch_size] for start in range(0, len(ordered), batch_size)]


def generate_predictions(model: Transformer, tokenizer: Tokenizer, examples: Sequence[EvalExample], path: Path, *,
                         prompt_format: str, max_new_tokens: int, batch_size: int, rank: int, world_size: int) -> None:
    """Write the greedy output for every example to the JSONL file `path`; what is already there is not made again.

    All ranks call it with the same arguments but `rank`. A prompt that leaves less than `max_new_tokens` of the model's
    positions gets the empty output with `"stop": "prompt_too_long"`. The result does not depend on batch_size or ranks.
    """
    # 1. One file with everything that earlier processes left, read by all ranks before any of them appends to it.
    if rank == 0:
        merge_journals(path)
    _wait_for_all_ranks()
    done = {prediction.index for prediction in read_predictions(path)[0]} if path.exists() else set()
    _wait_for_all_ranks()

    # 2. The prompts that are left, and this rank's batches. Both formats share the prompt; only the answers differ.
    prompts = {example.index: encode_prompt(example.tools, example.messages, tokenizer)
               for example in examples if example.index not in done}
    own_batches = length_sorted_batches(prompts, batch_size)[rank::world_size]
    longest_prompt = model.config.max_positions - max_new_tokens

    # 3. Generate, and append item by item.
    progress = tqdm(total=sum(map(len, own_batches)), desc=path.stem, unit="item", disable=rank != 0 or not own_batches)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(_journal(path, rank), "a", encoding="utf-8") as journal:
        for batch in own_batches:
            fitting = [index for index in batch if len(prompts[index]) <= longest_prompt]
            rows = {index: {"index": index, "output": "", "stop": "prompt_too_long"} for index in batch}
            if fitting:
                responses = generate(model, [prompts[index] for index in fitting], max_new_tokens=max_new_tokens,
                                     eos_id=tokenizer.eos_id)
                rows |= {index: _row(index, ids, tokenizer) for index, (ids, _) in zip(fitting, responses)}
            for index in batch:
                row = rows[index] if prompt_format == "tl" else {**rows[index], "format": prompt_format}
                journal.write(json.dumps(row) + "\n")
                journal.flush()
                progress.update()
    progress.close()

    # 4. The complete file, in order.
    _wait_for_all_ranks()
    if rank == 0:
        merge_journals(path)
    _wait_for_all_ranks()


def _row(index: int, response_ids: Sequence[int], tokenizer: Tokenizer) -> dict:
    has_ended = bool(response_ids) and response_ids[-1] == tokenizer.eos_id
    text_ids = list(response_ids[:-1] if has_ended else response_ids)
    return {"index": index, "output": tokenizer.decode(text_ids), "stop": "end" if has_ended else "max_new_tokens"}
