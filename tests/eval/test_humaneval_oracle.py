"""HumanEval's verdicts against the benchmark's own semantics: prompt, completion, test and check in one namespace.

The oracle executes that program in a throw-away process, as the benchmark's code does. It runs programs written here,
published solutions, and such solutions changed by a rule of this file.
"""

import ast
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval.evaluate_humaneval import check_completion, load_humaneval
from eval.records import Record

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

REAL = Path(__file__).resolve().parents[2] / "../shared/data/benchmarks/humaneval/HumanEval.jsonl.gz"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="the benchmark files are not beside this checkout")
LIMITS = {"seconds": 6.0, "memory_bytes": 512 << 20}
PROMPT = 'def f(x, y=None):\n    """What the test wants."""\n'
ORACLE = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
resource.setrlimit(resource.RLIMIT_CPU, (4, 5))
program, output = sys.stdin.read(), os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
try:
    exec(program, {})
    os.write(output, b"passed")
except BaseException:
    os.write(output, b"failed")
os._exit(0)
"""


def passes_as_one_program(problem, completion):
    entry_point, test = problem.meta["entry_point"], problem.meta["test"]
    program = f"{problem.text}{completion}\n{test}\ncheck({entry_point})"
    command = [sys.executable, "-I", "-S", "-c", ORACLE]
    try:
        ended = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return False
    return ended.stdout == "passed"


# ---------------------------------------------------------------------------------------------------------------------
# What a call does besides its result


def problem_of(test, prompt=PROMPT):
    lines = "".join(f"    {line}\n" for line in test.split("\n"))
    meta = {"entry_point": "f", "test": f"def check(candidate):\n{lines}", "canonical_solution": ""}
    return Record(index=0, id="T/0", text=prompt, meta=meta)


SAME = [  # body of f, body of check
    # identity
    ("return x", "x = [1]\nassert candidate(x) is x"),
    ("return list(x)", "x = [1]\nassert candidate(x) is x"),
    ("return x[0]", "x = [[1], [1]]\nassert candidate(x) is x[0] and candidate(x) is not x[1]"),
    ("return x[1]", "x = [[1], [1]]\nassert candidate(x) is x[0]"),
    ("return [x, x]", "a, b = candidate([1])\nassert a is b"),
    ("return [x, list(x)]", "a, b = candidate([1])\nassert a is b"),
    ("return x is y", "a = [1]\nassert candidate(a, a) is True and candidate(a, [1]) is False"),
    ("return x is y", "a = 'some text'\nassert candidate(a, a) is True"),
    ("return x is y", "a = float('1.5')\nassert candidate(a, a) is True and candidate(a, float('1.5')) is False"),
    ("return x is 'word'", "assert candidate('word') is True and candidate(''.join(['wo', 'rd'])) is False"),
    ("return x is y", "assert candidate((1, [2]), (1, [2])) is False"),
    ("return x", "x = (1, 'a')\nassert candidate(x) is x"),
    ("return x", "x = float('nan')\nassert [candidate(x)] == [x]"),
    ("return float('nan')", "x = float('nan')\nassert [candidate(x)] == [x]"),
    ("x.append(x)\nreturn x", "x = [1]\nassert candidate(x)[1] is x"),
    ("return x == [1, 2]", "assert candidate([1, 2]) is True and candidate([2]) is False"),
    ("return 1", "assert candidate(0) is True"),
    ("return x and y", "assert candidate(3, None) is None"),
    # mutation
    ("x.sort()\nreturn x[0]", "x = [3, 1]\nassert candidate(x) == 1 and x == [1, 3]"),
    ("x.sort()\nreturn x[0]", "x = [3, 1]\nassert candidate(x) == 1 and x == [3, 1]"),
    ("return sorted(x)[0]", "x = [3, 1]\nassert candidate(x) == 1 and x == [1, 3]"),
    ("x[1].append(9)", "x = [0, [1]]\ninner = x[1]\ncandidate(x)\nassert inner == [1, 9]"),
    ("x[1] = 5\ndel x[0]", "x = {0: 1}\ncandidate(x)\nassert x == {1: 5}"),
    ("x['k'] = x", "x = {}\ncandidate(x)\nassert x['k'] is x"),
    ("x.add(3)", "x = {1}\ncandidate(x)\nassert x == {1, 3}"),
    ("x.extend(b'c')", "x = bytearray(b'ab')\ncandidate(x)\nassert x == b'abc'"),
    ("x.append(y)", "x, y = [], [1]\ncandidate(x, y)\ny.append(2)\nassert x == [[1, 2]]"),
    ("x.append(list(y))", "x, y = [], [1]\ncandidate(x, y)\ny.append(2)\nassert x == [[1, 2]]"),
    ("x[:] = [True, 1.0]", "x = [1, 1]\ncandidate(x)\nassert x[0] is True and type(x[1]) is float"),
    ("x.pop()\nreturn x", "x = [1, 2]\ny = candidate(x)\nx.append(3)\nassert y == [1, 3]"),
    ("x.clear()\nraise ValueError", "x = [1]\ntry:\n    candidate(x)\nexcept ValueError:\n    assert x == []"),
    ("f.n = getattr(f, 'n', 0) + 1\nreturn f.n", "assert candidate(0) == 1 and candidate(0) == 2"),
    # exceptions
    (
        "raise ValueError('a', 2)",
        "try:\n    candidate(1)\nexcept ValueError as error:\n    assert error.args == ('a', 2)",
    ),
    (
        "raise KeyError(x)",
        "x = [1]\ntry:\n    candidate(x)\nexcept LookupError as error:\n    assert error.args[0] is x",
    ),
    ("raise KeyError(x)", "try:\n    candidate(1)\nexcept ValueError:\n    pass"),
    ("return x / 0", "try:\n    candidate(1)\n    assert False\nexcept ZeroDivisionError:\n    pass"),
    ("return x", "try:\n    candidate(1)\n    raise RuntimeError\nexcept ZeroDivisionError:\n    pass"),
    (
        "class E(IndexError): pass\nraise E('x')",
        "try:\n    candidate(1)\nexcept IndexError as error:\n    assert str(error) == 'x'",
    ),
    (
        "return b'\\xff'.decode()",
        "try:\n    candidate(1)\nexcept UnicodeDecodeError as error:\n    assert error.start == 0",
    ),
    ("assert x", "try:\n    candidate(0)\nexcept AssertionError:\n    pass"),
    ("assert x", "candidate(0)"),
    ("raise SystemExit", "try:\n    candidate(0)\nexcept Exception:\n    pass"),
    ("return f(x)", "try:\n    candidate(0)\nexcept RecursionError:\n    pass"),
    # results of other kinds
    ("return range(3)", "assert list(candidate(0)) == [0, 1, 2] and candidate(0) == range(3)"),
    ("return range(3)", "assert candidate(0) == [0, 1, 2]"),
    ("yield from x", "assert tuple(candidate([1, 2])) == (1, 2)"),
    ("return map(str, x)", "assert list(candidate([1, 2])) == ['1', '2']"),
    ("return map(str, x)", "assert candidate([1, 2]) == ['1', '2']"),
    ("return {1: 2}.values()", "assert list(candidate(0)) == [2]"),
    ("import fractions\nreturn fractions.Fraction(1, 3)", "assert candidate(0) == 1 / 3"),
    ("import fractions\nreturn fractions.Fraction(1, 2)", "assert candidate(0) == 0.5"),
    ("import decimal\nreturn decimal.Decimal('0.5')", "assert candidate(0) == 0.5"),
    ("import decimal\nreturn decimal.Decimal('0.5')", "assert abs(candidate(0) - 0.5) < 1"),
    ("return frozenset(x)", "assert candidate([1]) == {1} and isinstance(candidate([1]), frozenset)"),
    ("return frozenset(x)", "candidate([1]).add(2)"),
    ("import collections\nreturn collections.Counter(x)", "assert candidate('aab') == {'a': 2, 'b': 1}"),
    ("return 10 ** 5000", "assert candidate(0) % 10 == 0 and candidate(0) > 10 ** 4999"),
    ("return (x, {1: {2}}, None, -0.0, 1j, b'a')", "assert candidate(5) == (5, {1: {2}}, None, 0.0, 1j, b'a')"),
]
ONLY_HERE_WRONG = {  # what human-eval passes and this does not: it could be forged, or is no plain data
    "an object that equals everything": (
        "class Y:\n    def __eq__(self, other): return True\nreturn Y()",
        "assert candidate(1) == 2",
    ),
    "it among the arguments": (
        "class Y:\n    def __eq__(self, other): return True\nx[0] = Y()",
        "x = [1]\ncandidate(x)\nassert x == [2]",
    ),
    "text that equals everything": (
        "class Y(str):\n    def __eq__(self, other): return True\n    __hash__ = None\nreturn Y()",
        "assert candidate(1) == 'a'",
    ),
    "an object of its own class": ("class P:\n    n = 2\nreturn P()", "assert candidate(1).n == 2"),
    "a function": ("return lambda: 2", "assert candidate(1)() == 2"),
    "an exception caught as its own class's attribute": (
        "error = ValueError('x')\nerror.code = 3\nraise error",
        "try:\n    candidate(1)\nexcept ValueError as error:\n    assert error.code == 3",
    ),
    "SystemExit that the test catches": ("raise SystemExit", "try:\n    candidate(1)\nexcept BaseException:\n    pass"),
    "an object of an earlier call": (
        "f.kept = getattr(f, 'kept', [])\nf.kept.append(x)\nreturn f.kept",
        "a = candidate(1)\nb = candidate(2)\nassert a is b",
    ),
    "the names of the test's own frames": (
        "import sys\nframe = sys._getframe(1)\nframe.f_globals['verdict'] = 9\nreturn 3",
        "global verdict\nverdict = 1\ncandidate(1)\nassert verdict == 9",
    ),
    "a helper of the test redefined": (
        "global helper\nhelper = lambda: 5\nreturn 5",
        "assert candidate(1) == helper()",
    ),
    "a thread that goes on": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nreturn 1",
        "assert candidate(1) == 1",
    ),
}
FORGERIES = {  # programs that no design may pass
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit from atexit": "import atexit, os\natexit.register(os._exit, 0)\nreturn 0",
    "builtins": "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\nreturn 0",
    "check of the caller": "import sys\nsys._getframe(1).f_globals['check'] = lambda c: None\nreturn 0",
    "trace that returns": "import sys\nsys.settrace(lambda *a: None)\nreturn 0",
    "raises in ==": "class Y:\n    def __eq__(self, other): raise SystemExit(0)\nreturn Y()",
    "exception of its own": "class E(BaseException): pass\nraise E",
    "changes of what was not given": "import builtins\nbuiltins.len = lambda x: 9\nreturn len(x)",
}


def body(text):
    return "".join(f"    {line}\n" for line in text.split("\n"))


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def test_what_a_call_does_besides_its_result_is_as_in_one_program(pool):
    def both(case):
        problem = problem_of(case[1])
        return check_completion(problem, body(case[0]), **LIMITS), passes_as_one_program(problem, body(case[0]))

    outcomes = list(pool.map(both, SAME))
    wrong = [(case, ours.reason, oracle) for case, (ours, oracle) in zip(SAME, outcomes) if ours.passed != oracle]
    assert not wrong and 20 < sum(oracle for _, oracle in outcomes) < len(SAME)


@pytest.mark.parametrize("name", ONLY_HERE_WRONG)
def test_the_differences_that_remain(name):
    completion, test = ONLY_HERE_WRONG[name]
    problem = problem_of(test, f"def helper():\n    return 4\n\n{PROMPT}")
    assert passes_as_one_program(problem, body(completion))
    seconds = 1.0 if name == "a thread that goes on" else 3.0  # which is only ended by the time limit
    result = check_completion(problem, body(completion), seconds=seconds, memory_bytes=512 << 20)
    assert not result.passed and result.reason


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(name):
    result = check_completion(problem_of("assert candidate([]) == 7"), body(FORGERIES[name]), **LIMITS)
    assert not result.passed and result.reason


def test_what_passes_must_also_pass_in_one_program():
    """The test's own process never sees what the completion does to names that the test uses."""
    problem = problem_of("assert sum([candidate(1), 1]) == 2")
    for completion in ("    return x\n\nsum = None\n", "    return x\n\ndef sum(x): return 3\n"):
        result = check_completion(problem, completion, **LIMITS)
        assert not result.passed and not passes_as_one_program(problem, completion), result.reason
    assert check_completion(problem, "    return x\n\nmax = None\n", **LIMITS).passed


# ---------------------------------------------------------------------------------------------------------------------
# The published solutions and mutants of them


def mutants_of(problem, draw):
    """(kind, completion) of one mutant of each kind that the canonical solution allows."""
    source = problem.text + problem.meta["canonical_solution"]
    for kind in ("off by one", "operator", "none", "mutates", "argument", "raises", "iterator", "copy"):
        tree = ast.parse(source)
        function = next(node for node in tree.body[::-1] if getattr(node, "name", "") == problem.meta["entry_point"])
        statements = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        nodes = [node for statement in statements for node in ast.walk(statement)]
        argument = function.args.args[0].arg if function.args.args else "None"
        returns = [node for node in nodes if isinstance(node, ast.Return) and node.value is not None]
        if kind == "off by one":
            found = [node for node in nodes if isinstance(node, ast.Constant) and type(node.value) is int]
            if not found:
                continue
            draw.choice(found).value += draw.choice((1, -1))
        elif kind == "operator":
            found = [node for node in nodes if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp))]
            if not found:
                continue
            node = draw.choice(found)
            if isinstance(node, ast.Compare):
                node.ops[0] = draw.choice((ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.Is, ast.IsNot, ast.In))()
            elif isinstance(node, ast.BinOp):
                node.op = draw.choice((ast.Add, ast.Sub, ast.FloorDiv, ast.Mod))()
            else:
                node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        elif kind == "mutates":
            line = draw.choice(("append(0)", "sort()", "clear()", "pop()", "reverse()"))
            statements.insert(
                0, ast.parse(f"if isinstance({argument}, list) and {argument}: {argument}.{line}").body[0]
            )
        elif kind == "raises":
            line = draw.choice(
                ("raise ValueError", f"if not {argument}: raise KeyError({argument})", "raise SystemExit")
            )
            statements.insert(0, ast.parse(line).body[0])
        elif not returns:
            continue
        else:
            chosen = draw.choice(returns)
            chosen.value = {
                "none": ast.Constant(None),
                "argument": ast.Name(argument, ast.Load()),
                "iterator": ast.Call(ast.Name("iter", ast.Load()), [chosen.value], []),
                "copy": ast.Call(ast.Name("tuple", ast.Load()), [chosen.value], []),
            }[kind]
        text = "\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in statements)
        yield kind, body(text)


def compare_with_oracle(cases, pool):
    """Both verdicts of (problem, kind, completion), and those that differ."""

    def both(case):
        problem, _, completion = case
        return check_completion(problem, completion, **LIMITS), passes_as_one_program(problem, completion)

    outcomes = list(pool.map(both, cases))
    differ = [
        (problem.id, kind, completion, ours.reason, oracle)
        for (problem, kind, completion), (ours, oracle) in zip(cases, outcomes, strict=True)
        if ours.passed != oracle
    ]
    return [oracle for _, oracle in outcomes], differ


@needs_real
def test_some_mutants_are_judged_as_in_one_program(pool):
    draw = random.Random(11)
    problems = load_humaneval(REAL)
    cases = [(one, *mutant) for one in draw.sample(problems, 2) for mutant in mutants_of(one, draw)]
    oracle, differ = compare_with_oracle(cases, pool)
    assert not differ and len(cases) >= 10 and 0 < sum(oracle) < len(cases)


@needs_real
@pytest.mark.very_slow
def test_all_published_solutions_and_their_mutants_are_judged_as_in_one_program(pool):
    draw = random.Random(5)
    problems = load_humaneval(REAL)
    oracle, differ = compare_with_oracle([(one, "canonical", one.meta["canonical_solution"]) for one in problems], pool)
    assert not differ and sum(oracle) == 164
    cases = []
    for one in problems:  # two of each, in turn, so that every kind comes up
        mutants = list(mutants_of(one, draw))
        cases += [(one, *mutants[number % len(mutants)]) for number in (one.index, one.index + 3)]
    oracle, differ = compare_with_oracle(cases, pool)
    print(f"{len(cases)} mutants, {sum(oracle)} pass, {len(differ)} verdicts differ")
    assert not differ and len(cases) == 328 and sum(oracle) > 20
