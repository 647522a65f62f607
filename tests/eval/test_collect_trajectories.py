"""eval.collect_trajectories: the file by hand, resuming, sampling, forms of queries, flags; run_sft.py reads it."""

import contextlib
import io
import json
import time

import pytest

from data.json_records import DataError
from data.trajectories import Message, read_trajectories
from eval.collect_trajectories import authors_records, is_toolbox, main, read_queries
from eval.dialogues.journal import RecordedDialogue
from eval.dialogues.play import FORMAT_REMINDER
from eval.evaluate_tiny_multi import load_tiny_multi
from eval.predict import endpoint as endpoint_module
from eval.records import Record
from tests.eval.test_run_eval_dialogues import TOOLEYES, gold_script, needs_tooleyes
from tests.support.endpoint_server import Server
from tests.support.processes import start
from tests.support.tiny_run import ROOT, run_here
from toolbox.world import build_toolbox, special_tools

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

TINY_DATA = ROOT / "assets" / "tiny_data"


def run(output, **flags):
    """main in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words(output, **flags))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def words(output, **flags):
    values = {"queries": TINY_DATA / "test_multi.jsonl", "output": output, "max_new_tokens": 24, **flags}
    return [
        part
        for name, value in values.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Records by hand


def turn(*calls, output="", fault=""):
    return {
        "output": output,
        "fault": fault,
        "calls": [
            {"name": name, "arguments": arguments, "feedback": feedback, "executor": "local" if feedback else ""}
            for name, arguments, feedback in calls
        ],
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "finds",
            "parameters": {
                "type": "object",
                "properties": {"q": {"type": "string", "description": "what"}},
                "required": ["q"],
            },
        },
    }
]
TASKS = [
    Record(index, name, TOOLS, [Message("user", f"find {name}")])
    for index, name in enumerate(("a", "b", "a", "c", "d"))
]
DIALOGUES = [
    RecordedDialogue(
        0,
        [
            turn(("find", {}, "find() missing 1 required positional argument: 'q'")),
            turn(output="well", fault="found 'well'"),
            turn(("find", {"q": "1"}, "one \ud800"), ("find", {"q": "2"}, "two")),
            turn(("finish", {"answer": "one, two"}, None)),
        ],
        "finish",
        format="tl",
    ),
    RecordedDialogue(1, [turn(("find", {"q": "b"}, "b"))] * 9, "max_turns", format="tl"),
    RecordedDialogue(2, [turn(("finish", {"answer": "at once"}, None))], "finish", format="tl"),
    RecordedDialogue(3, [turn(output="x", fault="f")] * 9, "max_turns", format="tl"),
    RecordedDialogue(4, [], "prompt_too_long", format="tl"),
]
SYSTEM = {"role": "system", "content": json.dumps([TOOLS[0]["function"]])}


def said(*contents):
    """Messages of the authors' form from (role's first letter, content)."""
    roles = {"u": "user", "a": "assistant", "f": "function"}
    return [SYSTEM, *({"role": roles[role], "content": content} for role, content in contents)]


FIRST = (("u", "find a"), ("a", "find\n{}"), ("f", "find() missing 1 required positional argument: 'q'"))
LAST = (
    ("a", 'find\n{"q": "1"}'),
    ("f", "one \ufffd"),
    ("a", 'find\n{"q": "2"}'),
    ("f", "two"),
    ("a", 'finish\n{"answer": "one, two"}'),
)


def test_records_and_counts_by_hand():
    written = authors_records(TASKS, DIALOGUES, keeps_unfinished=False, keeps_unparsable=False)
    assert written.records == [
        {"id": "a", "conversations": said(*FIRST, *LAST)},
        {"id": "a (2)", "conversations": said(("u", "find a"), ("a", 'finish\n{"answer": "at once"}'))},
    ]
    assert written.counts == {
        "turns that are not a call": 10,
        "dialogues without finish (max_turns)": 2,
        "dialogues without finish (prompt_too_long)": 1,
    }


def test_unfinished_and_unparsable_are_kept_where_asked(tmp_path):
    written = authors_records(TASKS, DIALOGUES, keeps_unfinished=True, keeps_unparsable=True)
    assert [record["id"] for record in written.records] == ["a", "b", "a (2)", "c"]
    assert written.records[0]["conversations"] == said(*FIRST, ("a", "well"), ("u", FORMAT_REMINDER), *LAST)
    assert written.counts["dialogues without any call"] == 1
    written = authors_records(TASKS, DIALOGUES, keeps_unfinished=True, keeps_unparsable=False)
    assert [record["id"] for record in written.records] == ["a", "b", "a (2)"]
    assert written.counts["dialogues without any call"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def clumsy_script(tasks):
    """gold_script with a fault first in three of four dialogues: an unknown tool, no call at all, a wrong parameter."""
    gold = gold_script(tasks, "tl")

    def script(number, path, body):
        prompt = body["prompt"]
        task = next(task for task in tasks if f"User: {task.messages[0].content}\n" in prompt)
        if task.index % 4 == 3 and "\nOutput:" in prompt:
            return 200, {"choices": [{"text": "still thinking"}]}, {}  # never finishes
        if prompt.count("\nAssistant:") == 1 and task.index % 4:
            wrong = task.meta["calls"][0]["name"] + '(bogus="x")'
            return 200, {"choices": [{"text": ("", "no_such_tool()", "I cannot say.", wrong)[task.index % 4]}]}, {}
        return gold(number, path, body)

    return script


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Twelve tasks worked through by a clumsy endpoint: (file, stdout, the server)."""
    folder = tmp_path_factory.mktemp("collect")
    server = Server(clumsy_script(load_tiny_multi(TINY_DATA / "test_multi.jsonl")))
    code, out, err = run(folder / "raw.json", endpoint=server.url, model="m", limit=12)
    server.http.shutdown()
    assert code == 0, err
    return folder / "raw.json", out, server


def test_file_has_the_erroneous_turns_and_the_statistics(collected):
    path, out, _ = collected
    trajectories = read_trajectories(path)
    summary = json.loads(out.splitlines()[-1])
    assert summary["dialogues"] == 12 and summary["written"] == len(trajectories) == 9
    assert summary["dialogues without finish (max_turns)"] == 3 and summary["turns that are not a call"] == 3 + 3 * 8
    assert summary["by_call"]["tool_hallucination"]["count"] == 3  # those of index 1, 5, 9
    assert summary["by_call"]["unparsable"]["count"] == 0 and "| tool_hallucination      | 3     |" in out
    assert "9 of 12 dialogues written" in out and "Figure 1, 12247 trajectories" in out
    tasks = load_tiny_multi(TINY_DATA / "test_multi.jsonl")
    for trajectory, task in zip(trajectories, [task for task in tasks[:12] if task.index % 4 != 3], strict=True):
        assert trajectory.id == task.id and trajectory.tools == task.tools
        assert trajectory.messages[0].content == task.messages[0].content
        assert all(result in trajectory.messages[-1].call.arguments["answer"] for result in task.meta["results"])
    assert trajectories[1].messages[2] == Message("tool", "name 'no_such_tool' is not defined")


def test_run_sft_trains_on_it_unchanged(collected, tmp_path):
    code, out, err = run_here(tmp_path / "sft", data=collected[0], max_steps=1)
    assert code == 0, err
    assert "tool_hallucination 3" in out  # MAE masks what the teacher did wrong


def test_kept_turns_need_the_mask(collected, tmp_path):
    path = tmp_path / "raw.json"
    for suffix in ("", ".settings"):
        name = f"raw.json.dialogues{suffix}.json" + ("l" if not suffix else "")
        (tmp_path / name).write_bytes(collected[0].with_name(name).read_bytes())
    server = collected[2]
    code, out, err = run(path, endpoint=server.url, model="m", limit=12, unfinished="keep", unparsable="keep")
    assert code == 0 and "12 of 12 dialogues written" in out, err  # the server is gone: nothing was asked again
    with pytest.raises(DataError, match="expected the tool's name"):
        read_trajectories(path)
    trajectories = read_trajectories(path, unparsable_calls="mask")
    assert sum(message.fault is not None for each in trajectories for message in each.messages) == 3 + 3 * 8
    assert run_here(tmp_path / "sft", data=path, max_steps=1, unparsable_calls="mask")[0] == 0


def test_interrupted_endpoint_gives_the_same_bytes(collected, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.001)
    script = clumsy_script(load_tiny_multi(TINY_DATA / "test_multi.jsonl"))
    state = {"left": 0}

    def limited(number, path, body):
        state["left"] -= 1
        return script(number, path, body) if state["left"] >= 0 else (500, b"", {})

    server = Server(limited)
    flags = {"endpoint": server.url, "model": "m", "limit": 12, "endpoint_attempts": 1, "endpoint_concurrency": 3}
    for left in (2, 7, 11):
        state["left"] = left
        code, _, err = run(tmp_path / "raw.json", **flags)
        assert code == 2 and "found status 500" in err and not (tmp_path / "raw.json").exists()
    state["left"] = 10_000
    assert run(tmp_path / "raw.json", **flags)[0] == 0
    server.http.shutdown()
    assert (tmp_path / "raw.json").read_bytes() == collected[0].read_bytes()


@pytest.mark.slow
def test_killed_process_gives_the_same_bytes(collected, tmp_path):
    """SIGKILL three times between two requests, each time after some more of them."""
    script = clumsy_script(load_tiny_multi(TINY_DATA / "test_multi.jsonl"))
    server = Server(lambda number, path, body: (time.sleep(0.02), script(number, path, body))[1])
    line = words(tmp_path / "raw.json", endpoint=server.url, model="m", limit=12, endpoint_concurrency=2)
    for more in (3, 5, 8):
        wanted = len(server.requests) + more
        process = start("eval.collect_trajectories", line)
        deadline = time.monotonic() + 120
        while len(server.requests) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None
        process.kill()
        process.communicate()
        assert not (tmp_path / "raw.json").exists()
    assert run(tmp_path / "raw.json", endpoint=server.url, model="m", limit=12)[0] == 0
    server.http.shutdown()
    assert (tmp_path / "raw.json").read_bytes() == collected[0].read_bytes()


def test_model_as_teacher_draws_by_its_seed(tmp_path):
    flags = {
        "model": ROOT / "assets/tiny_model",
        "prompt_format": "plain",
        "limit": 6,
        "temperature": 1.7,
        "max_turns": 4,
        "unfinished": "keep",
    }
    for name, more in (("a", {}), ("b", {"batch_size": 1}), ("c", {"seed": 1})):
        code, _, err = run(tmp_path / name, **flags, **more)
        assert code == 0, err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    code, _, err = run(tmp_path / "a", **flags, seed=1)
    assert code == 2 and "found seed 0, expected 1: the predictions belong to another run" in err


# ---------------------------------------------------------------------------------------------------------------------
# Queries


def test_forms_of_queries(tmp_path):
    multi = read_queries(TINY_DATA / "test_multi.jsonl")
    assert len(multi) == 200 and {task.tool_set for task in multi} == {"toolbox"}
    train = read_queries(TINY_DATA / "train.json")
    records = read_trajectories(TINY_DATA / "train.json")
    assert [(task.id, task.tools) for task in train] == [(record.id, record.tools) for record in records]
    assert all([message.role for message in task.messages] == ["user"] and task.tool_set == "toolbox" for task in train)
    openai = tmp_path / "openai.jsonl"
    openai.write_text(
        json.dumps(
            {
                "id": "x",
                "tools": TOOLS,
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "find it"},
                    {"role": "assistant", "content": "no"},
                ],
            }
        )
        + "\n"
    )
    (task,) = read_queries(openai)
    assert [message.content for message in task.messages] == ["be brief", "find it"] and task.tool_set == ""
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"tools": TOOLS, "messages": [{"role": "user", "content": "find \ud800"}]}) + "\n")
    (task,) = read_queries(bare)
    assert (task.id, task.messages[0].content) == ("0", "find \ufffd")


@needs_tooleyes
def test_queries_of_tooleyes_and_rotbench():
    tasks = read_queries(TOOLEYES / "tooleyes/Test_Data/scenario_data_zero_processed.json")
    assert len(tasks) == 382 and tasks[0].tool_set and not tasks[0].meta.get("results")
    tasks = read_queries(TOOLEYES / "rotbench/Third_Turn/clean.json")
    assert len(tasks) == 70 and all([message.role for message in task.messages] == ["user"] for task in tasks)


def test_toolbox_is_known_by_its_documents():
    tools = [*build_toolbox(unseen=True)[:3], *special_tools()]
    other = json.loads(json.dumps(tools))
    other[0]["function"]["description"] = "something else"
    assert is_toolbox(tools) and not is_toolbox(other) and not is_toolbox(special_tools()) and not is_toolbox(TOOLS)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"queries": "none.jsonl"}, "none.jsonl: found No such file"),
        ({"model": "no/such"}, "no/such"),
        ({"max_turns": 10}, "--max_turns: found 10, expected 1 to 9"),
        ({"temperature": -1}, "--temperature: found -1.0, expected 0 to 100"),
        ({"instability_rate": 0.6, "call_failure_rate": 0.6}, "--instability_rate: found more than 1"),
        ({"tool_executor": "recorded"}, "--tool_executor: found 'recorded', expected"),
        ({"prompt_format": "openai"}, "--prompt_format: found openai without --endpoint"),
        ({"endpoint": "localhost"}, "--endpoint: found 'localhost', expected the base of an API"),
        ({"nonsense": 1}, "--nonsense"),
        (
            {"model": ROOT / "assets/tiny_model", "max_new_tokens": 1024},
            "--max_new_tokens: found 1024, expected less than",
        ),
        ({"model": ROOT / "assets/tiny_model", "prompt_format": "qwen25", "limit": 1}, "found no token <|im_start|>"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(tmp_path, flags, expected):
    code, _, err = run(tmp_path / "raw.json", **flags)
    assert code == 2 and err.count("\n") == 1 and expected in err, err


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "found no record"),
        ("[]", "found no record"),
        ("[3]", "found no record"),
        ("{", ":1: found the end at column 2, expected JSON"),
        ('{"tools": []}', ":1: found nothing as 'messages', expected list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', ":1: found nothing as 'tools', expected list"),
        (
            '{"tools": [], "messages": [{"role": "tool", "content": "x"}]}',
            ":1: found role 'tool', expected system or user",
        ),
        ('{"tools": [], "messages": [{"role": "system", "content": "x"}]}', ":1: found no message of the user"),
        ('{"tools": [3], "messages": [{"role": "user", "content": "x"}]}', ":1: tools[0]: found a number"),
    ],
)
def test_bad_query_files_are_one_line_and_code_2(tmp_path, text, expected):
    (tmp_path / "queries").write_text(text)
    code, _, err = run(tmp_path / "raw.json", queries=tmp_path / "queries", model=ROOT / "assets/tiny_model")
    assert code == 2 and err.count("\n") == 1 and expected in err, err


def test_nothing_finished_is_said(tmp_path):
    code, _, err = run(tmp_path / "raw.json", model=ROOT / "assets/tiny_model", limit=1, max_turns=1)
    assert code == 2 and "found no dialogue to write among 1" in err and not (tmp_path / "raw.json").exists()
