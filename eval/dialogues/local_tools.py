"""Our own implementations of the ToolEyes tools that need no network, and the toolbox world: what the tool server runs.

    LOCAL_TOOLS      (tool set, tool) -> what a call of it needs from the sandbox
    answer_request   run one call whose name and parameters the documents allow; in the sandbox only

Written from the tools' documents, one function per tool with the documents' parameter names. A tool uses no clock and
no global randomness: "today" is in the request, and random tools are seeded by tool, arguments and attempt. Arguments
come from models, with numbers often as strings, as all documents of ToolEyes say. A tool raises for what it cannot do;
the text goes to the model.
"""

import hashlib
import json
import math
import os
import random
import re
import string
import urllib.parse
import uuid
from datetime import date, timedelta

from toolbox.world import execute

TOOLBOX = "toolbox"  # the tool set of the toolbox world, whose tools come with the request
# What a call needs: nothing (a pure function), a folder, Python code run in it, or programs. Where a machine cannot
# provide it, the tool is not local (docs/multi_turn.md).
LOCAL_TOOLS = {
    ("Random/Random", "get_random_number"): "nothing",
    ("Random/Random", "get_uuid"): "nothing",
    ("Random/Random", "generate_string"): "nothing",
    ("Random/Random", "generate_password"): "nothing",
    ("Random/Random", "generate_placeholder_text"): "nothing",
    ("File/file_operation", "write_file"): "folder",
    ("File/file_operation", "read_file"): "folder",
    ("Execute/Execute", "execute_pycode"): "python",
    ("Execute/Execute", "execute_bash_code"): "programs",
    ("Calculator/Calculator", "calculator"): "nothing",
    ("Finance/Technical_Indicators", "get_all_technical_indicators_available"): "nothing",
    ("Finance/Technical_Indicators", "get_technical_indicator_description"): "nothing",
    ("Stock/Stock", "get_today_date"): "nothing",
    ("Stock/Stock", "add_date"): "nothing",
    ("Calendar/Calendar", "current_date"): "nothing",
    ("Travel/Hotels_Statistical_Data", "city_photo"): "nothing",
}
MAX_ITEMS = 1000  # of a random tool's list
MAX_LENGTH = 65535  # of a random string
MIN_PASSWORD_LENGTH = 6
MAX_DIGITS = 300  # of an exact result of the calculator
MAX_NESTING = 50  # brackets in an expression
MAX_RESULT_CHARACTERS = 16384  # longer than any feedback
DEFAULT_FILE = "output.txt"  # of write_file without a path

_TRUE = ("true", "1", "yes")


class ToolError(Exception):
    """A tool cannot do what was asked; the message is the feedback."""


def answer_request(request: dict) -> list:
    """["value", result ready for JSON] or ["raised", text of the exception].

    The request is {"tool_set", "name", "arguments", "attempt", "today", "tools"}; one without a name is only a trial.
    """
    try:
        result = _run(request) if "name" in request else ""
        text = result if isinstance(result, str) else json.dumps(result)
        return ["value", text[:MAX_RESULT_CHARACTERS] if len(text) > MAX_RESULT_CHARACTERS else result]
    except Exception as error:  # noqa: BLE001 - whatever a tool raises on a model's arguments is its feedback
        return ["raised", str(error)[:MAX_RESULT_CHARACTERS]]


def _run(request: dict) -> object:
    name, arguments = request["name"], request["arguments"]
    if request["tool_set"] == TOOLBOX:
        return execute(request["tools"], name, arguments, request["attempt"])
    match name:
        case "get_today_date" | "current_date":
            return request["today"]
        case "get_random_number" | "get_uuid" | "generate_string" | "generate_password" | "generate_placeholder_text":
            rng = random.Random(seed_of(request["tool_set"], name, arguments, request["attempt"]))
            return json.dumps(RANDOM_TOOLS[name](rng, **arguments))  # JSON within a JSON string, as ToolEyes has it
    return PLAIN_TOOLS[name](**arguments)


def seed_of(*parts: object) -> int:
    """An integer that depends only on the JSON of `parts`, not on the order of its keys."""
    text = json.dumps(parts, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big")


def _whole(value: object, name: str, low: int, high: int) -> int:
    """The integer that a model wrote as 5, 5.0 or "5". Raises ToolError for anything else or outside low..high."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise ToolError(f"invalid literal for int() with base 10: {ascii(value)[:80]}")
    if not low <= number <= high:
        raise ToolError(f"{name} must be between {low} and {high}")
    return int(number)


# ---------------------------------------------------------------------------------------------------------------------
# Random


def get_random_number(rng: random.Random, min: object = 0, max: object = 100, cnt: object = 1) -> list[int]:
    """`cnt` integers from `min` to `max`, both included."""
    low, high = (_whole(value, name, -(10**15), 10**15) for value, name in ((min, "min"), (max, "max")))
    if low > high:
        raise ToolError("min must not be greater than max")
    return [rng.randint(low, high) for _ in range(_whole(cnt, "cnt", 1, MAX_ITEMS))]


def get_uuid(rng: random.Random, cnt: object = 1) -> list[str]:
    """`cnt` UUIDs of version 4."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(_whole(cnt, "cnt", 1, MAX_ITEMS))]


def generate_string(rng: random.Random, len: object = 10, cnt: object = 1) -> list[str]:
    """`cnt` strings of `len` letters and digits."""
    return _draw_strings(rng, string.ascii_letters + string.digits, _whole(len, "len", 1, MAX_LENGTH), cnt)


def generate_password(rng: random.Random, len: object = 12, cnt: object = 1) -> list[str]:
    """`cnt` passwords of `len` characters, each with at least a letter, a digit and a punctuation mark."""
    length, kinds = (
        _whole(len, "len", MIN_PASSWORD_LENGTH, MAX_LENGTH),
        (string.ascii_letters, string.digits, string.punctuation),
    )
    passwords = []
    for rest in _draw_strings(rng, "".join(kinds), length - 3, cnt):
        characters = [*rest, *(rng.choice(kind) for kind in kinds)]
        rng.shuffle(characters)
        passwords.append("".join(characters))
    return passwords


def _draw_strings(rng: random.Random, alphabet: str, length: int, cnt: object) -> list[str]:
    count = _whole(cnt, "cnt", 1, MAX_ITEMS)
    if length * count > MAX_LENGTH:
        raise ToolError(f"len times cnt must be between 1 and {MAX_LENGTH}")
    return ["".join(rng.choices(alphabet, k=length)) for _ in range(count)]


LOREM_WORDS = (
    "lorem",
    "ipsum",
    "dolor",
    "sit",
    "amet",
    "consectetur",
    "adipiscing",
    "elit",
    "sed",
    "do",
    "eiusmod",
    "tempor",
    "incididunt",
    "ut",
    "labore",
    "et",
    "dolore",
    "magna",
    "aliqua",
    "enim",
    "ad",
    "minim",
    "veniam",
    "quis",
    "nostrud",
    "exercitation",
    "ullamco",
    "laboris",
    "nisi",
    "aliquip",
    "ex",
    "ea",
    "commodo",
    "consequat",
)


def generate_placeholder_text(rng: random.Random, cnt: object = 1) -> list[str]:
    """`cnt` sentences of five to twelve words of lorem ipsum."""
    sentences = [
        " ".join(rng.choices(LOREM_WORDS, k=rng.randint(5, 12))) for _ in range(_whole(cnt, "cnt", 1, MAX_ITEMS))
    ]
    return [f"{sentence.capitalize()}." for sentence in sentences]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_file(text: object, file_path: object = DEFAULT_FILE) -> str:
    """Write a text into the dialogue's folder. Raises ToolError in the words of ToolEyes' tool."""
    try:
        with open(_path_inside(file_path), "w", encoding="utf-8", errors="replace") as file:
            file.write(text if isinstance(text, str) else json.dumps(text))
    except (OSError, ValueError, TypeError) as error:
        raise ToolError(_file_error(error, file_path)) from None
    return f"File written successfully to {file_path}."


def read_file(file_path: object) -> str:
    """The text of a file of the dialogue's folder. Raises ToolError in the words of ToolEyes' tool."""
    try:
        with open(_path_inside(file_path), encoding="utf-8", errors="replace") as file:
            return file.read(MAX_RESULT_CHARACTERS)
    except (OSError, ValueError, TypeError) as error:
        raise ToolError(_file_error(error, file_path)) from None


def _file_error(error: Exception, path: object) -> str:
    """As ToolEyes has it, with the path as the model wrote it, not as it is called here."""
    if isinstance(error, OSError) and error.strerror:
        return f"Error: [Errno {error.errno}] {error.strerror}: {path!r}"
    return f"Error: {error}"


def _path_inside(path: object) -> str:
    """The real path of a file in the working folder, links followed. Raises as if nothing existed outside it.

    The sandbox forbids what this check would miss; this check gives the same words on every machine.
    """
    if not isinstance(path, str):
        raise TypeError(f"file_path must be a string, not {type(path).__name__}")
    root = os.getcwd()
    real = os.path.realpath(path)
    if not real.startswith(root + os.sep) and real != root:
        raise FileNotFoundError(2, "No such file or directory", path)
    return real


# ---------------------------------------------------------------------------------------------------------------------
# Calculator


_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_OPERATORS = {"+": (1, False), "-": (1, False), "*": (2, False), "/": (2, False), "^": (4, True)}  # precedence, right
_SIGN_PRECEDENCE = 3  # -2^2 is -4, 2*-3 is -6


def calculator(input_query: object) -> float:
    """The value of an expression of numbers, + - * / ^ (also ** and brackets), by the usual precedence.

    Exact for integers of up to MAX_DIGITS digits. Raises ToolError, ZeroDivisionError.
    """
    text = str(input_query).replace("**", "^").replace("\u00d7", "*").replace("\u00f7", "/").rstrip("= ")
    value, position = _sum(text, 0, 0, 0)
    if position < len(text):
        raise ToolError(f"{text[position : position + 20]!a} is not supported in an expression")
    return int(value) if isinstance(value, float) and value == int(value) and abs(value) < 1e15 else value


def _sum(text: str, position: int, precedence: int, depth: int) -> tuple[float, int]:
    """Value of the longest expression from `position` whose operators bind tighter than `precedence`."""
    if depth > MAX_NESTING:
        raise ToolError(f"more than {MAX_NESTING} brackets or signs in one another are not supported")
    left, position = _operand(text, _skip(text, position), depth)
    while True:
        position = _skip(text, position)
        operator = text[position : position + 1]
        tightness, is_right = _OPERATORS.get(operator, (0, False))
        if tightness <= precedence:
            return left, position
        right, position = _sum(text, position + 1, tightness - is_right, depth + is_right)
        left = _apply(operator, left, right)


def _operand(text: str, position: int, depth: int) -> tuple[float, int]:
    character = text[position : position + 1]
    if character in ("-", "+"):
        value, position = _sum(text, position + 1, _SIGN_PRECEDENCE, depth + 1)
        return (-value if character == "-" else value), position
    if character == "(":
        value, position = _sum(text, position + 1, 0, depth + 1)
        position = _skip(text, position)
        if text[position : position + 1] != ")":
            raise ToolError("a bracket without its partner is not supported")
        return value, position + 1
    match = _NUMBER.match(text, position)
    if not match or len(match[0]) > MAX_DIGITS:
        raise ToolError(f"{text[position : position + 20]!a} is not supported in an expression")
    return (int(match[0]) if match[0].isdigit() else float(match[0])), match.end()


def _apply(operator: str, left: float, right: float) -> float:
    is_exact = isinstance(left, int) and isinstance(right, int)
    if operator == "/":
        result = left // right if is_exact and right and left % right == 0 else left / right
    elif operator == "^":
        if is_exact and 0 <= right and right * max(1, abs(left)).bit_length() < 3.3 * MAX_DIGITS:
            result = left**right
        else:
            result = float(left) ** right
    else:
        result = left + right if operator == "+" else left - right if operator == "-" else left * right
    if isinstance(result, complex) or isinstance(result, float) and not math.isfinite(result):
        raise ToolError("a result that is no finite real number is not supported")
    return float(result) if isinstance(result, int) and abs(result) >= 10**MAX_DIGITS else result


def _skip(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


# ---------------------------------------------------------------------------------------------------------------------
# Dates


def add_date(date: object, days: object) -> str:
    """The date that many days after `date`, both as yyyy-mm-dd; `days` may be negative."""
    return _later(str(date), days)


def _later(text: str, days: object) -> str:
    try:
        start = date.fromisoformat(text.strip()) if len(text.strip()) == 10 else None
    except ValueError:
        start = None
    if start is None:
        raise ToolError(f"time data {ascii(text)[:80]} does not match format '%Y-%m-%d'")
    try:
        count = _whole(days, "days", -3_700_000, 3_700_000)
    except ToolError as error:
        if "between" in str(error):
            raise
        raise ToolError(f"unsupported type for timedelta days component: {type(days).__name__}") from None
    try:
        return (start + timedelta(days=count)).isoformat()
    except OverflowError:
        raise ToolError("date value out of range") from None


# ---------------------------------------------------------------------------------------------------------------------
# Finance, travel


# Symbols of the public interface that the tool set calls (Alpha Vantage); the descriptions are ours.
INDICATORS = {
    "SMA": "Simple moving average: the mean price over a number of periods.",
    "EMA": "Exponential moving average: a mean that weighs recent prices more, with exponentially falling weights.",
    "WMA": "Weighted moving average: a mean whose weights fall linearly with age.",
    "DEMA": "Double exponential moving average: an EMA with its own lag taken out once.",
    "TEMA": "Triple exponential moving average: an EMA with its lag taken out twice.",
    "TRIMA": "Triangular moving average: a moving average smoothed a second time, heaviest in the middle.",
    "KAMA": "Kaufman's adaptive moving average: quick in trends, slow in noise.",
    "MAMA": "MESA adaptive moving average: adapts to the phase of the price cycle.",
    "VWAP": "Volume weighted average price: traded value over traded volume of the day.",
    "T3": "Tillson's T3: a smooth moving average made of several EMAs.",
    "MACD": "Moving average convergence / divergence: the difference of a fast and a slow EMA, with a signal line.",
    "MACDEXT": "MACD whose three moving averages may be of any kind.",
    "STOCH": "Stochastic oscillator: where the close is in the recent range, smoothed.",
    "STOCHF": "Fast stochastic oscillator: the stochastic oscillator without the second smoothing.",
    "RSI": "Relative strength index: gains against losses over a number of periods, from 0 to 100.",
    "STOCHRSI": "Stochastic RSI: the stochastic oscillator of the RSI.",
    "WILLR": "Williams' %R: how far the close is below the recent high, from -100 to 0.",
    "ADX": "Average directional movement index: the strength of a trend, whatever its direction.",
    "ADXR": "ADX rating: the mean of the ADX now and some periods ago.",
    "APO": "Absolute price oscillator: the difference of two moving averages.",
    "PPO": "Percentage price oscillator: the difference of two moving averages in percent.",
    "MOM": "Momentum: the change of price over a number of periods.",
    "BOP": "Balance of power: the close above the open, as a share of the period's range.",
    "CCI": "Commodity channel index: the distance of the typical price from its mean, in mean deviations.",
    "CMO": "Chande momentum oscillator: gains less losses over their sum, from -100 to 100.",
    "ROC": "Rate of change: the change of price over a number of periods, in percent.",
    "ROCR": "Rate of change ratio: the price over the price some periods ago.",
    "AROON": "Aroon: how long ago the highest high and the lowest low were.",
    "AROONOSC": "Aroon oscillator: Aroon up less Aroon down.",
    "MFI": "Money flow index: an RSI weighted by volume.",
    "TRIX": "Rate of change of a triply smoothed EMA.",
    "ULTOSC": "Ultimate oscillator: buying pressure over three spans of time.",
    "DX": "Directional movement index: upward against downward movement, without smoothing.",
    "MINUS_DI": "Minus directional indicator: the share of downward movement in the true range.",
    "PLUS_DI": "Plus directional indicator: the share of upward movement in the true range.",
    "MINUS_DM": "Minus directional movement: how far lows go below the last low.",
    "PLUS_DM": "Plus directional movement: how far highs go above the last high.",
    "BBANDS": "Bollinger bands: a moving average, with lines some standard deviations above and below.",
    "MIDPOINT": "Midpoint: the mean of highest and lowest close of a span.",
    "MIDPRICE": "Midprice: the mean of highest high and lowest low of a span.",
    "SAR": "Parabolic stop and reverse: a trailing stop that draws nearer while a trend lasts.",
    "TRANGE": "True range: the period's range, a gap to the last close included.",
    "ATR": "Average true range: the mean true range, a measure of volatility.",
    "NATR": "Normalised average true range: the ATR in percent of the close.",
    "AD": "Chaikin's accumulation / distribution line: volume added up by where the close is in the range.",
    "ADOSC": "Chaikin's oscillator: a fast less a slow EMA of the accumulation / distribution line.",
    "OBV": "On balance volume: volume added on days up, taken off on days down.",
    "HT_TRENDLINE": "Hilbert transform, instantaneous trend line: the price without its dominant cycle.",
    "HT_SINE": "Hilbert transform, sine wave: the phase of the dominant cycle as two sine waves.",
    "HT_TRENDMODE": "Hilbert transform, trend or cycle: 1 in a trend, 0 in a cycle.",
    "HT_DCPERIOD": "Hilbert transform, dominant cycle period: the length of the cycle in periods.",
    "HT_DCPHASE": "Hilbert transform, dominant cycle phase: where in the cycle the price is, in degrees.",
    "HT_PHASOR": "Hilbert transform, phasor components: the cycle as an in-phase and a quadrature part.",
}


def get_all_technical_indicators_available() -> list[str]:
    """The symbols of all indicators."""
    return list(INDICATORS)


def get_technical_indicator_description(indicator_symbol: object) -> str:
    """What an indicator is. Raises KeyError, whose text is the symbol in quotes, for an unknown one."""
    return INDICATORS[str(indicator_symbol).strip().upper()]


def city_photo(city_iata: object, photo_size: object = "(960, 720)") -> str:
    """The address of a city's photo; `photo_size` as "(width, height)", "960x720" or a list of two numbers."""
    numbers = re.findall(r"\d{1,5}", json.dumps(photo_size))
    if len(numbers) != 2:
        raise ToolError(f"photo_size {ascii(photo_size)[:80]} is not supported, give (width, height)")
    city = urllib.parse.quote(str(city_iata).strip().upper()[:80], safe="", errors="replace")
    return f"https://photo.hotellook.com/static/cities/{numbers[0]}x{numbers[1]}/{city}.jpg"


RANDOM_TOOLS = {
    function.__name__: function
    for function in (get_random_number, get_uuid, generate_string, generate_password, generate_placeholder_text)
}
PLAIN_TOOLS = {
    function.__name__: function
    for function in (
        write_file,
        read_file,
        calculator,
        add_date,
        get_all_technical_indicators_available,
        get_technical_indicator_description,
        city_photo,
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Shell


def shell_command(arguments: dict) -> list[str]:
    """The program and its arguments for execute_bash_code: a new shell for every call in the same folder."""
    return ["/bin/bash", "-c", str(arguments["commands"]).replace("\0", "")]


def shell_result(arguments: dict, exit_code: int, output: str) -> tuple[bool, str]:
    """(whether it succeeded, the text) of a shell's output. An error is reported by its exit code alone, unless the
    parameter that the document calls `return_err_outputpersistent=False` asks for the output."""
    if exit_code and not is_true(arguments.get("return_err_outputpersistent=False", False)):
        command = str(arguments["commands"])[:200]
        return False, f"Command '{command}' returned non-zero exit status {exit_code}."
    return True, output.strip() if is_true(arguments.get("strip_newlines", False)) else output


def is_true(value: object) -> bool:
    """Whether a model's flag says yes: true, "True", 1, "yes"."""
    return str(value).strip().lower() in _TRUE
