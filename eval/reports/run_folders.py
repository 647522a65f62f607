"""A folder of run_sft.py, run_ppo.py or run_eval.py: what can be read of it, and what is missing or damaged."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.json_records import DataError, read_json_object
from data.run_journals import clean_evaluation, clean_metrics, clean_sample, is_number, read_journal
from eval.benchmarks import BENCHMARKS
from eval.predict.generate import answers_sha256
from eval.predict.run_predictions import TINY_DATA
from eval.records import Record
from eval.reports.compare import read_results, read_run

SFT, PPO, EVALUATION = "SFT", "PPO", "evaluation"


@dataclass(slots=True)
class RunFolder:
    """What a folder holds. A file that is missing or cannot be read is empty here; `problems` says so."""

    path: Path
    name: str  # on the page; differs between the folders of a page
    kind: str  # SFT, PPO or EVALUATION
    config: dict  # config.json
    environment: dict  # environment.json
    problems: list[str]  # one line each
    # training
    identity: dict = field(default_factory=dict)  # run_identity.json
    report: dict = field(default_factory=dict)  # data_report.json
    metrics: list[dict] = field(default_factory=list)  # numbers only, each with "step"
    samples: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)  # held_out.jsonl of SFT, numbers only
    history: list[dict] = field(default_factory=list)  # settings changed on the way, history.jsonl
    is_finished: bool = False  # the final model is there, and is that of the last logged step
    # evaluation
    summaries: dict[str, dict] = field(default_factory=dict)  # benchmark -> its part of summary.json
    results: dict[str, dict[int, dict]] = field(default_factory=dict)  # benchmark -> index -> row
    outputs: dict[str, dict[int, str]] = field(default_factory=dict)  # benchmark -> index -> what the model wrote


def read_run_folders(paths: list[Path]) -> list[RunFolder]:
    """The folders in their order. Raises DataError for one that is no run's."""
    return [_read_folder(path, name) for path, name in zip(paths, _names_of(paths), strict=True)]


def _names_of(paths: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; a number where they are equal."""
    parts = [path.absolute().parts for path in paths]
    for n_parts in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-n_parts:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]


def _read_folder(path: Path, name: str) -> RunFolder:
    problems: list[str] = []
    if not path.is_dir():
        raise DataError(f"{path}: found no folder, expected that of a run")
    config = _object(path / "config.json", problems)
    metrics = _journal(path / "metrics.jsonl", clean_metrics, problems)
    kind = _kind_of(path, config, metrics)
    folder = RunFolder(path, name, kind, config, _object(path / "environment.json", problems), problems)
    if kind == EVALUATION:
        _read_evaluation(folder)
    else:
        folder.metrics = metrics
        _read_training(folder)
    return folder


def _kind_of(path: Path, config: dict, metrics: list[dict]) -> str:
    """What kind of run the folder is of, by its settings, or where those are lost by what it wrote."""
    written = {key.partition("/")[0] for row in metrics for key in row}
    if "benchmarks" in config or (path / "summary.json").exists():
        return EVALUATION
    if "kl_coef" in config or "ppo" in written:
        return PPO
    if "max_key_token_weight" in config or "sft" in written:
        return SFT
    raise DataError(f"{path}: found no run, expected a folder of run_sft.py, run_ppo.py or run_eval.py")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _read_training(folder: RunFolder) -> None:
    path, problems = folder.path, folder.problems
    folder.identity = _object(path / "run_identity.json", problems)
    folder.report = _object(path / "data_report.json", problems)
    folder.history = _journal(path / "history.jsonl", _clean_change, problems)
    finished = _object(path / "finished.json", problems) if (path / "finished.json").exists() else {}
    last_logged = folder.metrics[-1]["step"] if folder.metrics else None
    folder.is_finished = (path / "final" / "config.json").exists() and finished.get("step", last_logged) == last_logged
    if not (path / "metrics.jsonl").exists():
        problems.append("metrics.jsonl: found no such file; the run made no step")
    elif not folder.metrics:
        problems.append("metrics.jsonl: found no step; the run ended before its first one")
    if folder.kind == PPO:
        folder.samples = _journal(path / "samples.jsonl", clean_sample, problems)
        folder.evaluations = _journal(path / "evaluations.jsonl", clean_evaluation, problems)
        if not folder.samples:
            problems.append("samples.jsonl: found no sample response")
    else:
        folder.held_out = _journal(path / "held_out.jsonl", clean_metrics, problems)


def _clean_change(row: dict) -> dict | None:
    return row if is_number(row.get("step")) and isinstance(row.get("setting"), str) else None


def last_step_of(folder: RunFolder) -> int | None:
    """The optimizer step at which the run is to end; None where the folder does not say."""
    total, limit = folder.identity.get("total_steps"), folder.config.get("max_steps")
    if type(total) is not int or type(limit) is not int:
        return None
    return min(total, limit or total)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def _read_evaluation(folder: RunFolder) -> None:
    try:
        folder.summaries = read_run(folder.path)["benchmarks"]
    except DataError as error:
        folder.problems.append(f"{_without(folder.path, error)}; run_eval.py writes it at its end")
    for name, summary in folder.summaries.items():
        try:
            folder.results |= read_results(folder.path, {"benchmarks": {name: summary}})
        except DataError as error:
            folder.problems.append(_without(folder.path, error))
    for path in sorted((folder.path / "predictions").glob("*.jsonl")):
        if ".rank" not in path.name:  # the journal of a rank that was killed
            rows = _journal(path, _clean_output, folder.problems)
            folder.outputs[path.stem] = {row["index"]: row["text"] for row in rows}
    for name in folder.summaries:  # in their order: that of a set differs from start to start
        if name not in folder.outputs:
            folder.problems.append(f"predictions/{name}.jsonl: found no such file; its answers are not shown")


def _clean_output(row: dict) -> dict | None:
    """Index and text of a prediction: what the model wrote, or the turns of its dialogue with their feedback."""
    if type(row.get("index")) is not int:
        return None
    if isinstance(row.get("output"), str):
        return {"index": row["index"], "text": row["output"].strip()}
    turns = row.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    lines = []
    for turn in turns:
        lines.append(str(turn.get("output")).strip())
        calls = turn.get("calls")
        for call in calls if isinstance(calls, list) else []:
            if isinstance(call, dict) and call.get("feedback"):
                lines.append(f"-> {call['feedback']}")
    return {"index": row["index"], "text": "\n".join(lines)}


def read_questions(folders: list[RunFolder], name: str) -> dict[int, Record]:
    """Index -> record of a benchmark, from its own file where that is still the one that was scored; else empty."""
    if name not in BENCHMARKS:
        return {}
    for folder in folders:
        directory = folder.config.get("benchmark_dir")
        wanted = folder.summaries.get(name, {}).get("answers_sha256")
        for place in (directory, str(TINY_DATA)) if isinstance(directory, str) else (str(TINY_DATA),):
            path = Path(place) / BENCHMARKS[name].path
            try:
                if (path.is_file() or path.is_dir()) and answers_sha256(path) == wanted:
                    return {record.index: record for record in BENCHMARKS[name].load(path)}
            except (DataError, OSError, ValueError):  # ValueError: a path with a null character
                continue
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _object(path: Path, problems: list[str]) -> dict:
    """A JSON object, {} where there is none."""
    try:
        return read_json_object(path)
    except DataError as error:
        problems.append(_without(path.parent, error))
        return {}


def _journal(path: Path, clean: Callable[[dict], dict | None], problems: list[str]) -> list[dict]:
    try:
        rows, found = read_journal(path, clean)
    except DataError as error:
        rows, found = [], [_without(path.parent, error)]
    problems += found
    return rows


def _without(folder: Path, error: DataError) -> str:
    """The error without the folder's path: the page is not tied to this machine."""
    return str(error).replace(f"{folder}/", "")
