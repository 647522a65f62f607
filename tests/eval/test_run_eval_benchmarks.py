"""run_eval.py on small files of each published benchmark's form: each benchmark, ranks' shares, resuming, endpoint."""

import csv
import gzip
import json

import pytest
import torch

from data.formats.table import render_output
from data.tool_calls import ToolCall
from eval.evaluate_humaneval import load_humaneval
from eval.evaluate_mmlu import LETTERS, load_mmlu
from eval.predict import endpoint as endpoint_module
from eval.predict.choices import choice_prompt
from eval.predict.generate import LocalModel, encode_text, generated_rows
from eval.predict.letter_logprobs import letter_rows
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from tests.support.endpoint_server import Server
from tests.support.eval_runs import flags_of, predictions_of, run_here
from tests.support.tiny_run import tiny_files

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

TOOL = {
    "name": "search",
    "description": "finds",
    "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "what"}}, "required": ["q"]},
}
LAST_TOOLS = [
    {
        "name": name,
        "description": name,
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": key}},
            "required": [key],
        },
    }
    for name, key in (("ask_to_user", "question"), ("finish", "answer"))
]
COUNT = 3


def write_benchmarks(folder):
    """A few records of our own in the files of RoTBench, ToolAlpaca, BFCL, GSM8K, HumanEval and MMLU."""
    for name in (
        "rotbench/First_Turn",
        "toolalpaca",
        "bfcl_v3_exec/2024-12-19_5bd63a96",
        "gsm8k",
        "humaneval",
        "mmlu/test",
        "mmlu/dev",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "rotbench/First_Turn/clean.json").write_text(
        json.dumps(
            [
                {
                    "id": f"Turn 1: find {i}",
                    "scenario": "TG",
                    "conversations": [
                        {"from": "system", "value": f"Tools:\n{json.dumps([TOOL, *LAST_TOOLS])}\n\nLet's Begin!"},
                        {"from": "user", "value": f"find {i}\nBegin!\n"},
                        {"from": "assistant", "value": [f'Thought:\nAction: search\nAction Input: {{"q": "{i}"}}']},
                    ],
                }
                for i in range(COUNT)
            ]
        )
    )
    (folder / "gsm8k/test.jsonl").write_text(
        "".join(
            json.dumps({"question": f"What is {i} + 1?", "answer": f"One more.\n#### {i + 1}"}) + "\n"
            for i in range(COUNT)
        )
    )
    with gzip.open(folder / "humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.writelines(
            json.dumps(
                {
                    "task_id": f"T/{i}",
                    "prompt": f"def f{i}(x):\n",
                    "entry_point": f"f{i}",
                    "canonical_solution": f"    return x + {i}\n",
                    "test": f"def check(candidate):\n    assert candidate(2) == {2 + i}\n",
                }
            )
            + "\n"
            for i in range(COUNT)
        )
    for subject in ("art", "law"):
        for part, count in (("test", COUNT), ("dev", 5)):
            with open(folder / f"mmlu/{part}/{subject}_{part}.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                writer.writerows(
                    [f"{part} {subject} {i}?", "one", "None", "three", f"{i}", i % 4] for i in range(count)
                )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_pretrained(tiny_files()[0]).eval(), load_tokenizer(tiny_files()[0])


def run(folder, output, **flags):
    return run_here(
        flags_of(folder, output, **{"check_files": "off", "max_answer_tokens": 6, "max_new_tokens": 6, **flags})
    )


# ---------------------------------------------------------------------------------------------------------------------
# Model


def test_every_benchmark_is_predicted_scored_and_resumed(folder, tmp_path):
    names = ["rotbench-clean", "gsm8k", "humaneval", "mmlu"]
    code, out, err = run(folder, tmp_path, benchmarks=",".join(names), execute_code="on")
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    assert {name: summary[name]["n"] for name in names} == {**dict.fromkeys(names, COUNT), "mmlu": 2 * COUNT}
    assert summary["rotbench-clean"]["rules"] == "official" and "pass_at_1" in summary["humaneval"]
    assert all(
        name in out for name in ("exact_match", "last_number", "accuracy", "pass_at_1", "| rotbench-clean, fp32 |")
    )
    for figure in ("figure4", "figure5"):
        assert (tmp_path / f"plots/{figure}.svg").stat().st_size > 1000
    whole = {name: predictions_of(tmp_path, name) for name in names}
    for name, content in whole.items():  # what a kill leaves: some lines, one of them torn
        lines = content.splitlines(keepends=True)
        (tmp_path / f"predictions/{name}.jsonl").write_bytes(lines[2] + lines[0] + lines[1][:9])
    code, out, err = run(folder, tmp_path, benchmarks=",".join(names[:2] + names[3:]))
    assert code == 0 and out.count("kept 2 predictions") == 3 and out.count("dropped 1 partial") == 3, err
    assert {name: predictions_of(tmp_path, name) for name in names if name != "humaneval"} == {
        name: content for name, content in whole.items() if name != "humaneval"
    }


def test_letters_are_those_of_whole_forwards_and_of_any_share(folder, model):
    """Oracle: one forward without a cache over the prompt and each letter."""
    network, tokenizer = model
    queries = load_mmlu(folder / "mmlu")
    rows = list(letter_rows(network, tokenizer, queries))
    for query, row in zip(queries, rows, strict=True):
        ids = encode_text(choice_prompt(query, 5), tokenizer)
        for letter, logprob in zip(LETTERS, row["logprobs"], strict=True):
            letter_ids = tokenizer.encode_continuation(f" {letter}")
            with torch.no_grad():
                logprobs_TV = network(torch.tensor([[*ids, *letter_ids]]))[0].double().log_softmax(-1)
            expected = sum(logprobs_TV[len(ids) - 1 + i, token].item() for i, token in enumerate(letter_ids))
            assert logprob == pytest.approx(expected, abs=1e-4)
        assert row["output"] == " " + LETTERS[row["logprobs"].index(max(row["logprobs"]))]
    assert list(letter_rows(network, tokenizer, queries[2:5])) == rows[2:5]  # bit for bit: kills and ranks
    assert [next(letter_rows(network, tokenizer, [query])) for query in queries[::3]] == rows[::3]


def test_letters_with_fewer_shots_where_the_model_is_short(folder, model):
    network, tokenizer = model
    config, queries = network.config, load_mmlu(folder / "mmlu")[:1]
    lengths = [len(encode_text(choice_prompt(queries[0], kept), tokenizer)) for kept in range(6)]
    longest = max(len(tokenizer.encode_continuation(f" {letter}")) for letter in LETTERS)

    def row_with(positions):
        network.config = type(config)(
            **{name: getattr(config, name) for name in config.__slots__} | {"max_positions": positions}
        )
        try:
            return next(letter_rows(network, tokenizer, queries))
        finally:
            network.config = config

    assert row_with(lengths[2] + longest)["logprobs"] != row_with(lengths[5] + longest)["logprobs"]
    assert row_with(lengths[0] - 1) == {"index": 0, "output": "", "stop": "prompt_too_long"}


def test_longest_prompt_as_the_benchmarks_own_loop_counts_it(folder, model):
    network, tokenizer = model
    queries = load_mmlu(folder / "mmlu")[::3]
    lengths = sorted({len(encode_text(choice_prompt(query, k), tokenizer)) for query in queries for k in range(6)})
    for limit in (*lengths, lengths[0] - 1, lengths[2] + 1, 1):
        for query, row in zip(queries, letter_rows(network, tokenizer, queries, max_prompt_tokens=limit), strict=True):
            k = 5
            while k and len(encode_text(choice_prompt(query, k), tokenizer)) > limit:
                k -= 1
            ids = encode_text(choice_prompt(query, k), tokenizer)
            with torch.inference_mode():
                last_V = network(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
            first = [tokenizer.encode_continuation(f" {letter}") for letter in LETTERS]
            assert row.get("n_shots", 5) == k and ("n_shots" in row) == (k < 5)
            for logprob, letter_ids in zip(row["logprobs"], first, strict=True):
                assert len(letter_ids) > 1 or logprob == pytest.approx(last_V[letter_ids[0]].item(), abs=1e-4)
    assert list(letter_rows(network, tokenizer, queries)) == list(
        letter_rows(network, tokenizer, queries, max_prompt_tokens=lengths[-1])
    )


def test_fewer_shots_are_counted_in_the_log_and_decide_the_predictions(folder, model, tmp_path):
    queries = load_mmlu(folder / "mmlu")
    room = max(len(encode_text(choice_prompt(query, 3), model[1])) for query in queries)
    code, out, err = run(folder, tmp_path, benchmarks="mmlu", mmlu_max_prompt_tokens=room)
    assert code == 0 and f"{len(queries)} of {len(queries)} prompts have fewer solved questions, to fit" in out, err
    rows = [json.loads(line) for line in predictions_of(tmp_path, "mmlu").splitlines()]
    assert {row["n_shots"] for row in rows} <= {3, 4} and len(rows) == len(queries)
    code, out, err = run(folder, tmp_path, benchmarks="mmlu", mmlu_max_prompt_tokens=0)
    assert code == 2 and "max_prompt_tokens" in err
    code, out, err = run(folder, tmp_path / "all", benchmarks="mmlu", mmlu_max_prompt_tokens=0)
    assert (
        code == 0 and "fewer solved questions" not in out and b"n_shots" not in predictions_of(tmp_path / "all", "mmlu")
    )


def test_ranks_share_the_queries(folder, model):
    queries = load_humaneval(folder / "humaneval/HumanEval.jsonl.gz")

    def rows(rank, world_size, batch_size):
        return list(
            generated_rows(
                LocalModel(*model, rank, world_size),
                queries,
                prompt_format="tl",
                stop_texts=("\ndef",),
                max_new_tokens=4,
                batch_size=batch_size,
            )
        )

    alone = sorted(rows(0, 1, 8), key=lambda row: row["index"])
    assert sorted(rows(0, 2, 1) + rows(1, 2, 1), key=lambda row: row["index"]) == alone and len(alone) == COUNT


# ---------------------------------------------------------------------------------------------------------------------
# Endpoint


@pytest.mark.parametrize(
    "prompt_format", ["tl", "toolllama", "nexusraven", "chatglm4", "qwen2", "llama31", "qwen25", "openai"]
)
def test_endpoint_that_answers_rightly_in_every_format(folder, tmp_path, monkeypatch, prompt_format):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("SOME_KEY", "sk-test")

    def script(number, path, body):
        if number == 0:
            return 429, b"not now", {}
        asked = json.dumps(body)
        wanted = next(i for i in range(COUNT) if f"find {i}" in asked)
        output = render_output([ToolCall("search", {"q": str(wanted)})], prompt_format)
        choice = {"message": json.loads(output)} if path.endswith("/chat/completions") else {"text": output}
        return 200, {"choices": [{**choice, "finish_reason": "stop"}]}, {}

    server = Server(script)
    code, _, err = run(
        folder,
        tmp_path,
        benchmarks="rotbench-clean",
        endpoint=server.url,
        endpoint_key="SOME_KEY",
        model="m",
        prompt_format=prompt_format,
    )
    server.http.shutdown()
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["rotbench-clean"]
    assert (summary["TS"], summary["PI"], summary["CF"]) == (COUNT, COUNT, COUNT), summary["errors"]
    assert server.requests[-1][2]["Authorization"] == "Bearer sk-test"
    assert not any("sk-test" in path.read_text() for path in tmp_path.rglob("*.json*"))
    assert str(len(server.requests)) == str(COUNT + 1)


def test_endpoint_that_fails_loses_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.001)
    state = {"works": 2}

    def script(number, path, body):
        if number >= state["works"]:
            return 500, b"<html>", {}
        return 200, {"choices": [{"text": "#### 1"}]}, {}

    server = Server(script)
    flags = {
        "benchmarks": "gsm8k",
        "endpoint": server.url,
        "model": "m",
        "endpoint_concurrency": 1,
        "endpoint_attempts": 2,
    }
    code, _, err = run(folder, tmp_path, **flags)
    assert code == 2 and err.strip().splitlines()[-1].startswith(f"{server.url}/completions: found status 500")
    assert "what was predicted is kept" in err and len(predictions_of(tmp_path, "gsm8k").splitlines()) == 2
    state["works"] = 99
    code, out, err = run(folder, tmp_path, **flags)
    server.http.shutdown()
    assert code == 0 and "kept 2 predictions" in out, err
    assert len(server.requests) == 2 + 2 + 1
    assert run(folder, tmp_path, **{**flags, "model": "other"})[0] == 2  # predictions of another model


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"prompt_format": "openai"}, "--prompt_format: found openai without --endpoint"),
        ({"prompt_format": "qwen25"}, "--prompt_format qwen25: found no token <|im_start|>, <|im_end|> in the"),
        ({"endpoint": "localhost:1"}, "--endpoint: found 'localhost:1', expected the base of an API"),
        ({"endpoint": "http://h/v1", "predictions": "p"}, "--endpoint: found it with --predictions"),
        ({"endpoint_timeout": 0}, "--endpoint_timeout"),
        ({"benchmarks": "humaneval"}, "--execute_code: found off, expected on for humaneval"),
        ({"benchmarks": "tooleyes"}, "scenario_data_zero_processed.json: found No such file"),
        ({"check_files": "on"}, "clean.json: found"),
        ({"benchmarks": "mmlu", "benchmark_dir": "tests"}, "tests/mmlu: found no test/*_test.csv"),
        ({"benchmarks": "gsm8k", "max_answer_tokens": 2048}, "--max_answer_tokens: found 2048, expected less than"),
        ({"rules": "loose"}, "expected one of default, official, fair"),
    ],
)
def test_bad_input_is_one_line_and_code_2(folder, tmp_path, change, expected):
    code, _, err = run(folder, tmp_path / "out", **{"benchmarks": "rotbench-clean", **change})
    assert code == 2 and err.strip().count("\n") == 0 and expected in err, err


def test_altered_file_is_named_with_what_to_do(folder, tmp_path):
    code, _, err = run(folder, tmp_path / "out", benchmarks="rotbench-clean", check_files="on")
    assert code == 2 and "with sha256" in err and "--check_files off takes files of your own" in err
