"""Run seeds by hand: see the package."""

import sys
import traceback

from tests.simulation.scenario import run


def main(words: list[str]) -> int:
    """Run what the command line says; 1 when a seed failed."""
    if len(words) == 1:
        print(run(int(words[0]), print))
        return 0
    first, last = map(int, words)
    failed = 0
    for seed in range(first, last):
        try:
            run(seed)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"seed {seed}: {error!r} in {where.name}, line {where.lineno}", flush=True)
    print(f"{last - first} seeds, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
