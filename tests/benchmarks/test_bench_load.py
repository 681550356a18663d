"""The benchmark of a machine under load: its conditions begin and end, and a run gives the figures of its row."""

import json
import subprocess

import bench_load
import pytest


def test_a_quota_is_a_cgroup_that_is_gone_afterwards_or_nothing_where_none_may_be_made():
    with bench_load.quota() as group:
        assert group is None or group.exists()
    assert group is None or not group.parent.exists()


def test_the_other_process_is_gone_afterwards(monkeypatch):
    others, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words: others.append(popen(*words)) or others[-1])
    with bench_load.busy():
        assert others[0].poll() is None
    assert others[0].poll() is not None


@pytest.mark.slow
def test_a_row_has_the_seconds_the_threads_and_the_load_of_every_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_load, "CONDITIONS", {"as it is": bench_load.nothing})
    bench_load.main([str(tmp_path), "--rounds", "1", "--steps", "10"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["requested"] for row in rows][1] == "auto"
    for row in rows:
        assert row["condition"] == "as it is"
        assert row["seconds"][0] > 0
        assert row["threads"][0] >= 1
        assert row["load"][0] >= 0
