"""Who answers a tool call: one interface, two executors (docs/multi_turn.md).

    local      our own tools, each call in its own process in the sandbox (local_tools.py, eval/sandbox/run.py)
    simulated  the tools' documents: exact checks, then a made-up payload shaped by the document

The document check comes before any tool and is the same for both; it reports faults in the words of ToolEyes' own
executor. data.error_filter.classify_feedback reads every feedback as the category that it is meant to have:
`settle_feedback` ensures that. Nothing here uses a clock or global random numbers: a dialogue's feedback depends on its
own calls alone, not on the order of dialogues or the number of threads.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from data.error_filter import check_documents, classify_feedback
from data.tool_calls import MAX_NESTING, ToolCall
from data.tool_documents import tool_parameters
from eval.dialogues.local_tools import LOCAL_TOOLS, TOOLBOX, shell_command, shell_result
from eval.dialogues.simulated_tools import check_types, draw_outcome
from eval.sandbox.run import LAYERS, ToolServer, ToolServerEnded

EXECUTOR_KINDS = ("auto", "local", "simulated")
MAX_FEEDBACK_CHARACTERS = 4096  # ToolEyes' executor keeps 1,023 tokens of its tokenizer
MAX_ARGUMENT_BYTES = 1 << 20  # of a call as JSON; longer ones are refused, unseen by any tool
TODAY = "2024-12-20"  # the paper's month
CALL_SECONDS = 10.0
CALL_MEMORY_BYTES = 512 << 20
SERVERS = 2

REASON = "The function cannot be executed successfully with the given parameters for the reason: "  # Table 14
CALL_FAILURE = '{"error": "Response error."}'  # Table 14
FILES_LOST = '{"error": "connection error. The tool server was started again; the files of this dialogue are lost."}'


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """One call of a dialogue."""

    dialogue: int  # number of the dialogue; its files persist between its calls
    tool_set: str  # "toolbox", or the ToolEyes path ("Random/Random")
    tools: list[dict]  # OpenAI function dicts, the documents that the model was shown
    call: ToolCall
    attempt: int  # earlier identical calls of this dialogue


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model is told."""

    feedback: str  # at most MAX_FEEDBACK_CHARACTERS
    executor: str  # who answered: "local" or "simulated"


Executor = Callable[[ToolRequest], ToolResult]  # for several threads at once


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Who answers the calls, and how. Raises ValueError for an impossible setting."""

    kind: str  # one of EXECUTOR_KINDS
    seed: int = 0  # decides, with the two rates, which simulated calls fail
    instability_rate: float = 0.0  # share of simulated calls that find the service down
    failure_rate: float = 0.0  # share of simulated calls that the tool fails on
    execute_code: bool = False  # False: the tools that run the model's code are not local
    today: str = TODAY  # of the date tools
    seconds: float = CALL_SECONDS  # of wall time for one local call
    servers: int = SERVERS  # processes that share the local calls, dialogue by dialogue
    layers: tuple[str, ...] = LAYERS  # of the sandbox, tried on this machine

    def __post_init__(self) -> None:
        if self.kind not in EXECUTOR_KINDS:
            raise ValueError(f"executor is {self.kind!r}, expected one of {', '.join(EXECUTOR_KINDS)}")
        for name in ("instability_rate", "failure_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        if (total := self.instability_rate + self.failure_rate) > 1.0:
            raise ValueError(f"instability_rate + failure_rate is {total:g}, expected at most 1")


class ToolExecutor:
    """An Executor with an end: close it, or use it in a `with`.

    auto: local where there is a local tool, else simulated. local: as auto, but other tools answer as without network.
    State: the sandboxed processes of the local tools, which start at the first local call.
    """

    def __init__(self, settings: ExecutorSettings) -> None:
        self.kind, self._settings = settings.kind, settings
        self._local = LocalTools(settings)

    def __call__(self, request: ToolRequest) -> ToolResult:
        """Answer one call. Raises SandboxError if the sandbox is needed and does not start."""
        is_toolbox = request.tool_set == TOOLBOX
        is_local = self.kind != "simulated" and (is_toolbox or self._local.has(request))
        is_plain = is_plain_json([request.call.name, request.call.arguments])
        if is_local and is_toolbox and is_plain:
            found = self._local.run(request)  # the toolbox world checks the documents itself, in its own words
        elif fault := find_fault(request):
            found = fault
        elif not is_plain:
            found = "tool_call_failure", f"{REASON}arguments beyond {MAX_ARGUMENT_BYTES} bytes of JSON"
        elif is_local:
            found = self._local.run(request)
        elif self.kind == "local":
            found = "tool_instability", no_network(request.call.name)
        else:
            found = draw_outcome(
                request.tool_set,
                document_of(request),
                request.call.arguments,
                request.attempt,
                seed=self._settings.seed,
                instability_rate=self._settings.instability_rate,
                failure_rate=self._settings.failure_rate,
            )
        return ToolResult(
            settle_feedback(*found, request), "local" if is_local or self.kind == "local" else "simulated"
        )

    @property
    def notices(self) -> list[str]:
        """What went wrong with the sandbox and was repaired, one line each, for the user."""
        return list(self._local.notices)

    @property
    def limits_applied(self) -> dict[str, str]:
        """What confines local calls, as in a SandboxResult; empty before the first one."""
        return dict(self._local.limits_applied)

    def forget(self, dialogue: int) -> None:
        """The dialogue is over: remove its files."""
        self._local.forget(dialogue)

    def close(self) -> None:
        """End the sandboxed processes."""
        self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# Document check


def find_fault(request: ToolRequest) -> tuple[str, str] | None:
    """(category, feedback) of a call that the documents forbid, None if they allow it.

    In the words of ToolEyes' executor, which are Python's: an unknown parameter is reported before a missing one.
    """
    name, arguments = _shown(request.call.name), request.call.arguments
    if not isinstance(arguments, dict):
        return "unparsable", f"{name}() argument after ** must be a mapping, not {type(arguments).__name__}"
    category = check_documents(request.call, request.tools).category
    document = document_of(request)
    if category == "tool_hallucination" or document is None:
        if not request.tool_set:  # tools of no library: the words of the authors' data
            return "tool_hallucination", f"name '{name}' is not defined"
        module = ".".join(request.tool_set.split("/")[-2:] + ["tool"])
        return "tool_hallucination", f"cannot import name '{name}' from '{module}' ({request.tool_set}/tool.py)"
    properties, required = tool_parameters(document)
    if category == "parameter_hallucination":
        unknown = next(parameter for parameter in arguments if parameter not in properties)
        return category, f"{name}() got an unexpected keyword argument '{_shown(unknown)}'"
    if category == "parameter_missing":
        missing = [f"'{parameter}'" for parameter in required if parameter not in arguments]
        listed = (
            missing[0]
            if len(missing) == 1
            else " and ".join(missing)
            if len(missing) == 2
            else f"{', '.join(missing[:-1])}, and {missing[-1]}"
        )
        plural = "s" * (len(missing) > 1)
        return category, f"{name}() missing {len(missing)} required positional argument{plural}: {listed}"
    if fault := check_types(properties, arguments):
        return "tool_call_failure", f"Parameter type error: {fault}"
    return None


def document_of(request: ToolRequest) -> dict | None:
    """The `function` part of the called tool's document; if there are several, the first that allows the call."""
    documents = [tool for tool in request.tools if tool["function"].get("name") == request.call.name]
    allowing = (tool for tool in documents if check_documents(request.call, [tool]).category == "all_right")
    tool = next(allowing, documents[0] if documents else None)
    return tool["function"] if tool is not None else None


def no_network(name: str) -> str:
    """What a web tool answers on a machine without network."""
    return (
        f"HTTPSConnectionPool(host='api.example.com', port=443): Max retries exceeded with url: /{_shown(name)} "
        "(Caused by NewConnectionError('Failed to establish a new connection'))"
    )


def is_plain_json(call: list) -> bool:
    """Whether a call is JSON that every later step can take: bounded length, bounded depth, finite numbers."""
    pending, depth = [call], 0
    while pending and depth <= MAX_NESTING:  # no recursion, which a model's brackets could exhaust
        nested = [value for value in pending if isinstance(value, (dict, list))]
        pending = [item for value in nested for item in (value.values() if isinstance(value, dict) else value)]
        depth += 1
    if pending:
        return False
    try:
        return len(json.dumps(call, allow_nan=False)) <= MAX_ARGUMENT_BYTES
    except (ValueError, TypeError):
        return False


def _shown(text: object) -> str:
    text = str(text)
    return text if len(text) <= 100 else text[:97] + "..."


def settle_feedback(meant: str, text: str, request: ToolRequest) -> str:
    """The feedback, cut to its length, that the error filter reads as the category `meant`.

    A tool's own words stay as they are where the filter reads them so. Otherwise an error gets the sentence of Table 14
    before it or, where even its words mislead, becomes that table's plainest message. A result that looks like an
    error, such as a file that holds a log, is put under the key "result".
    """
    text = text.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates, which no tokenizer takes
    if meant == "all_right":
        inner = text
        if len(text) > MAX_FEEDBACK_CHARACTERS:
            inner = text[: MAX_FEEDBACK_CHARACTERS // 2]  # quoting it again may at least double its length
        candidates = [
            text[:MAX_FEEDBACK_CHARACTERS],
            json.dumps({"result": inner}, ensure_ascii=False),
            json.dumps({"result": inner[: MAX_FEEDBACK_CHARACTERS // 8]}),
        ]
    else:
        candidates = [text[:MAX_FEEDBACK_CHARACTERS], (REASON + text)[:MAX_FEEDBACK_CHARACTERS], CALL_FAILURE]
    for candidate in candidates:
        if (
            len(candidate) <= MAX_FEEDBACK_CHARACTERS
            and classify_feedback(candidate, request.call, request.tools) == meant
        ):
            return candidate
    return candidates[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Local


class LocalTools:
    """The local tools in a few sandboxed servers; a dialogue's number picks its server, so that it finds its files
    again.

    State: the servers, one lock each; which dialogues have files where.
    """

    def __init__(self, settings: ExecutorSettings) -> None:
        self._settings = settings
        self._locks = [threading.Lock() for _ in range(settings.servers)]
        self._servers: list[ToolServer | None] = [None] * settings.servers
        self._with_files: list[set[int]] = [set() for _ in range(settings.servers)]
        self._abilities: dict[str, bool] = {}  # of the sandbox on this machine, once a server has started
        self.notices: list[str] = []
        self.limits_applied: dict[str, str] = {}

    def has(self, request: ToolRequest) -> bool:
        """Whether a local tool answers: there is one, and it may run here."""
        needs = LOCAL_TOOLS.get((request.tool_set, request.call.name))
        if needs in (None, "nothing"):
            return needs is not None
        if needs in ("python", "programs") and not self._settings.execute_code:
            return False
        if not self._abilities:
            with self._locks[self._place(request.dialogue)]:
                self._abilities = self._server(self._place(request.dialogue)).abilities
            for ability in (ability for ability, is_there in self._abilities.items() if not is_there):
                self.notices.append(
                    f"tools: the sandbox of this machine can give no {ability}; what needs that is "
                    "simulated (docs/multi_turn.md)"
                )
        return self._abilities["programs" if needs == "programs" else "folder"]

    def run(self, request: ToolRequest) -> tuple[str, str]:
        """(category, text) of a call that the documents allow (toolbox: of any). Raises SandboxError."""
        needs = LOCAL_TOOLS.get((request.tool_set, request.call.name), "nothing")
        body = {"dialogue": request.dialogue, "needs": needs}
        arguments = request.call.arguments
        if needs == "programs":
            body |= {"program": shell_command(arguments)}
        elif needs == "python":
            body |= {"code": str(arguments["code:"])}
        else:
            body |= {
                "tool_set": request.tool_set,
                "name": request.call.name,
                "arguments": arguments,
                "attempt": request.attempt,
                "today": self._settings.today,
                "tools": request.tools if request.tool_set == TOOLBOX else [],
            }
        place = self._place(request.dialogue)
        with self._locks[place]:
            answer = self._ask(place, body)
        if answer is None:
            return "tool_instability", FILES_LOST
        return read_answer(request, needs, *answer, self._settings.seconds)

    def forget(self, dialogue: int) -> None:
        """Remove the files of a dialogue."""
        place = self._place(dialogue)
        with self._locks[place]:
            if dialogue in self._with_files[place]:
                self._with_files[place].remove(dialogue)
                try:
                    self._servers[place].forget(dialogue)
                except ToolServerEnded as error:
                    self._give_up(place, error)

    def close(self) -> None:
        """End all servers."""
        for place, lock in enumerate(self._locks):
            with lock:
                if self._servers[place] is not None:
                    self._servers[place].close()
                    self._servers[place] = None

    def _place(self, dialogue: int) -> int:
        return dialogue % len(self._locks)

    def _server(self, place: int) -> ToolServer:
        if self._servers[place] is None:
            self._servers[place] = ToolServer(
                seconds=self._settings.seconds, memory_bytes=CALL_MEMORY_BYTES, layers=self._settings.layers
            )
            self.limits_applied = self._servers[place].limits_applied
        return self._servers[place]

    def _ask(self, place: int, body: dict) -> tuple[str, int, str] | None:
        """The server's answer, from a new one if the old one has ended; None if the dialogue's files went with it."""
        dialogue = body["dialogue"]
        for is_last in (False, True):
            had_files = dialogue in self._with_files[place]
            try:
                server = self._server(place)
                if body["needs"] != "nothing":
                    self._with_files[place].add(dialogue)
                return server.call(body)
            except ToolServerEnded as error:
                self._give_up(place, error)
                if had_files:
                    return None
                if is_last:
                    raise
        return None

    def _give_up(self, place: int, error: ToolServerEnded) -> None:
        lost = sorted(self._with_files[place])
        files = f"; files lost of dialogues {', '.join(map(str, lost))}" if lost else ""
        self.notices.append(f"{error}; started again{files}")
        self._with_files[place].clear()
        self._servers[place].close()
        self._servers[place] = None


def read_answer(
    request: ToolRequest, needs: str, status: str, exit_code: int, text: str, seconds: float
) -> tuple[str, str]:
    """(category, text) of what a call's process wrote; code that it ran may have written anything."""
    if status == "timed out":
        return "tool_instability", f"{REASON}timed out after {seconds:g} s"
    if needs == "programs":
        is_right, output = shell_result(request.call.arguments, exit_code, text)
        return ("all_right", json.dumps(output)) if is_right else ("tool_call_failure", REASON + output)
    try:
        kind, content = json.loads(text)
        text = content if isinstance(content, str) else json.dumps(content)
        kind = str(kind)
    except (ValueError, TypeError, RecursionError):
        return "tool_call_failure", f"{REASON}the process ended: exit code {exit_code}"
    if request.tool_set == TOOLBOX:
        if kind != "value":
            return "tool_call_failure", CALL_FAILURE
        return classify_feedback(text, request.call, request.tools), text
    if kind != "value":
        # The file tools of ToolEyes catch their errors and return the text, which is then quoted like any result.
        return "tool_call_failure", json.dumps(text) if needs == "folder" else text
    return "all_right", json.dumps(content)
