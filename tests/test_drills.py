"""A handful of what tests/drills/ does at length."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "drills"))

import drill
import equal

NUM_KILLS = 3


@pytest.mark.slow
@pytest.mark.pitfall(43)
def test_runs_killed_at_random_moments_end_as_if_they_were_not(tmp_path, monkeypatch):
    monkeypatch.setattr(drill, "MOST_KILLS_OF_A_RUN", 2)  # And so two runs.
    done = drill.drill(tmp_path, NUM_KILLS)
    assert sum("kill" in row for row in done) == NUM_KILLS
    assert sum("ended" in row for row in done) >= 2
    # Begun again it knows what was done.
    assert drill.drill(tmp_path, NUM_KILLS) == done


@pytest.mark.slow
@pytest.mark.pitfall(41)
def test_four_processes_make_the_run_of_one(tmp_path):
    names = ("one device", "4 processes of 2")
    layouts = [layout for layout in equal.LAYOUTS if layout.name in names]
    assert len(layouts) == len(names)
    table = equal.table(tmp_path, layouts, ("AdamW",))
    assert len(table.splitlines()) == 2 + len(names)
