"""Run seeds by hand: see the package."""

import sys
import traceback
from collections.abc import Callable

from tests.simulation import pair, scenario, table, whole_scenario
from tests.simulation.stranger import STRANGE_FRAMES


def seeds(run: Callable, first: int, last: int) -> int:
    """Run seeds; print those that fail, and return how many they are."""
    failed = 0
    for seed in range(first, last):
        try:
            run(seed)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"seed {seed}: {error!r} in {where.name}, {where.filename}:{where.lineno}", flush=True)
    print(f"{last - first} seeds, {failed} failed")
    return failed


def of_a_whole_worker(seed: int, tell: Callable[[str], None] | None = None) -> object:
    """Run a seed with a worker of its own: one that failed is of no use to the next."""
    return whole_scenario.run(whole_scenario.worker_of(seed), seed, tell)


def beside_a_stranger(seed: int, tell: Callable[[str], None] | None = None) -> object:
    """The same, attacked."""
    return whole_scenario.run(whole_scenario.worker_of(seed), seed, tell, strange=STRANGE_FRAMES)


def main(words: list[str]) -> int:
    """Run what the command line says; 1 when a seed failed."""
    if words == ["--table"]:
        table.FILE.write_text(table.table())
        return 0
    run: Callable = scenario.run
    if words[0].startswith("--"):
        run = {"--worker": of_a_whole_worker, "--stranger": beside_a_stranger, "--pair": pair.run}[words.pop(0)]
    numbers = [int(word) for word in words]
    if len(numbers) == 1:
        print(run(numbers[0], print))
        return 0
    return int(bool(seeds(run, *numbers)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
