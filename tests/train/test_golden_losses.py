"""Ten losses and gradient norms of the bundled run, committed: a change that should not alter training leaves them.

To change them on purpose: `python -m tests.train.test_golden_losses "why they moved"`; the reason is kept in the file.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from run_sft import main

GOLDEN = Path(__file__).parent / "golden" / "sft_losses.txt"
STEPS = 10


def ten_steps(output: Path) -> list[tuple[float, float, int]]:
    """(loss, gradient norm, trained tokens) of the first steps of `python run_sft.py`."""
    assert main(["--output", str(output), "--max_steps", str(STEPS), "--plot", "off", "--checkpoint_every", "0"]) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["sft/loss"], row["sft/grad_norm"], row["sft/trained_tokens"]) for row in rows]


def test_bundled_run_has_the_committed_losses(tmp_path):
    lines = [line.split() for line in GOLDEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found = ten_steps(tmp_path / "run")
    assert len(lines) == len(found) == STEPS
    for (loss, norm, tokens), (golden_loss, golden_norm, golden_tokens) in zip(found, lines, strict=True):
        assert loss == pytest.approx(float(golden_loss), rel=1e-5)
        assert norm == pytest.approx(float(golden_norm), rel=1e-4)  # a norm sums the rounding of 2 million entries
        assert tokens == int(golden_tokens)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.train.test_golden_losses REASON")
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(f"{loss:.9f} {norm:.9f} {tokens}\n" for loss, norm, tokens in ten_steps(Path(folder) / "run"))
    GOLDEN.write_text(
        f"# loss, gradient norm, trained tokens of steps 1 to {STEPS}; {sys.argv[1]}\n{rows}", encoding="utf-8"
    )
