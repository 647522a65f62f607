"""Does the feedback of a tool report an error? Its structure decides first, a short text as a whole second.

    structure   JSON, Python's repr, JSON inside a string, JSON that was cut off, `Status Code: 404. Response: {...}`:
                the result's own envelope (status codes, success flags, error objects, messages), never its payload
    text        must read like an exception or a refusal from its first word on (data/error_texts.py)

Nothing here raises, whatever the feedback; the time is linear in its length.
"""

import json
import re
from collections.abc import Iterable

from data.error_texts import is_number, match_error_text, says_none
from data.tool_calls import MAX_NESTING, parse_value

MAX_ENVELOPES = 6  # objects and lists inside one another that are still read as the result's envelope

Fault = tuple[str, str]  # the rule that found the error, the part of the feedback that reports it

# Keys are compared in lower case and without anything but letters and digits: errorMessage and error_message are one.
_ERROR_KEYS = frozenset(
    "error errors err errormessage errormsg errmsg errortext errordescription errordetail errordetails errorcode "
    "errcode errno errorno errorinfo errortype apierror faultstring faultcode".split()
)
_SUCCESS_KEYS = frozenset("success successful ok succeeded issuccess issuccessful response".split())  # false: an error
_FAILURE_KEYS = frozenset("iserror haserror haserrors".split())  # true: an error
_CODE_KEYS = frozenset("statuscode httpstatuscode httpstatus httpcode status code cod responsecode".split())
_WORD_KEYS = frozenset("status state outcome stat type code".split())
_CLASS_KEYS = frozenset("type name exception errortype class code".split())  # NotFoundError
_MESSAGE_KEYS = tuple(
    "message msg detail details reason description note info information resultmsg statusmessage statustext "
    "errormessage errors error title exception".split()
)
# Where the result proper is found, or a header of its own. `_RESULT_KEYS` are those that hold what was asked for.
_RESULT_KEYS = frozenset("response responses result results data body output content payload return items".split())
_WRAPPERS = _RESULT_KEYS | frozenset("meta status header headers head fault responsemetadata apistatus".split())
_METADATA = re.compile(
    r"(?:.*(?:id|url|uri|time|timestamp|date|version|links?|docs?|elapsed|after)|path|instance|help|method|level|hint|"
    r"resultcode|returncode|retcode|severity|took|credits|param|parameters?|fields?|loc|get|trace|retry|extensions|cause|stack|stacktrace|traceback|"
    r"count|total|limit|remaining)\Z"
)
_ENVELOPE = _ERROR_KEYS | _SUCCESS_KEYS | _FAILURE_KEYS | _CODE_KEYS | _WORD_KEYS | _WRAPPERS | frozenset(_MESSAGE_KEYS)
_BAD_WORD = re.compile(
    r"(?:ko|nok|fail|failed|failure|rejected|un(?:authorized|authenticated|available)|(?:invalid|over|bad|missing)_\w+|"
    r"(?:\w+_)?(?:error|exception|fault|denied|exceeded|forbidden|timeout|not_found))\Z"
)
_GOOD_WORDS = frozenset("ok success successful succeeded".split())

_STATUS_LINE = re.compile(
    r"\s*(?:HTTP )?Status(?: Code)?\s*[:=]?\s*(\d{3})\b[\s.,;]*(?:(?:Response|Body|Message)\s*:)?\s*", re.IGNORECASE
)
# Errors of any length, by their first words.
_LONG = re.compile(
    r"The function cannot be executed successfully|Your output format does not match|https?ConnectionPool\(",
    re.IGNORECASE,
)
# <Error><Code>.. of object stores, or the title of an error page.
_ERROR_PAGE = re.compile(
    r"\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<(?:\w+[:_])?(?:Error|Fault|Exception)\b"
    r"|<(?:!doctype )?html\b[\s\S]{0,1000}?<title>([^<]{0,200})</title>)",
    re.IGNORECASE,
)
_OPENS_WITH_ERROR_KEY = re.compile(
    r"""\s*\{\s*["']errors?["']\s*:\s*(?!null|none|false|""|''|\[\s*\]|\{\s*\}|0\b)\S""", re.IGNORECASE
)


def find_fault(feedback: str) -> Fault | None:
    """The first rule by which `feedback` reports an error, with the text that does, or None."""
    return _judge(feedback, MAX_ENVELOPES)


def _judge(feedback: str, depth: int) -> Fault | None:
    value = read_structure(feedback)
    return _judge_text(value, depth) if isinstance(value, str) else _judge_structure(value, depth, is_root=True)


def _judge_text(text: str, depth: int) -> Fault | None:
    """Text that is not an object: with a status line before the result, a page, or plain."""
    if depth <= 0:
        return None
    if _LONG.match(text.lstrip()):
        return "raised by the executor", text[:1000]
    if match := _STATUS_LINE.match(text):
        rest = text[match.end() :]
        return ("status", text[:1000]) if match[1] >= "400" else _judge(rest, depth - 1) if rest else None
    if match := _ERROR_PAGE.match(text):
        return ("error page", match[0]) if match[1] is None or match_error_text(match[1]) else None
    if _OPENS_WITH_ERROR_KEY.match(text):
        return "error key", text[:1000]
    return match_error_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_structure(feedback: str) -> dict | list | str:
    """The feedback as a dict or list if it is one (JSON or Python's repr, complete or cut off), else as text.

    A JSON string is unpacked, at most three times: some tools answer with JSON inside a JSON string.
    """
    value: object = feedback
    for _ in range(4):
        if not isinstance(value, str):
            break
        text = value.strip().removeprefix("```json").removesuffix("```").strip()
        if text[:1] not in ("{", "[", '"'):
            return value
        try:
            value = _parse(text)
        except ValueError:
            return value if text[0] == '"' else _complete(text)
    return value if isinstance(value, (dict, list)) else feedback


def _parse(text: str) -> object:
    """Raises ValueError for text that is neither JSON nor Python's repr of it, or nested too deeply."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return parse_value(text)  # its ToolCallError is a ValueError
    level = [value]
    for _ in range(MAX_NESTING):
        level = [item for value in level for item in _items(value)]
    if level:
        raise ValueError(f"found more than {MAX_NESTING} nested values, expected fewer")
    return value


def _items(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


_TOKEN = re.compile(r""""(?:[^"\\]|\\.)*+"?|'(?:[^'\\]|\\.)*+'?|[\[\]{},]""", re.DOTALL)


def _complete(text: str) -> dict | list | str:
    """An object that was cut off, closed where it ends or else after its last complete item; other text as it is."""
    closers: list[str] = []
    item_end, item_closers, open_quote = 0, "", ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[0] in "\"'":
            is_open = match.end() == len(text) and (len(token) == 1 or token[-1] != token[0])
            open_quote = token[0] if is_open else ""
        elif token in "{[":
            closers.append("}" if token == "{" else "]")
            item_end = match.end()
        elif token == ",":
            item_end = match.start()
        elif not closers or closers.pop() != token:
            return text
        if len(closers) > MAX_NESTING:
            return text
        if token in "{[,":
            item_closers = "".join(reversed(closers))
    for candidate in (text + open_quote + "".join(reversed(closers)), text[:item_end] + item_closers):
        try:
            value = _parse(candidate)
        except ValueError:
            continue
        if isinstance(value, (dict, list)) and value:
            return value
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Structure


def _judge_structure(value: dict | list, depth: int, *, is_root: bool) -> Fault | None:
    """An object fails by its own keys or by what its wrappers hold, a list if every item does."""
    if depth <= 0 or not value:
        return None
    if isinstance(value, dict):
        fields = {re.sub(r"[\W_]+", "", str(key)[:100]).lower(): item for key, item in value.items()}
        if any(_flag(fields.get(key)) is False for key in _FAILURE_KEYS):
            return None
        return _judge_envelope(fields, depth, is_root) or _judge_wrapped(fields, depth)
    if isinstance(value[0], dict) and value[0].get("type") == "text":
        return _judge(str(value[0].get("text", "")), depth - 1)  # a message as a list of parts
    first = None
    for item in value:
        fault = _judge_structure(item, depth - 1, is_root=False) if isinstance(item, (dict, list)) else None
        if fault is None:
            return None
        first = first or fault
    return first


def _judge_envelope(fields: dict, depth: int, is_root: bool) -> Fault | None:
    """By the object's own keys. Where there is payload too, a status or a message may be part of it and counts less."""
    has_payload = _has_payload(fields)
    texts = [text for key in _MESSAGE_KEYS for text in _message_texts(fields.get(key))]

    def fault(rule: str, key: str) -> Fault:
        shown = json.dumps({key: fields[key]}, ensure_ascii=False, default=str)[1:-1]
        return rule, " ".join([shown, *(text for text in texts if text not in shown)])[:1000]

    for key, value in fields.items():
        if key in _SUCCESS_KEYS and _flag(value) is False or key in _FAILURE_KEYS and _flag(value) is True:
            return fault("success flag", key)
        if key in _SUCCESS_KEYS and type(value) is int and value == 0 and texts and not has_payload:
            return fault("success flag", key)  # with results next to it, 0 may count successes
    status = next((key for key, value in fields.items() if _is_failing_status(key, value, has_payload)), None)
    if status is not None and not is_root and "id" in fields and _code(fields[status]) is None:
        status, has_payload = None, True  # a thing with an id that failed, such as an order: the call found it
    for key, value in fields.items():
        if key not in _ERROR_KEYS or not _is_error(value, may_count=has_payload or key == "errors"):
            continue
        is_partial = key == "errors" and any(not _is_blank(fields.get(name)) for name in _RESULT_KEYS)
        if not is_partial and (is_root or status is not None or not has_payload):
            return fault("error key", key)
    if status is not None and (not has_payload or is_root and any(match_error_text(text) for text in texts)):
        return fault("status", status)
    has_result = has_payload or any(not _is_blank(fields.get(key)) for key in _RESULT_KEYS)
    if has_result or any(_says_none(key, value) for key, value in fields.items()):
        return None
    sentences = [part for text in texts for part in (text, *re.split(r"[.;!] +", text[:1000])[1:5])]
    return next(filter(None, (_judge_text(sentence, depth - 1) for sentence in sentences)), None)


def _judge_wrapped(fields: dict, depth: int) -> Fault | None:
    """By what the wrappers hold; an object's only key is one whatever its name ({"finance": {"error": ..}})."""
    for key, value in fields.items():
        if key not in _WRAPPERS and len(fields) > 1:
            continue
        if isinstance(value, str):
            # `response` and `body` are a server's answer; `result` and `output` hold payload, be it a log.
            if key not in ("response", "body") or _has_payload(fields):
                continue
            value = read_structure(value)
            if isinstance(value, str) and (found := _judge_text(value, depth - 1)):
                return found
        if isinstance(value, (dict, list)) and (found := _judge_structure(value, depth - 1, is_root=False)):
            return found
    return None


def _has_payload(fields: dict) -> bool:
    """Whether an object holds more than a report about the call itself."""
    return any(
        not (_is_envelope(key, fields) or _is_blank(value) or _is_failing_status(key, value, False))
        or key in ("status", "state", "result", "outcome")
        and _is_state(value)
        for key, value in fields.items()
    )


def _is_state(value: object) -> bool:
    """Whether the text of a status is the state of a thing, as "Delivered" is; neither good nor bad for the call."""
    if not isinstance(value, str) or _code(value) is not None:
        return False
    word = value.strip().lower()
    return bool(word) and word not in _GOOD_WORDS and not _BAD_WORD.match(word) and match_error_text(word) is None


def _is_envelope(key: str, fields: dict) -> bool:
    """Whether a key may be part of a report about the call itself; a title only where a problem report has one."""
    if key == "title":
        return "status" in fields or "detail" in fields
    return key in _ENVELOPE or _METADATA.match(key) is not None


def _is_blank(value: object, depth: int = 3) -> bool:
    """Null, false, 0, empty, or a container of such values only."""
    if isinstance(value, (dict, list)) and value and depth:
        return all(_is_blank(item, depth - 1) for item in _items(value))
    return not value or isinstance(value, str) and not value.strip()


def _flag(value: object) -> bool | None:
    """The truth value of a flag, also as text; None for all else."""
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in ("true", "yes") else False if word in ("false", "no", "fail", "failed") else None
    return value if isinstance(value, bool) else None


def _code(value: object) -> int | None:
    """An integer status code, also as text ("404", "404 Not Found")."""
    if isinstance(value, str) and (match := re.match(r"\s*(\d{1,6})(?:\s*\Z|\s+[A-Za-z ]+\Z)", value[:60])):
        return int(match[1])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_failing_status(key: str, value: object, has_payload: bool) -> bool:
    if key in _CODE_KEYS and (code := _code(value)) is not None:
        return 400 <= code < 600
    if key == "status" and value is False:
        return True
    if not isinstance(value, str) or len(value) > 100:
        return False
    if key in _CLASS_KEYS and re.search(r"[a-z](?:Error|Exception|Fault)\s*\Z", value):
        return True
    word = value.strip().lower()
    is_bad = key in _WORD_KEYS and _BAD_WORD.match(word) is not None
    return is_bad and (not has_payload or word in ("error", "fail", "failure"))


def _is_error(value: object, *, may_count: bool) -> bool:
    """Whether the value of an error key reports one. may_count: a number may be a count or a deviation."""
    if isinstance(value, str):
        return not says_none(value) and not (is_number(value) and (may_count or not value.strip().isdigit()))
    if isinstance(value, dict):
        codes = [_code(item) for key, item in value.items() if str(key).lower() in ("code", "status", "error_code")]
        says_so = any(code == 0 or code is not None and 200 <= code < 300 for code in codes)
        if says_so or not codes and all(isinstance(item, (int, float)) for item in value.values()):
            texts = [text for key in ("message", "msg", "detail") for text in _message_texts(value.get(key))]
            return any(match_error_text(text) for text in texts)
    if isinstance(value, (dict, list)):
        return any(_is_error(item, may_count=False) for item in _items(value))
    return bool(value) and not isinstance(value, float) and (isinstance(value, bool) or not may_count)


def _says_none(key: str, value: object) -> bool:
    """A statement that there was no error: `"error": null`, `"success": true`, `"status": "ok"`, `"code": 200`."""
    if key in _ERROR_KEYS:
        return not _is_error(value, may_count=True)
    if key in _CODE_KEYS and (code := _code(value)) is not None:
        return code == 0 or 200 <= code < 400
    return (
        key in _SUCCESS_KEYS
        and _flag(value) is True
        or key in _WORD_KEYS
        and isinstance(value, str)
        and value.strip().lower() in _GOOD_WORDS
    )


def _message_texts(value: object) -> list[str]:
    """The texts of a message: itself, or those of a list of texts or of {"msg": ..} objects, at most five."""
    items = value[:5] if isinstance(value, list) else [value]
    texts = [item.get("msg", item.get("message")) if isinstance(item, dict) else item for item in items]
    return [text for text in texts if isinstance(text, str) and text.strip()]
