"""Makes examples/walkthrough.ipynb: docs/walkthrough.md with code that computes the numbers of each section.

    pip install -r requirements-optional.txt
    python examples/make_notebook.py           # runs the cells (seconds, nothing is trained) and writes the notebook

What needs training comes from docs/figures/walkthrough.json, the numbers of the last `examples/make_walkthrough.py`.
The file is the same byte for byte for the same numbers: no time stamps, no versions, ids by position.
tests/test_notebook.py holds text, code and outputs to the page, and runs the cells again.

Shape suffixes (also of the cells): B responses, R response tokens.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, NOTEBOOK = ROOT / "docs/walkthrough.md", ROOT / "examples/walkthrough.ipynb"
HEAD = """# Walkthrough: one trajectory from JSON to the gradient

This is [docs/walkthrough.md](../docs/walkthrough.md) with the code that computes its numbers. Change a cell and run it
again: another trajectory in the first one, another bound of the weights in section 5, another clip in section 9. No
cell trains; the losses and log-probabilities of trained models come from a stored run.
"""
SETUP = """
import json
import math
import sys

sys.path.insert(0, "..")  # the notebook runs in examples/

import torch
from IPython.display import SVG, display

from data.trajectories import read_trajectories
from model.tokenizer import load_tokenizer

trajectory = read_trajectories("../assets/tiny_data/train.json")[15]
tokenizer = load_tokenizer("../assets/tiny_model")
with open("../docs/figures/walkthrough.json") as file:
    run = json.load(file)  # the numbers of a training run
"""
CELLS = {  # section -> code
    1: """
for index, message in enumerate(trajectory.messages):
    print(index, message.role, message.call or message.content)
""",
    2: """
from data.formats.table import dialogue_segments

segments = dialogue_segments(trajectory.tools, trajectory.messages[:4])
print("".join(segment.text for segment in segments))
""",
    3: """
from data.loss_weights import encode_trajectory

row = encode_trajectory(
    trajectory,
    tokenizer,
    error_filter="structured",
    key_tokens=True,
    max_key_token_weight=9.0,
    loss_normalization="sum",
)
corrected = [t for t in range(len(row)) if row.message_indices[t] == 3 and row.token_classes[t] != "context"]
print(len(row), "positions")
for t in corrected:
    print(t, repr(tokenizer.piece(row.input_ids[t])), "->", repr(tokenizer.piece(row.target_ids[t])))
""",
    4: """
from data.error_filter import decide_masked_turns

for decision in decide_masked_turns(trajectory, "structured"):  # try "none"
    print(decision.message_index, "masked" if decision.masked else "trained", decision.category, decision.matched_text)
""",
    5: """
from data.key_tokens import find_key_tokens, weigh_key_tokens
from data.loss_weights import encode_names
from data.tool_documents import offered_names
from examples.draw_figures import draw_key_token_weights

W_MAX = 9.0  # try 1.0: no token weighs more than another
names = encode_names(offered_names(trajectory.tools), tokenizer)
call_ids = row.input_ids[corrected[2] : corrected[-1] + 1]  # from the first token of the name
others = [ids for name, ids in names.items() if name != "compare_cabin_remote"]
key = find_key_tokens(call_ids, others)
print("key tokens:", *(repr(tokenizer.piece(call_ids[k])) for k in key), "other tokens:", len(call_ids) - len(key))
print("weights:", *(f"{weight:g}" for weight in weigh_key_tokens(key, len(call_ids), W_MAX)))
display(SVG(draw_key_token_weights()))
""",
    6: """
from data.batches import pack
from examples.make_walkthrough import corrected_turn, draw_token_losses
from model.pretrained_weights import load_pretrained
from train.held_out import trained_logprobs

logprobs = trained_logprobs(load_pretrained("../assets/tiny_model"), pack([row]), torch.device("cpu"))
for name, losses in (("before", [-each for each in logprobs]), ("after", run["token_loss_sft"])):
    print(name, "SFT:", f"{sum(corrected_turn(losses, row)):.3f} nats over the corrected call")
display(SVG(draw_token_losses(run, row, tokenizer)))
""",
    7: """
from rl.reward import tool_call_reward

gold = trajectory.messages[3].call
for response in run["ppo"]["responses"]:
    result = tool_call_reward(response["text"], [gold], trajectory.tools)
    print(f"{result.reward:+.2f} {result.category:18} {response['text']}")
""",
    8: """
from examples.make_walkthrough import chosen_responses, draw_response_ledger
from rl.advantages import compute_gae, kl_shaped_rewards

right, wrong = chosen_responses(run["ppo"])
logprobs_BR, ref_logprobs_BR, values_BR = (torch.tensor([wrong[name]]) for name in ("logprob", "ref_logprob", "value"))
mask_BR = torch.ones_like(values_BR, dtype=torch.bool)
scores_B = torch.tensor([wrong["score"]])
rewards_BR = kl_shaped_rewards(scores_B, logprobs_BR, ref_logprobs_BR, mask_BR, run["ppo"]["kl_coef"])
advantages_BR, returns_BR = compute_gae(rewards_BR, values_BR, mask_BR, gamma=1.0, gae_lambda=0.95)
for token_id, *columns in zip(wrong["ids"], rewards_BR[0], values_BR[0], advantages_BR[0], returns_BR[0]):
    print(f"{tokenizer.piece(token_id)!r:10}", *(f"{round(value.item(), 3) + 0.0:8.3f}" for value in columns))
display(SVG(draw_response_ledger(wrong, tokenizer)))
""",
    9: """
from examples.make_walkthrough import draw_clip
from rl.ppo_loss import policy_loss

CLIP_RANGE = 0.2  # try 0.05
n_clipped = n_tokens = 0
for response in run["ppo"]["responses"]:
    columns = ("logprob_before_last_update", "logprob", "advantage")
    new_BR, old_BR, advantages_BR = (torch.tensor([response[name]]) for name in columns)
    _, stats = policy_loss(new_BR, old_BR, advantages_BR, torch.ones_like(new_BR, dtype=torch.bool), CLIP_RANGE)
    n_clipped, n_tokens = n_clipped + int(stats["clipped"]), n_tokens + new_BR.numel()
print(n_clipped, "of", n_tokens, "tokens are clipped")
display(SVG(draw_clip(run["ppo"])))
""",
    10: """
from examples.make_walkthrough import draw_probabilities

for response in (right, wrong):
    before, after = (math.exp(sum(response[name])) for name in ("logprob", "logprob_at_end"))
    print(f"{before:.5f} -> {after:.5f}  {response['text']}")
display(SVG(draw_probabilities(run["ppo"], tokenizer)))
""",
}


def sections(page: str) -> dict[int, str]:
    """Number -> text of each section of the page, without its pictures, which the cells draw."""
    without_pictures = re.sub(r"^!\[.*\n\n?", "", page, flags=re.MULTILINE)
    relinked = re.sub(r"\]\((\w+\.md)", r"](../docs/\1", without_pictures)
    parts = re.split(r"^(?=## \d+\. )", relinked, flags=re.MULTILINE)[1:]
    return {int(re.match(r"## (\d+)", part)[1]): part.strip() for part in parts}


def make_notebook(page: str) -> dict:
    """The notebook as JSON values, not run yet."""
    cells = [("markdown", HEAD.strip()), ("code", SETUP.strip())]
    for number, content in sections(page).items():
        cells += [("markdown", content), ("code", CELLS[number].strip())]
    return {
        "cells": [
            {"cell_type": kind, "id": f"cell-{index:02}", "metadata": {}, "source": source}
            | ({"execution_count": None, "outputs": []} if kind == "code" else {})
            for index, (kind, source) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def run_cells(notebook: dict) -> dict:
    """The notebook with the outputs of its cells, run in order in examples/. Raises CellExecutionError of nbclient."""
    import nbclient
    import nbformat

    node = nbformat.from_dict(notebook)
    nbclient.NotebookClient(
        node,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,  # a slow kernel sends a cell's text in pieces
        resources={"metadata": {"path": str(ROOT / "examples")}},
    ).execute()
    outputs = {cell["id"]: (cell["execution_count"], cell["outputs"]) for cell in node["cells"] if "outputs" in cell}
    cells = [
        cell | {"execution_count": outputs[cell["id"]][0], "outputs": outputs[cell["id"]][1]}
        if cell["id"] in outputs
        else cell
        for cell in notebook["cells"]
    ]
    return json.loads(json.dumps(notebook | {"cells": cells}))


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description="Make examples/walkthrough.ipynb from docs/walkthrough.md.").parse_args(
        arguments
    )
    try:
        notebook = run_cells(make_notebook(PAGE.read_text(encoding="ascii")))
    except ModuleNotFoundError as error:
        print(f"found no package {error.name}, expected those of requirements-optional.txt", file=sys.stderr)
        return 2
    NOTEBOOK.write_text(json.dumps(notebook, indent=1) + "\n", encoding="ascii", newline="\n")
    print(NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
