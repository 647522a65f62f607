"""One self-contained HTML page that shows runs: SFT, PPO and evaluation folders together.

    python -m eval.run_page runs/sft runs/ppo runs/eval_base runs/eval_sft runs/eval_ppo --html runs/page.html

The page fetches nothing and runs no script. It is read from the folders' files alone (of evaluations also the
benchmark's file, if it is unchanged), so the same folders give the same bytes. What a folder lacks, and what is damaged
in it, is said on the page. docs/metrics.md explains the numbers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, write_text
from eval.reports.evaluation_page import describe_evaluations, evaluations_section
from eval.reports.page_parts import html_text, items, paragraph, section
from eval.reports.run_folders import EVALUATION, RunFolder, read_run_folders
from eval.reports.training_page import describe_training, training_section
from printable import terminal_text
from svg import CHART_PATTERNS, CHART_STYLE, DARK, DARK_AREAS, HATCH, LIGHT, LIGHT_AREAS, STYLE

PAGE_START = "<!DOCTYPE html>"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 12px 16px 4rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.3rem; border-top: 2px solid var(--ink); padding-top: .8rem;
  margin-top: 2.4rem; } h3 { font-size: 1.1rem; margin-top: 1.6rem; } h4, h5 { font-size: 1rem; margin: .2rem 0; }
h4 { margin-top: 1.2rem; } article h4 { margin-top: .2rem; }
p { max-width: 46rem; margin: .5rem 0; } .note { color: var(--faint); font-size: .92rem; }
a { color: var(--a); } nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
:focus-visible { outline: 3px solid var(--a); outline-offset: 2px; }
.problems { border-left: 6px double var(--b); padding: .4rem .6rem .4rem 1.8rem; }
.problems::before { content: "Missing or damaged:"; font-weight: 700; margin-left: -1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: .8rem 1rem; }
figure { margin: 0; } svg { display: block; width: 100%; max-width: 30rem; height: auto; }
details { margin: .5rem 0; } details details { margin-left: 1rem; } summary { cursor: pointer; }
.scroll { overflow-x: auto; max-width: 100%; margin: .6rem 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .92rem; min-width: min(22rem, 100%); }
caption { text-align: left; font-weight: 700; padding: .2rem 0; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top;
  max-width: 28rem; overflow-wrap: break-word; } thead th { border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 400; } .n { font-variant-numeric: tabular-nums; white-space: nowrap; }
article { border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .8rem; margin: .8rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .5rem 1rem;
  margin: .5rem 0; } .answers dt { font-weight: 700; font-size: .92rem; } .answers dd { margin: 0; }
pre { margin: .2rem 0; white-space: pre-wrap; font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; }
mark { background: var(--mark); color: var(--ink); text-decoration: underline 2px; }
svg.defs { position: absolute; width: 0; height: 0; }
@media print { nav, .skip { display: none; } figure, article, tr { break-inside: avoid; }
  .scroll { overflow: visible; } }
"""
WORDS = (
    "SFT: supervised fine-tuning, the first stage. The model learns to repeat the calls of recorded dialogues.",
    "MAE: turns whose call failed are masked: they stay in the dialogue, but are not trained.",
    "PKT: the tokens that decide between tools, key tokens, weigh more in the loss.",
    "Loss: mean negative logarithm of the probability of the right next token, in nats; 0 would be perfect.",
    "PPO: the second stage. The model samples answers, a rule rewards them, and likely answers shift to better ones.",
    "Reward: +1 for the gold call, down to -2 for no call at all; by the rule alone, before the KL is subtracted.",
    "KL: how far the model has moved from the SFT model, in nats; it is subtracted from the reward.",
    "Critic: a model that predicts the reward, so that PPO learns from surprises. Explained variance 1 = it is right.",
    "95 % interval: the range of true rates that fit the measured one; wide where n is small.",
)


def render_page(folders: Sequence[RunFolder]) -> str:
    """The page as text: a summary in words, then each training run, then the evaluations together."""
    training = [folder for folder in folders if folder.kind != EVALUATION]
    evaluations = [folder for folder in folders if folder.kind == EVALUATION]
    parts = [(f"run-{number}", folder) for number, folder in enumerate(training, 1)]
    links = [(identifier, f"{folder.name} ({folder.kind})") for identifier, folder in parts]
    links += [("evaluations", "Evaluations")] if evaluations else []
    listed = "".join(f'<li><a href="#{identifier}">{html_text(words)}</a></li>' for identifier, words in links)
    body = [training_section(folder, identifier) for identifier, folder in parts]
    body += [evaluations_section(evaluations, "evaluations")] if evaluations else []
    title = html_text("Runs: " + ", ".join(folder.name for folder in folders))
    return f"""{PAGE_START}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; {_variables(LIGHT, LIGHT_AREAS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, DARK_AREAS)} }} }}
{STYLE}{CHART_STYLE}{PAGE_STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the runs</a>
<svg class="defs" width="0" height="0" aria-hidden="true" focusable="false">{HATCH}{CHART_PATTERNS}</svg>
<header>
<h1>{title}</h1>
<nav aria-label="Parts of this page"><ul><li><a href="#summary">In short</a></li>{listed}</ul></nav>
</header>
<main id="main" tabindex="-1">
{_summary(training, evaluations)}
{"".join(body)}
</main>
</body>
</html>
"""


def _summary(training: Sequence[RunFolder], evaluations: Sequence[RunFolder]) -> str:
    """What a newcomer should know first."""
    problems = sum(len(folder.problems) for folder in (*training, *evaluations))
    counts = [
        f"{len(group)} {noun}{'s' * (len(group) != 1)}"
        for group, noun in ((training, "training run"), (evaluations, "evaluation"))
        if group
    ]
    lead = f"This page shows {' and '.join(counts)}."
    if problems:
        lead += f" {problems} file{'s are' if problems != 1 else ' is'} missing or damaged; the parts below say which."
    return section(
        2,
        "In short",
        "summary",
        paragraph(lead),
        *(paragraph(describe_training(folder)) for folder in training),
        *map(paragraph, describe_evaluations(evaluations)),
        "<details><summary>Words used on this page</summary>" + items(WORDS) + "</details>",
    )


def _variables(colors: dict[str, str], tints: Sequence[str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in ({**colors, "mark": tints[3]}).items())


def check_replaceable(page: Path) -> None:
    """Raise DataError if `page` is there and neither empty nor an HTML page. Reads its start alone, and no pipe, which
    may not end."""
    is_page = not page.exists()
    if page.is_file():
        with page.open("rb") as file:
            is_page = file.read(len(PAGE_START)) in (b"", PAGE_START.encode())
    if not is_page:
        raise DataError(f"{page}: found no HTML page, expected a new file or a page to replace")


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m eval.run_page", description="One HTML page that shows runs.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of run_sft.py, run_ppo.py or run_eval.py"
    )
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parse_arguments(parser, arguments)

    def command() -> None:
        check_replaceable(flags.html)
        write_text(flags.html, render_page(read_run_folders(flags.runs)))
        print(f"page: {terminal_text(str(flags.html))}")

    return run_command(command, (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
