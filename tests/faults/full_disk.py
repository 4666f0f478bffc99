"""A disk of a few megabytes that gets full while a run works on it: ``unshare -rm python -m tests.faults.full_disk``.

Started in a mount namespace of its own, so that whoever may make one needs no rights, and nothing is left mounted.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.faults.bench import RECIPE, called, hashes

BYTES = 32 * 2**20


def main() -> None:
    """Reads ``[finished run, empty folder, [[stage, bytes left], …]]``, writes what went wrong in each, or nothing."""
    undisturbed, disk, asked = json.load(sys.stdin)
    expected, disk = hashes(Path(undisturbed)), Path(disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "tmpfs", disk], check=True)
    for number, (stage, left) in enumerate(asked):
        workdir = disk / str(number)
        shutil.copytree(undisturbed, workdir, ignore=shutil.ignore_patterns("report"))
        print(json.dumps(_filled(workdir, stage, left, expected)), flush=True)
        shutil.rmtree(workdir)


def _filled(workdir: Path, stage: str, left: int, expected: dict[str, str]) -> list[str]:
    """Where the disk was full, and what was not as promised."""
    shutil.rmtree(workdir / stage)
    before = {path: path.read_bytes() for path in workdir.glob("*/**/*") if path.is_file()}
    command = ["run", str(RECIPE), "--workdir", str(workdir), "--only", stage]
    ballast = _ballast(workdir.parent / "ballast", left)
    code, said = called(*command)
    last = said.strip().splitlines()[-1]
    wrong = []
    met = code == 1 and os.strerror(errno.ENOSPC) in said
    foreseen = code == 2 and " free in " in last
    if not (met or foreseen) or str(workdir) not in last:
        wrong.append(f"{left} bytes left: exit {code}, {last}")
    if changed := [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]:
        wrong.append(f"{changed[0]} changed")
    ballast.unlink()
    code, said = called(*command)
    if code or {name: digest for name, digest in hashes(workdir).items() if name.startswith(f"{stage}/")} != {
        name: digest for name, digest in expected.items() if name.startswith(f"{stage}/")
    }:
        wrong.append(f"with space again: exit {code}, {said[-300:]}")
    return [last.replace(str(workdir), ""), *wrong]


def _ballast(path: Path, left: int) -> Path:
    """A file that fills the disk but for so many bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - left))
    return path


if __name__ == "__main__":
    main()
