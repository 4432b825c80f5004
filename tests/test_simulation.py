"""The Connection against a model peer over bad links: every octet is right, every run ends. See simulation.py.

SIMULATION_SEEDS=100000 in the environment runs more seeds than the usual ones.
"""

import os

import pytest

from tests import simulation

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "1200"))  #: 1,200 take about eight seconds
CHUNK = 100


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_octet_arrives_and_every_run_ends(first):
    for seed in range(first, first + CHUNK):
        try:
            simulation.run(seed)
        except AssertionError as error:
            error.add_note(f"python -m tests.simulation {seed} {seed + 1}")
            raise


def test_the_runs_are_deterministic():
    assert [simulation.run(seed) for seed in range(20)] == [simulation.run(seed) for seed in range(20)]


def test_the_seeds_reach_what_they_are_for():
    results = [simulation.run(seed) for seed in range(200)]
    assert sum(result.up >= 30_000 for result in results) > 20
    assert sum(result.down >= 30_000 for result in results) > 20
    assert sum(result.reset for result in results) > 5
