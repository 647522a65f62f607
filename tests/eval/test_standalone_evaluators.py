"""Every evaluate_*.py scores files as a program of its own, without torch and without model code."""

import ast
import functools
import json
import subprocess
import sys

from tests.support.tiny_run import ROOT

MODEL_CODE = {"torch", "model", "train", "rl"}
EVALUATORS = sorted(path.stem for path in (ROOT / "eval").glob("evaluate_*.py"))
PROBE = """
import contextlib, importlib, io, json, sys
ends = {}
for name in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = importlib.import_module(f"eval.{name}").main(["--answers", "none", "--predictions", "none"])
        except SystemExit as stop:
            code = stop.code
    ends[name] = [code, said.getvalue()]
print(json.dumps([ends, sorted(sys.modules)]))
"""


def test_missing_files_are_one_line_and_code_2_and_no_model_code_is_loaded():
    """All in one process; a single one, run by `python -m` on real files, is in test_evaluate_tiny.py."""
    done = subprocess.run([sys.executable, "-c", PROBE, *EVALUATORS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends, modules = json.loads(done.stdout)
    assert sorted(ends) == EVALUATORS and len(EVALUATORS) >= 8
    for name, (code, said) in ends.items():
        assert code == 2 and said.count("\n") == 1, (name, said)
    assert not MODEL_CODE & {module.split(".")[0] for module in modules}


@functools.cache
def imported_by(module: str) -> set[str]:
    """Modules in all import statements of one of our modules, those inside functions too."""
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        return set()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_import_statement_on_the_way_names_model_code():
    """Also not one that runs late, inside a function."""
    for name in EVALUATORS:
        open_modules, reached = {f"eval.{name}"}, set()
        while open_modules:
            module = open_modules.pop()
            reached.add(module)
            assert module.split(".")[0] not in MODEL_CODE, f"{name} reaches {module}"
            open_modules |= imported_by(module) - reached
        assert len(reached) > 5
