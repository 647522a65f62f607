"""What the inspector shows is what training uses, in terminal and page; hostile text stays text."""

import json
import re
import shutil
import subprocess
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import pytest
import sentencepiece

from data.inspect_loss_weights import format_sample, main
from data.loss_weights import encode_trajectory
from data.loss_weights_page import DARK, LIGHT, SCRIPT, render_page
from data.token_view import view_sample
from data.tool_calls import ToolCall
from printable import terminal_lines
from tests.data.test_loss_weights import FIND_PAPER, TOOLS, trajectory
from tests.support.piece_tokenizer import PieceTokenizer

SETTINGS = {"error_filter": "structured", "key_tokens": True, "max_key_token_weight": 9.0}
HOSTILE = trajectory(
    ("user", "</span><script>document.title='pwned'</script> <img src=x onerror=alert(1)> \x1b[31m \u202e & \"'", None),
    ("assistant", "", ToolCall("get_paper", {"id": "</script><script>alert(2)</script>"})),
    ("tool", '{"error": "<b onmouseover=alert(3)> Invalid API key"}', None),
    ("assistant", "", ToolCall("get_paper_details", {"id": '"><svg onload=alert(4)>'})),
    ("tool", "--><style>*{display:none}</style>", None),
    ("assistant", "<!-- done", None),
    trajectory_id="<b>&\"id'",
)


def view(sample, normalization="turn_mean", tokenizer=None):
    tokenizer = tokenizer or PieceTokenizer()
    row = encode_trajectory(sample, tokenizer, **SETTINGS, loss_normalization=normalization)
    raw_row = encode_trajectory(sample, tokenizer, **SETTINGS, loss_normalization="sum")
    return view_sample(sample, row, raw_row, tokenizer, settings={"error_filter": "structured"}), row


class PageReader(HTMLParser):
    """Every element's name and attributes, and the text of each token span."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.tokens, self.scripts, self.inside = [], [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if "data-weight" in dict(attributes):
            self.tokens.append([dict(attributes), ""])
        self.inside = "token" if "data-weight" in dict(attributes) else tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "token":
            self.tokens[-1][1] += text
        elif self.inside == "script":
            self.scripts.append(text)


# ---------------------------------------------------------------------------------------------------------------------
# View


@pytest.mark.parametrize("normalization", ["turn_mean", "token_mean", "sum"])
@pytest.mark.parametrize("sample", [FIND_PAPER, HOSTILE])
def test_every_weight_of_the_row_is_shown_once(sample, normalization):
    shown, row = view(sample, normalization)
    tokens = [token for turn in shown.turns for token in turn.tokens]
    weighted = {token.position: token.loss_weight for token in tokens if token.position >= 0}
    assert len(weighted) == sum(token.position >= 0 for token in tokens)  # no position twice
    assert {p: w for p, w in weighted.items() if w} == {p: w for p, w in enumerate(row.loss_weights) if w}
    assert shown.loss_weight_sum == sum(row.loss_weights)
    assert [turn.message_index for turn in shown.turns] == [-1, *range(len(sample.messages))]


def test_the_view_reads_as_the_prompt_with_eos_behind_trained_turns():
    tokenizer = PieceTokenizer()
    shown, row = view(FIND_PAPER, tokenizer=tokenizer)
    tokens = [token for turn in shown.turns for token in turn.tokens]
    assert [t.token_id for t in tokens if t.kind != "eos"] == list(row.input_ids)
    assert [turn.is_trained for turn in shown.turns] == [False, False, False, False, True, False, True]
    assert "".join(t.text for t in shown.turns[2].tokens if t.kind == "masked") == ' get_paper(id="7")'
    assert [t.text for t in shown.turns[4].tokens if t.kind == "key"] == [" get", "_"]
    evidence = "".join(t.text for t in shown.turns[3].tokens if t.is_evidence)
    assert "Invalid API key" in evidence and evidence.strip().startswith(('{"error"', '"error"'))


def test_printable_escapes_what_acts_on_a_terminal():
    assert terminal_lines("a\x1b[31m\u202eb\ud800\x00\nc") == "a\\x1b[31m\\u202eb\\ud800\\x00\nc"


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def test_terminal_text_has_markers_without_colour():
    text = format_sample(view(FIND_PAPER)[0], color=False, max_context=None)
    assert "\x1b" not in text
    assert '[ get*4.5]|_|paper|[_*4.5]|detai|ls|(|id|="|7|")|</s>|' in text
    assert '~ get_paper(id="7")~' in text and ">>" in text and "<<" in text
    assert "MASKED: tool_call_failure" in text and "matched " in text
    assert "TRAINED: 12 tokens, 2 key, sum of w 19, loss weights sum 1" in text
    assert "2 trained turns, 21 trained tokens, loss weights sum 2, denominator 2" in text


def test_a_turn_of_weight_0_in_the_data_is_its_own_class():
    messages = list(FIND_PAPER.messages)
    messages[3] = replace(messages[3], weight=0)
    shown = view(replace(FIND_PAPER, messages=messages))[0]
    text = format_sample(shown, color=False, max_context=None)
    assert '{ get_paper_details(id="7")}' in text and "EXCLUDED: weight 0 in the data" in text
    assert "1 trained turns, 9 trained tokens" in text and "MASKED: tool_call_failure" in text
    page = render_page(shown)
    assert '<section class="excluded">' in page and "<b>Excluded</b>: weight 0 in the data" in page
    assert sum(a["data-kind"] == "weight 0 in the data" for a, _ in PageReader(page).tokens) == 11


def test_terminal_colours_add_nothing_but_colours():
    shown = view(HOSTILE)[0]
    plain, colored = (format_sample(shown, color=color, max_context=20) for color in (False, True))
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain and "\x1b[30;43;1m" in colored
    assert "\x1b" not in plain  # the sample's own escape characters are written out
    assert "more context tokens (--full_context)" in plain


# ---------------------------------------------------------------------------------------------------------------------
# Page


@pytest.mark.parametrize("normalization", ["turn_mean", "token_mean", "sum"])
def test_page_holds_every_token_and_the_encoded_sum(normalization):
    shown, row = view(HOSTILE, normalization)
    page = PageReader(render_page(shown))
    expected = [token for turn in shown.turns for token in turn.tokens]
    assert [text for _, text in page.tokens] == ["end of turn" if t.kind == "eos" else t.text for t in expected]
    assert sum(float(a["data-weight"]) for a, _ in page.tokens) == pytest.approx(sum(row.loss_weights), abs=1e-12)
    assert f"{sum(row.loss_weights):.6f}" in render_page(shown)
    assert [int(a["data-position"]) for a, _ in page.tokens if float(a["data-weight"])] == [
        position for position, weight in enumerate(row.loss_weights) if weight
    ]


def test_hostile_text_stays_text():
    text = render_page(view(HOSTILE)[0])
    page = PageReader(text)
    assert page.scripts == [SCRIPT]
    names = {tag for tag, _ in page.elements}
    assert not names & {"img", "svg", "iframe", "link", "object", "b onmouseover"} and names >= {"main", "section"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    for attribute in ("src", "href", "action"):
        assert not any(attribute in attributes for _, attributes in page.elements)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{b64encode(sha256(SCRIPT.encode()).digest()).decode()}'" in policy
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert text.encode("utf-8") and "\x1b" not in text and "\u202e" not in text


def test_page_can_be_walked_with_the_keyboard():
    page = PageReader(render_page(view(HOSTILE)[0]))
    stops = [attributes for attributes, _ in page.tokens if attributes["tabindex"] == "0"]
    assert len(stops) == 1 + len(HOSTILE.messages)  # one tab stop per turn, the arrows reach the rest
    assert all(attributes["tabindex"] in ("0", "-1") for attributes, _ in page.tokens)
    details = [attributes for tag, attributes in page.elements if tag == "aside"]
    assert [a["id"] for a in details] == ["details"] and details[0]["aria-live"] == "polite"


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


TEXT_PAIRS = (  # text and what it is written on
    ("text", "page"),
    ("faint", "page"),
    ("text", "panel"),
    ("faint", "panel"),
    ("key-text", "key"),
    ("normal-text", "normal"),
    ("eos-text", "eos"),
    ("masked-text", "masked"),
    ("excluded-text", "excluded"),
    ("evidence-text", "evidence"),
)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_reaches_wcag_aa(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0) and contrast("#777777", "#ffffff") < 4.5  # known
    for text, background in TEXT_PAIRS:
        assert contrast(scheme[text], scheme[background]) >= 4.5, (text, background)
    for line in ("line", "focus"):  # edges and focus rings: 3:1
        assert contrast(scheme[line], scheme["page"]) >= 3.0, line


# ---------------------------------------------------------------------------------------------------------------------
# In a real browser

HARNESS = """<body><iframe id="narrow" src="page.html" width="360" height="800"></iframe>
<iframe id="wide" src="page.html" width="1280" height="800"></iframe><pre id="out"></pre><script>
addEventListener("load", () => {
  const out = {};
  for (const name of ["narrow", "wide"]) {
    const inner = document.getElementById(name).contentDocument, root = inner.documentElement;
    const press = (key) => inner.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const at = () => inner.activeElement.textContent;
    const stop = inner.querySelector('section.trained .t[tabindex="0"]');
    stop.focus();
    const seen = [at()];
    for (const key of ["ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home", "ArrowDown", "ArrowUp"]) {
      press(key);
      seen.push(at());
    }
    stop.focus();
    out[name] = { fits: root.scrollWidth <= root.clientWidth, title: inner.title, seen,
      details: inner.querySelector("#details div").textContent,
      sum: [...inner.querySelectorAll("[data-weight]")].reduce((sum, t) => sum + Number(t.dataset.weight), 0) };
  }
  document.getElementById("out").textContent = JSON.stringify(out);
});
</script></body>"""


@pytest.mark.slow
def test_page_in_chromium_at_phone_and_desktop_width(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    shown, row = view(HOSTILE)
    (tmp_path / "page.html").write_text(render_page(shown), encoding="utf-8")
    (tmp_path / "harness.html").write_text(HARNESS, encoding="utf-8")
    command = [
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--allow-file-access-from-files",
        "--virtual-time-budget=10000",
        "--dump-dom",
        (tmp_path / "harness.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
    found = json.loads(
        re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    for width in ("narrow", "wide"):
        assert found[width]["fits"], width
        assert found[width]["title"] == f"Loss weights of sample {HOSTILE.id}"  # no script of the sample ran
        assert found[width]["sum"] == pytest.approx(sum(row.loss_weights), abs=1e-9)
        assert found[width]["seen"][:3] == [" get", "_", "paper"]
        assert found[width]["seen"][3:7] == ["end of turn", "\n", "end of turn", "\n"]  # End, on, back, Home
        assert " get" not in found[width]["seen"][7]  # down: the next turn's stop
        assert found[width]["seen"][8] == "\n"  # up: back to where the turn was left
        assert "key token, w " in found[width]["details"] and "assistant get_paper_details" in found[width]["details"]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data file in OpenAI form and a small SentencePiece model."""
    folder = tmp_path_factory.mktemp("inspect")
    messages = [
        {"role": "user", "content": "Find it"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_paper", "arguments": '{"id": "7"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": '{"error": "Invalid API key"}'},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "b", "type": "function", "function": {"name": "finish", "arguments": '{"answer": "no"}'}}
            ],
        },
    ]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"id": f"s{i}", "tools": TOOLS, "messages": messages}) + "\n" for i in range(2)))
    text = folder / "text.txt"
    text.write_text(
        "\n".join(
            f'get_paper(id="{i}") finish(answer="paper {i} is found") System: User: Assistant: '
            'Output: {"error": "Invalid API key"} def Function: Args: string'
            for i in range(200)
        )
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        model_type="bpe",
        byte_fallback=False,
        character_coverage=1.0,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return data, folder / "tokenizer.model", folder


def run_main(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line_prints_and_writes(files, capsys):
    data, tokenizer, folder = files
    code, out, err = run_main(capsys, "--data", data, "--model", tokenizer, "--index", 1, "--no_color")
    assert (code, err) == (0, "") and out.startswith("sample s1 (") and "MASKED: tool_call_failure" in out
    assert run_main(capsys, "--data", data, "--model", tokenizer, "--id", "s1", "--no_color")[1] == out
    page = folder / "page.html"
    assert run_main(capsys, "--data", data, "--model", tokenizer, "--html", page)[0] == 0
    assert PageReader(page.read_text(encoding="utf-8")).scripts == [SCRIPT]


def test_bad_input_is_one_line_and_code_2(files, capsys):
    data, tokenizer, folder = files
    bad = folder / "bad.jsonl"
    bad.write_text('{"id": 1, "messages": [\n')
    for arguments, message in [
        (("--data", folder / "absent.json"), "absent.json"),
        (("--data", bad), "bad.jsonl:1"),
        (("--data", data, "--model", tokenizer, "--index", 2), "found --index 2, expected 0 to 1"),
        (("--data", data, "--model", tokenizer, "--index", -1), "found --index -1"),
        (("--data", data, "--model", tokenizer, "--id", "zzz"), "no trajectory with id 'zzz'"),
        (("--data", data, "--model", folder / "nowhere"), "nowhere"),
        (("--data", data, "--model", tokenizer, "--max_key_token_weight", 0.5), "max_weight: found 0.5"),
        (("--data", data, "--model", tokenizer, "--html", folder / "no" / "folder.html"), "folder.html"),
    ]:
        code, out, err = run_main(capsys, *arguments)
        assert code == 2 and out == "" and message in err and err.count("\n") == 1, arguments
