"""Folders of runs: a run goes on in its own, and no other does."""

import os

import pytest

from healthgpt.runs import begin, require_same, state_of


def test_a_run_goes_on_in_its_folder_and_no_other_does(tmp_path):
    settings = {"seed": 0, "data": "a.jsonl", "rank": None}
    begin(tmp_path / "run", settings)
    begin(tmp_path / "run", settings)
    require_same(tmp_path / "run", {"seed": 0, "data": "a.jsonl"})
    with pytest.raises(ValueError, match=r"settings: seed was 0 and is 1; rank was null and is 4\. Go on"):
        begin(tmp_path / "run", {**settings, "seed": 1, "rank": 4})
    with pytest.raises(ValueError, match=r'settings: x was "not set" and is null\. Go on'):
        begin(tmp_path / "run", {**settings, "x": None})
    with pytest.raises(ValueError, match=r'settings: data was "a.jsonl" and is null\. Go on'):
        begin(tmp_path / "run", {"seed": 0})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        begin(tmp_path / "file", settings)
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is no JSON"):
        begin(tmp_path / "run", settings)


def test_the_state_of_files_changes_with_them(tmp_path):
    assert state_of(tmp_path / "none") is None
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("1")
    states = [state_of(tmp_path / "folder"), state_of(tmp_path / "folder/a")]
    os.utime(tmp_path / "folder/a", (0, 0))
    states += [state_of(tmp_path / "folder"), state_of(tmp_path / "folder/a")]
    (tmp_path / "folder/b").touch()
    states += [state_of(tmp_path / "folder")]
    # The one file of a folder has the state of the folder.
    assert states[0] == states[1] and states[2] == states[3] and len(set(states)) == 3
    assert state_of(tmp_path / "folder") == states[-1]
