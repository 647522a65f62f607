"""A whole PPO run in miniature for tests: a model that half knows its calls, prompts, ways to start it."""

import contextlib
import functools
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.formats.table import encode_prompt
from data.tool_calls import ToolCall, render_tool_call
from data.tool_documents import normalize_tools
from data.trajectories import Message
from model.pretrained_weights import save_pretrained
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from tests.support.processes import free_port, spawn
from tests.support.tiny_run import CITIES, ROOT, tiny_files, tiny_model
from train.distributed import close_world
from train.weighted_cross_entropy import linear_token_logprobs

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a city"}},
                "required": ["city"],
            },
        },
    }
    for name in ("get_weather", "search")
]
ARMS = tuple(ToolCall(name, {"city": "Oslo"}) for name in ("get_weather", "search"))
QUERY = "weather of Oslo"


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and models


def make_record(identity: str, query: str, gold: Sequence[ToolCall], tools: list[dict]) -> dict:
    """One prompt in the held-out form."""
    answers = [{"calls": [{"name": call.name, "arguments": call.arguments}], "order_free": False} for call in gold]
    return {"id": identity, "tools": tools, "messages": [{"role": "user", "content": query}], "gold": answers}


def write_records(path: Path, records: Sequence[dict]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@functools.cache
def ppo_data() -> Path:
    """11 prompts of different lengths: 6 cities with both tools offered, 5 of them with the right one alone."""
    records = []
    for index in range(11):
        city, tool = CITIES[index % 6], TOOLS[index % 2]
        gold = ToolCall(tool["function"]["name"], {"city": city})
        records.append(make_record(f"p{index}", f"{gold.name} for {city}", [gold], TOOLS if index < 6 else [tool]))
    return write_records(Path(tempfile.mkdtemp(prefix="tiny_ppo_")) / "prompts.jsonl", records)


def fit(samples: Sequence[tuple[list[int], list[int]]], *, steps: int) -> Transformer:
    """A tiny model after `steps` Adam steps on (prompt ids, response ids), all of them packed into one row."""
    model, inputs, positions, lengths, states, targets = tiny_model(seed=3), [], [], [], [], []
    for prompt_ids, response_ids in samples:
        first_state = len(inputs) + len(prompt_ids) - 1
        states += range(first_state, first_state + len(response_ids))
        targets += response_ids
        lengths.append(len(prompt_ids) + len(response_ids) - 1)
        inputs += prompt_ids + response_ids[:-1]
        positions += range(lengths[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(steps):
        hidden_TD = model(
            torch.tensor([inputs]),
            position_ids_BT=torch.tensor([positions]),
            segment_lengths=lengths,
            return_hidden=True,
        )[0]
        logprobs_K = linear_token_logprobs(hidden_TD[states], model.head_weight(), torch.tensor(targets))
        optimizer.zero_grad()
        (-logprobs_K.sum() / len(samples)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def save_with_tokenizer(model: Transformer, folder: Path) -> Path:
    """A model folder as `run_sft.py` leaves it."""
    save_pretrained(model, folder)
    (folder / "tokenizer.model").write_bytes((tiny_files()[0] / "tokenizer.model").read_bytes())
    return folder


def call_ids(call: ToolCall) -> list[int]:
    """The response that makes this call, EOS included."""
    tokenizer = load_tokenizer(tiny_files()[0])
    return [*tokenizer.encode_continuation(f" {render_tool_call(call)}"), tokenizer.eos_id]


def prompt_ids_of(record: dict) -> list[int]:
    """What the model reads of a record in the held-out form."""
    messages = [Message("user", record["messages"][0]["content"])]
    return encode_prompt(normalize_tools(record["tools"], "test"), messages, load_tokenizer(tiny_files()[0]))


@functools.cache
def policy_folder() -> Path:
    """A model that has seen the right answers for a short while: some of its sampled calls are right, some wrong."""
    records = [json.loads(line) for line in ppo_data().read_text().splitlines()]
    golds = [record["gold"][0]["calls"][0] for record in records]
    samples = [
        (prompt_ids_of(record), call_ids(ToolCall(gold["name"], gold["arguments"])))
        for record, gold in zip(records, golds, strict=True)
    ]
    return save_with_tokenizer(fit(samples, steps=45), Path(tempfile.mkdtemp(prefix="tiny_ppo_")) / "model")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def ppo_arguments(output: Path, **flags: object) -> list[str]:
    """Flags of a short deterministic CPU run into `output`; `flags` are added or replace."""
    values = {
        "model": flags.get("model") or policy_folder(),
        "data": ppo_data(),
        "output": output,
        "device": "cpu",
        "plot": "off",
        "checkpoint_every": 3,
        "rollout_batch_size": 4,
        "minibatch_size": 4,
        "micro_batch_size": 2,
        "max_response_tokens": 24,
        "policy_learning_rate": 1e-3,
        "value_learning_rate": 1e-2,
        "epochs": 1,
        "prompt_turns": "tools",
        "ppo_epochs": 1,
        "kl_coef": 0.05,
        "warmup_ratio": 0.02,
        "schedule": "cosine",
        "critic_only_iterations": 0,
        "entropy_coef": 0,
        "whiten_advantages": "off",
        "value_clip_range": 0.2,
        **flags,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def ppo_command(output: Path, *, ranks: int = 0, **flags: object) -> list[str]:
    """The command line of a run: ranks = 0 starts plain python, else torchrun with so many processes."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*start, "run_ppo.py", *ppo_arguments(output, **flags)]


def run_ppo_here(output: Path, **flags: object) -> tuple[int, str, str]:
    """run_ppo.main in this process: (exit code, stdout, stderr). Saves the import of torch."""
    return call_main(ppo_arguments(output, **flags))


def call_main(arguments: list[str]) -> tuple[int, str, str]:
    """run_ppo.main on a command line: (exit code, stdout, stderr)."""
    from run_ppo import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def run_on_ranks(folder: Path, ranks: int, runs: Sequence[list[str]]) -> list[list[tuple[int, str, str]]]:
    """Several command lines, one after the other, in one set of gloo processes: for each rank what call_main gives.

    The environment is that of torchrun. `folder` receives one file per rank.
    """
    spawn(_one_rank, (ranks, [free_port() for _ in runs], list(runs), str(folder)), ranks)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _one_rank(rank: int, ranks: int, ports: list[int], runs: list[list[str]], folder: str) -> None:
    torch.set_num_threads(1)
    results = []
    for port, arguments in zip(ports, runs, strict=True):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))  # a rank left waiting fails instead of hanging
        results.append(call_main(arguments))
        close_world()  # main leaves the group open after an error
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))


def journal_of(output: Path, name: str) -> list[dict]:
    """The lines of a journal without their times, which no two runs share."""
    rows = [json.loads(line) for line in (output / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The two-armed toy


def arm_logprobs(model: Transformer) -> torch.Tensor:
    """Log-probability of each arm's whole call, EOS included, after the toy's prompt: (2,)."""
    prompt_ids, totals = prompt_ids_of(make_record("toy", QUERY, ARMS, TOOLS)), []
    for call in ARMS:
        response_ids = call_ids(call)
        input_ids_1T = torch.tensor([prompt_ids + response_ids[:-1]])
        hidden_KD = model(input_ids_1T, return_hidden=True)[0, len(prompt_ids) - 1 :]
        totals.append(linear_token_logprobs(hidden_KD, model.head_weight(), torch.tensor(response_ids)).sum())
    return torch.stack(totals)


@functools.cache
def toy_folder() -> Path:
    """A model that answers the toy's prompt with either arm, about half of the time each, and hardly anything else."""
    prompt_ids = prompt_ids_of(make_record("toy", QUERY, ARMS, TOOLS))
    model = fit([(prompt_ids, call_ids(arm)) for arm in ARMS], steps=70)
    return save_with_tokenizer(model, Path(tempfile.mkdtemp(prefix="toy_ppo_")) / "model")


def toy_data(path: Path, gold: Sequence[ToolCall], n: int) -> Path:
    """`n` times the toy's prompt with these gold calls."""
    return write_records(path, [make_record(f"toy{index}", QUERY, gold, TOOLS) for index in range(n)])
