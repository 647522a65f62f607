"""Predictions of a model or an endpoint for one benchmark, journaled per item, resumable, split over ranks.

While running, rank 0 appends to PREDICTIONS/<benchmark>.jsonl itself and rank r to its journal (journals.py). At the
start and at the end rank 0 merges all of them into the first, sorted by index.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from tqdm import tqdm

from data.formats.prompt_format import find_stop_ids
from data.formats.table import encode_prompt
from data.json_records import DataError, read_json_object, write_json_lines, write_text
from eval.predict.cut_output import cut_at
from eval.predict.journals import Journal, describe_resume, journal_file, journal_files, read_rows
from eval.predict.prediction_files import prediction_of
from eval.records import Record
from model.decode import DecodeWeights
from model.sampling import generate_as_ended
from model.tokenizer import Tokenizer
from model.transformer import Transformer

HASH_BLOCK = 1 << 20  # bytes read at a time

Found = TypeVar("Found")


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def folder_sha256(model_dir: Path) -> str:
    """sha256 over names and contents of the files that decide a model's outputs (weights, config, tokenizer)."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".model"):
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        _update(digest, path)
    return digest.hexdigest()


def answers_sha256(path: Path) -> str:
    """sha256 of an answer file, or over the names and contents of all files in a folder of them."""
    if path.is_file():
        return _update(hashlib.sha256(), path).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        _update(digest, file)
    return digest.hexdigest()


def _update(digest, path: Path):
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest


def check_settings(path: Path, settings: dict[str, str | int], *, resume: str, is_writer: bool) -> None:
    """Make sure that predictions at `path` were or will be made with `settings`, kept next to them as .settings.json.

    Every rank calls it, so that all of them stop; only the one with `is_writer` writes. Raises DataError if earlier
    predictions have other settings or none, or if there are any and `resume` is "never": nothing is ever overwritten.
    """
    settings_path = path.with_suffix(".settings.json")
    if not path.exists() and not journal_files(path):
        if is_writer:
            write_text(settings_path, json.dumps(settings, indent=2) + "\n")
        return
    if resume == "never":
        raise DataError(f"{path}: found predictions, expected none for --resume never; choose another --output")
    try:
        found = read_json_object(settings_path)
    except DataError:
        raise DataError(
            f"{settings_path}: found no settings with the earlier predictions, expected those of this run; "
            "choose another --output"
        ) from None
    for name, value in settings.items():
        if found.get(name) != value:
            raise DataError(
                f"{settings_path}: found {name} {found.get(name)!a}, expected {value!a}: the predictions "
                "belong to another run; choose another --output"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def complete_predictions(
    path: Path,
    queries: Sequence[Record],
    predict: Callable[[list], Iterator[dict]],
    *,
    label: dict[str, str],
    rank: int,
) -> list[str]:
    """Bring the JSONL file `path` to one row per query; what is already there is not made again.

    All ranks call it with the same queries. `predict(missing)` gives this rank's rows for the queries still missing, in
    any order; each is written with the keys of `label` and flushed as it comes. Returns notices for the user. Raises
    DataError, on all ranks, for journals that cannot be continued, and whatever `predict` raises; the rows it gave
    before are in the journal.
    """
    # 1. Everything that earlier processes left becomes one file, before any rank appends to its own journal.
    earlier, n_dropped = merge_journals(path, rank)
    done = {row["index"] for row in earlier}
    missing = [query for query in queries if query.index not in done]

    # 2. Predict, and append item by item.
    predicted = predict(missing)  # settings that do not fit show before the bar
    with (
        Journal(path if rank == 0 else journal_file(path, rank)) as journal,
        tqdm(total=len(missing), desc=path.stem, unit="item", disable=rank != 0 or not missing or None) as bar,
    ):
        for row in predicted:
            journal.append({**row, **label})
            bar.update(_rank_count())  # of rank 0 standing for all

    # 3. The complete file, in order.
    rows, _ = merge_journals(path, rank)
    n_kept = len(queries) - len(missing)
    n_fewer = sum("n_shots" in row for row in rows)
    fewer = [f"{path}: {n_fewer} of {len(rows)} prompts have fewer solved questions, to fit"] if n_fewer else []
    return fewer + describe_resume(
        path,
        kept=f"{n_kept} predictions" if n_kept else "",
        n_dropped=n_dropped,
        too_long=[row["index"] for row in rows if row.get("stop") == "prompt_too_long"],
        refused=[(row["index"], row.get("error", "")) for row in rows if row.get("stop") == "refused"],
        what="predictions counted as wrong",
    )


def merge_journals(path: Path, rank: int) -> tuple[list[dict], int]:
    """The rows of all ranks, sorted by index, put into `path`; and how many partial lines killed writers left.

    A collective (join_journals). Raises DataError, on all ranks, for malformed lines and for an index with two
    different outputs.
    """

    def read() -> tuple[list[dict], int]:
        row_of_index: dict[int, dict] = {}
        rows, n_dropped = read_rows((path, *journal_files(path)))
        for where, row in rows:
            prediction_of(row, where)  # raises on anything malformed
            # A kill between the rename and the removal below leaves lines in both files: no conflict.
            if row_of_index.setdefault(row["index"], row) != row:
                raise DataError(f"{where}: found a second, different output for index {row['index']}")
        return [row_of_index[index] for index in sorted(row_of_index)], n_dropped

    def write(found: tuple[list[dict], int]) -> None:
        write_json_lines(path, found[0])
        for file in journal_files(path):
            file.unlink()

    return join_journals(rank, read, write)


def join_journals(rank: int, read: Callable[[], Found], write: Callable[[Found], None]) -> Found:
    """What `read` finds in all journals, after rank 0 has put it together with `write`.

    A collective: all ranks wait for each other before they read, and again before any of them may append. What `read`
    raises, it raises on all ranks.
    """
    _wait_for_all_ranks()
    found = read()
    _wait_for_all_ranks()
    if rank == 0:
        write(found)
    _wait_for_all_ranks()
    return found


def _wait_for_all_ranks() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _rank_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model of ours, whole on this process's device, and which share of the records this process answers."""

    model: Transformer
    tokenizer: Tokenizer
    rank: int
    world_size: int
    cuda_graphs: bool = False  # record the steps of decoding (model/step_graphs.py)


def encode_record(record: Record, prompt_format: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt for a model of ours, BOS included. A text has no format: it is encoded as it is.

    Raises PromptError if the tokenizer is not that of a model of `prompt_format`.
    """
    if record.text:
        return encode_text(record.text, tokenizer)
    return encode_prompt(record.tools, record.messages, tokenizer, prompt_format)


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS, where the tokenizer has one, and the ids of the text."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


def length_sorted_batches(prompts: dict[int, list[int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of near-equal prompt length, longest first, so that a lack of memory shows at once."""
    ordered = sorted(prompts, key=lambda index: (-len(prompts[index]), index))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def generated_rows(
    local: LocalModel,
    queries: Sequence[Record],
    *,
    prompt_format: str,
    stop_texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[dict]:
    """The greedy output for this rank's share of the queries, batch by batch, longest prompts first, as each ends.

    An output ends with EOS, before the first of `stop_texts`, or after `max_new_tokens`. Generation itself stops at EOS
    and at those stop texts that are control tokens, by their id; at other texts the output is cut afterwards. A prompt
    that leaves less than `max_new_tokens` of the model's positions gets the empty output with
    `"stop": "prompt_too_long"`. A row does not depend on batch_size or ranks. Raises PromptError, before the first row.
    """
    weights, tokenizer = DecodeWeights(local.model, cuda_graphs=local.cuda_graphs), local.tokenizer
    prompts = {query.index: encode_record(query, prompt_format, tokenizer) for query in queries}
    continued = {query.index for query in queries if query.text}
    stop_ids = find_stop_ids(stop_texts, tokenizer)
    room = local.model.config.max_positions - max_new_tokens

    def rows_of(batch: list[int]) -> Iterator[dict]:
        fitting = [index for index in batch if len(prompts[index]) <= room]
        for index in batch:
            if len(prompts[index]) > room:
                yield {"index": index, "output": "", "stop": "prompt_too_long"}
        if not fitting:
            return
        ids = [prompts[index] for index in fitting]
        for position, response_ids in generate_as_ended(weights, ids, max_new_tokens=max_new_tokens, eos_id=stop_ids):
            index = fitting[position]
            output, stop = read_response(
                response_ids,
                tokenizer,
                stop_ids=stop_ids,
                stop_texts=stop_texts,
                prompt_ids=prompts[index] if index in continued else [],
            )
            yield {"index": index, "output": output, "stop": stop}

    own_batches = length_sorted_batches(prompts, batch_size)[local.rank :: local.world_size]
    return (row for batch in own_batches for row in rows_of(batch))


def read_response(
    response_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    stop_ids: frozenset[int],
    stop_texts: Sequence[str],
    prompt_ids: list[int],
) -> tuple[str, str]:
    """The text of a response up to its end, and why it ended.

    With `prompt_ids` the text continues theirs: decoded alone it would lose a blank in front, which is the indentation
    of a function's body.
    """
    end = next((position for position, token_id in enumerate(response_ids) if token_id in stop_ids), None)
    text_ids = list(response_ids[:end])
    prompt, whole = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *text_ids])
    text = whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(text_ids)
    output, is_cut = cut_at(text, stop_texts)
    return output, "end" if is_cut or end is not None else "max_new_tokens"
