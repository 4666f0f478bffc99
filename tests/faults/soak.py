"""The recipe again and again under random faults, until time is up.

    python -m tests.faults.soak --minutes 60 --out FOLDER

Processes are killed and stopped, find no room to write, and start again beside damaged checkpoints and shards, or as
two. A run that has come to its end is held against the undisturbed one; exit code 1 if any differs, or if a process
ended otherwise than it should.
"""

import argparse
import collections
import itertools
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.distributed import layouts
from tests.faults.bench import RECIPE, Bench, hashes
from tests.faults.interruptions import LONGER, differing, longer
from tests.faults.progress import status

STAGES = ("tokenizer", "corpus", "target", "pretrain", "responses", "vocabulary", "distill", "evaluate", "export")
# What a run reads again when it goes on, stage by stage.
FRAGILE = ("checkpoints/*/**/*", "checkpoints/*.json", "responses-*", "rows-*")
ROOM = 1024  # bytes that a file may have where the disk is full

KILLED, STOPPED, FULL, LEFT = "SIGKILL", "SIGTERM", "disk full", "left alone"
ENDS = {KILLED: (0, -signal.SIGKILL), STOPPED: (0, 75, -signal.SIGTERM), FULL: (0, 1), LEFT: (0,)}
"""Exit codes; 0 where a process was done before, and SIGTERM's own where it did not listen yet."""


class Soak:
    """One run after another.

    Args:
      folder: for the runs.
      seed: of when and where what happens.
    """

    def __init__(self, folder: Path, seed: int):
        self._random = random.Random(seed)
        self._folder = folder
        began = time.monotonic()
        self._expected = hashes(longer(Bench(folder, effort=1)))
        self._longest = (time.monotonic() - began) / 2  # until something happens to a process
        self._damaged: set[Path] = set()  # folders with a file that nobody has found to be damaged yet
        self.events: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.completed = 0

    def until(self, end: float) -> None:
        """Goes on until a moment of ``time.monotonic()``; a run that is not done then is left."""
        for number in itertools.count(1):
            workdir = self._folder / f"run-{number}"
            while any(status(workdir / stage) != "done" for stage in STAGES):
                if time.monotonic() > end:
                    return
                self._event(workdir)
            found = differing(hashes(workdir), self._expected)
            self.completed += 1
            self._say(workdir, "done", f"differs in {', '.join(found)}" if found else "as the undisturbed run")
            self.wrong += [f"{workdir.name}: {name}" for name in found]
            self._damaged.clear()
            if not found:
                shutil.rmtree(workdir)

    def _event(self, workdir: Path) -> None:
        """A process, or two, from its start to its end."""
        at_hand = next(stage for stage in STAGES if status(workdir / stage) != "done")
        damage = self._damage(workdir / at_hand) if self._random.random() < 0.5 else []
        processes = self._random.choice((1, 2)) if at_hand == "responses" else 1
        fault = self._random.choice((KILLED, KILLED, STOPPED, STOPPED, FULL, LEFT))
        # Training as two is another run to the last bits; answers are the same.
        only = ("--only", at_hand) if processes > 1 else ()
        started = layouts.start(RECIPE, workdir, processes, 1, *LONGER, *only)
        time.sleep(self._random.uniform(0, self._longest) if fault != LEFT else 0)
        for process in started:
            if fault == FULL and process.poll() is None:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (ROOM, ROOM))
            elif fault in (KILLED, STOPPED):
                process.send_signal(getattr(signal, fault))
        codes = [process.wait() for process in started]
        said = " | ".join(layouts.log_of(workdir, index).read_text()[-400:] for index in range(processes))
        done = [fault, *damage, *(["two processes"] if processes > 1 else [])]
        self.events.update(done)
        self._say(workdir, f"{' + '.join(done)} in {at_hand}", f"exit {', '.join(map(str, codes))}")
        if all(code in ENDS[fault] for code in codes):
            return
        refused = [folder for folder in self._damaged if str(folder) in said and any(code in (1, 2) for code in codes)]
        for folder in refused:
            self.events["refused by name"] += 1
            shutil.rmtree(folder)  # as the message says
            self._damaged.remove(folder)
        if not refused:
            self.wrong.append(f"{workdir.name}: {' + '.join(done)} in {at_hand}: exit {codes}: {said}")

    def _damage(self, folder: Path) -> list[str]:
        """Damages one of the files that a stage would go on from, if there are any; says how."""
        files = sorted(file for pattern in FRAGILE for file in folder.glob(pattern) if file.is_file())
        files = [file for file in files if file.stat().st_size]
        if not files:
            return []
        file = self._random.choice(files)
        self._damaged.add(folder)
        what, content = self._random.choice(("deleted", "truncated", "bit flipped")), bytearray(file.read_bytes())
        place = self._random.randrange(len(content))
        if what == "deleted":
            file.unlink()
            return [what]
        if what == "truncated":
            del content[place:]
        else:
            content[place] ^= 1 << self._random.randrange(8)
        file.write_bytes(content)
        return [what]

    def _say(self, workdir: Path, what: str, came: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {workdir.name}: {what}: {came}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of when and where what happens (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, for the runs")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    soak = Soak(options.out, options.seed)
    soak.until(end)
    print("| event | times |\n|---|---|")
    for event, times in [*soak.events.most_common(), ("runs completed", soak.completed), ("wrong", len(soak.wrong))]:
        print(f"| {event} | {times} |")
    print("\n".join(soak.wrong))
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
