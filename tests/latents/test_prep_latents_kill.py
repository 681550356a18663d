"""SIGKILL at random moments: the store that is finished afterwards has the bytes of one that nobody disturbed."""

import random
import signal
import time

import pytest
from latent_stores import prepare_latents
from new_process import Command

from alphaflow_cli.data.store import verify_store
from alphaflow_cli.errors import AlphaflowError

PICTURES = 12_000


def start(out, processes):
    return Command(["prep-latents", f"glyphs:{PICTURES}", "--out", out, "--processes", processes])


def shards(out):
    return len(list(out.glob("train-*.json")))


def kill_when(run, out, more, rng):
    """A random moment after so many more shards; only the parent dies at once, its workers must go by themselves."""
    goal = shards(out) + more
    while run.poll() is None and shards(out) < goal:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))
    alive = run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    return alive


def kill_test(tmp_path, kills, processes, seed):
    rng, out, done, rounds = random.Random(seed), tmp_path / "s", 0, 0
    while done < kills:
        done += kill_when(start(out, processes(done)), out, rng.choice([0, 0, 1]), rng)
        rounds += 1
        if (out / "manifest.json").exists() or shards(out) > 12:  # nearly done: take some away so that there is work
            (out / "manifest.json").unlink(missing_ok=True)
            for sidecar in rng.sample(sorted(out.glob("train-*.json")), 8):
                sidecar.unlink()
        assert rounds < 3 * kills
    deadline = time.monotonic() + 30
    while True:  # a worker of the last kill may need half a second to see that it is alone
        try:
            prepare_latents(f"glyphs:{PICTURES}", out, size=32, autoencoder="none", shown=False)
            break
        except AlphaflowError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    reference = prepare_latents(f"glyphs:{PICTURES}", tmp_path / "reference", size=32, autoencoder="none", shown=False)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in reference.iterdir()}
    assert verify_store(out) == []


def test_two_kills_leave_a_store_that_is_finished_to_the_same_bytes(tmp_path):
    kill_test(tmp_path, 2, lambda done: 1, seed=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_twenty_kills_on_one_and_two_processes(tmp_path):
    kill_test(tmp_path, 20, lambda done: 1 + done % 2, seed=1)


def test_sigterm_stops_at_once_keeps_the_finished_shards_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "s"
    run = Command(["prep-latents", f"glyphs:{PICTURES}", "--out", out])
    while shards(out) < 2:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert shards(out) >= 2
    assert not list(out.glob(".*.tmp"))
