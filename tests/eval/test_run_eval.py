"""run_eval.py from model to report: files, determinism over batches, ranks and kills, refusals, comparison of runs."""

import fcntl
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from data import json_records
from data.formats.table import encode_prompt
from data.tool_calls import ToolCall, render_tool_call
from eval.benchmarks import BENCHMARKS
from eval.eval_config import EvalConfig, default_output
from eval.evaluate_tiny import load_tiny
from eval.predict import generate as generate_predictions
from eval.predict.generate import LocalModel, generated_rows, length_sorted_batches, read_response
from eval.reports.compare import main as compare_main
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from tests.support.eval_runs import flags_of, predictions_of, run_here
from tests.support.processes import lines_in, start
from tests.support.tiny_run import CITIES, ROOT, copy_of_model, make_records, tiny_files

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

COUNT = 23  # records per benchmark: no multiple of a batch or of the ranks


def make_benchmarks(folder: Path) -> Path:
    """test_seen.jsonl and test_unseen.jsonl with the tools of tests.support.tiny_run and requests."""
    tools = [
        {"type": "function", "function": tool} for tool in json.loads(make_records(1)[0]["conversations"][0]["content"])
    ]
    draw = random.Random(3)
    folder.mkdir()
    for name in ("seen", "unseen"):
        with open(folder / f"test_{name}.jsonl", "w") as file:
            for index in range(COUNT):
                tool, city = draw.choice(tools)["function"]["name"], draw.choice(CITIES)
                request = " ".join(["please"] * draw.randrange(9) + [f"{tool} for {city}"])
                gold = [{"calls": [{"name": tool, "arguments": {"city": city}}], "order_free": False}]
                file.write(
                    json.dumps(
                        {
                            "id": f"{name}/{index}",
                            "tools": draw.sample(tools, draw.randint(1, 3))
                            + [each for each in tools if each["function"]["name"] == tool],
                            "messages": [{"role": "user", "content": request}],
                            "gold": gold,
                            "meta": {},
                        }
                    )
                    + "\n"
                )
    return folder


@pytest.fixture(scope="module")
def benchmark_dir(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("eval") / "data")


@pytest.fixture(scope="module")
def reference(benchmark_dir, tmp_path_factory):
    """An undisturbed run on both benchmarks: (folder, stdout)."""
    output = tmp_path_factory.mktemp("eval") / "reference"
    code, out, _ = run_here(flags_of(benchmark_dir, output, benchmarks="tiny-seen,tiny-unseen"))
    assert code == 0
    return output, out


def scores_of(output):
    return {path.name: path.read_bytes() for path in (output / "results").iterdir()} | {
        "summary": json.loads((output / "summary.json").read_text())["benchmarks"]
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_each_answer_file_is_read_once(benchmark_dir, tmp_path, monkeypatch):
    """By all of prediction, scoring and report together; a prediction file when it is complete and for the scores."""
    n_reads, read_bytes = Counter(), json_records._read_bytes

    def counted(path):
        n_reads[Path(path).name] += 1
        return read_bytes(path)

    monkeypatch.setattr(json_records, "_read_bytes", counted)
    assert run_here(flags_of(benchmark_dir, tmp_path, benchmarks="tiny-seen,tiny-unseen", limit=2))[0] == 0
    assert n_reads.pop("tiny-seen.settings.json") == 1  # for the type of the predictions
    assert n_reads == {"test_seen.jsonl": 1, "test_unseen.jsonl": 1, "tiny-seen.jsonl": 2, "tiny-unseen.jsonl": 2}


def test_run_leaves_predictions_results_summary_report(reference, benchmark_dir):
    output, out = reference
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "environment.json",
        "predictions",
        "report.md",
        "results",
        "summary.json",
    ]
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["tiny-seen", "tiny-unseen"]
    for name, scores in summary["benchmarks"].items():
        assert scores["n"] == COUNT and 0 <= scores["CF"] <= scores["PI"] <= scores["TS"] <= COUNT
        predictions = [json.loads(line) for line in predictions_of(output, name).splitlines()]
        rows = [json.loads(line) for line in (output / "results" / f"{name}.jsonl").read_text().splitlines()]
        assert [row["index"] for row in predictions] == [row["index"] for row in rows] == list(range(COUNT))
        assert {row["stop"] for row in predictions} <= {"end", "max_new_tokens"}
        assert not list((output / "predictions").glob("*.rank*"))
    report = (output / "report.md").read_text()
    assert report in out and "| tiny-seen, fp32   | 23 |" in report and "CF % [95 %]" in report
    assert json.loads((output / "config.json").read_text())["max_new_tokens"] == 12
    assert str(ROOT) not in (output / "environment.json").read_text()


def test_same_command_again_keeps_the_predictions(reference, benchmark_dir):
    output, _ = reference
    before, scores = predictions_of(output), scores_of(output)
    code, out, _ = run_here(flags_of(benchmark_dir, output, benchmarks="tiny-seen,tiny-unseen"))
    assert code == 0 and f"kept {COUNT} predictions" in out
    assert predictions_of(output) == before and scores_of(output) == scores


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_does_not_matter(reference, benchmark_dir, tmp_path, batch_size):
    assert run_here(flags_of(benchmark_dir, tmp_path, batch_size=batch_size))[0] == 0
    assert predictions_of(tmp_path) == predictions_of(reference[0])


def test_limit_is_evenly_spread_and_can_be_extended(reference, benchmark_dir, tmp_path):
    """An earlier run of the first records, as older versions made them, gives those that both want, and no others."""
    whole = predictions_of(reference[0]).splitlines(keepends=True)
    assert run_here(flags_of(benchmark_dir, tmp_path, limit=1))[0] == 0
    (tmp_path / "predictions/tiny-seen.jsonl").write_bytes(b"".join(whole[:4]))
    code, out, err = run_here(flags_of(benchmark_dir, tmp_path, limit=7))
    assert err == ""  # no bar where stderr is no terminal, so that an error is one line
    picked = [0, 3, 6, 9, 13, 16, 19]  # 23 / 7 = 3.29 times 0 to 6
    assert code == 0 and "tiny-seen: 7 of 23 records, evenly spread (--limit)" in out
    assert predictions_of(tmp_path) == b"".join(whole[index] for index in sorted({0, 1, 2, 3, *picked}))
    rows = (tmp_path / "results/tiny-seen.jsonl").read_text().splitlines()
    assert [json.loads(row)["index"] for row in rows] == picked
    scores = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["tiny-seen"]
    assert (scores["n"], scores["of_records"]) == (7, 23)
    assert "tiny-seen: 7 of 23 records, evenly spread (--limit)." in (tmp_path / "report.md").read_text()
    assert run_here(flags_of(benchmark_dir, tmp_path))[0] == 0
    assert predictions_of(tmp_path) == predictions_of(reference[0])


def test_plain_format_labels_its_lines(benchmark_dir, tmp_path):
    assert run_here(flags_of(benchmark_dir, tmp_path, prompt_format="plain", limit=3))[0] == 0
    assert [json.loads(line)["format"] for line in predictions_of(tmp_path).splitlines()] == ["plain"] * 3


def test_prompt_that_does_not_fit_is_wrong_and_reported(reference, benchmark_dir, tmp_path):
    model = copy_of_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    lengths = [
        len(encode_prompt(example.tools, example.messages, tokenizer))
        for example in load_tiny(benchmark_dir / "test_seen.jsonl")
    ]
    # A prompt of `room` tokens just fits; a slightly longer one would leave less than the 12 new tokens.
    candidates = [length for length in sorted(lengths) if any(length < other <= length + 12 for other in lengths)]
    room = candidates[len(candidates) // 2]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": room + 12}))
    code, out, _ = run_here(flags_of(benchmark_dir, tmp_path / "out", model=model))
    rows = [json.loads(line) for line in predictions_of(tmp_path / "out").splitlines()]
    undisturbed = [json.loads(line) for line in predictions_of(reference[0]).splitlines()]
    assert (
        code == 0
        and f"{sum(length > room for length in lengths)} predictions counted as wrong because the prompt does not fit"
        in out
    )
    for length, row, other in zip(lengths, rows, undisturbed, strict=True):
        assert row == ({"index": row["index"], "output": "", "stop": "prompt_too_long"} if length > room else other)


def test_response_ends_at_eos_at_a_stop_or_at_its_length():
    tokenizer = load_tokenizer(tiny_files()[0])
    ids, eos = tokenizer.encode("search(city"), tokenizer.eos_id

    def read(response_ids, stop_texts=(), prompt_ids=()):
        return read_response(
            response_ids, tokenizer, stop_ids={eos}, stop_texts=stop_texts, prompt_ids=list(prompt_ids)
        )

    assert read([*ids, eos]) == ("search(city", "end")
    assert read(ids) == ("search(city", "max_new_tokens")
    assert read([*ids, eos, *ids, eos]) == ("search(city", "end")  # control tokens may stand before EOS
    assert read(ids, ("ci", "rch(")) == ("sea", "end")  # the first in the text, not in the list
    assert read([*ids, eos], ("nowhere",)) == ("search(city", "end")
    tokenizer = load_tokenizer(ROOT / "assets/tiny_model")  # the one of the small run joins blanks
    prompt, body = tokenizer.encode("def f():\n"), tokenizer.encode_continuation("    return 1")
    assert read(body, prompt_ids=prompt) == ("    return 1", "max_new_tokens")


def test_generation_is_told_the_control_tokens_that_end_it(benchmark_dir, monkeypatch):
    """`<s>` stands for a format's control token; a stop text that is none is looked for in the text afterwards."""
    tokenizer, calls = load_tokenizer(tiny_files()[0]), []
    ids, bos = tokenizer.encode("search(city"), tokenizer.control_id("<s>")

    def scripted(model, prompts, *, eos_id, max_new_tokens):
        calls.append((eos_id, max_new_tokens))
        return ((position, [*ids, bos]) for position in range(len(prompts)))

    monkeypatch.setattr(generate_predictions, "generate_as_ended", scripted)
    queries = BENCHMARKS["tiny-seen"].load(benchmark_dir / "test_seen.jsonl")[:3]
    rows = list(
        generated_rows(
            LocalModel(load_pretrained(tiny_files()[0]), tokenizer, rank=0, world_size=1),
            queries,
            prompt_format="tl",
            stop_texts=("<s>", "(city"),
            max_new_tokens=12,
            batch_size=4,
        )
    )
    assert calls == [({bos, tokenizer.eos_id}, 12)]
    assert [(row["output"], row["stop"]) for row in rows] == [("search", "end")] * 3


def test_length_sorted_batches():
    prompts = {4: [1] * 3, 0: [1], 2: [1] * 3, 9: [1] * 7}
    assert length_sorted_batches(prompts, 3) == [[9, 2, 4], [0]]
    assert length_sorted_batches({}, 3) == []


# ---------------------------------------------------------------------------------------------------------------------
# Kills and ranks


def test_continues_from_every_cut(reference, benchmark_dir, tmp_path):
    """Every state a kill can leave: whole lines of any order, a torn line, journals of several ranks, lines twice."""
    lines = predictions_of(reference[0]).splitlines(keepends=True)
    settings = (reference[0] / "predictions/tiny-seen.settings.json").read_bytes()
    states = [
        {"tiny-seen.jsonl": b""},
        {"tiny-seen.jsonl": b"".join(lines[20:3:-2])},
        {"tiny-seen.jsonl": b"".join(lines[:5]) + lines[5][:-9]},
        {"tiny-seen.jsonl": b"".join(lines[:5]) + lines[5][:-1]},  # whole but for the line feed
        {
            "tiny-seen.jsonl": lines[3] + lines[0],
            "tiny-seen.rank0001.jsonl": lines[7] + lines[8][:12],
            "tiny-seen.rank0002.jsonl": lines[3],
        },
        {"tiny-seen.rank0001.jsonl": lines[22]},
        {
            "tiny-seen.jsonl": b"".join(lines),
            "tiny-seen.rank0001.jsonl": b"".join(lines[:4]),
            "tiny-seen.jsonl.unfinished": b"{",
        },
    ]
    for number, state in enumerate(states):
        folder = tmp_path / str(number) / "predictions"
        folder.mkdir(parents=True)
        for name, content in {**state, "tiny-seen.settings.json": settings}.items():
            (folder / name).write_bytes(content)
        code, out, err = run_here(flags_of(benchmark_dir, folder.parent))
        assert code == 0, err
        assert predictions_of(folder.parent) == predictions_of(reference[0]), number
        assert ("dropped 1 partial" in out) == (number in (2, 4))
        assert not list(folder.glob("*.rank*"))


@pytest.mark.slow
def test_sigkill_then_two_ranks_then_one(reference, benchmark_dir, tmp_path):
    """Killed alone, continued and killed under two ranks, finished alone: the undisturbed file, byte by byte.

    The two ranks are stopped at first: while they live, a new run is refused.
    """
    arguments = flags_of(benchmark_dir, tmp_path, batch_size=1)

    def lines_there():
        return lines_in(tmp_path / "predictions", "tiny-seen*.jsonl")

    for ranks, enough in ((1, 3), (2, 8)):
        running = start("run_eval", arguments, ranks)
        deadline = time.monotonic() + 120
        while lines_there() < enough and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if ranks > 1:
            running.send_signal(signal.SIGSTOP)  # so that they cannot end before the run in the next lines meets them
            code, _, err = run_here(arguments)
            assert code == 2 and err.count("\n") == 1 and "found another process at work" in err
        running.kill()
        running.communicate()
        assert enough <= lines_there(), ranks
    assert run_here(arguments)[0] == 0
    assert predictions_of(tmp_path) == predictions_of(reference[0])


@pytest.mark.slow
def test_two_ranks_equal_one(reference, benchmark_dir, tmp_path):
    running = start("run_eval", flags_of(benchmark_dir, tmp_path, benchmarks="tiny-seen,tiny-unseen"), ranks=2)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert out.count("# Evaluation") == 1
    assert predictions_of(tmp_path) == predictions_of(reference[0])
    assert predictions_of(tmp_path, "tiny-unseen") == predictions_of(reference[0], "tiny-unseen")
    assert scores_of(tmp_path) == scores_of(reference[0])


def test_folder_in_use_is_refused(reference, benchmark_dir, tmp_path):
    arguments = flags_of(benchmark_dir, tmp_path)
    (tmp_path / "predictions").mkdir()
    with open(tmp_path / "predictions/lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # flock counts two opens of one file as two holders, also in one process
        code, _, err = run_here(arguments)
        assert code == 2 and err.count("\n") == 1 and f"{tmp_path}/predictions: found another process" in err
        assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["lock"]
    assert run_here(arguments)[0] == 0
    assert predictions_of(tmp_path) == predictions_of(reference[0])


# ---------------------------------------------------------------------------------------------------------------------
# Score only


def gold_predictions(benchmark_dir, path):
    """A prediction file that answers every record of test_seen.jsonl with its gold call."""
    with open(path, "w") as file:
        for index, line in enumerate((benchmark_dir / "test_seen.jsonl").read_text().splitlines()):
            call = json.loads(line)["gold"][0]["calls"][0]
            file.write(json.dumps({"index": index, "output": render_tool_call(ToolCall(**call))}) + "\n")
    return path


def test_predictions_are_scored_without_a_model(benchmark_dir, tmp_path):
    predictions = gold_predictions(benchmark_dir, tmp_path / "gold.jsonl")
    code, _, err = run_here(flags_of(benchmark_dir, tmp_path / "out", predictions=predictions, model="none"))
    assert code == 0, err
    scores = json.loads((tmp_path / "out/summary.json").read_text())["benchmarks"]["tiny-seen"]
    assert (scores["TS"], scores["PI"], scores["CF"]) == (COUNT, COUNT, COUNT) and scores["errors"] == {}
    assert not (tmp_path / "out/predictions").exists()


def test_compare_prints_the_verdicts(reference, benchmark_dir, tmp_path, capsys):
    predictions = gold_predictions(benchmark_dir, tmp_path / "gold.jsonl")
    assert run_here(flags_of(benchmark_dir, tmp_path / "gold", predictions=predictions))[0] == 0
    assert compare_main([str(reference[0]), str(tmp_path / "gold"), "--names", "base,SFT"]) == 0
    out = capsys.readouterr().out
    assert "base, fp32 % [95 %]" in out and "SFT vs base, fp32" in out and "tiny-unseen" not in out
    assert len(out.splitlines()) == 5 and out.count("higher, intervals disjoint") == 3
    assert "| tiny-seen | 23 | CF     |" in out and "100.0 [85.7, 100.0]" in out  # 1 / (1 + 1.96^2 / 23) = 0.857
    assert compare_main([str(reference[0]), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'none' / 'summary.json'}: found No such file")
    assert run_here(flags_of(benchmark_dir, tmp_path / "gold", predictions=predictions, limit=5))[0] == 0
    assert compare_main([str(reference[0]), str(tmp_path / "gold")]) == 2  # other records: no comparison
    assert "expected the same ones" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"nonsense": 1}, "--nonsense: found an unknown flag"),
        (
            {"benchmarks": "tiny-seen,rotbench"},
            "--benchmarks: found 'rotbench', expected some of tiny-seen, tiny-unseen",
        ),
        ({"benchmarks": "tiny-seen,tiny-seen"}, "expected each benchmark once"),
        ({"benchmarks": ""}, "--benchmarks: found ''"),
        ({"prompt_format": "xml"}, "expected one of auto, tl, plain"),
        ({"limit": -1}, "--limit"),
        ({"batch_size": 0}, "--batch_size"),
        ({"max_new_tokens": 4000}, "--max_new_tokens: found 4000, expected less than the model's 2048 positions"),
        ({"model": "no/such/folder"}, "no/such/folder: found no such folder"),
        ({"model": "tests"}, "tests"),
        ({"benchmark_dir": "no/such"}, "no/such/test_seen.jsonl: found No such file"),
        ({"predictions": "none.jsonl"}, "none.jsonl: found No such file"),
        ({"predictions": "p", "benchmarks": "tiny-seen,tiny-unseen"}, "expected one, that of --predictions"),
        ({"predictions": "p", "prompt_format": "plain"}, "--prompt_format: found it with --predictions"),
        ({"config": "none.json"}, "none.json"),
    ],
)
def test_bad_input_is_one_line_and_code_2(benchmark_dir, tmp_path, change, expected):
    code, _, err = run_here(flags_of(benchmark_dir, tmp_path / "out", **change))
    assert code == 2 and err.count("\n") == 1 and expected in err, err


@pytest.mark.parametrize("predictions", ["", "p.jsonl"])
def test_the_folder_of_a_training_run_stays_as_it_is(benchmark_dir, tmp_path, predictions):
    for name in ("run_identity.json", "config.json"):
        (tmp_path / name).write_text("{}")
    code, _, err = run_here(flags_of(benchmark_dir, tmp_path, predictions=predictions, benchmarks="tiny-seen"))
    assert (code, err) == (2, f"--output: found {tmp_path}, the folder of a training run, expected another folder\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run_identity.json"]
    assert (tmp_path / "config.json").read_text() == "{}"


def test_predictions_of_another_run_are_refused_and_kept(reference, benchmark_dir, tmp_path):
    other = copy_of_model(tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    before = predictions_of(reference[0])
    for change in ({"model": other}, {"max_new_tokens": 13}, {"prompt_format": "plain"}, {"dtype": "bfloat16"}):
        code, _, err = run_here(flags_of(benchmark_dir, reference[0], **change))
        assert code == 2 and err.count("\n") == 1 and "belong to another run" in err, change
    (tmp_path / "answers").mkdir()
    answers = (benchmark_dir / "test_seen.jsonl").read_text()
    (tmp_path / "answers/test_seen.jsonl").write_text(answers.replace("please", "kindly"))
    code, _, err = run_here(flags_of(tmp_path / "answers", reference[0]))
    assert code == 2 and "found answers_sha256" in err and "belong to another run" in err
    code, _, err = run_here(flags_of(benchmark_dir, reference[0], resume="never"))
    assert code == 2 and "expected none for --resume never" in err
    assert predictions_of(reference[0]) == before


def test_journal_of_one_rank_without_settings_is_refused(reference, benchmark_dir, tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/tiny-seen.rank0001.jsonl").write_bytes(predictions_of(reference[0]))
    code, _, err = run_here(flags_of(benchmark_dir, tmp_path))
    assert code == 2 and "found no settings with the earlier predictions" in err


def test_copied_model_folder_counts_as_the_same_model(reference, benchmark_dir, tmp_path):
    code, out, _ = run_here(flags_of(benchmark_dir, reference[0], model=copy_of_model(tmp_path / "model")))
    assert code == 0 and f"kept {COUNT} predictions" in out


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (
            lambda lines: [lines[0], b'{"index": 1, "out\n', *lines[2:]],
            "tiny-seen.jsonl:2: found '\"out' at column 14, expected JSON",
        ),
        (
            lambda lines: [*lines, lines[0].replace(b'"output": "', b'"output": "!')],
            "a second, different output for index 0",
        ),
        (lambda lines: [*lines, b'{"index": 99, "output": "", "stop": "end"}\n'], "found index 99, expected 0 to 22"),
    ],
)
def test_damaged_journals_are_refused(reference, benchmark_dir, tmp_path, spoil, expected):
    folder = tmp_path / "predictions"
    folder.mkdir()
    settings = (reference[0] / "predictions/tiny-seen.settings.json").read_bytes()
    (folder / "tiny-seen.settings.json").write_bytes(settings)
    (folder / "tiny-seen.jsonl").write_bytes(b"".join(spoil(predictions_of(reference[0]).splitlines(keepends=True))))
    code, _, err = run_here(flags_of(benchmark_dir, tmp_path))
    assert code == 2 and err.count("\n") == 1 and expected in err, err


def test_config_file_and_help(benchmark_dir, tmp_path, capsys):
    (tmp_path / "eval.json").write_text(json.dumps({"limit": 2, "max_new_tokens": 5}))
    code, _, err = run_here(
        [*flags_of(benchmark_dir, tmp_path / "out", max_new_tokens=4), "--config", str(tmp_path / "eval.json")]
    )
    assert code == 0, err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["limit"], config["max_new_tokens"]) == (2, 4)  # flags win over the file
    code, out, _ = run_here(["--help"])
    assert code == 0 and all(f"--{name} " in out for name in config)


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "runs/eval/sft"),
        ({"model": "runs/ppo/final"}, "runs/eval/ppo"),
        ({"model": "assets/tiny_model"}, "runs/eval/tiny_model"),
        ({"model": "runs/sft/final/"}, "runs/eval/sft"),
        ({"model": "/"}, "runs/eval/model"),
        ({"model": "models/a b\n$(x)"}, "runs/eval/a_b___x_"),
        ({"model": "org/name:7b", "endpoint": "http://127.0.0.1:1/v1"}, "runs/eval/name_7b"),
        ({"predictions": "some/clean.jsonl", "benchmarks": "tiny-seen"}, "runs/eval/clean"),
    ],
)
def test_every_model_has_its_own_default_folder(settings, folder):
    assert default_output(EvalConfig(**settings)) == folder
