"""Run Python code that a model wrote, as ToolEyes' `execute_pycode` does. For use inside the sandbox only.

eval/sandbox/tool_server.py calls this in the process of one call, after its limits are in force; nothing else may
(tests/eval/test_hostile_tools.py checks). Python's own interactive interpreter runs the code.
"""

import ast
import code
import io
import sys

MAX_TEXT_CHARACTERS = 16384


class _Output(io.TextIOBase):
    """Keeps the first characters that are written."""

    def __init__(self) -> None:
        self.text, self.room = "", MAX_TEXT_CHARACTERS

    def write(self, piece: str) -> int:
        """As for any text file; what does not fit is discarded."""
        kept = piece[: self.room]
        self.text += kept
        self.room -= len(kept)
        return len(piece)


class _Interpreter(code.InteractiveInterpreter):
    """Raises what the code raises, instead of writing a traceback."""

    def showtraceback(self) -> None:
        raise sys.exc_info()[1]

    def showsyntaxerror(self, filename: str | None = None) -> None:
        raise sys.exc_info()[1]


def answer_code(source: str) -> list:
    """["value", what the code wrote] or ["raised", the text of what it raised], at most MAX_TEXT_CHARACTERS of it.

    What it prints is followed by the value of its last line if that is an expression, as at Python's prompt.
    """
    output = _Output()
    kept, sys.stdout, sys.stderr = sys.stdout, output, output
    try:
        tree = ast.parse(source.strip("\n"))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        interpreter = _Interpreter({"__name__": "__main__", "exit": sys.exit, "quit": sys.exit})
        interpreter.runsource(ast.unparse(tree) + "\n", "code", "exec")
        if last is not None:
            interpreter.runsource(ast.unparse(last) + "\n", "code", "single")
    except SystemExit:
        pass  # the code ended itself
    except BaseException as error:  # noqa: BLE001 - of any class, including one that the code defines
        return ["raised", _text_of(error)]
    finally:
        sys.stdout = kept
    return ["value", output.text]


def _text_of(error: BaseException) -> str:
    try:
        return (str(error) or type(error).__name__)[:MAX_TEXT_CHARACTERS]
    except BaseException:  # noqa: BLE001 - its __str__ may be the code's own
        return "an error without text"
