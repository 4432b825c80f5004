"""Run the benchmark: `python -m tests.bench [--quick] [--rounds N] [--only tcp-up,…] [--subjects direct,ringway,…]
[--flags "--workers 1"]`.

Rows are interleaved: in every round each measure is taken for all subjects, one right after the other, so that what
else the machine does meets them alike; ratios are formed inside a round. Everything runs on two cores. As root.
"""

import argparse
import os
import shlex
import signal
import sys
from typing import NoReturn

from tests.bench.measures import MEASURES, Measure
from tests.bench.subjects import DEFAULT, NotMeasurable, Subject, Subjects, parse
from tests.bench.table import Results, describe_machine
from tests.bench.topology import Topology
from tests.peers import why_no_namespaces

CORES = 2


def main() -> int:
    options = _arguments()
    reason = why_no_namespaces()
    if reason:
        print(f"the benchmark needs network namespaces: {reason}", file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    # Inherited by everything started from here: proxies, targets, clients and the gateway.
    os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGTERM, _stop)
    results = Results(cores)
    machine = describe_machine(cores)
    print(
        f"{machine['cpu']}, {len(cores)} cores used, Linux {machine['kernel']}, Python {machine['python']}", flush=True
    )
    try:
        with Topology() as topology:
            _run(topology, options, results)
    except KeyboardInterrupt:
        print("\nstopped; what was measured until then:")
    results.show()
    if not options.quick or options.json:
        print(f"kept in {results.save(options.json)}")
    return 0


def _run(topology: Topology, options: argparse.Namespace, results: Results) -> None:
    makers = Subjects(topology, options.flags)
    subjects: list[Subject] = []
    for name in _wanted_by(options):
        try:
            subjects.append(makers.make(name))
        except NotMeasurable as why:
            print(f"{name}: left out, {why}", file=sys.stderr)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            print(f"{name}: left out, it does not start: {_first_line(error)}", file=sys.stderr)
    for turn in range(options.rounds):
        for measure in options.only:
            # The other way round every second time: whoever comes later in a pair does so as often as not.
            for subject in subjects if turn % 2 == 0 else subjects[::-1]:
                if measure.takes(subject):
                    _one(topology, options, results, measure, subject, turn)


def _wanted_by(options: argparse.Namespace) -> list[str]:
    """Return the subjects' names; with `--flags` every gateway is followed by its twin that has them."""
    twins = [name + "+" if options.flags and parse(name)[0] == "ringway" else "" for name in options.subjects]
    return [name for pair in zip(options.subjects, twins, strict=True) for name in pair if name]


def _one(
    topology: Topology, options: argparse.Namespace, results: Results, measure: Measure, subject: Subject, turn: int
) -> None:
    try:
        figures = measure.run(topology, subject, options.seconds)
    except NotMeasurable as why:
        results.add(measure, subject.name, str(why))
        return
    except Exception as error:
        results.add(measure, subject.name, f"failed: {_first_line(error)}")
        print(f"round {turn + 1}  {measure.name:16} {subject.name:24} failed: {_first_line(error)}", flush=True)
        return
    except BaseException as error:  # pytest's own failures are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        results.add(measure, subject.name, f"failed: {_first_line(error)}")
        return
    results.add(measure, subject.name, figures)
    if not options.quiet:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"round {turn + 1}  {measure.name:16} {subject.name:24} {shown}", flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n\n")[1])
    names = [measure.name for measure in MEASURES]
    parser.add_argument("--rounds", type=int, help="how often each figure is taken (3, with --quick 1)")
    parser.add_argument("--seconds", type=float, help="how long a figure is taken, about (3, with --quick 1.5)")
    parser.add_argument("--quick", action="store_true", help="one short round, nothing kept: while optimising")
    parser.add_argument("--only", metavar="MEASURE,…", help=f"of {', '.join(names)}".replace("%", "%%"))
    parser.add_argument("--subjects", default=",".join(DEFAULT), metavar="SUBJECT,…", help=f"of {', '.join(DEFAULT)}")
    parser.add_argument(
        "--flags", default=[], type=shlex.split, metavar='"FLAG …"',
        help="flags of `ringway run`: each gateway is also measured with them, as a subject of its own (ringway+)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="keep the results there instead of tests/bench/results/")
    parser.add_argument("--quiet", action="store_true", help="print the table only")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (1.5 if options.quick else 3.0)
    wanted = options.only.split(",") if options.only else [m.name for m in MEASURES if m.quick or not options.quick]
    unknown = [name for name in wanted if not any(known == name or known.startswith(name + "-") for known in names)]
    if unknown:
        parser.error(f"no measure {unknown[0]!r}; allowed are {', '.join(names)}")
    # A name also stands for all that begin with it, unless it is one itself: `ping-pong`, `udp`, `lan`.
    exact = set(names)
    options.only = [
        measure
        for measure in MEASURES
        if any(measure.name == name or (name not in exact and measure.name.startswith(name + "-")) for name in wanted)
    ]
    options.subjects = options.subjects.split(",")
    for name in options.subjects:
        try:
            parse(name)
        except ValueError as error:
            parser.error(str(error))
    if options.json:
        from pathlib import Path

        options.json = Path(options.json)
    return options


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
