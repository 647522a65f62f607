"""Every way to hand in something wrong: one line on stderr, exit code 2, no traceback, earlier checkpoints usable."""

import json
import re
import resource
import shutil
import sys

import pytest

from tests.support.tiny_run import command, copy_of_model, make_records, metrics_of, run_here, run_process, tiny_files


def expect_refusal(tmp_path, pattern: str, **flags) -> None:
    """The run ends with code 2 and one line that matches, before any file of a run is made."""
    output = tmp_path / "refused"
    code, _, err = run_here(output, **{"max_steps": 1, **flags})
    assert code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert re.search(pattern, err), err
    assert not (output / "checkpoints").exists()


def write(tmp_path, content: str):
    path = tmp_path / "train.json"
    path.write_text(content, encoding="utf-8")
    return path


def with_change(tmp_path, change):
    """The third of four records changed; one record per line of the list, so that it begins in line 4."""
    records = make_records(4)
    change(records[2])
    return write(tmp_path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


# ---------------------------------------------------------------------------------------------------------------------
# Data


def wrong_role(record):
    record["conversations"][2]["role"] = "asistant"


def unparsable_call(record):
    record["conversations"][2]["content"] = 'get_weather\n{"city": '


def tool_without_name(record):
    record["conversations"][0]["content"] = json.dumps([{"description": "nameless"}])


def duplicate_id(record):
    record["id"] = "t0"


def no_messages(record):
    record["conversations"] = []


@pytest.mark.parametrize("change", [wrong_role, unparsable_call, tool_without_name, duplicate_id, no_messages])
def test_a_wrong_record_is_found_by_its_line(tmp_path, change):
    path = with_change(tmp_path, change)
    expect_refusal(tmp_path, rf"^{re.escape(str(path))}:4: .*found .*expected ", data=path)


@pytest.mark.parametrize("text", ['[\n{"id": 1,\n', "", "[]", "\n \n", "[1, 2]", "{}"])
def test_malformed_or_empty_file(tmp_path, text):
    path = write(tmp_path, text)
    expect_refusal(tmp_path, rf"^{re.escape(str(path))}(:\d+)?: .*found .*expected", data=path)


def test_missing_file_and_folder_instead_of_file(tmp_path):
    expect_refusal(tmp_path, r"absent\.json", data=tmp_path / "absent.json")
    expect_refusal(tmp_path, re.escape(str(tmp_path)), data=tmp_path)


def test_unparsable_calls_can_be_masked_instead(tmp_path):
    code, out, err = run_here(tmp_path / "run", data=with_change(tmp_path, unparsable_call), unparsable_calls="mask")
    assert (code, err) == (0, "") and "unparsable 1" in out


def test_nothing_left_to_train(tmp_path):
    expect_refusal(tmp_path, r"^\S+: found 22 trajectories, 22 longer than 5 tokens", max_tokens=5)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def test_model_folder_without_weights(tmp_path):
    model = copy_of_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    expect_refusal(tmp_path, re.escape(str(model)), model=model)


@pytest.mark.parametrize("length", [0, 5, 300, -10])
def test_truncated_safetensors(tmp_path, length):
    model = copy_of_model(tmp_path / "model")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    expect_refusal(tmp_path, rf"{re.escape(str(path))}.*truncated", model=model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_model_folder_without_config_or_tokenizer(tmp_path, name):
    model = copy_of_model(tmp_path / "model")
    (model / name).unlink()
    expect_refusal(tmp_path, re.escape(str(model)), model=model)


def test_no_such_model_folder(tmp_path):
    expect_refusal(tmp_path, "no_model", model=tmp_path / "no_model")


def test_vocabulary_that_does_not_fit_the_embedding(tmp_path):
    from model.pretrained_weights import save_pretrained
    from tests.support.tiny_run import tiny_model

    model = tmp_path / "model"
    save_pretrained(tiny_model(vocab_size=200), model)
    shutil.copy(tiny_files()[0] / "tokenizer.model", model)
    expect_refusal(tmp_path, r"found a tokenizer of \d+ ids, expected at most 200", model=model)


def test_config_vocabulary_that_differs_from_the_stored_embedding(tmp_path):
    model = copy_of_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    expect_refusal(tmp_path, "embed_tokens", model=model)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and folders


def test_unknown_flag_and_unknown_config_key(tmp_path):
    expect_refusal(tmp_path, r"^--learning_rat: found an unknown flag", learning_rat=1)
    config = tmp_path / "settings.json"
    config.write_text('{"seed": 1,\n"sed": 2}')
    expect_refusal(tmp_path, rf"^{re.escape(str(config))}:2: found unknown key 'sed'", config=config)


def test_cuda_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    expect_refusal(tmp_path, "^--device: found cuda, expected cpu or auto", device="cuda")


def test_the_output_folder_of_another_run_stays_as_it_is(tmp_path):
    output = tmp_path / "run"
    assert run_here(output, max_steps=1)[0] == 0
    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    data = write(tmp_path, json.dumps(make_records(9, seed=3)))
    changes = {"learning_rate": {"learning_rate": 0.5}, "data_sha256": {"data": data}, "seed": {"seed": 4}}
    for name, flags in changes.items():
        code, _, err = run_here(output, max_steps=2, **flags)
        assert code == 2 and err.count("\n") == 1
        assert f"found {name} = " in err and "belongs to another run" in err
    code, _, err = run_here(output, max_steps=2, resume="never")
    assert code == 2 and "found checkpoint step_00000001" in err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == files
    assert run_here(output, max_steps=2)[0] == 0
    assert [row["step"] for row in metrics_of(output)] == [1, 2]


@pytest.mark.parametrize("kind", ["file", "model folder"])
def test_an_output_that_is_no_run_folder(tmp_path, kind):
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("mine")
    else:
        copy_of_model(output)
    code, _, err = run_here(output, max_steps=1)
    assert code == 2 and err.count("\n") == 1 and str(output) in err


def test_full_disk_while_saving(tmp_path):
    """A file-size limit that the small files stay under and the second checkpoint does not (see test_checkpoint.py)."""
    output = tmp_path / "run"
    assert run_here(output, max_steps=3)[0] == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        code, _, err = run_here(output, max_steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and err.count("\n") == 1
    assert "cannot save" in err and "File too large" in err and "Traceback" not in err
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000003"]
    code, out, err = run_here(output, max_steps=6)
    assert code == 0 and "step_00000003 (step 3" in out, err


# ---------------------------------------------------------------------------------------------------------------------
# The same through real processes: nothing else of Python or torch may reach stderr


@pytest.mark.slow
def test_full_disk_in_a_process(tmp_path):
    """The limit is set by the shell's ulimit (blocks of 512 or 1024 bytes), as a full disk would be met in life."""
    line = command(tmp_path / "run", max_steps=1)
    assert line[0] == sys.executable
    done = run_process(["bash", "-c", 'ulimit -f 30; exec "$@"', "run", *line])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "cannot save" in done.stderr  # nothing else of Python or torch
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
