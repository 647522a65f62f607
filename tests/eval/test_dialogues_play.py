"""eval/dialogues/play.py: the loop of a dialogue, batches, resumption at every point, the endpoint, all of ToolEyes."""

import itertools
import json
import os
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.error_filter import classify_feedback
from data.formats.table import COMPLETION_FORMATS, FORMATS, PROMPT_FORMATS, prompt_text, render_output
from data.json_records import DataError
from data.tool_calls import ToolCall
from data.trajectories import Message
from eval.dialogues.journal import DialogueJournal, read_dialogues, read_journals
from eval.dialogues.metrics import score_dialogues
from eval.dialogues.play import (
    MAX_TURNS,
    USER_REPLY,
    DialogueSettings,
    complete_dialogues,
    format_reminder,
    run_dialogues_with_endpoint,
    run_dialogues_with_model,
    turn_generator,
)
from eval.dialogues.tools import MAX_FEEDBACK_CHARACTERS, ExecutorSettings, ToolExecutor, ToolResult
from eval.evaluate_tooleyes import load_tooleyes
from eval.predict import endpoint as endpoint_module
from eval.predict.endpoint import EndpointError
from eval.predict.generate import LocalModel
from eval.predict.journals import journal_file, journal_files
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from tests.support.dialogue_doubles import (
    FINISH,
    TOOLS,
    WEATHER,
    CharacterTokenizer,
    ScriptedDecoder,
    answer_right,
    call,
    follow,
    play,
    task,
)
from tests.support.endpoint_server import Server
from tests.support.tiny_run import tiny_model

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

ROOT = Path(__file__).resolve().parents[2]
TOOLEYES = ROOT / "../shared/data/benchmarks/tooleyes/Test_Data/scenario_data_zero_processed.json"
NEWS = call("get_news")

# ---------------------------------------------------------------------------------------------------------------------
# One dialogue


def one(tmp_path, *outputs, **settings):
    """The only dialogue of a run, and the decoder."""
    dialogues, _, decoder = play(tmp_path / "p.jsonl", [task()], follow(*outputs), **settings)
    assert len(dialogues) == 1 and not journal_files(tmp_path / "p.jsonl")
    return dialogues[0], decoder


def test_two_turns(tmp_path):
    dialogue, decoder = one(tmp_path, " " + WEATHER, FINISH)
    assert dialogue.end == "finish" and [turn["output"] for turn in dialogue.turns] == [" " + WEATHER, FINISH]
    assert dialogue.turns[0]["calls"] == [
        {
            "name": "get_weather",
            "arguments": {"city": "Oslo"},
            "feedback": '{"result": "get_weather 0"}',
            "executor": "simulated",
        }
    ]
    assert dialogue.turns[1]["calls"] == [
        {"name": "finish", "arguments": {"answer": "It rains."}, "feedback": None, "executor": ""}
    ]
    first, second = (prompt for _, _, prompt in decoder.prompts)
    assert first == prompt_text(TOOLS, [Message("user", "Weather in Oslo?")], "tl")
    assert second == f'{first} {WEATHER}\nOutput: {{"result": "get_weather 0"}}\nAssistant:'
    row = json.loads((tmp_path / "p.jsonl").read_text())
    assert row["index"] == 0 and row["format"] == "tl" and row["end"] == "finish" and row["error"] == ""


@pytest.mark.parametrize(
    ("outputs", "end", "turns", "is_valid"),
    [
        ([NEWS] * 8 + [FINISH], "finish", 9, 1),  # a ninth-turn finish counts
        ([NEWS] * 9 + [FINISH], "max_turns", 9, 0),  # a tenth turn does not exist
        ([FINISH], "finish", 1, 1),
        (["no call"] * 8 + [FINISH], "finish", 9, 1),
        (["no call"] * 9, "max_turns", 9, 0),
    ],
)
def test_nine_turns_are_the_limit(tmp_path, outputs, end, turns, is_valid):
    dialogue, decoder = one(tmp_path, *outputs)
    assert (dialogue.end, len(dialogue.turns), decoder.n_asked) == (end, turns, turns)
    assert score_dialogues([dialogue], [task()])[1]["VA"] == is_valid
    assert MAX_TURNS == 9


@pytest.mark.parametrize("finish", ["finish()", 'finish(answer="")', "Finish(answer=null)", 'FINISH(final_answer="x")'])
def test_finish_ends_whatever_its_argument(tmp_path, finish):
    assert one(tmp_path, finish)[0].end == "finish"


def test_user_is_asked(tmp_path):
    dialogue, decoder = one(tmp_path, call("ask_to_user", question="Where?"), FINISH)
    assert dialogue.turns[0]["calls"][0]["feedback"] == USER_REPLY
    assert dialogue.turns[0]["calls"][0]["executor"] == "user"
    assert decoder.prompts[1][2].endswith(f"\nUser: {USER_REPLY}\nAssistant:")


def test_output_that_is_no_call_gets_the_reminder(tmp_path):
    dialogue, decoder = one(tmp_path, "It rains.", FINISH)
    assert dialogue.turns[0]["calls"] == [] and "expected '('" in dialogue.turns[0]["fault"]
    assert decoder.prompts[1][2].endswith(f"\nAssistant: It rains.\nUser: {format_reminder('tl')}\nAssistant:")
    dialogue, _ = one(tmp_path / "cut", "get_weather(city=" + '"x' * 90, FINISH, max_new_tokens=60)
    assert dialogue.turns[0]["fault"].endswith("(output cut at max_new_tokens)")
    assert len(dialogue.turns[0]["output"]) == 60


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_reminder_reads_as_unparsable(prompt_format):
    assert classify_feedback(format_reminder(prompt_format), ToolCall("get_news", {}), TOOLS) == "unparsable"


@pytest.mark.parametrize("prompt_format", [name for name in COMPLETION_FORMATS if name not in ("tl", "plain")])
def test_own_words_stand_in_later_prompts(tmp_path, prompt_format):
    """The thought too, letter by letter; the prompt of a later turn begins with the one before it."""
    words = {
        "toolllama": "Thought: look.\n",
        "qwen2": "Thought: look.\n",
        "react": " Thought: look.\n",
        "nexusraven": "\n",
        "qwen25": "I look.\n",
    }.get(prompt_format, "")
    output = words + render_output([ToolCall("get_weather", {"city": "Oslo"})], prompt_format).removeprefix("Thought: ")
    end = call("finish", prompt_format, answer="x")
    _, decoder = one(tmp_path, output, "no call", end, prompt_format=prompt_format)
    prompts = [prompt for _, _, prompt in decoder.prompts]
    for before, after in itertools.pairwise(prompts):
        assert after.startswith(before.rstrip("\n") if prompt_format == "toolllama" else before)
    assert output.lstrip() in prompts[1] and "get_weather 0" in prompts[1]
    assert "no call" in prompts[2] and prompts[2].count(output.lstrip()) == 1
    assert format_reminder(prompt_format) in prompts[2]


def test_several_calls_of_one_output(tmp_path):
    calls = [
        ToolCall("get_weather", {"city": "Oslo"}),
        ToolCall("ask_to_user", {"question": "And?"}),
        ToolCall("get_weather", {"city": "Oslo"}),
        ToolCall("finish", {"answer": "x"}),
        ToolCall("get_news", {}),
    ]
    asked = []

    def execute(request):
        asked.append((request.call.name, request.attempt, request.dialogue, request.tool_set))
        return answer_right(request)

    dialogue, _ = one(tmp_path, render_output(calls, "qwen25"), prompt_format="qwen25", execute=execute)
    assert asked == [("get_weather", 0, 0, "toolbox"), ("get_weather", 1, 0, "toolbox")]
    assert [entry["name"] for entry in dialogue.turns[0]["calls"]] == [
        "get_weather",
        "ask_to_user",
        "get_weather",
        "finish",
    ]  # what follows finish is never run
    assert dialogue.end == "finish" and len(dialogue.turns) == 1
    _, decoder = one(
        tmp_path / "b", render_output(calls[:3], "qwen25"), render_output(calls[3:4], "qwen25"), prompt_format="qwen25"
    )
    responses = decoder.prompts[1][2].partition("</tool_call><|im_end|>")[2]
    assert responses.index("get_weather 0") < responses.index(USER_REPLY) < responses.index("get_weather 1")


def test_attempts_of_equal_calls_are_counted(tmp_path):
    dialogue, _ = one(
        tmp_path,
        call("get_weather", city="Oslo", unit="C"),
        NEWS,
        call("get_weather", unit="C", city="Oslo"),
        WEATHER,
        FINISH,
    )
    assert [turn["calls"][0]["feedback"] for turn in dialogue.turns[:4]] == [
        f'{{"result": "{name}"}}' for name in ("get_weather 0", "get_news 0", "get_weather 1", "get_weather 0")
    ]


def test_long_feedback_is_cut(tmp_path):
    dialogue, _ = one(tmp_path, NEWS, FINISH, execute=lambda request: ToolResult("x" * 99_999, "local"))
    assert dialogue.turns[0]["calls"][0]["feedback"] == "x" * MAX_FEEDBACK_CHARACTERS


def test_prompts_that_no_longer_fit(tmp_path):
    length = len(prompt_text(TOOLS, task().messages, "tl"))
    dialogue, decoder = one(tmp_path, NEWS, positions=length + 5, max_new_tokens=6)
    assert (dialogue.end, dialogue.turns, decoder.prompts) == ("prompt_too_long", [], [])
    path = tmp_path / "later" / "p.jsonl"
    dialogues, notices, _ = play(path, [task()], follow(NEWS, FINISH), positions=length + 20, max_new_tokens=20)
    assert dialogues[0].end == "prompt_too_long" and len(dialogues[0].turns) == 1
    assert "1 dialogues counted as no valid answer because the prompt does not fit" in notices[0]
    with pytest.raises(DataError, match="found room for 20 tokens, expected more than the 20 of one turn"):
        play(path, [task(1)], follow(FINISH), positions=20, max_new_tokens=20)


# ---------------------------------------------------------------------------------------------------------------------
# Batches, kills, resumption


def wandering(dialogue, turn, prompt):
    """A policy whose outputs depend on the whole prompt: calls, faults, questions, several ends."""
    rng = random.Random(f"{dialogue} {turn} {prompt}")
    return rng.choice(
        [
            WEATHER,
            NEWS,
            call("get_weather", city="Rome", unit="C"),
            "nonsense \u2603",
            "get_weather()",
            call("ask_to_user", question="Where?"),
            call("no_tool"),
            FINISH,
        ]
    )


def test_batches_and_order_do_not_matter(tmp_path):
    tasks = [task(index, f"Query {index}?") for index in range(12)]
    files = set()
    for number, (batch_size, seed) in enumerate([(1, 0), (3, 1), (5, 2), (32, 3)]):
        path = tmp_path / str(number) / "p.jsonl"
        play(path, tasks, wandering, batch_size=batch_size, seed=seed)
        files.add(path.read_bytes())
    assert len(files) == 1 and len(files.pop().splitlines()) == 12


def journal_of(tmp_path, tasks):
    """The bytes of a journal that holds all turns, and of the finished file."""
    whole = tmp_path / "whole" / "p.jsonl"
    dialogues, _, _ = play(whole, tasks, wandering)
    lines = []
    for dialogue in dialogues:
        lines += [{"index": dialogue.index, "turn": number, **turn} for number, turn in enumerate(dialogue.turns, 1)]
        lines.append({"index": dialogue.index, "end": dialogue.end, "error": ""})
    order = random.Random(1)
    queues = [[line for line in lines if line["index"] == each.index] for each in dialogues]
    mixed = []
    while any(queues):  # as dialogues that go on side by side write it
        mixed.append(order.choice([queue for queue in queues if queue]).pop(0))
    return "".join(json.dumps(line) + "\n" for line in mixed).encode(), whole.read_bytes()


def test_resumed_from_any_byte_of_the_journal(tmp_path):
    """A kill leaves a prefix of the journal; whatever its length, the finished file is the same, byte for byte."""
    tasks = [task(index, f"Query {index}?") for index in range(5)]
    journal, whole = journal_of(tmp_path, tasks)
    rng = random.Random(2)
    for number, length in enumerate(
        [0, 1, len(journal) - 1, len(journal), *(rng.randrange(len(journal)) for _ in range(40))]
    ):
        path = tmp_path / str(number) / "p.jsonl"
        path.parent.mkdir()
        journal_file(path, 0).write_bytes(journal[:length])
        asked = []

        def execute(request, asked=asked):
            asked.append(request)
            return answer_right(request)

        _, notices, _ = play(path, tasks, wandering, execute=execute, seed=number)
        assert path.read_bytes() == whole and not journal_files(path)
        is_torn = journal[:length][-1:] not in (b"", b"\n") and length != len(journal) - 1
        assert any("dropped 1 partial line" in notice for notice in notices) == is_torn
        recorded = [json.loads(line) for line in journal[:length].split(b"\n")[:-1]]
        n_recorded = sum(entry["executor"] == "simulated" for line in recorded for entry in line.get("calls", []))
        last = journal[:length].rpartition(b"\n")[2]
        if length == len(journal) - 1 and b'"calls"' in last:
            continue
        n_all = sum(
            entry["executor"] == "simulated"
            for line in map(json.loads, journal.splitlines())
            for entry in line.get("calls", [])
        )
        assert len(asked) == n_all - n_recorded  # no tool is called twice for a recorded turn


def test_killed_over_and_over_with_other_ranks(tmp_path):
    tasks = [task(index, f"Query {index}?") for index in range(24)]
    _, whole = journal_of(tmp_path, tasks)
    path = tmp_path / "p.jsonl"
    for number, (rank, world_size) in enumerate([(0, 1), (1, 2), (0, 2), (0, 1), (1, 2)]):
        with pytest.raises(KeyboardInterrupt):
            play(
                path,
                tasks,
                wandering,
                stop_after=5 + 4 * number,
                rank=rank,
                world_size=world_size,
                seed=number,
                batch_size=number + 1,
            )
    assert not path.exists() and len(journal_files(path)) >= 1
    play(path, tasks, wandering)
    assert path.read_bytes() == whole


def test_ranks_split_the_dialogues_and_turns_have_generators_of_their_own(tmp_path):
    tasks = [task(index) for index in range(7)]
    played, seeds = [], []
    for rank in range(3):
        decoder = ScriptedDecoder(follow(NEWS, FINISH), CharacterTokenizer(), n_rows=2)
        with DialogueJournal(tmp_path / "p.jsonl", rank=rank, recorded={}) as journal:
            model = SimpleNamespace(config=SimpleNamespace(max_positions=99_999))
            run_dialogues_with_model(
                tasks,
                LocalModel(model, decoder.tokenizer, rank, world_size=3),
                DialogueSettings("tl", max_new_tokens=10, temperature=0.7, seed=5, batch_size=2),
                execute=answer_right,
                journal=journal,
                decoder=decoder,
            )
        played.append(sorted({dialogue for dialogue, _, _ in decoder.prompts}))
        seeds += [generator.initial_seed() for generator in decoder.generators]
        assert seeds[-1] == turn_generator(5, *decoder.prompts[-1][:2]).initial_seed()
    assert played == [[0, 3, 6], [1, 4], [2, 5]]
    assert len(seeds) == len(set(seeds)) == 14 and len(journal_files(tmp_path / "p.jsonl")) == 3
    assert [len(each.turns) for each in read_journals(tmp_path / "p.jsonl")[0].values()] == [2] * 7


def test_more_tasks_later(tmp_path):
    """A run with --limit is taken up by one without; finished dialogues are not asked again."""
    tasks = [task(index, f"Query {index}?") for index in range(6)]
    path = tmp_path / "p.jsonl"
    play(path, tasks[:4], wandering)
    dialogues, notices, decoder = play(path, tasks, wandering)
    assert [dialogue.index for dialogue in dialogues] == list(range(6))
    assert {dialogue for dialogue, _, _ in decoder.prompts} == {4, 5} and "kept 4 dialogues" in notices[0]
    assert path.read_bytes() == journal_of(tmp_path, tasks)[1]


def test_another_model_is_noticed_on_resumption(tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        play(path, [task()], follow(NEWS, WEATHER, FINISH), stop_after=2)
    with pytest.raises(DataError, match=r"found another output for turn 2 of index 0 than in its journal"):
        play(path, [task()], follow(NEWS, NEWS, FINISH))
    journal = journal_file(path, 0)
    text = journal.read_text()
    journal.write_text(text.replace('"name": "get_weather"', '"name": "get_wind"'))  # read by another parser
    with pytest.raises(DataError, match=r"found another output for turn 2"):
        play(path, [task()], follow(NEWS, WEATHER, FINISH))
    journal.write_text(text)
    assert play(path, [task()], follow(NEWS, WEATHER, FINISH))[0][0].end == "finish"


def test_local_tools_find_their_files_again(tmp_path):
    """A resumed dialogue repeats its local calls, for what they leave behind; the recorded feedback stands."""

    class Disk:
        def __init__(self):
            self.files, self.forgotten = {}, []

        def __call__(self, request):
            if request.call.name == "get_weather":
                self.files[request.dialogue] = request.call.arguments["city"]
                return ToolResult("written", "local")
            return ToolResult(self.files.get(request.dialogue, "nothing there"), "local")

        def forget(self, dialogue):
            self.forgotten.append(dialogue)

    path, outputs, disk = tmp_path / "p.jsonl", follow(WEATHER, NEWS, FINISH), Disk()
    with pytest.raises(KeyboardInterrupt):
        play(path, [task()], outputs, execute=Disk(), stop_after=1)
    dialogues, _, _ = play(path, [task()], outputs, execute=disk)
    assert [turn["calls"][0]["feedback"] for turn in dialogues[0].turns[:2]] == ["written", "Oslo"]
    assert disk.forgotten == [0]


# ---------------------------------------------------------------------------------------------------------------------
# A real decoder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_model_of_ours(tmp_path, temperature):
    """Random weights write nonsense; nine turns of it depend on nothing but the dialogue, and cost their own tokens."""
    model = tiny_model(max_positions=4096, tie_embeddings=False).eval()
    for weight in model.parameters():
        weight.data *= 4  # as initialised, attention hardly matters and every output is the same
    tasks = [task(index, f"{'Query ' * index}?") for index in range(3)]

    def complete(path, batch_size, stop_after=None):
        class Counted:
            n = 0

            def __call__(self, request):
                return answer_right(request)

        def run(missing, journal):
            written = journal.add_turn

            def add_turn(*arguments):
                written(*arguments)
                Counted.n += 1
                if Counted.n == stop_after:
                    raise KeyboardInterrupt

            journal.add_turn = add_turn
            run_dialogues_with_model(
                missing,
                LocalModel(model, CharacterTokenizer(), rank=0, world_size=1),
                DialogueSettings("tl", max_new_tokens=8, temperature=temperature, seed=3, batch_size=batch_size),
                execute=Counted(),
                journal=journal,
            )

        complete_dialogues(path, tasks, run, prompt_format="tl", rank=0)
        return path.read_bytes()

    whole = complete(tmp_path / "1" / "p.jsonl", 1)
    assert complete(tmp_path / "2" / "p.jsonl", 4) == whole
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path / "3" / "p.jsonl", 2, 11)
    assert complete(tmp_path / "3" / "p.jsonl", 3) == whole
    dialogues = read_dialogues(tmp_path / "1" / "p.jsonl")[0]
    assert [dialogue.end for dialogue in dialogues] == ["max_turns"] * 3
    outputs = {turn["output"] for dialogue in dialogues for turn in dialogue.turns}
    assert len(outputs) > 10


# ---------------------------------------------------------------------------------------------------------------------
# Endpoint


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.001)
    servers = []

    def start(script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def ask_server(path, tasks, endpoint, prompt_format, *, execute=answer_right, temperature=0.0):
    def run(missing, journal):
        settings = DialogueSettings(prompt_format, max_new_tokens=50, temperature=temperature)
        run_dialogues_with_endpoint(missing, endpoint, settings, execute=execute, journal=journal)

    complete_dialogues(path, tasks, run, prompt_format=prompt_format, rank=0)
    return read_dialogues(path)[0]


def message(**fields):
    return 200, {"choices": [{"message": {"role": "assistant", **fields}, "finish_reason": "stop"}]}, {}


def native(*calls, content=None, identity="x"):
    return message(
        content=content,
        tool_calls=[
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ],
    )


def test_native_calls_over_turns(serve, tmp_path):
    """Every call gets its own id and its own feedback, also where the server gives all calls the same id."""
    answers = [
        native(("get_weather", '{"city": "Oslo"}'), ("ask_to_user", '{"question": "And?"}'), content="I look."),
        message(content="It rains."),
        native(("get_news", "{broken"), content=""),
        native(("get_news", "")),
        native(("finish", '{"answer": "x"}')),
    ]
    server = serve(lambda number, path, body: answers[number])
    dialogue = ask_server(tmp_path / "p.jsonl", [task()], server.endpoint(), "openai", temperature=0.5)[0]
    assert dialogue.end == "finish" and [bool(turn["fault"]) for turn in dialogue.turns] == [0, 1, 1, 0, 0]
    path, body, _ = server.requests[-1]
    assert path == "/v1/chat/completions" and body["tools"] == TOOLS and body["temperature"] == 0.5
    assert body["messages"] == [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": "call_1_0",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                },
                {
                    "id": "call_1_1",
                    "type": "function",
                    "function": {"name": "ask_to_user", "arguments": '{"question": "And?"}'},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "call_1_0", "content": '{"result": "get_weather 0"}'},
        {"role": "tool", "tool_call_id": "call_1_1", "content": USER_REPLY},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": format_reminder("openai")},
        {"role": "assistant", "content": dialogue.turns[2]["output"]},
        {"role": "user", "content": format_reminder("openai")},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_8_0", "type": "function", "function": {"name": "get_news", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_8_0", "content": '{"result": "get_news 0"}'},
    ]


def test_published_prompt_by_chat(serve, tmp_path):
    outputs = [
        "Thought: look\nAction: get_weather\nAction Input: {'city': 'Oslo'}",
        "rain",
        'Action: finish\nAction Input: {"answer": "x',
    ]
    server = serve(lambda number, path, body: message(content=outputs[number]))
    dialogue = ask_server(tmp_path / "p.jsonl", [task()], server.endpoint(), "react")[0]
    assert dialogue.end == "finish" and dialogue.turns[2]["calls"][0]["arguments"] == {"answer": "x"}
    path, body, _ = server.requests[-1]
    assert path == "/v1/chat/completions" and "tools" not in body and "stop" not in body
    assert [each["role"] for each in body["messages"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [each["content"] for each in body["messages"][1:]] == [
        "Weather in Oslo?",
        outputs[0],
        'Function: {"result": "get_weather 0"}',
        outputs[1],
        format_reminder("react"),
    ]


@pytest.mark.parametrize("prompt_format", ["tl", "qwen2", "llama31", "qwen25"])
def test_completions_are_what_a_model_of_ours_gets(serve, tmp_path, prompt_format):
    """The same policy behind a server and behind a decoder: the same prompts, the same file but for the order."""

    def policy(dialogue, turn, prompt):
        name, arguments = [("get_weather", {"city": "Oslo"}), ("get_news", {}), ("finish", {"answer": "x"})][turn - 1]
        return call(name, prompt_format, **arguments)

    def script(number, path, body):
        turn = sum(body["prompt"].count(word) for word in ("get_weather 0", "get_news 0")) + 1
        stop = (FORMATS[prompt_format].stop_strings or ("",))[-1]
        return 200, {"choices": [{"text": policy(0, turn, "") + stop + "more" * bool(stop)}]}, {}

    tasks = [task(index, f"Query {index}?") for index in range(6)]
    _, _, decoder = play(tmp_path / "a" / "p.jsonl", tasks, policy, prompt_format=prompt_format)
    server = serve(script)
    ask_server(tmp_path / "b" / "p.jsonl", tasks, server.endpoint(), prompt_format)
    assert (tmp_path / "a" / "p.jsonl").read_bytes() == (tmp_path / "b" / "p.jsonl").read_bytes()
    prompts = {prompt.removeprefix("<|begin_of_text|>") for _, _, prompt in decoder.prompts}
    assert {body["prompt"] for _, body, _ in server.requests} == prompts
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}


def test_nothing_is_asked_again_after_a_failure(serve, tmp_path):
    """The server goes away in the middle, twice; the finished file is that of a run without fault."""
    tasks = [task(index, f"Query {index}?") for index in range(8)]
    failing, lock, answered = {"after": 5}, threading.Lock(), []

    def script(number, path, body):
        prompt = body["prompt"]
        dialogue, turn = int(prompt.partition("Query ")[2].partition("?")[0]), prompt.count("\nAssistant:")
        with lock:
            if len(answered) >= failing["after"]:
                return 503, b"", {}
            answered.append((dialogue, turn))
        return 200, {"choices": [{"text": wandering(dialogue, turn, prompt)}]}, {}

    path = tmp_path / "p.jsonl"
    for after in (12, 999):
        with pytest.raises(EndpointError, match="status 503"):
            ask_server(path, tasks, serve(script).endpoint(attempts=2), "tl")
        failing["after"] = after
    ask_server(path, tasks, serve(script).endpoint(concurrency=2), "tl")
    assert len(answered) == len(set(answered)) == sum(len(each.turns) for each in read_dialogues(path)[0])
    play(tmp_path / "b" / "p.jsonl", tasks, wandering)
    assert path.read_bytes() == (tmp_path / "b" / "p.jsonl").read_bytes()


def test_refusals_and_prompts_too_long_for_the_server(serve, tmp_path):
    def script(number, path, body):
        query = body["prompt"]
        if "Query 1?" in query:
            return 400, {"error": {"message": "bad name"}}, {}
        if "Query 2?" in query and "get_news 0" in query:
            return 400, {"error": {"message": "maximum context length is 4096"}}, {}
        return 200, {"choices": [{"text": FINISH if "get_news 0" in query else NEWS}]}, {}

    tasks = [task(index, f"Query {index}?") for index in range(4)]
    dialogues = ask_server(tmp_path / "p.jsonl", tasks, serve(script).endpoint(concurrency=1), "tl")
    assert [dialogue.end for dialogue in dialogues] == ["finish", "refused", "prompt_too_long", "finish"]
    assert "bad name" in dialogues[1].error and [len(each.turns) for each in dialogues] == [2, 0, 1, 2]
    summary = score_dialogues(dialogues, tasks)[1]
    assert summary["ends"] == {"finish": 2, "prompt_too_long": 1, "refused": 1} and summary["VA"] == 2


def test_nothing_but_refusals_stops_the_run(serve, tmp_path):
    server = serve(lambda *_: (400, {"error": {"message": "no such model"}}, {}))
    tasks = [task(index) for index in range(40)]
    with pytest.raises(EndpointError, match="no such model.* for each of the first"):
        ask_server(tmp_path / "p.jsonl", tasks, server.endpoint(concurrency=2), "tl")
    assert len(server.requests) < 14 and not journal_file(tmp_path / "p.jsonl", 0).read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"text": null}]}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": []}]}',
        b'{"choices": [{"message": {"content": 7, "tool_calls": 8}}]}',
        b'{"choices": [{"message": {"tool_calls": ' + b"[" * 900 + b"]" * 900 + b"}}]}",
        b'{"choices": [{"message": {"content": "\\ud800", "tool_calls": null}, "text": "\\ud800"}]}',
    ],
)
def test_hostile_answers(serve, tmp_path, content):
    for prompt_format in ("tl", "openai", "react"):
        server = serve(lambda *_: (200, content, {}))
        dialogue = ask_server(tmp_path / prompt_format / "p.jsonl", [task()], server.endpoint(), prompt_format)[0]
        assert dialogue.end == "max_turns" and all(turn["fault"] for turn in dialogue.turns)


# ---------------------------------------------------------------------------------------------------------------------
# All of ToolEyes


def tooleyes_policy(dialogue, turn, prompt):
    """Calls of offered tools with guessed arguments, faults among them; now and then the end."""
    rng = random.Random(f"{dialogue} {turn}")
    names = prompt.partition("Function:\ndef ")[2].split("Function:\ndef ")
    if turn > 2 and rng.random() < 0.3:
        return call("finish", answer="done")
    signature = rng.choice(names)
    name, _, rest = signature.partition("(")
    parameters = [piece.partition(":")[0] for piece in rest.partition("):")[0].split(", ") if piece]
    rng.random() < 0.1 and parameters.append("unknown")
    return call(name if rng.random() < 0.9 else name + "_x", **{key: "5" for key in parameters if rng.random() < 0.9})


@pytest.mark.skipif(not TOOLEYES.exists(), reason="the benchmark files are not there")
def test_all_of_tooleyes(tmp_path):
    """382 dialogues with the documents' executor; killed on the way, the finished file is the same."""
    tasks = load_tooleyes(TOOLEYES)
    with ToolExecutor(ExecutorSettings("simulated", seed=1, instability_rate=0.05, failure_rate=0.05)) as execute:
        dialogues, _, _ = play(tmp_path / "a" / "p.jsonl", tasks, tooleyes_policy, execute=execute, batch_size=64)
        path = tmp_path / "b" / "p.jsonl"
        with pytest.raises(KeyboardInterrupt):
            play(path, tasks, tooleyes_policy, execute=execute, batch_size=32, seed=1, stop_after=700)
        play(path, tasks, tooleyes_policy, execute=execute, batch_size=16, seed=2)
    assert len(dialogues) == 382 and path.read_bytes() == (tmp_path / "a" / "p.jsonl").read_bytes()
    rows, summary = score_dialogues(dialogues, tasks)
    assert summary["n"] == 382 and sum(part["n"] for part in summary["by_scenario"].values()) == 382
    assert {name: part["n"] for name, part in summary["by_scenario"].items()} == {
        "TG": 58,
        "DU": 49,
        "RS": 56,
        "PL": 70,
        "IR": 54,
        "AM": 45,
        "FT": 50,
    }
    assert set(summary["errors"]) >= {
        "tool_hallucination",
        "parameter_hallucination",
        "parameter_missing",
        "tool_call_failure",
        "tool_instability",
    }
    assert list(summary["executors"]) == ["simulated"] and 0 < summary["VA"] < 382
    assert summary["executors"]["simulated"] == summary["n_calls"] == sum(row["calls"] for row in rows)


@pytest.mark.very_slow
@pytest.mark.skipif(not TOOLEYES.exists(), reason="the benchmark files are not there")
@pytest.mark.parametrize("player", ["scripted", "bundled base"])
def test_all_of_tooleyes_killed_five_times(tmp_path, player):
    """Five processes, each killed by SIGKILL after its first forty new turns; the sixth ends with the same bytes."""
    tasks = load_tooleyes(TOOLEYES)

    def complete(path, batch_size, kill_after=None):
        def run(missing, journal):
            written, count = journal.add_turn, itertools.count(1)

            def add_turn(*arguments):
                written(*arguments)
                if next(count) == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            journal.add_turn = add_turn
            with ToolExecutor(
                ExecutorSettings("simulated", seed=1, instability_rate=0.05, failure_rate=0.05)
            ) as execute:
                if player == "scripted":
                    tokenizer, prompt_format = CharacterTokenizer(), "tl"
                    model = SimpleNamespace(config=SimpleNamespace(max_positions=1_000_000))
                    decoder = ScriptedDecoder(tooleyes_policy, tokenizer, n_rows=batch_size, seed=batch_size)
                else:
                    folder = ROOT / "assets/tiny_model"
                    tokenizer, prompt_format = load_tokenizer(folder), "plain"
                    model, decoder = load_pretrained(folder), None
                run_dialogues_with_model(
                    missing,
                    LocalModel(model, tokenizer, rank=0, world_size=1),
                    DialogueSettings(prompt_format, max_new_tokens=16, batch_size=batch_size),
                    execute=execute,
                    journal=journal,
                    decoder=decoder,
                )

        complete_dialogues(path, tasks, run, prompt_format="tl" if player == "scripted" else "plain", rank=0)

    path, whole = tmp_path / "a" / "p.jsonl", tmp_path / "b" / "p.jsonl"
    for number in range(5):
        child = os.fork()
        if child == 0:
            try:
                complete(path, 8 + 8 * number, kill_after=40)
            finally:
                os._exit(9)  # only if the kill did not come
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    complete(path, 16)
    complete(whole, 32)
    assert path.read_bytes() == whole.read_bytes() and len(read_dialogues(path)[0]) == 382
