"""What a model is asked for each record of a benchmark: a call, a text to continue, a choice, or a whole dialogue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.formats.table import FORMATS, encode_prompt
from data.json_records import DataError
from data.trajectories import Message
from eval.benchmark_data import (
    BENCHMARK_FILES,
    DIALOGUE_BENCHMARKS,
    EvalExample,
    load_rotbench,
    load_tiny,
    load_tiny_multi,
    load_toolalpaca,
)
from eval.bfcl_data import load_bfcl
from eval.dialogues.journal import DialogueTask
from eval.general_tasks import (
    NEXT_QUESTION,
    STOP_TEXTS,
    ChoiceQuestion,
    gsm8k_prompt,
    load_gsm8k,
    load_humaneval,
    load_mmlu,
)
from eval.tooleyes_data import load_tooleyes
from model.tokenizer import Tokenizer

# Benchmarks whose prompt is a text, and where the model's continuation of it ends.
TEXT_BENCHMARKS = {"gsm8k": (NEXT_QUESTION,), "humaneval": STOP_TEXTS}
CHOICE_BENCHMARKS = ("mmlu",)


@dataclass(frozen=True, slots=True)
class Query:
    """A record whose answer is generated."""

    index: int
    tools: list[dict]  # OpenAI function dicts; [] beside a text
    messages: list[Message]  # the dialogue up to the call to be predicted; [] beside a text
    text: str  # the text to continue; "" beside a dialogue


@dataclass(frozen=True, slots=True)
class ChoiceQuery:
    """A record whose answer is the likeliest of four letters."""

    index: int
    question: ChoiceQuestion
    shots: Sequence[ChoiceQuestion]  # solved questions on the same subject


def load_queries(name: str, path: Path) -> list[Query] | list[ChoiceQuery] | list[DialogueTask]:
    """All queries of benchmark `name` from its file or folder, in order. Raises DataError with `file:line`."""
    if name in DIALOGUE_BENCHMARKS:
        return load_tasks(name, path)
    if name == "mmlu":
        questions, shots = load_mmlu(path)
        return [ChoiceQuery(question.index, question, shots[question.subject]) for question in questions]
    if name == "gsm8k":
        return [Query(problem.index, [], [], gsm8k_prompt(problem.question)) for problem in load_gsm8k(path)]
    if name == "humaneval":
        return [Query(problem.index, [], [], problem.prompt) for problem in load_humaneval(path)]
    return [Query(example.index, example.tools, example.messages, "") for example in _load_examples(name, path)]


def load_tasks(name: str, path: Path) -> list[DialogueTask]:
    """The tasks of a multi-turn benchmark, in order. Raises DataError with `file:line`."""
    return load_tiny_multi(path) if name == "tiny-multi" else load_tooleyes(path)


def _load_examples(name: str, path: Path) -> list[EvalExample]:
    if name.startswith("tiny-"):
        return load_tiny(path)
    if name.startswith("rotbench-"):
        return load_rotbench(path)
    if name == "toolalpaca":
        return load_toolalpaca(path)
    if name == "bfcl-exec":
        return load_bfcl(path)
    raise DataError(f"--benchmarks: found {name}, expected one of {', '.join(BENCHMARK_FILES)}")


def encode_query(query: Query, prompt_format: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt for a model of ours, BOS included. A text has no format: it is encoded as it is.

    Raises PromptError if the tokenizer is not that of a model of `prompt_format`.
    """
    return (
        encode_text(query.text, tokenizer)
        if query.text
        else encode_prompt(query.tools, query.messages, tokenizer, prompt_format)
    )


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS, where the tokenizer has one, and the ids of the text."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


def stop_texts_of(name: str, prompt_format: str) -> tuple[str, ...]:
    """Where an answer to a query of benchmark `name` ends, beside the model's own end of a turn."""
    return TEXT_BENCHMARKS.get(name, FORMATS[prompt_format].stop_strings)


def cut_at(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first of `stop_texts`, and whether there was one."""
    ends = [position for stop in stop_texts if (position := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
