"""Client of an OpenAI-compatible server: completions of a text, chat with native tool calls. Standard library only.

A fault that may pass (no connection, no answer in time, status 408, 429 or 5xx, a body that is not the expected JSON)
is tried again after a pause that doubles. Any other ends the run with one line, except the refusal of a single request
(400, 413, 422), which becomes that record's answer: a chat API may not accept the tool names of a noisy benchmark.
The server is not trusted: answers are bounded in size and time (eval/predict/bounded_request.py), redirects are not
followed (they would carry the key elsewhere), and every piece of the key is hidden in what it says.
"""

import html
import http.client
import json
import math
import os
import random
import re
import string
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.message import Message

from data.formats.call_text import json_text
from data.formats.prompt_format import PromptError
from data.formats.table import FORMATS, prompt_text
from data.json_records import DataError
from eval.predict.bounded_request import BoundedRequest
from eval.predict.choices import choice_prompt
from eval.predict.cut_output import cut_at
from eval.records import Record

BACKOFF_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0  # before the second attempt; the longest pause, also for Retry-After
MAX_ANSWER_BYTES = 16 << 20
MAX_STOPS = 4  # the API takes no more; what it does not cut is cut here
REFUSALS_TO_STOP = 8  # without a single answer: then it is the server or the settings, not the records
TOP_LOGPROBS = 5  # the most that the completions API gives
READ_CHARACTERS, SHOWN_CHARACTERS = 1 << 16, 300  # of a server's words: searched for the key, then shown
KEY_PIECE, ENCODINGS = 4, 3  # characters of the key that are hidden; how often words may be encoded
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))")
PASSING_STATUS = (408, 425, 429)
REFUSED_STATUS = (400, 413, 422)


class EndpointError(DataError):
    """The server cannot be used, or not any longer; one line."""


class _PassingError(Exception):
    """A fault worth another attempt, and the pause in seconds the server asked for (0 = none)."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask."""

    url: str  # base of the API, as in http://127.0.0.1:8000/v1
    model: str  # the model's name there
    api_key: str  # sent as bearer token; "" = none
    timeout_seconds: float  # for one whole answer
    attempts: int  # requests per record, the first one included
    concurrency: int  # requests at a time
    stopping: threading.Event = field(default_factory=threading.Event)  # once set, no more attempts
    in_flight: set[BoundedRequest] = field(default_factory=set)  # requests without an answer so far

    def stop(self) -> None:
        """No more attempts, and no answers to the requests in flight."""
        self.stopping.set()
        for request in list(self.in_flight):
            request.cut()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said to one request: its first choice, or why there is none."""

    choice: dict  # the API's choices[0]; {} without an answer
    stop: str  # "end", "max_new_tokens", "prompt_too_long" or "refused"
    error: str  # the server's words where it refused, else ""


# ---------------------------------------------------------------------------------------------------------------------
# Requests


LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")  # a proxy of the environment is not asked for these
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is the http(s) base of an API. The message shows no password and no query."""
    if "@" in url:
        raise ValueError(
            "found a URL with a user or password, expected one without; the key belongs in the environment variable "
            "that --endpoint_key names"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, a bracket without its pair
        is_usable = False
    if not is_usable or not url.isascii() or any(character <= " " or character in "?#" for character in url):
        shown_url = re.split("[?#]", url)[0]
        hidden = "?.." if shown_url != url else ""
        raise ValueError(f"found {shown_url + hidden!a}, expected the base of an API, as in http://127.0.0.1:8000/v1")


def check_key_variable(name: str) -> None:
    """Raise ValueError, without the value, unless `name` can be that of an environment variable and is no key itself.

    Keys often have the letters of a name: what begins like one, or is long and has digits, counts as a name only where
    there is such a variable.
    """
    looks_like_key = name[:3] in ("sk_", "pk_", "hf_") or (
        len(name) >= 20 and any(map(str.isdigit, name)) and (name != name.upper() or "_" not in name)
    )
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or (looks_like_key and name not in os.environ):
        raise ValueError(
            "found a value that is not shown, expected the name of the environment variable that holds the key, as in "
            "OPENAI_API_KEY"
        )


def make_endpoint(
    url: str, model: str, *, key_variable: str, timeout: float, attempts: int, concurrency: int
) -> Endpoint:
    """The endpoint with the key that the environment variable `key_variable` holds; it may be unset.

    Raises EndpointError for a key that is none, without showing it.
    """
    key = os.environ.get(key_variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise EndpointError(f"--endpoint_key: found characters in {key_variable} that no key has, expected ASCII")
    return Endpoint(
        url=url.rstrip("/"),
        model=model,
        api_key=key,
        timeout_seconds=timeout,
        attempts=attempts,
        concurrency=concurrency,
    )


def ask(endpoint: Endpoint, path: str, body: dict) -> Answer:
    """POST `body` to `endpoint.url` + `path`, again where a fault may pass; the server's first choice.

    Raises EndpointError, one line without the key, after the last attempt or for a fault that stays.
    """
    message, attempt = "", 0
    for attempt in range(endpoint.attempts):
        if endpoint.stopping.is_set():
            raise EndpointError(f"{endpoint.url}{path}: found the run about to stop, expected no more requests")
        try:
            return _ask_once(endpoint, path, body)
        except _PassingError as fault:
            message = str(fault)
            if attempt + 1 < endpoint.attempts:
                doubled = BACKOFF_SECONDS * 2 ** min(attempt, 10) * random.uniform(0.75, 1.25)  # requests drift apart
                if endpoint.stopping.wait(min(max(doubled, fault.pause), MAX_PAUSE_SECONDS)):
                    break
    raise EndpointError(
        f"{endpoint.url}{path}: {message} in attempt {attempt + 1} of {endpoint.attempts}; what was "
        "predicted is kept, the same command continues"
    )


def _ask_once(endpoint: Endpoint, path: str, body: dict) -> Answer:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    request = urllib.request.Request(endpoint.url + path, json.dumps(body).encode("ascii"), headers)
    status, headers, raw = _exchange(endpoint, request)
    if not 200 <= status < 300:
        return _refusal(endpoint, path, status, headers, raw)
    choice = _first_choice(raw, endpoint)
    return Answer(choice, "max_new_tokens" if choice.get("finish_reason") == "length" else "end", "")


def _exchange(endpoint: Endpoint, request: urllib.request.Request) -> tuple[int, Message, bytes]:
    """Status, headers and body of the answer; the body of a refusal may be incomplete. Raises _PassingError."""
    use_proxy = urllib.parse.urlsplit(endpoint.url).hostname not in LOOPBACK_HOSTS
    with BoundedRequest(endpoint.timeout_seconds) as bounded:
        endpoint.in_flight.add(bounded)
        try:
            with bounded.open(request, use_proxy=use_proxy) as response:
                answer = response.status, response.headers, _read(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, _read_if_possible(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if bounded.is_over or isinstance(reason, TimeoutError):
                raise _PassingError(f"found no answer within {endpoint.timeout_seconds:g} s") from None
            if reason is not error:
                raise _PassingError(f"found no connection ({_shown(str(reason), endpoint)})") from None
            words = _shown(f"{type(error).__name__}: {error}", endpoint)
            raise _PassingError(f"found a broken connection ({words})") from None
        finally:
            endpoint.in_flight.discard(bounded)
        if bounded.is_over:  # a body without a length looks complete when its connection is cut
            raise _PassingError(f"found no answer within {endpoint.timeout_seconds:g} s")
        return answer


def _read(response: http.client.HTTPResponse) -> bytes:
    """The whole body."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise _PassingError(f"found an answer of more than {MAX_ANSWER_BYTES} bytes, expected a shorter one")
    if response.length:  # bytes that were announced and never came
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(chunks)


def _read_if_possible(error: urllib.error.HTTPError) -> bytes:
    try:
        return _read(error)
    except (OSError, http.client.HTTPException, ValueError, _PassingError):
        return b""


def _refusal(endpoint: Endpoint, path: str, status: int, headers: Message, raw: bytes) -> Answer:
    """The answer for a status other than 2xx; raises where it concerns more than this request."""
    text = _error_text(raw)
    words = _shown(text, endpoint)
    if status in PASSING_STATUS or status >= 500:
        raise _PassingError(f"found status {status} ({words})", _seconds(headers.get("Retry-After")))
    if status in REFUSED_STATUS:
        lowered = text.lower()
        is_too_long = (
            status == 413
            or "context_length_exceeded" in lowered
            or "context" in lowered
            and ("length" in lowered or "window" in lowered)
        )
        return Answer({}, "prompt_too_long" if is_too_long else "refused", f"status {status} ({words})")
    raise EndpointError(f"{endpoint.url}{path}: found status {status} ({words}), expected an answer")


def _first_choice(raw: bytes, endpoint: Endpoint) -> dict:
    value = _parsed(raw)
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        text = raw[:READ_CHARACTERS].decode("utf-8", "replace")
        raise _PassingError(f"found {_shown(text, endpoint)}, expected a JSON object with choices")
    return choices[0]


def _parsed(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _error_text(raw: bytes) -> str:
    """The message and code of an error body in any of the usual shapes, else its text."""
    value = _parsed(raw)
    value = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(value, dict):
        parts = [value[key] for key in ("message", "code", "detail") if isinstance(value.get(key), str)]
        value = ", ".join(parts) or None
    return value if isinstance(value, str) else raw[:READ_CHARACTERS].decode("utf-8", "replace")


def _shown(text: str, endpoint: Endpoint) -> str:
    """A server's words as one line of ASCII of bounded length, without any piece of the key.

    Also not URL-encoded, as HTML entities or as escapes of JSON; a server that hides the key on purpose finds a way.
    """
    text = text[:READ_CHARACTERS]
    if endpoint.api_key:
        text = hide_key(text, endpoint.api_key)
        for _ in range(ENCODINGS):
            text = _ESCAPE.sub(lambda match: chr(int(match[1] or match[2], 16)), text)
            text = hide_key(html.unescape(urllib.parse.unquote(text)), endpoint.api_key)
    return ascii(text[:SHOWN_CHARACTERS])[1:-1]


def hide_key(text: str, key: str) -> str:
    """`text` with asterisks for every character that belongs to a piece of the key, whatever its letter case.

    A piece has KEY_PIECE characters, or is the whole of a shorter key: servers quote the first and the last few.
    """
    size, key, lowered = min(KEY_PIECE, len(key)), key.translate(_LOWER), text.translate(_LOWER)
    pieces = {key[start : start + size] for start in range(len(key) - size + 1)}
    hidden = list(text)
    for start in range(len(text) - size + 1):
        if lowered[start : start + size] in pieces:
            hidden[start : start + size] = "*" * size
    return "".join(hidden)


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or 0)
    except ValueError:  # a date
        return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), MAX_PAUSE_SECONDS)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def ask_record(
    endpoint: Endpoint,
    query: Record,
    *,
    prompt_format: str,
    max_new_tokens: int,
    stop_texts: Sequence[str],
    temperature: float = 0.0,
) -> dict:
    """The predictions row for one record: by chat where the format has messages, else by a completion of its text.

    `temperature` 0 asks for the likeliest tokens; a choice always does. Raises EndpointError.
    """
    if query.letters:
        return _ask_choice(endpoint, query, prompt_format)
    if chat_request := FORMATS[prompt_format].chat_request:
        text_alone = [{"role": "user", "content": query.text}], []
        messages, tools = text_alone if query.text else chat_request(query.tools, query.messages)
        answer = chat(endpoint, messages, tools, max_new_tokens, stop_texts, temperature)
        return _row(query.index, message_text(answer, bool(tools)), answer, stop_texts)
    text = query.text or prompt_text(query.tools, query.messages, prompt_format)
    answer = complete(endpoint, text, max_new_tokens, stop_texts, temperature=temperature)
    return _row(query.index, completed_text(answer), answer, stop_texts)


def complete(
    endpoint: Endpoint,
    prompt: str,
    max_tokens: int,
    stop_texts: Sequence[str],
    *,
    temperature: float = 0.0,
    logprobs: int = 0,
) -> Answer:
    """The server's completion of a text, with so many log-probabilities per token. Raises EndpointError."""
    body = {"model": endpoint.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    body |= {"logprobs": logprobs} if logprobs else {}
    return ask(endpoint, "/completions", _with_stops(body, stop_texts))


def chat(
    endpoint: Endpoint,
    messages: list[dict],
    tools: list[dict],
    max_tokens: int,
    stop_texts: Sequence[str],
    temperature: float = 0.0,
) -> Answer:
    """The server's answer to messages of the chat API, with native `tools` if there are any. Raises EndpointError."""
    body = {"model": endpoint.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    return ask(endpoint, "/chat/completions", _with_stops({**body, "tools": tools} if tools else body, stop_texts))


def _with_stops(body: dict, stop_texts: Sequence[str]) -> dict:
    return {**body, "stop": list(stop_texts[:MAX_STOPS])} if stop_texts else body


def completed_text(answer: Answer) -> str:
    """The text of a completion, "" if the answer has none."""
    text = answer.choice.get("text")
    return text if isinstance(text, str) else ""


def message_text(answer: Answer, has_tools: bool) -> str:
    """The message of a chat: with tools as JSON, so that its calls can be read again; without, its text."""
    message = answer.choice.get("message")
    message = message if isinstance(message, dict) else {}
    if not has_tools:
        return message["content"] if isinstance(message.get("content"), str) else ""
    try:
        return json_text({key: message[key] for key in ("content", "tool_calls") if key in message}) if message else ""
    except RecursionError:  # nested so deeply that it cannot be written again; no call is
        return ""


def _row(index: int, text: str, answer: Answer, stop_texts: Sequence[str]) -> dict:
    output, is_cut = cut_at(text, stop_texts)
    row = {"index": index, "output": output, "stop": "end" if is_cut else answer.stop}
    return {**row, "error": answer.error} if answer.error else row


def _ask_choice(endpoint: Endpoint, query: Record, prompt_format: str) -> dict:
    """The letter that the server finds most likely, with as many of the solved questions as its context holds.

    By completions that is the best of the letters among the listed log-probabilities, by chat the text of the answer.
    """
    for n_shots in range(len(query.shots), -1, -1):
        text = choice_prompt(query, n_shots)
        if FORMATS[prompt_format].chat_request:
            answer = chat(endpoint, [{"role": "user", "content": text}], [], 16, ())
            output = message_text(answer, has_tools=False)
        else:
            answer = complete(endpoint, text, 1, (), logprobs=TOP_LOGPROBS)
            output = _likeliest_letter(answer.choice, query.letters) or completed_text(answer)
        if answer.stop != "prompt_too_long":
            break
    row = {"index": query.index, "output": output, "stop": "end" if answer.choice else answer.stop}
    if answer.choice and n_shots < len(query.shots):
        row["n_shots"] = n_shots
    return {**row, "error": answer.error} if answer.error else row


def _likeliest_letter(choice: dict, letters: str) -> str:
    logprobs = choice.get("logprobs")
    top = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    first = top[0] if isinstance(top, list) and top and isinstance(top[0], dict) else {}
    found = [
        (value, token.strip())
        for token, value in first.items()
        if len(token.strip()) == 1 and token.strip() in letters and type(value) in (int, float)
    ]
    return " " + max(found)[1] if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def ask_records(
    endpoint: Endpoint, queries: Sequence[Record], *, prompt_format: str, max_new_tokens: int, stop_texts: Sequence[str]
) -> Iterator[dict]:
    """Rows in the order in which answers arrive, `endpoint.concurrency` requests at a time.

    When one record fails for good, the answers that still arrive are given, then EndpointError is raised.
    """
    waiting, held_back, has_answered, failure = list(reversed(queries)), [], False, None
    running: set[Future] = set()
    with ThreadPoolExecutor(max_workers=endpoint.concurrency) as pool:
        try:
            while running or waiting and failure is None:
                while waiting and failure is None and len(running) < endpoint.concurrency:
                    running.add(
                        pool.submit(
                            ask_record,
                            endpoint,
                            waiting.pop(),
                            prompt_format=prompt_format,
                            max_new_tokens=max_new_tokens,
                            stop_texts=stop_texts,
                        )
                    )
                done, running = wait(running, return_when=FIRST_COMPLETED)
                rows, error = _results(done)
                failure = failure or error
                held_back += rows
                has_answered = has_answered or any(row["stop"] != "refused" for row in rows)
                if has_answered:
                    yield from held_back
                    held_back = []
                elif len(held_back) >= REFUSALS_TO_STOP and failure is None:
                    failure = EndpointError(
                        f"{endpoint.url}: found {held_back[0]['error']} for each of the first "
                        f"{len(held_back)} requests, expected answers"
                    )
                if failure is not None:
                    endpoint.stopping.set()
        except BaseException:  # interrupted: do not wait for answers
            endpoint.stop()
            raise
    if failure is not None:
        raise failure
    yield from held_back


def _results(done: Iterable[Future]) -> tuple[list[dict], Exception | None]:
    rows, failure = [], None
    for future in done:
        try:
            rows.append(future.result())
        except (EndpointError, PromptError) as error:
            failure = failure or error
    return rows, failure
