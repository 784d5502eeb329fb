"""What a save leaves behind, complete or interrupted, and which folders are writable."""

import os

import pytest

from modeling_nanogpt.training.atomic import check_writable, files_written_aside


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_replace_those_of_the_same_name_and_leave_the_others(tmp_path):
    (tmp_path / "kept").write_text("old")
    (tmp_path / "replaced").write_text("old")
    with files_written_aside(tmp_path) as folder:
        (folder / "replaced").write_text("new")
        (folder / "added").write_text("new")
        assert contents(tmp_path)["replaced"] == "old"
    assert contents(tmp_path) == {"kept": "old", "replaced": "new", "added": "new"}
    assert not (tmp_path / ".saving").exists()


def test_weights_come_last(tmp_path, monkeypatch):
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (renamed.append(target.name), replace(source, target)))
    with files_written_aside(tmp_path) as folder:
        for name in ("a", "model.safetensors", "tokenizer.json", "z"):
            (folder / name).write_text("")
    assert renamed[-1] == "model.safetensors" and len(renamed) == 4


def test_a_save_that_breaks_off_changes_nothing(tmp_path):
    (tmp_path / "model").write_text("old")
    with pytest.raises(RuntimeError), files_written_aside(tmp_path) as folder:
        (folder / "model").write_text("half")
        raise RuntimeError("the disk is full")
    assert (tmp_path / "model").read_text() == "old"


def test_a_save_after_a_broken_one_starts_clean(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "left over").write_text("half")
    with files_written_aside(tmp_path) as folder:
        (folder / "model").write_text("new")
    assert contents(tmp_path) == {"model": "new"}


def test_the_folder_is_made_with_its_parents(tmp_path):
    with files_written_aside(tmp_path / "out" / "run") as folder:
        (folder / "model").write_text("new")
    assert contents(tmp_path) == {os.path.join("out", "run", "model"): "new"}


def test_check_writable_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "out" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out_dir") as error:
        check_writable(tmp_path / "file" / "run")
    assert "\n" not in str(error.value)


def test_a_file_is_not_a_folder_to_write_into(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable(tmp_path / "file")
