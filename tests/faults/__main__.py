"""Runs the fault suite and prints its table: ``python -m tests.faults --effort 30 --out FOLDER``."""

import argparse
import logging
import sys
import time
import unittest
from pathlib import Path

from tests.faults import FAULTS, Bench, Outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--effort", type=int, default=3, help="how often each fault is done (default: 3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="F1", help="only these lines")
    parser.add_argument("--seed", type=int, default=0, help="of where and when they are done (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, for all that is made")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    logging.disable(logging.WARNING)  # that damage was found
    bench, failed = Bench(options.out, options.effort, options.seed), 0
    print("| | what was done | times | as promised | | s |\n|---|---|---|---|---|---|")
    for fault in sorted(FAULTS, key=lambda fault: int(fault.number[1:])):
        if options.only and fault.number not in options.only:
            continue
        began = time.monotonic()
        try:
            outcome = fault.run(bench)
        except unittest.SkipTest as reason:
            outcome = Outcome(0, 0, f"not done here: {reason}")
        failed += outcome.held != outcome.injected
        seconds = f"{time.monotonic() - began:.0f}"
        cells = fault.number, fault.injection, outcome.injected, outcome.held, outcome.note, seconds
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
