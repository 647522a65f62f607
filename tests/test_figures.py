"""The pictures of docs/: drawn again byte for byte, numbers worked by hand, texts that do not overlap, contrast."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples import draw_figures
from svg import DARK, LIGHT, SERIES, pixels
from tests.support.pictures import SVG, assert_texts_are_apart, contrast

ROOT = Path(__file__).resolve().parent.parent
PICTURES = sorted((ROOT / "docs/figures").glob("*.svg"))
each_picture = pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)


def texts(name: str) -> list[str]:
    """The texts of a committed picture, in the order they were drawn."""
    root = ElementTree.parse(ROOT / "docs/figures" / f"{name}.svg").getroot()
    return [element.text for element in root.iter(f"{SVG}text")]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("name", draw_figures.FIGURES)
def test_drawn_again_byte_for_byte(name):
    drawn = draw_figures.FIGURES[name]().encode("ascii")
    assert drawn == (ROOT / "docs/figures" / f"{name}.svg").read_bytes()


def test_command_writes_all_pictures(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        draw_figures.main(["--help"])  # once made a folder of that name
    assert capsys.readouterr().out.startswith("usage: ") and not Path("--help").exists()
    assert draw_figures.main([str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(draw_figures.FIGURES)
    assert capsys.readouterr().out.count("\n") == len(draw_figures.FIGURES)


def test_key_token_weights_by_hand():
    """The failed call has 11 tokens of weight 0. The corrected one: 13 of its 14 tokens from the name on without EOS,
    2 of them key, so w = 11 / 2; blank, 11 others and EOS weigh 1."""
    weights = [label for label in texts("e02_key_token_weights") if re.fullmatch(r"[\d.]+", label)]
    assert weights.count("5.5") == 2
    shown = " ".join(texts("e02_key_token_weights"))
    assert "2 key tokens, 11 others" in shown and shown.count("compare") == 2


def test_normalisations_by_hand():
    """Weights 3 1 1 1 (sum 6) and 5 1 1 1 1 1 1 1 (sum 12): half of 3/6, of 1/6, of 5/12, of 1/12; over 18 without."""
    labels = [label for label in texts("e06_normalisations") if re.fullmatch(r"[\d.]+", label)]
    assert labels[:4] + labels[4:6] == ["0.25", "0.083", "0.083", "0.083", "0.208", "0.042"]  # E6
    assert labels[12:14] + labels[16:18] == ["0.167", "0.056", "0.278", "0.056"]  # E7: 3/18, 1/18, 5/18, 1/18
    assert labels[24:26] + labels[28:30] == ["3", "1", "5", "1"]  # E8


def test_gradients_by_hand():
    """z = W h with h = (2, 1): 2*1 + 0, 0 + 1, -2 + 0.5, 1 - 1. softmax = exp(z) / (7.389 + 2.718 + 0.223 + 1)."""
    logits, probabilities, logits_gradient, hidden_gradient = draw_figures.logits_and_gradients()
    assert logits == [2.0, 1.0, -1.5, 0.0]
    assert probabilities == pytest.approx([0.6521, 0.2399, 0.0197, 0.0883], abs=1e-4)
    assert logits_gradient == pytest.approx([1.3042, -1.5202, 0.0394, 0.1765], abs=2e-4)
    # 1.3042 * 1 - 0.0394 * 1 + 0.1765 * 0.5; -1.5202 + 0.0394 * 0.5 - 0.1765
    assert hidden_gradient == pytest.approx([1.3531, -1.6770], abs=3e-4)


def test_schedule_by_hand():
    """Step 1 of W = 10 has 1/11; step 100: linear 1 - 89/90, cosine (1 + cos(89/90 pi)) / 2."""
    shown = texts("e12_schedules")
    assert "linear 0.0111" in shown and "cosine 0.0003" in shown and "constant 1" in shown
    assert any(label.endswith("step 1 has 0.091") for label in shown)


def test_rope_by_hand():
    """The slowest pair turns 500000^(-126/128) per token. Pair j makes 8192 * omega_j / 2 pi turns: below 1 it is
    divided by 8, from 4 on kept; omega_j = 500000^(-j/64) makes 4 turns at j = 28.2 and 1 turn at j = 35.0."""
    frequencies = draw_figures.rope_frequencies()
    slowest = math.exp(-126 / 128 * math.log(500_000))
    assert frequencies["plain"][63] == pytest.approx(slowest, rel=1e-5)
    assert frequencies["llama3"][63] == pytest.approx(slowest / 8, rel=1e-5)
    # ln(8192 / (4 * 2 pi)) / ln(500000) * 64 = 28.22, and for one turn 34.98
    assert "pairs 0-28 kept, 29-34 blended, 35-63 divided by 8" in texts("e16_rope")


def test_wilson_by_hand():
    """k = 0: the upper bound is z^2 / (n + z^2) with z^2 = 3.8415: 3.8415 / 13.8415 and 3.8415 / 103.8415."""
    shown = texts("e20_wilson")
    assert "0: 0-27.8 %" in shown and "0: 0-3.7 %" in shown


def test_rewards_by_hand():
    """The paper's numbers; parameter faults add up."""
    rewards = [float(label) for label in texts("e22_reward_tree") if re.fullmatch(r"[+-]\d\.\d\d", label)]
    assert rewards == [-2.0, -2.0, -1.5, -0.8, -0.5, -0.5, -1.3, -1.3, -1.0, -1.8, -0.25, 1.0]


def test_ledger_by_hand():
    """The same numbers as in the table of docs/math.md, which works them out."""
    numbers = draw_figures.ledger_numbers()
    assert numbers["reward"] == pytest.approx([-0.02, 0.04, 1.0])
    assert numbers["advantage"] == pytest.approx([0.674, 0.52, 0.4])
    assert numbers["return"] == pytest.approx([0.974, 1.02, 1.0])


def test_kl_estimates_by_hand():
    """At pi / pi_ref = 0.2, d = -ln 5 = -1.6094: d^2 / 2 = 1.2951, exp(-d) - 1 + d = 5 - 1 - 1.6094."""
    ratios, estimates = draw_figures.kl_curves()
    assert ratios[0] == 0.2
    assert [estimates[name][0] for name in ("k1", "k2", "k3")] == pytest.approx([-1.6094, 1.2951, 2.3906], abs=1e-4)


def test_clipped_losses_by_hand():
    assert draw_figures.policy_loss_curve(1.0, [0.5, 1.1, 1.5]) == pytest.approx([-0.5, -1.1, -1.2])
    assert draw_figures.policy_loss_curve(-1.0, [0.5, 1.1, 1.5]) == pytest.approx([0.8, 1.1, 1.5])
    assert "clipped: 0.045" in texts("e29_clipped_losses")  # 0.5 * (0.2 - 0.5)^2


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@each_picture
def test_texts_are_inside_and_do_not_overlap(path):
    assert_texts_are_apart(ElementTree.parse(path).getroot())


@each_picture
def test_screen_readers_get_title_and_description(path):
    root = ElementTree.parse(path).getroot()
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img" and root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert len(title.text) > 10 and len(description.text) > 60


@each_picture
def test_both_schemes_and_nothing_from_outside(path):
    source = path.read_text(encoding="ascii")
    assert "prefers-color-scheme:dark" in source and source.count("http") == 1  # the namespace
    assert path.stat().st_size < 40_000


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_of_text_and_marks(colors):
    for name in ("ink", "faint", *SERIES):  # the series also colour text
        assert contrast(colors[name], colors["page"]) >= 4.5, name


def test_pixels_hide_rounding_errors():
    assert [pixels(value) for value in (-0.001, 3.0000000001, 2.26, -1.5)] == ["0", "3", "2.3", "-1.5"]


def test_every_picture_is_on_a_page():
    pages = "".join(path.read_text("ascii") for path in (ROOT / "docs").glob("*.md"))
    for path in PICTURES:
        assert f"](figures/{path.name})" in pages, path.name
