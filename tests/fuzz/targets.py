"""What is fuzzed: each target makes good folders, one of whose files is then damaged, and reads such a folder.

A target may refuse what it reads: one of USER_ERRORS, or code 2 and one line. Whatever else it does is found: another
exception, a line that is not printable, an answer that is wrong without a word.
"""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import run_eval
from command_line import ConfigError, read_config
from data.error_filter import classify_feedback, matches_released_substrings
from data.formats.prompt_format import PromptError
from data.formats.table import PROMPT_FORMATS, TRAINING_FORMATS, dialogue_segments, parse_output, render_output
from data.inspect_loss_weights import main as inspect_loss_weights
from data.json_records import DataError, parse_json
from data.tool_calls import ToolCall, ToolCallError
from data.tool_documents import normalize_tools, tool_parameters
from data.trained_format import choose_format
from data.trajectories import Message
from eval.eval_config import EvalConfig
from eval.evaluate_humaneval import load_humaneval, read_completions
from eval.reports.compare import main as compare
from model.config import ModelFolderError
from model.import_gguf import main as import_gguf
from model.pretrained_weights import check_folder, load_pretrained, load_value_model, save_pretrained, save_value_model
from model.tokenizer import load_tokenizer
from model.value_model import ValueModel
from rl.check_rewards import check_rewards, drop_unspellable
from rl.check_rewards import main as explain_reward
from rl.ppo_config import PPOConfig
from rl.prompts import read_prompts
from rl.reward import tool_call_reward
from tests.data.test_formats_outputs import ACCEPTED
from tests.data.test_message_forms import FORMS as MESSAGE_FORMS
from tests.data.test_tool_documents import FORMS as TOOL_FORMS
from tests.data.test_trajectories import AUTHORS
from tests.eval import test_evaluate_bfcl as bfcl
from tests.eval import test_evaluate_humaneval as humaneval
from tests.eval import test_evaluate_mmlu as mmlu
from tests.eval import test_evaluate_tiny as tiny
from tests.eval import test_evaluate_tooleyes as tooleyes
from tests.model import test_import_gguf as gguf
from tests.support.rotbench_records import react, rotbench_record, toolalpaca_record
from tests.support.small_training import train_small
from tests.support.tiny_run import ROOT, make_records, make_tokenizer, tiny_model
from train.checkpoint import CheckpointError
from train.run_control import TrainingError
from train.run_logging import RunFolderError, read_metrics
from train.sft_config import SFTConfig
from train.sft_loop import encode_data

FEEDBACK = ROOT / "tests/data/feedback_cases.jsonl"
STEPS = 2  # of the training runs whose folders are damaged
UNDAMAGED = "undamaged.weights"  # of a run at its end, beside its files; never damaged itself
CALL = ToolCall("get_weather", {"city": "Oslo", "days": 3})


class Refused(Exception):
    """A command ended with code 2 and one line."""


class Wrong(Exception):
    """A target read something wrong without a word."""


USER_ERRORS = (
    *(CheckpointError, ConfigError, DataError, ModelFolderError, PromptError, RunFolderError, TrainingError, OSError),
    Refused,
)


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of input. `share`: of the cases, relative to the other targets."""

    name: str
    make: Callable[[Path], None]  # writes good folders into a folder
    read: Callable[[Path, random.Random, str], None]  # reads a damaged folder; the name of the damaged file
    share: int = 4


def write(path: Path, content: object) -> None:
    """Text as it is, a list as JSON lines where the name says so, else JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        lines = path.suffix == ".jsonl"
        content = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content, indent=1)
    path.write_text(content, encoding="utf-8", errors="surrogatepass")


def end_of(main: Callable[[list[str]], int], arguments: list) -> None:
    """Run a command in this process. Raises Refused for code 2 and one printable line, Wrong for all but code 0."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        try:
            code = main([str(each) for each in arguments])
        except SystemExit as stop:
            code = stop.code
    said = err.getvalue()
    if code not in (0, 2) or (code == 2 and said.count("\n") != 1):
        raise Wrong(f"code {code}, stderr {said[-300:]!a}")
    odd = {each for each in out.getvalue() + said if not each.isprintable() and each not in "\n\r"}  # \r: a bar of tqdm
    if odd:
        raise Wrong(f"unprintable characters in the output: {sorted(odd)!a:.200}")
    if code == 2:
        raise Refused(said.strip())


# ---------------------------------------------------------------------------------------------------------------------
# Data


def make_data(folder: Path) -> None:
    write(folder / "authors/data.json", [AUTHORS, *make_records(3)])
    for number, record in enumerate(MESSAGE_FORMS.values()):
        write(folder / f"form{number}/data.jsonl", [record])
    write(folder / "mixed/data.jsonl", list(MESSAGE_FORMS.values())[:6])
    held_out = (ROOT / "assets/tiny_data/test_seen.jsonl").read_text().split("\n")[:2]
    write(folder / "held_out/data.jsonl", "\n".join(held_out) + "\n")


def _tokenizer():
    return load_tokenizer(ROOT / "assets/tiny_model")


def read_data_for_sft(folder: Path, rng: random.Random, damaged: str) -> None:
    config = SFTConfig(
        data=str(folder / damaged),
        error_filter=rng.choice(("structured", "substring", "none")),
        unparsable_calls=rng.choice(("error", "mask")),
        prompt_format=rng.choice(("tl", "toolllama")),
    )
    encode_data(config, _tokenizer())


def read_data_for_ppo(folder: Path, rng: random.Random, damaged: str) -> None:
    tokenizer = _tokenizer()
    prompts, _ = read_prompts(
        folder / damaged,
        tokenizer,
        error_filter=rng.choice(("structured", "none")),
        prompt_turns=rng.choice(("all", "first")),
        max_prompt_tokens=1000,
        unparsable_calls=rng.choice(("error", "mask")),
    )
    if offenders := check_rewards(prompts):
        raise DataError(offenders[0])
    drop_unspellable(prompts, tokenizer, 64)


def inspect_data(folder: Path, rng: random.Random, damaged: str) -> None:
    page = ["--html", folder / "page.html"] if rng.random() < 0.5 else []
    end_of(inspect_loss_weights, ["--data", folder / damaged, "--index", 0, "--full_context", *page])


def make_reward_lines(folder: Path) -> None:
    tools = [tiny.TOOL]
    for number, text in enumerate(("get_weather(city='Oslo', days=3)", "get_news(topic='x')", "f(")):
        gold = [{"name": CALL.name, "arguments": CALL.arguments}]
        write(folder / f"{number}/line.jsonl", [{"tools": tools, "gold": gold, "output": text}])


def read_reward_line(folder: Path, rng: random.Random, damaged: str) -> None:
    end_of(explain_reward, ["--explain", "--data", folder / damaged])


def make_documents(folder: Path) -> None:
    for number, document in enumerate(TOOL_FORMS.values()):
        write(folder / f"{number}/tools.json", [document, tiny.TOOL])


def read_documents(folder: Path, rng: random.Random, damaged: str) -> None:
    text = (folder / damaged).read_bytes().decode("utf-8", "replace")
    tools = normalize_tools(parse_json(text, "tools.json:1"), "tools.json:1")
    messages = [Message("user", "Weather?"), Message("assistant", "", CALL), Message("tool", "{}")]
    for prompt_format in TRAINING_FORMATS:
        dialogue_segments(tools, messages, prompt_format)
    for tool in tools:
        tool_parameters(tool["function"])


def make_feedback(folder: Path) -> None:
    for number, line in enumerate(FEEDBACK.read_text(encoding="utf-8").splitlines()):
        write(folder / f"{number}/feedback.txt", json.loads(line)["feedback"])


def read_feedback(folder: Path, rng: random.Random, damaged: str) -> None:
    text = (folder / damaged).read_bytes().decode("utf-8", rng.choice(("surrogateescape", "replace")))
    category = classify_feedback(text, CALL, [tiny.TOOL])
    if not isinstance(category, str) or not isinstance(matches_released_substrings(text), bool):
        raise Wrong(f"category {category!a}")


def make_outputs(folder: Path) -> None:
    calls = [CALL, ToolCall("finish", {"answer": 'It\'s "7"\n', "more": [1, {"a": None}]})]
    for name in PROMPT_FORMATS:
        texts = [text for each, text, _ in ACCEPTED if each == name]
        texts += [render_output(calls[:1], name), render_output(calls[1:], name)] if name != "plain" else []
        for number, text in enumerate(texts):
            write(folder / f"{name}{number}/{name}.txt", text)


def read_output(folder: Path, rng: random.Random, damaged: str) -> None:
    """Parsers refuse with ToolCallError only; the reward refuses nothing and explains itself in printable ASCII."""
    text = (folder / damaged).read_bytes().decode("utf-8", rng.choice(("surrogateescape", "replace")))
    for name in (Path(damaged).stem, rng.choice(PROMPT_FORMATS)):
        try:
            parse_output(text, name)
        except ToolCallError as error:
            refuse_unprintable(error)
        result = tool_call_reward(text, [CALL], [tiny.TOOL], name)
        if not (result.explanation.isascii() and result.explanation.isprintable() and -2 <= result.reward <= 1):
            raise Wrong(f"reward {result.reward}, explanation {result.explanation!a:.200}")


def refuse_unprintable(error: Exception) -> None:
    """The words of an error are shown to people: one printable line."""
    if not str(error).isprintable():
        raise Wrong(f"{type(error).__name__} is not one printable line: {str(error)!a:.300}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Settings, model folders, tokenizers


def make_configs(folder: Path) -> None:
    for name in ("paper", "released"):
        write(folder / f"{name}/config.json", json.loads((ROOT / f"configs/{name}.json").read_text()))
    write(folder / "flat/config.json", {"seed": 3, "learning_rate": 1e-4, "output": "runs/x", "resume": "auto"})
    write(folder / "eval/config.json", {"benchmarks": "tiny-seen,gsm8k", "limit": 3, "call_failure_rate": 0.1})


def read_settings(folder: Path, rng: random.Random, damaged: str) -> None:
    kinds = {"eval": ((EvalConfig, ""),), "flat": ((SFTConfig, "sft"),)}
    config_class, section = rng.choice(kinds.get(folder.name, ((SFTConfig, "sft"), (PPOConfig, "ppo"))))
    read_config(config_class, "fuzz", ["--config", str(folder / damaged)], section=section)


def make_models(folder: Path) -> None:
    """One file, two shards with an index, a folder of our own export with a critic's head; one layer each."""
    model = tiny_model(n_layers=1)
    save_pretrained(model, folder / "single")
    save_value_model(ValueModel(model.config), folder / "critic")
    write(folder / "single/tl_training.json", {"prompt_format": "tl", "end_of_turn_id": 2})
    write(folder / "single/generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "temperature": 1.0})
    write(folder / "critic/tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"})
    make_tokenizer(folder / "single")
    tensors = load_file(folder / "single/model.safetensors")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = folder / f"sharded/model-0000{number}-of-00002.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in part}, file)
        index |= dict.fromkeys(part, file.name)
    write(folder / "sharded/model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": index})
    for other in ("sharded", "critic"):
        shutil.copy(folder / "single/tokenizer.model", folder / other)
    shutil.copy(folder / "single/config.json", folder / "sharded")


def read_model(folder: Path, rng: random.Random, damaged: str) -> None:
    """As run_sft and run_ppo do. A folder that is read must have a model of finite size that gives logits."""
    choose_format("auto", folder)
    tokenizer = load_tokenizer(folder)
    check_folder(folder, tokenizer)
    if rng.random() < 0.3:
        load_value_model(folder)
    model = load_pretrained(folder)
    logits_BTV = model(torch.tensor([[1, 5, 7]]))
    if logits_BTV.shape != (1, 3, model.config.vocab_size):
        raise Wrong(f"logits of shape {tuple(logits_BTV.shape)}")


def make_gguf(folder: Path) -> None:
    model = tiny_model(n_layers=2, vocab_size=len(gguf.TOKENS), max_positions=256)
    for kind in (0, 1):
        path = folder / f"{kind}/model.gguf"
        path.parent.mkdir(parents=True)
        path.write_bytes(gguf.gguf_bytes(gguf.METADATA, gguf.tensors_of(model), kind))


def read_gguf(folder: Path, rng: random.Random, damaged: str) -> None:
    end_of(import_gguf, [folder / damaged, folder / "out"])
    load_pretrained(folder / "out")


def make_tokenizers(folder: Path) -> None:
    (folder / "pieces").mkdir(parents=True)
    make_tokenizer(folder / "pieces")
    try:
        from tests.support.format_tokenizers import byte_level_bpe

        texts = [json.dumps(record) for record in make_records(8)]
        for family in ("qwen25", "llama31"):
            (folder / family).mkdir()
            byte_level_bpe(folder / family, texts, family=family, vocab_size=330)
    except ImportError:
        pass  # the package that reads tokenizer.json is optional


def read_tokenizer(folder: Path, rng: random.Random, damaged: str) -> None:
    tokenizer = load_tokenizer(folder)
    for text in ("", "get_weather(city='Oslo')", " \n\u00e9\U0001f600\0", "<s>" * 3):
        ids = tokenizer.encode(text) + tokenizer.encode_continuation(text)
        tokenizer.decode(ids)
        if not all(0 <= each < tokenizer.vocab_size for each in ids):
            raise Wrong(f"ids {ids[:10]} of {tokenizer.vocab_size}")
    tokenizer.decode([0, tokenizer.vocab_size - 1, tokenizer.vocab_size + 5])
    tokenizer.piece(tokenizer.vocab_size - 1), tokenizer.control_id("</s>")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


def texts_as_predictions(texts: list[str], output_format: str = "tl") -> list[dict]:
    return [{"index": index, "output": text, "format": output_format} for index, text in enumerate(texts)]


def make_predictions(folder: Path) -> None:
    """For each evaluator a folder with its answers and one or two files of predictions."""
    news, weather = react("get_news", {}), react("get_weather", {"city": "Oslo", "unit": "None"})
    write(folder / "rotbench/clean.json", [rotbench_record([news]), rotbench_record([weather, news])])
    write(folder / "rotbench/predictions.jsonl", texts_as_predictions([news, weather], "react"))
    write(folder / "rotbench/official.json", [{"conversations": [{"from": "assistant", "value": news}]}] * 2)
    write(folder / "toolalpaca/eval_real.json", [toolalpaca_record()])
    outputs = ['latest_get(key="0123abcd", base="EUR", days=2)', "list_get()", "secret_get("]
    write(folder / "toolalpaca/predictions.jsonl", texts_as_predictions(outputs))
    bfcl.write(folder / "bfcl", bfcl.small_set())
    calls = ["calculate_density(mass=50, volume=1/4)", "get_city(zip='08540', point=(1, -2.5))", "math_gcd(a=1, b=2)"]
    calls.append("[calculate_mean([1, 2, 6])]")
    write(folder / "bfcl/predictions.jsonl", texts_as_predictions([f"Call: {call}" for call in calls], "nexusraven"))
    write(folder / "tooleyes/Test_Data/answers.json", [tooleyes.record(), tooleyes.record("And in Rome?")])
    rows = [tooleyes.row(0, tooleyes.RIGHT), tooleyes.row(1, tooleyes.WRONG, "max_turns")]
    write(folder / "tooleyes/predictions.jsonl", rows)
    multi = (ROOT / "assets/tiny_data/test_multi.jsonl").read_text().split("\n")[:2]
    write(folder / "tiny_multi/test_multi.jsonl", "\n".join(multi) + "\n")
    write(folder / "tiny_multi/predictions.jsonl", rows)
    write(folder / "tiny/answers.jsonl", [tiny.record(0), tiny.record(1, calls=[("finish", {"answer": "x"})])])
    write(folder / "tiny/predictions.jsonl", texts_as_predictions(['get_weather(city="Oslo", days=3)', "f("]))
    write(folder / "gsm8k/test.jsonl", [{"question": "2 + 3?", "answer": "It is\n#### 5"}] * 2)
    write(folder / "gsm8k/predictions.jsonl", texts_as_predictions([" 5.\n#### 5", "1,000.5 and -7"]))
    subject = 'Which?,None,"a, b",nan,"say ""x""",1\nWho?,w,x,y,z,0\n'
    write(folder / "mmlu/test/law_test.csv", mmlu.HEADER + subject)
    write(folder / "mmlu/dev/law_dev.csv", mmlu.HEADER + mmlu.SHOTS)
    write(
        folder / "mmlu/predictions.jsonl", [{"index": 0, "output": " B"}, {"index": 1, "logprobs": [-1, -2, -0.5, -9]}]
    )
    write(folder / "humaneval/HumanEval.jsonl", [humaneval.problem(0), humaneval.problem(1)])
    write(folder / "humaneval/predictions.jsonl", texts_as_predictions([humaneval.RIGHT, "    return 1\ndef f"]))


ANSWERS = {
    "rotbench": "clean.json",
    "toolalpaca": "eval_real.json",
    "bfcl": "",
    "tooleyes": "Test_Data/answers.json",
    "tiny_multi": "test_multi.jsonl",
    "tiny": "answers.jsonl",
    "gsm8k": "test.jsonl",
    "mmlu": "",
    "humaneval": "HumanEval.jsonl",
}


def score_predictions(folder: Path, rng: random.Random, damaged: str) -> None:
    """The evaluator as a command. HumanEval would run programs: its files are only read."""
    name, answers = folder.name, folder / ANSWERS[folder.name]
    predictions = folder / (damaged if damaged == "official.json" else "predictions.jsonl")
    if name == "humaneval":
        read_completions(predictions, load_humaneval(answers), None)
        return
    module = __import__(f"eval.evaluate_{name}", fromlist=["main"])
    rules = ["--rules", rng.choice(("official", "fair"))] if name in ("rotbench", "bfcl", "toolalpaca") else []
    end_of(module.main, ["--answers", answers, "--predictions", predictions, "--output", folder / "scored", *rules])


# ---------------------------------------------------------------------------------------------------------------------
# Folders of runs


def make_eval_run(folder: Path) -> None:
    """A whole evaluation, and one whose journals say that it was killed."""
    write(folder / "run/benchmarks/test_seen.jsonl", [tiny.record(index) for index in range(3)])
    save_pretrained(tiny_model(n_layers=1), folder / "run/model")
    make_tokenizer(folder / "run/model")
    end_of(run_eval.main, eval_flags(folder / "run"))
    (folder / "run/output/environment.json").unlink()  # it has the time, and no run reads it
    shutil.copytree(folder / "run", folder / "killed")
    predictions = folder / "killed/output/predictions/tiny-seen.jsonl"
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.with_name("tiny-seen.rank0000.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    predictions.unlink()


def eval_flags(folder: Path) -> list[str]:
    flags = {
        **{"model": folder / "model", "benchmark_dir": folder / "benchmarks", "benchmarks": "tiny-seen"},
        **{"output": folder / "output", "device": "cpu", "max_new_tokens": 4},
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def read_eval_run(folder: Path, rng: random.Random, damaged: str) -> None:
    """Go on with it, or compare it with itself."""
    if rng.random() < 0.5:
        end_of(compare, [folder / "output", folder / "output", "--names", "a,b", "--mcnemar"])
    else:
        end_of(run_eval.main, eval_flags(folder))


def make_training_run(folder: Path) -> None:
    weights = train_small(folder / "run", STEPS, total_steps=STEPS)
    save_file(weights, folder / "run" / UNDAMAGED)
    (folder / "run/environment.json").unlink()  # it has the time, and no run reads it
    rows = read_metrics(folder / "run/metrics.jsonl")
    write(folder / "run/metrics.jsonl", [{name: 1.0 if "time" in name else row[name] for name in row} for row in rows])


def read_training_run(folder: Path, rng: random.Random, damaged: str) -> None:
    """Resume: from a whole checkpoint, or not at all. The weights at the end must be those of the undisturbed run."""
    weights = train_small(folder, STEPS, total_steps=STEPS)
    expected = load_file(folder / UNDAMAGED)
    if not all(torch.equal(weights[name], expected[name]) for name in expected):
        raise Wrong("resumed to other weights")
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    if damaged != "metrics.jsonl" and steps != list(range(1, STEPS + 1)):
        raise Wrong(f"metrics of the steps {steps}")


TARGETS = (
    Target("models", make_models, read_model),
    Target("data for SFT", make_data, read_data_for_sft, share=6),
    Target("data for PPO", make_data, read_data_for_ppo),
    Target("data inspected", make_data, inspect_data, share=2),
    Target("reward lines", make_reward_lines, read_reward_line, share=2),
    Target("tool documents", make_documents, read_documents),
    Target("feedback", make_feedback, read_feedback),
    Target("outputs", make_outputs, read_output, share=6),
    Target("configs", make_configs, read_settings),
    Target("GGUF files", make_gguf, read_gguf, share=3),
    Target("tokenizers", make_tokenizers, read_tokenizer),
    Target("predictions", make_predictions, score_predictions, share=12),
    Target("evaluation folders", make_eval_run, read_eval_run, share=2),
    Target("training folders", make_training_run, read_training_run, share=2),
)
