"""eval.ablation: which cells, how they are run, stopped and resumed, with tiny programs; one real cell; the tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from command_line import read_config
from data.json_records import DataError
from eval import ablation
from eval.ablation import PPO_FLAGS, QUICK_PPO_FLAGS, cells_of, commands_of, main, read_flags, write_data, write_prompts
from eval.cells import check_folder, opened, read_finished, run_cells, seconds_left, write_once
from eval.reports.ablation_tables import (
    METHODS,
    Cell,
    difference_rows,
    irm_rows,
    paper_difference,
    rate_rows,
    write_tables,
)
from rl.ppo_config import PPOConfig
from tests.support.tiny_run import ROOT
from toolbox.make import draw_split

SMALL = ["--quick", "--seeds", "1", "--ppo_seeds", "0", "--prompts", "6", "--trajectories", "8", "--output"]
NONE, MAE, IRM, MAE_IRM = Cell("none", 0), Cell("MAE", 0), Cell("IRM", 0), Cell("MAE+IRM", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def test_eight_methods_and_one_sft_model_for_two_of_them():
    cells = cells_of(3, 1)
    assert len(cells) == 3 * 4 + 4 and len(set(cells)) == 16
    assert {cell.method for cell in cells if cell.seed == 0} == set(METHODS)
    assert {cell.method for cell in cells if cell.seed == 2} == {"none", "MAE", "PKT", "MAE+PKT"}
    assert MAE_IRM.start() == MAE and IRM.start() == NONE == NONE.start()
    assert [str(cell) for cell in cells[:2]] == ["none, seed 0", "MAE, seed 0"]


@pytest.mark.parametrize(
    ("method", "filter_and_key_tokens"),
    [("none", "none off"), ("MAE", "structured off"), ("PKT", "none on"), ("MAE+PKT", "structured on")],
)
def test_flags_of_sft(tmp_path, method, filter_and_key_tokens):
    train, score = commands_of(tmp_path, Cell(method, 3), "")
    flags = dict(zip(train[1::2], train[2::2], strict=True))
    assert f"{flags['--error_filter']} {flags['--key_tokens']}" == filter_and_key_tokens
    assert train[0] == "run_sft.py" and flags["--seed"] == "3"
    assert flags["--output"] + "/final" == score[score.index("--model") + 1]
    assert flags["--data"].endswith("data/train.json")
    after = commands_of(tmp_path, Cell(f"{method}+IRM".removeprefix("none+"), 3), "--kl_coef 0.2")
    assert after[0][after[0].index("--data") + 1].endswith("data/ppo.json")
    assert after[0][:4] == ["run_ppo.py", "--model", flags["--output"] + "/final", "--kl_coef"]
    assert after[0][after[0].index("--output") + 1] + "/final" == after[1][after[1].index("--model") + 1]


def test_data_are_held_out_and_all_different(tmp_path):
    write_data(tmp_path, 200, 5, alike=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    train, ppo = json.loads(files.pop("train.json")), json.loads(files.pop("ppo.json"))
    assert ppo == json.loads((ROOT / "assets/tiny_data/train.json").read_text())
    assert len(ppo) == 1217 and train == ppo[:5]
    trained = {turn["content"] for record in ppo for turn in record["conversations"] if turn["role"] == "user"}
    records = {name: [json.loads(line) for line in lines.splitlines()] for name, lines in files.items()}
    assert records.keys() == {"test_seen.jsonl", "test_unseen.jsonl", "test_hard.jsonl", "test_alike.jsonl"}
    queries = [record["messages"][0]["content"] for each in records.values() for record in each]
    assert len(queries) == len(set(queries)) == 800 and not trained & set(queries)
    for name in ("train.json", "test_alike.jsonl"):  # what is missing is made again, alike
        before = (tmp_path / "data" / name).read_bytes()
        (tmp_path / "data" / name).unlink()
        write_data(tmp_path, 200, 5, alike=False)
        assert (tmp_path / "data" / name).read_bytes() == before
        (tmp_path / "data" / name).write_bytes(before[:-2])
        with pytest.raises(DataError, match=f"{name}: found another text, expected what this command draws"):
            write_data(tmp_path, 200, 5, alike=False)
        (tmp_path / "data" / name).write_bytes(before)


def test_a_pipe_in_the_place_of_data_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.json")
    with pytest.raises(DataError, match=r"train\.json: found no regular file"):
        write_once(tmp_path / "train.json", "[]")


def test_more_prompts_than_the_world_has_are_refused_before_any_cell(tmp_path, monkeypatch):
    prompts = [*draw_split("seen", 5, 3)]
    monkeypatch.setattr(ablation, "draw_split", lambda *_: [*prompts, *prompts])
    trained = {"conversations": [{"role": "user", "content": prompts[0]["messages"][0]["content"]}]}
    with pytest.raises(DataError, match="--prompts: found 3, expected at most 2, all that tiny-seen has"):
        write_prompts(tmp_path, [trained], 3)
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------------------------------------------------
# Running


def python(code: str) -> list[str]:
    return ["-c", code]


def appends(tmp_path, word: str, code: str = "") -> list[str]:
    return python(f"import time; {code}\nopen({str(tmp_path / 'order')!r}, 'a').write({word!r})")


def test_a_cell_with_irm_waits_for_its_sft_and_all_run_once(tmp_path):
    programs = {
        NONE: [appends(tmp_path, "n", "time.sleep(0.3)"), appends(tmp_path, "N")],
        IRM: [appends(tmp_path, "i"), appends(tmp_path, "I")],
        MAE: [appends(tmp_path, "m")],
    }
    finished = dict(run_cells(tmp_path, programs, 2))
    order = (tmp_path / "order").read_text()
    assert finished.keys() == programs.keys() and Counter(order) == Counter("nNiIm")
    assert [each for each in order if each != "m"] == list("nNiI")
    assert finished[NONE] >= 0.3
    assert list(run_cells(tmp_path, {}, 2)) == []


@pytest.mark.slow
def test_as_many_cells_at_a_time_as_jobs(tmp_path):
    code = (
        f"import os, time; from pathlib import Path; me = Path({str(tmp_path)!r}, f'on{{os.getpid()}}'); me.touch(); "
    )
    code += "time.sleep(0.2); print(len(list(me.parent.glob('on*')))); me.unlink()"
    cells = [Cell("none", seed) for seed in range(4)]
    for n_jobs in (1, 2):
        assert len(list(run_cells(tmp_path / f"{n_jobs}", {cell: [python(code)] for cell in cells}, n_jobs))) == 4
        seen = [int((cell.folder(tmp_path / f"{n_jobs}") / "log.txt").read_text()) for cell in cells]
        assert max(seen) <= n_jobs


def test_a_program_that_fails_is_named_and_the_others_are_told_to_end(tmp_path):
    on, heard = str(tmp_path / "on"), str(tmp_path / "heard")
    long = f"import signal, time; signal.signal(15, lambda *_: open({heard!r}, 'w') and exit()); open({on!r}, 'w')"
    fails = f"import os, time\nwhile not os.path.exists({on!r}): time.sleep(0.01)\nprint('a: found b\x1b'); exit(2)"
    with pytest.raises(DataError) as error:
        list(run_cells(tmp_path, {NONE: [python(f"{long}; time.sleep(60)")], MAE: [python(fails)]}, 2))
    assert "found exit code 2 of -c for MAE, seed 0" in str(error.value) and r"'a: found b\x1b'" in str(error.value)
    assert (tmp_path / "heard").exists()


ABLATION = """
import sys, json
from pathlib import Path
from eval import ablation
out, seeds = sys.argv[1:]
def commands_of(output, cell, flags):
    code = f"open({out + '/order'!r}, 'a').write('{cell}\\\\n')"
    slow = "import time; time.sleep(60)"
    return [["-c", code], ["-c", slow if cell.method == 'PKT' and not Path(out, 'fast').exists() else ""]]
ablation.commands_of = commands_of
ablation.write_tables = lambda output, settings, cells: output / "tables"
sys.exit(ablation.main(["--quick", "--seeds", seeds, "--ppo_seeds", "1", "--prompts", "2", "--output", out + "/run"]))
"""


def start_fake(tmp_path, n_seeds: int = 1) -> subprocess.Popen:
    """The program with tiny cells, of which PKT does not end before the file `fast` exists."""
    line = [sys.executable, "-c", ABLATION, str(tmp_path), str(n_seeds)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(path, n_lines: int) -> list[str]:
    end = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < n_lines:
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_anywhere_it_continues_without_the_finished_cells(tmp_path, number, code):
    running = start_fake(tmp_path)
    wait_for_lines(tmp_path / "run/cells.jsonl", 6)  # all but PKT, and PKT+IRM that waits for it
    children = [int(each) for each in children_of(running.pid)]
    assert len(children) == 1
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
    assert running.returncode == code
    if number != signal.SIGKILL:
        assert err == (
            f"stopped by {number.name}; finished cells and checkpoints are kept; the same command continues\n"
        )
    end = time.monotonic() + 10
    while is_alive(children[0]):
        assert time.monotonic() < end
        time.sleep(0.02)
    if number == signal.SIGINT:  # what is left on disk is what SIGTERM leaves
        return
    with open(tmp_path / "run/cells.jsonl", "a") as file:
        file.write('{"cell": "PK')  # torn
    (tmp_path / "fast").touch()
    running = start_fake(tmp_path)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    assert out.startswith("finished: 6 of 8 cells\n7/8  PKT, seed 0: ") and "about 0 min left" in out
    order = Counter(wait_for_lines(tmp_path / "order", 9))
    assert order == Counter(map(str, cells_of(1, 1))) + Counter(["PKT, seed 0"])
    running = start_fake(tmp_path)
    out, _ = running.communicate(timeout=60)
    assert (running.returncode, out) == (0, f"already finished: 8 of 8 cells\ntables: {tmp_path / 'run/tables'}\n")
    running = start_fake(tmp_path, n_seeds=2)  # four more cells, the finished ones are kept
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0 and out.startswith("finished: 8 of 12 cells\n"), err
    more = [line for line in (tmp_path / "order").read_text().splitlines() if line.endswith("seed 1")]
    assert sorted(more) == ["MAE+PKT, seed 1", "MAE, seed 1", "PKT, seed 1", "none, seed 1"]


def children_of(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_time_left():
    cells = cells_of(2, 1)
    assert seconds_left({NONE: 10.0, MAE: 20.0}, cells, 1) == 10 * 15  # 6 of SFT, 4 with IRM of which nothing is known
    assert seconds_left({NONE: 10.0, MAE: 20.0, IRM: 100.0}, cells, 2) == (6 * 15 + 3 * 100) / 2
    assert seconds_left(dict.fromkeys(cells, 3.0), cells, 2) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_journal(tmp_path):
    path = tmp_path / "cells.jsonl"
    assert read_finished(path, [NONE]) == {}
    path.write_text('{"cell": "none, seed 0", "seconds": 1.5}\n{"cell": "MAE, se')
    assert read_finished(path, [NONE, MAE]) == {NONE: 1.5}
    assert path.read_text() == '{"cell": "none, seed 0", "seconds": 1.5}\n'
    for line in (
        '{"cell": "MAE, seed 1", "seconds": 1.5}',
        '{"cell": "none, seed 0"}',
        '{"cell": [1], "seconds": 1.0}',
    ):
        path.write_text(f"{line}\n")
        with pytest.raises(DataError, match=r"cells\.jsonl:1: found .*, expected a cell of this run"):
            read_finished(path, [NONE])


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    _, settings = read_flags([*SMALL, str(output)])
    (output / "settings.json").write_text(json.dumps({**settings, "prompts": 7}))
    (output / "cells.jsonl").write_text('{"cell": "none, seed 0", "seconds": 1.5}\n')
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert main([*SMALL, str(output)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "settings.json: found prompts 7, expected 6 as in this command" in err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_seeds_may_be_raised_and_nothing_else(tmp_path):
    output = tmp_path / "run"
    may_grow = ("seeds", "ppo_seeds")
    with opened(output, {"seeds": 3, "ppo_seeds": 1, "prompts": 6}, may_grow):
        pass
    with opened(output, {"seeds": 4, "ppo_seeds": 2, "prompts": 6}, may_grow):
        pass
    assert json.loads((output / "settings.json").read_text()) == {"seeds": 4, "ppo_seeds": 2, "prompts": 6}
    for changed, words in (
        ({"seeds": 3}, "found seeds 4, expected at most 3 as"),
        ({"ppo_seeds": 1}, "found ppo_seeds 2, expected at most 1 as"),
        ({"prompts": 7}, "found prompts 6, expected 7 as"),
    ):
        with pytest.raises(DataError, match=words):
            check_folder(output, {"seeds": 4, "ppo_seeds": 2, "prompts": 6, **changed}, may_grow)
    (output / "settings.json").write_text('{"seeds": "4", "ppo_seeds": true}')
    for name in may_grow:
        with pytest.raises(DataError, match=f"found {name} "):
            check_folder(output, {name: 9}, may_grow)


def test_other_folders_are_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([*SMALL, str(tmp_path)]) == 2
    assert "found files but no settings.json" in capsys.readouterr().err
    assert main([*SMALL, str(tmp_path / "thesis.txt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with opened(tmp_path / "run", {"a": 1}), pytest.raises(DataError, match="another run at work"):
        with opened(tmp_path / "run", {"a": 1}):
            pass
    (tmp_path / "run/settings.json").unlink()
    check_folder(tmp_path / "run", {})  # the lock alone is no content


def test_settings(capsys):
    _, quick = read_flags(["--quick", "--output", "x"])
    _, full = read_flags(["--output", "x"])
    assert (full["seeds"], full["ppo_seeds"], full["prompts"], full["trajectories"]) == (10, 3, 3000, 1217)
    assert quick["ppo_flags"] == QUICK_PPO_FLAGS and {**full, **quick} == quick
    for flags in (
        ["--seeds", "0"],
        ["--seeds", "21"],
        ["--jobs", "0"],
        ["--trajectories", "100001"],
        ["--prompts", "x"],
    ):
        with pytest.raises(SystemExit, match="2"):
            read_flags([*flags, "--output", "x"])
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        read_flags(["--quick"])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def rows(*bits: str) -> dict[int, dict]:
    """One row per prompt, "TPC" with a dot for what is wrong."""
    return {
        index: {name: int(bit != ".") for name, bit in zip(("TS", "PI", "CF"), each, strict=True)}
        for index, each in enumerate(bits)
    }


RESULTS = {
    "none": {
        0: rows("TPC", "TP.", "...", "..."),
        1: rows("TPC", "TPC", "...", "..."),
        2: rows("TPC", "...", "...", "..."),
    },
    "MAE": {
        0: rows("TPC", "TPC", "TPC", "..."),
        1: rows("...", "TPC", "TPC", "TPC"),
        2: rows("TPC", "TPC", "...", "..."),
    },
    "IRM": {0: rows("TPC", "TP.", "TP.", "...")},
}


def test_rates_by_hand():
    found = {(row["method"], row["metric"]): row for row in rate_rows("s", RESULTS)}
    row = found["none", "CF"]  # 1, 2 and 1 of 4: 25, 50, 25; mean 100/3, s = sqrt(208.33) = 14.4338
    assert row["percents"] == [25, 50, 25] and row["seeds"] == [0, 1, 2] and row["prompts"] == 4
    assert row["mean"] == pytest.approx(100 / 3)
    assert row["interval_95"] == pytest.approx(
        (100 / 3 - 4.3027 * 14.4337567 / 3**0.5, 100 / 3 + 4.3027 * 14.4337567 / 3**0.5)
    )
    assert found["IRM", "TS"]["percents"] == [75] and found["IRM", "TS"]["interval_95"] is None
    assert len(found) == 9


def test_differences_by_hand():
    found = {(row["method"], row["metric"]): row for row in difference_rows("s", RESULTS)}
    assert len(found) == 6 and not any(method == "none" for method, _ in found)
    row = found["MAE", "CF"]
    # seed 0: won 2, lost 0; seed 1: won 2 (prompts 2, 3), lost 1 (prompt 0); seed 2: won 1, lost 0
    assert (row["lost"], row["won"]) == (1, 5)
    assert row["mean"] == pytest.approx(100 * 4 / 12)  # gains 2, 1, 1 of 4: 50, 25, 25 points
    assert row["p_over_seeds"] == 2 / 8  # all three of one sign: two of the eight choices of signs
    assert row["p_over_prompts"] == pytest.approx(2 * (1 + 6) / 64)
    row = found["IRM", "TS"]  # one seed, against none with that seed: one prompt won
    assert (row["lost"], row["won"], row["mean"], row["interval_95"]) == (0, 1, 25, None)
    assert (row["p_over_seeds"], row["p_over_prompts"], row["seeds"]) == (1, 1, [0])


def test_what_irm_adds_by_hand():
    """IRM over none is in difference_rows; MAE+IRM is compared with MAE, seed 2 alone: one prompt lost, none won."""
    results = RESULTS | {"MAE+IRM": {2: rows("TPC", "...", "...", "...")}}
    found = {(row["method"], row["minus"], row["metric"]): row for row in irm_rows("s", results)}
    assert {key[:2] for key in found} == {("MAE+IRM", "MAE")} and len(found) == 3
    row = found["MAE+IRM", "MAE", "CF"]
    assert (row["lost"], row["won"], row["mean"], row["seeds"]) == (1, 0, -25, [2])


def test_the_papers_differences_are_those_of_its_rows():
    # Table 5: standard 74.56 70.18 42.98 / 76.19 55.24 38.1; PKT CF 43.86, 48.57; all TS 87.72, 83.81
    assert paper_difference("PKT", "CF") == "+0.9, +10.5"
    assert paper_difference("MAE+PKT+IRM", "TS") == "+13.2, +7.6"
    assert paper_difference("IRM", "PI") == "+14.0, +3.8"  # 84.21 - 70.18, 59.05 - 55.24
    assert paper_difference("PKT", "CF", minus="PKT") == "+0.0, +0.0"


def test_the_flags_of_ppo_are_flags_of_ppo(tmp_path):
    for flags in (PPO_FLAGS, QUICK_PPO_FLAGS):
        config = read_config(PPOConfig, "", commands_of(tmp_path, IRM, flags)[0][1:])
        assert (config.rollout_batch_size, config.kl_coef, config.seed, config.device) == (32, 0.2, 0, "cpu")


@pytest.mark.slow
def test_one_real_cell(tmp_path):
    """SFT of two steps, scored; then tables of two cells, the second a copy of the first."""
    _, settings = read_flags([*SMALL, str(tmp_path)])
    write_data(tmp_path, settings["prompts"], settings["trajectories"], settings["alike"])
    assert [cell for cell, _ in run_cells(tmp_path, {NONE: commands_of(tmp_path, NONE, "")}, 1)] == [NONE]
    shutil.copytree(NONE.folder(tmp_path), IRM.folder(tmp_path))
    text = write_tables(tmp_path, settings, [NONE, IRM]).read_text()
    assert "## tiny-alike, 6 prompts" in text and "Greedy predictions in fp32" in text
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert content["dtype"] == "float32" and {row["method"] for row in content["rates"]} == {"none", "IRM"}
    assert "IRM" in (tmp_path / "ablation.svg").read_text()
    path = IRM.folder(tmp_path) / "eval/summary.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    with pytest.raises(DataError, match="another type than in earlier cells"):
        write_tables(tmp_path, settings, [NONE, IRM])
    for name in ("TS_percent", "tiny-seen"):
        path.write_text(path.read_text().replace(f'"{name}"', '"other"', 1))
        with pytest.raises(DataError, match=r"found .*, expected"):
            write_tables(tmp_path, settings, [IRM])
    path.unlink()
    with pytest.raises(DataError, match="expected the summary of a run_eval.py run"):
        write_tables(tmp_path, settings, [NONE, IRM])
