"""A sample with its loss weights as one self-contained HTML page, readable without colour and without a mouse.

All text of the sample goes through html_text, and the page's Content-Security-Policy admits only its own script, by
hash, so a hostile trajectory can neither run code nor fetch anything.
"""

from base64 import b64encode
from hashlib import sha256

from data.token_view import SampleView, TokenView, TurnView
from printable import html_text

KIND_TITLES = {
    "key": "key token",
    "normal": "trained",
    "eos": "end of turn",
    "masked": "masked",
    "excluded": "weight 0 in the data",
    "context": "context",
}
EOS_TEXT = "end of turn"

# Colours: every text/background pair reaches a contrast of 4.5:1 in both schemes (test_inspect_loss_weights.py).
LIGHT = {
    "page": "#ffffff",
    "panel": "#f3f4f6",
    "text": "#1a1c20",
    "faint": "#55585f",
    "line": "#8a8f98",
    "key-text": "#1f1500",
    "key": "#ffd24d",
    "normal-text": "#0b3d1c",
    "normal": "#d3f2dc",
    "eos-text": "#0a2f66",
    "eos": "#d9e6ff",
    "masked-text": "#55585f",
    "masked": "#ececec",
    "excluded-text": "#5b2a86",
    "excluded": "#efe3fa",
    "evidence-text": "#8a0f0f",
    "evidence": "#ffe3e0",
    "focus": "#0b57d0",
}
DARK = {
    "page": "#14161a",
    "panel": "#20242b",
    "text": "#e8eaed",
    "faint": "#a9b0bb",
    "line": "#78808c",
    "key-text": "#1f1500",
    "key": "#f2c037",
    "normal-text": "#bff0cf",
    "normal": "#17402a",
    "eos-text": "#cfe0ff",
    "eos": "#1d3763",
    "masked-text": "#b0b5bd",
    "masked": "#2b2f36",
    "excluded-text": "#e2cdf7",
    "excluded": "#43295c",
    "evidence-text": "#ffc9c4",
    "evidence": "#5a1f1f",
    "focus": "#8ab4f8",
}

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 12px 16px 11rem; max-width: 78rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: .4rem 0; }
h2 { font-size: 1rem; margin: 0; display: inline; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .4rem .8rem; margin: .6rem 0; }
dt { color: var(--faint); font-size: .82rem; } dd { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .6rem 0; padding: .5rem .7rem;
  background: var(--panel); border-radius: 6px; list-style: none; }
.help, .status, summary span { color: var(--faint); font-size: .9rem; }
section { border: 1px solid var(--line); border-left-width: 6px; border-radius: 6px; margin: .7rem 0;
  padding: .5rem .7rem; }
section.trained { border-left-style: double; border-left-color: var(--normal-text); }
  section.masked { border-left-style: dashed; }
section.excluded { border-left-style: dotted; border-left-color: var(--excluded-text); }
.status { margin: .1rem 0 .3rem; } .status b { color: var(--text); }
summary { cursor: pointer; }
.tokens { white-space: pre-wrap; font: 15px/2.1 ui-monospace, Menlo, Consolas, monospace; margin: .3rem 0 0; }
.t { unicode-bidi: isolate; border-radius: 3px; padding: 2px 0; cursor: pointer; scroll-margin: 5rem 0 12rem; }
.t.lead { white-space: normal; }
.t.nl::before { content: "\\21B5"; color: var(--faint); }
.key, .eos { display: inline-block; max-width: 100%; line-height: 1.4; }
.key { background: var(--key); color: var(--key-text); font-weight: 700; padding: 2px 3px; margin: 0 1px;
  border: 2px solid var(--key-text); }
.key::after { content: "\\D7" attr(data-w); font-size: .72em; margin-left: 2px; }
.normal { background: var(--normal); color: var(--normal-text); box-shadow: inset 0 -2px var(--normal-text);
  margin-right: 1px; }
.eos { background: var(--eos); color: var(--eos-text); border: 2px dotted var(--eos-text); padding: 2px 4px;
  margin: 0 2px; }
.masked.t, .legend .masked { background: var(--masked); color: var(--masked-text); text-decoration: line-through; }
.excluded.t, .legend .excluded { background: var(--excluded); color: var(--excluded-text);
  text-decoration: underline dotted; }
.evidence { background: var(--evidence); color: var(--evidence-text); text-decoration: underline wavy;
  font-weight: 700; }
.t:focus-visible, summary:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; position: relative; }
.chosen { outline: 2px solid var(--focus); outline-offset: 1px; }
#details { position: fixed; left: 0; right: 0; bottom: 0; background: var(--panel); border-top: 2px solid var(--line);
  padding: .5rem 1rem; max-height: 10.5rem; overflow: auto; }
#details div { max-width: 78rem; margin: 0 auto; } #details code { font-size: 1.05em; font-weight: 700; }
"""

# Arrow keys walk through the tokens of a turn and on into the next; Tab goes from turn to turn (one tab stop each).
SCRIPT = """
"use strict";
const tokens = [...document.querySelectorAll(".t[data-weight]")];
const details = document.querySelector("#details div");
const visible = (token) => token.getClientRects().length > 0;
function show(token) {
  document.querySelectorAll(".chosen").forEach((old) => old.classList.remove("chosen"));
  token.classList.add("chosen");
  const d = token.dataset, code = document.createElement("code");
  code.textContent = token.textContent.replace(/ /g, "\\u2423").replace(/\\n/g, "\\u21B5") || "(empty)";
  const turn = token.closest("section").querySelector("h2").textContent;
  details.replaceChildren(code, " id " + d.id + ", " + d.kind + ", w " + d.w + ", loss weight " + d.shown
    + (d.position < 0 ? ", predicted by nothing" : ", predicted at position " + d.position) + ". " + turn + ".");
}
function go(token) {
  if (!token) return;
  token.closest(".tokens").querySelectorAll('.t[tabindex="0"]').forEach((old) => { old.tabIndex = -1; });
  token.tabIndex = 0;
  token.focus();
}
function step(token, direction) {
  let index = tokens.indexOf(token) + direction;
  while (tokens[index] && !visible(tokens[index])) index += direction;
  return tokens[index];
}
function turn(token, direction) {
  const groups = [...document.querySelectorAll(".tokens")].filter((group) => visible(group.querySelector(".t")));
  const group = groups[groups.indexOf(token.closest(".tokens")) + direction];
  return group && group.querySelector('.t[tabindex="0"]');
}
document.addEventListener("keydown", (event) => {
  const token = event.target.closest && event.target.closest(".t[data-weight]");
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const group = token.closest(".tokens").querySelectorAll(".t");
  const next = { ArrowRight: () => step(token, 1), ArrowLeft: () => step(token, -1), ArrowDown: () => turn(token, 1),
    ArrowUp: () => turn(token, -1), Home: () => group[0], End: () => group[group.length - 1] }[event.key];
  if (!next) return;
  event.preventDefault();
  go(next());
});
document.addEventListener("focusin", (event) => { if (event.target.matches(".t[data-weight]")) show(event.target); });
document.addEventListener("click", (event) => {
  const token = event.target.closest(".t[data-weight]");
  if (token) go(token);
});
"""


def render_page(sample: SampleView) -> str:
    """The page as text. Every token of the sample carries `data-weight`, its exact loss weight."""
    script_hash = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; base-uri 'none'"
    title = f"Loss weights of sample {html_text(sample.id)}"
    figures = {
        "source": sample.source,
        **sample.settings,
        "input positions": sample.n_positions,
        "trained turns": sample.trained_turns,
        "trained tokens": sample.trained_tokens,
        "sum of loss weights": f"{sample.loss_weight_sum:.6f}",
        "denominator": f"{sample.denominator:.6g}",
    }
    rows = "\n".join(
        f"<div><dt>{html_text(name.replace('_', ' '))}</dt><dd>{html_text(str(value))}</dd></div>"
        for name, value in figures.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{rows}
</dl>
{_legend()}
<p class="help">Tab goes from turn to turn, the left and right arrows from token to token, up and down to the turn
before and after. Details of the chosen token are at the foot of the page.</p>
<main>
{"".join(_section(turn) for turn in sample.turns)}</main>
<aside id="details" aria-live="polite" aria-label="Details of the chosen token"><div>Choose a token.</div></aside>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colors.items())


def _legend() -> str:
    entries = (
        ('<span class="t key" data-w="9">abc</span>', "key token and its weight w"),
        ('<span class="t normal">abc</span>', "trained, w = 1"),
        (f'<span class="t eos">{EOS_TEXT}</span>', "EOS, trained, w = 1"),
        ('<span class="t masked">abc</span>', "masked turn: weight 0, stays context"),
        ('<span class="t excluded">abc</span>', "turn of weight 0 in the data, stays context"),
        ('<span class="t">abc</span>', "context, not trained"),
        ('<span class="t evidence">abc</span>', "feedback that caused the turn before it to be masked"),
    )
    items = "".join(f"<li>{mark} {meaning}</li>" for mark, meaning in entries)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


# ---------------------------------------------------------------------------------------------------------------------
# Turns and tokens


def _section(turn: TurnView) -> str:
    number = "" if turn.message_index < 0 else f"Message {turn.message_index}: "
    name = f" {html_text(turn.call_name)}" if turn.call_name else ""
    heading = f"<h2>{number}{html_text(turn.title)}{name}</h2>"
    is_masked = turn.decision is not None and turn.decision.masked
    state = "masked" if is_masked else "trained" if turn.is_trained else "excluded" if turn.is_excluded else "context"
    first = next((i for i, token in enumerate(turn.tokens) if token.kind != "context"), 0)  # the turn's tab stop
    tokens = "".join(_token(token, is_tab_stop=i == first, is_lead=i == 0) for i, token in enumerate(turn.tokens))
    body = f'<div class="tokens" role="group" aria-label="{number}tokens">{tokens}</div>'
    if turn.message_index < 0:  # long: folded until asked for
        note = f"<span>{len(turn.tokens)} tokens, not trained</span>"
        body = f"<details><summary>{heading} {note}</summary>{body}</details>"
        heading = ""
    return f'<section class="{state}">{heading}{_status(turn)}{body}</section>\n'


def _status(turn: TurnView) -> str:
    decision = turn.decision
    if decision is None:
        return ""
    if decision.masked:
        matched = f", matched <q>{html_text(decision.matched_text)}</q>" if decision.matched_text else ""
        return (
            f'<p class="status"><b>Masked: {html_text(decision.category)}</b>, rule {html_text(decision.rule)}'
            f"{matched}. Weight 0, stays context.</p>"
        )
    if turn.is_excluded:
        return '<p class="status"><b>Excluded</b>: weight 0 in the data, stays context.</p>'
    trained = [token for token in turn.tokens if token.loss_weight]
    n_key = sum(token.kind == "key" for token in trained)
    return (
        f'<p class="status"><b>Trained</b>: {len(trained)} tokens, {n_key} key, sum of w '
        f"{sum(token.key_weight for token in trained):.6g}, sum of loss weights {turn.loss_weight_sum:.6f}.</p>"
    )


def _token(token: TokenView, *, is_tab_stop: bool, is_lead: bool) -> str:
    text = EOS_TEXT if token.kind == "eos" else token.text
    classes = [
        "t",
        *([] if token.kind == "context" else [token.kind]),
        *(["evidence"] if token.is_evidence else []),
        *(["nl"] if "\n" in text else []),
        *(["lead"] if is_lead else []),
    ]  # a turn's own newline takes no line
    return (
        f'<span class="{" ".join(classes)}" tabindex="{0 if is_tab_stop else -1}" data-id="{token.token_id}" '
        f'data-kind="{KIND_TITLES[token.kind]}" data-w="{token.key_weight:.4g}" '
        f'data-weight="{token.loss_weight!r}" data-shown="{token.loss_weight:.6g}" '
        f'data-position="{token.position}">{html_text(text)}</span>'
    )
