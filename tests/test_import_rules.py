"""The import directions between packages and what product code must not contain, read from the syntax trees."""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "model", "train", "rl", "eval", "toolbox", "benchmarks", "tests")
MAY_IMPORT = {  # package -> our packages that it may import besides itself
    "model": set(),
    "data": {"model"},
    "train": {"data", "model"},
    "rl": {"data", "model", "train"},
    "eval": {"data", "model", "toolbox"},
    "toolbox": {"data", "model", "train"},
    "benchmarks": {"data", "model", "train", "rl", "eval", "toolbox", "tests"},
}
SHARED_MODULES = {  # in the root, for every package -> our packages that it may import
    "command_line": set(),
    "start_up": set(),
    "printable": set(),
    "svg": set(),
    "charts": {"data"},
}
FORBIDDEN_PACKAGES = {
    "transformers",
    "trl",
    "accelerate",
    "deepspeed",
    "peft",
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "datasets",
    "lightning",
    "pytorch_lightning",
    "hydra",
    "omegaconf",
    "fire",
    "tyro",
}
PEERS_ALLOWED = {"benchmarks"}  # these measure against the peers of requirements-peers.txt
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
# imported inside a function, with a message when absent
OPTIONAL_PACKAGES = {"gguf", "tensorboard", "tokenizers", "wandb"}
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:work|opt|root|tmp|home|mnt|Users)/")


def product_files() -> list[Path]:
    folders = [ROOT / package for package in PACKAGES if package != "tests" and (ROOT / package).is_dir()]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, is it `import module`) of every import, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, True) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), False))
    return found


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""


def faults_of_imports(path: Path) -> list[str]:
    package, faults = package_of(path), []
    modules = {file.stem for file in ROOT.glob("*.py")}
    for module, bare in imports_of(tree_of(path)):
        top = module.split(".")[0]
        if module.startswith("."):
            faults.append(f"relative import {module}")
        elif top in PACKAGES:
            if bare:
                faults.append(f"import {module} (only `from {module} import name`: `eval` must stay the builtin)")
            allowed = set(PACKAGES) - {"tests", "benchmarks"} if not package else MAY_IMPORT[package] | {package}
            if top not in allowed:
                faults.append(f"{package or 'script'} imports {module}")
        elif top in modules - set(SHARED_MODULES) and package not in ("", "benchmarks"):
            faults.append(f"{package} imports the script {module}")
        if not package and top in set(PACKAGES) - SHARED_MODULES.get(path.stem, set(PACKAGES)):
            faults.append(f"{relative(path)} imports {module}")
        if package == "eval" and path.name.startswith("evaluate_") and top == "model":
            faults.append(f"standalone evaluator imports {module}")
        if top in FORBIDDEN_PACKAGES and package not in PEERS_ALLOWED:
            faults.append(f"forbidden package {module}")
    return faults


def faults_of_calls(tree: ast.AST) -> list[str]:
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name in FORBIDDEN_CALLS:
            faults.append(f"line {node.lineno}: call of {name}")
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = f"{node.func.value.id}.{node.func.attr}"
            safe = any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            )
            if called == "torch.load" and not safe or called in ("os.system", "pickle.load", "pickle.loads", "np.load"):
                faults.append(f"line {node.lineno}: call of {called}")
    return faults


def faults_of_optional_imports(path: Path) -> list[str]:
    if package_of(path) == "benchmarks":  # these may need their peers
        return []
    outer = [node for node in tree_of(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    tops = {module.split(".")[0] for node in outer for module, _ in imports_of(ast.Module([node], []))}
    return [f"imports {top} for the whole file" for top in sorted(tops & OPTIONAL_PACKAGES)]


def faults_of_text(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    faults = [] if text.isascii() else ["not ASCII"]
    faults += [f"path of a machine {found}" for found in MACHINE_PATH.findall(text)]
    faults += [f"leftover {found}" for found in re.findall(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)]
    if "shared/" in text.replace("../shared/", "" if package_of(path) == "benchmarks" else "../shared/"):
        faults.append("names a folder beside the repository")
    return faults


def faults_of_printing(path: Path) -> list[str]:
    """`print` belongs to run_*.py, benchmarks and modules with a `main`; elsewhere only errors go to stderr."""
    tree = tree_of(path)
    if package_of(path) == "benchmarks" or path.name.startswith("run_"):
        return []
    if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
        return []
    prints = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    return [
        f"line {node.lineno}: prints" for node in prints if "file=sys.stderr" not in map(ast.unparse, node.keywords)
    ]


RULES = {  # name -> the faults of one file
    "imports go one way": faults_of_imports,
    "nothing is evaluated or unpickled": lambda path: faults_of_calls(tree_of(path)),
    "optional packages are imported where they are used": faults_of_optional_imports,
    "no machine paths, no leftovers, ASCII only": faults_of_text,
    "only scripts and mains print": faults_of_printing,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule):
    files = product_files()
    assert len(files) > 80
    faults = [f"{relative(path)}: {fault}" for path in files for fault in RULES[rule](path)]
    assert not faults, "\n".join(faults)


def test_init_files_are_one_docstring():
    for package in PACKAGES:
        path = ROOT / package / "__init__.py"
        if (ROOT / package).is_dir():
            body = tree_of(path).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), package


def test_other_tracked_text_has_no_machine_paths():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if path.suffix in (".md", ".sh", ".toml", ".txt", ".yml") and path.is_file():
            found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found and found[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# The rules are not blind


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("data/x.py", "from eval.confidence import wilson_interval"),
        ("data/x.py", "def f():\n    from train.optimizer import x"),
        ("model/x.py", "from data.tool_calls import ToolCall"),
        ("train/x.py", "from eval.reports.report import x"),
        ("rl/x.py", "from eval.reports.report import x"),
        ("eval/x.py", "from train.optimizer import x"),
        ("eval/evaluate_x.py", "from model.tokenizer import x"),
        ("train/x.py", "import data.trajectories"),
        ("run_x.py", "import eval"),
        ("command_line.py", "from data.trajectories import x"),
        ("svg.py", "from data.trajectories import x"),
        ("charts.py", "from eval.confidence import x"),
        ("data/x.py", "import transformers"),
        ("train/x.py", "from pickle import load"),
        ("data/x.py", "from . import tool_calls"),
        ("run_x.py", "from tests.conftest import x"),
    ],
)
def test_import_faults_are_found(tmp_path, monkeypatch, place, source):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    (tmp_path / "command_line.py").touch()
    assert faults_of_imports(path)


def test_permitted_imports_pass(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for place, source in (
        ("eval/evaluate_x.py", "from data.tool_calls import x\nfrom eval.confidence import y\nimport json"),
        ("data/inspect_loss_weights.py", "from model.tokenizer import x"),
        ("run_x.py", "from eval.reports.report import x"),
        ("rl/x.py", "import torch\nfrom train.optimizer import x"),
        ("benchmarks/x.py", "import transformers"),
    ):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        assert not faults_of_imports(path)


def test_call_faults_are_found():
    for source in (
        "eval('1')",
        "exec(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(b)",
        "__import__('x')",
    ):
        assert faults_of_calls(ast.parse(source))
    for source in (
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "re.compile(x)",
        "ast.literal_eval(x)",
        "torch.compile(m)",
    ):
        assert not faults_of_calls(ast.parse(source))


def test_faults_of_text_and_printing_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "data" / "x.py"
    path.parent.mkdir()
    for source, rule in (
        ("import tokenizers", faults_of_optional_imports),
        ("# TODO", faults_of_text),
        ("x = '/home/someone'", faults_of_text),
        ("x = 'shared/data'", faults_of_text),
        ("x = '\u00e4'", faults_of_text),
        ("def f():\n    print(1)", faults_of_printing),
    ):
        tree_of.cache_clear()
        path.write_text(source, encoding="utf-8")
        assert len(rule(path)) == 1, source
    for source in (
        "import sys\nprint(1, file=sys.stderr)",
        "def main():\n    print(1)",
        "def f():\n    import tokenizers",
    ):
        tree_of.cache_clear()
        path.write_text(source, encoding="utf-8")
        assert not any(rule(path) for rule in RULES.values()), source
