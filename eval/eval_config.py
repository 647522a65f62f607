"""The settings of run_eval.py."""

import re
from dataclasses import dataclass
from pathlib import Path

from command_line import setting
from data.formats.table import COMPLETION_FORMATS, DEFAULT_FORMAT, PROMPT_FORMATS
from data.trained_format import AUTO_FORMAT
from eval.benchmarks import BENCHMARKS, OWN
from eval.dialogues.metrics import MAX_TURNS
from eval.dialogues.tools import EXECUTOR_KINDS
from eval.predict.endpoint import check_key_variable, check_url

DEFAULT_BENCHMARKS = "tiny-seen,tiny-unseen"


def default_output(config: "EvalConfig") -> str:
    """runs/eval/NAME, so that models of different runs do not meet in one folder.

    NAME is the folder's or file's own name (model, or --predictions without its suffix), for a folder `final` that of
    the run around it: runs/sft/final -> runs/eval/sft.
    """
    path = Path(config.predictions).with_suffix("") if config.predictions else Path(config.model)
    path = path if config.endpoint else path.absolute()  # an endpoint's model is a name, not a place
    name = path.parent.name if path.name == "final" else path.name
    return f"runs/eval/{re.sub(r'[^A-Za-z0-9._-]', '_', name).strip('.') or 'model'}"


@dataclass(slots=True)
class EvalConfig:
    """All settings of one evaluation."""

    model: str = setting("runs/sft/final", "folder of the model, Hugging Face layout; with --endpoint its name there")
    benchmarks: str = setting(DEFAULT_BENCHMARKS, f"comma-separated, of {', '.join(BENCHMARKS)}; own is that of --data")
    data: str = setting(
        "",
        "file of your own dialogues, in any form that training reads: each right call of a tool is a question of the "
        "benchmark own, which is then the only one unless --benchmarks names others",
    )
    benchmark_dir: str = setting("assets/tiny_data", "folder of the benchmark files (docs/evaluation.md)")
    check_files: str = setting(
        "on", "compare published benchmark files with their sha256; off for files of your own", choices=("on", "off")
    )
    prompt_format: str = setting(
        AUTO_FORMAT,
        "form of prompt and calls: docs/evaluation.md; auto = the one that the model folder was trained in, else tl; "
        "plain is that of the bundled base model",
        choices=(AUTO_FORMAT, *PROMPT_FORMATS),
    )
    endpoint: str = setting(
        "", "base URL of an OpenAI-compatible server, http://HOST:PORT/v1; empty = model folder", hidden=True
    )
    endpoint_key: str = setting(
        "OPENAI_API_KEY", "name of the environment variable that holds the endpoint's key", hidden=True
    )
    endpoint_timeout: float = setting(
        120.0, "seconds that the endpoint may take for one request, all in all", low=0.1, high=86400.0
    )
    endpoint_attempts: int = setting(6, "requests per record before the run ends, with growing pauses between", low=1)
    endpoint_concurrency: int = setting(8, "simultaneous requests to the endpoint", low=1)
    predictions: str = setting("", "score this file of predictions (one benchmark), no model; empty = predict")
    rules: str = setting(
        "default",
        "official = the benchmark's own scorer, fair = empty arguments may be right; "
        "default is official for RoTBench, fair for the others",
        choices=("default", "official", "fair"),
    )
    execute_code: str = setting(
        "off",
        "run code that the model wrote, in the sandbox (docs/sandbox.md); needed for humaneval",
        choices=("on", "off"),
    )
    tool_executor: str = setting(
        "auto",
        "who answers the calls of a dialogue: tools of this project, or a simulation by the documents; "
        "auto = local where there is a tool, else simulated (docs/multi_turn.md)",
        choices=EXECUTOR_KINDS,
    )
    instability_rate: float = setting(
        0.0, "share of simulated calls that fail as if the service were down", low=0.0, high=1.0
    )
    call_failure_rate: float = setting(0.0, "share of simulated calls that the tool itself fails on", low=0.0, high=1.0)
    max_turns: int = setting(MAX_TURNS, "model outputs of a dialogue (ToolEyes and paper: 9)", low=1, high=MAX_TURNS)
    max_dialogue_tokens: int = setting(
        8192,
        "prompt and output together, at most the model's positions; a longer "
        "dialogue ends. The key/value cache holds batch_size times as many",
        low=2,
    )
    limit: int = setting(0, "only N records of each benchmark, evenly spread; 0 = all", low=0)
    max_new_tokens: int = setting(
        128, "longest output of a call, tokens; longer ones are cut and scored as they are", low=1
    )
    max_answer_tokens: int = setting(384, "the same for the continuation of a text, as in gsm8k", low=1)
    max_turn_tokens: int = setting(512, "the same for a turn of a dialogue, whose answer may be long", low=1)
    mmlu_max_prompt_tokens: int = setting(
        2048,
        "leave out solved questions of MMLU, the last first, while its prompt is longer, as the benchmark's own code "
        "does; 0 = only where the model's positions end. An endpoint counts its own tokens",
        low=0,
    )
    batch_size: int = setting(32, "prompts generated together on one rank; changes memory and speed only", low=1)
    output: str = setting(
        "",
        "folder of predictions, results, summary.json, report.md, plots; empty = runs/eval/NAME, by the model's folder",
    )
    resume: str = setting(
        "auto",
        "auto keeps predictions that output already holds for this model and settings; "
        "never refuses a folder that has some",
        choices=("auto", "never"),
    )
    seed: int = setting(0, "seed of every random generator and of the tools; greedy calls do not depend on it", low=0)
    dtype: str = setting("float32", "compute type", choices=("float32", "bfloat16"))
    device: str = setting("auto", "auto takes CUDA where present", choices=("auto", "cpu", "cuda"))
    cuda_graphs: str = setting(
        "off",
        "on CUDA, record the steps of decoding and launch each as one: less work of the host; not yet run on a GPU",
        choices=("on", "off"),
    )

    def validate(self) -> None:
        """Checks that need more than one field's bounds; raises ValueError naming the field."""
        if self.data and self.benchmarks == DEFAULT_BENCHMARKS:
            self.benchmarks = OWN
        names = self.benchmarks.split(",")
        for name in names:
            if name not in BENCHMARKS:
                raise ValueError(f"benchmarks: found {name!a}, expected some of {', '.join(BENCHMARKS)}")
        if len(set(names)) != len(names):
            raise ValueError(f"benchmarks: found {self.benchmarks}, expected each benchmark once")
        if (OWN in names) != bool(self.data):
            found = "--data" if self.data else OWN
            raise ValueError(f"benchmarks: found {found} alone, expected {OWN} together with --data FILE")
        if self.predictions and len(names) != 1:
            raise ValueError(f"benchmarks: found {len(names)} benchmarks, expected one, that of --predictions")
        if self.predictions and self.prompt_format not in (AUTO_FORMAT, DEFAULT_FORMAT):
            raise ValueError('prompt_format: found it with --predictions, expected "format" in that file\'s lines')
        if self.predictions and self.endpoint:
            raise ValueError("endpoint: found it with --predictions, expected one of the two")
        if self.prompt_format not in (AUTO_FORMAT, *COMPLETION_FORMATS) and not self.endpoint:
            raise ValueError(
                f"prompt_format: found {self.prompt_format} without --endpoint, expected the chat API of a server"
            )
        if self.instability_rate + self.call_failure_rate > 1.0:
            raise ValueError(
                f"instability_rate: found {self.instability_rate + self.call_failure_rate:g} together "
                "with --call_failure_rate, expected at most 1"
            )
        needs_code = [name for name in names if BENCHMARKS[name].executes_code]
        if needs_code and self.execute_code == "off":
            raise ValueError(
                f"execute_code: found off, expected on for {needs_code[0]}, whose scoring runs code that a model wrote"
            )
        for name, check in (("endpoint_key", check_key_variable), ("endpoint", check_url)):
            if name == "endpoint_key" or self.endpoint:
                try:
                    check(getattr(self, name))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
