"""A lease on a folder in a bucket: one run at a time, told to the others, outlived by nobody who was killed.

The object ``.lock`` is created only if there is none, which the bucket guarantees, and is written anew while its holder
lives. One that was not for two minutes, or whose holder was a process of this machine and is gone, is taken over.

Not protected: a holder that is stopped or cut off for two minutes goes on writing until it looks again (within twenty
seconds of being back), then stops itself; and of two runs that take over the same dead lease within the same second,
one finds out a second later.
"""

import contextlib
import datetime
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdraft.errors import Interrupted
from jaxdraft.remote import Bucket
from jaxdraft.tracking import say

NAME = ".lock"
RENEWED_EVERY, DEAD_AFTER, SETTLED_AFTER = 20.0, 120.0, 1.0  # seconds


@contextlib.contextmanager
def lease(bucket: Bucket) -> Iterator[None]:
    """Holds the lease on a folder; the process is sent SIGTERM if it loses it.

    Raises:
      Interrupted: another run holds it.
    """
    mine = {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    _take(bucket, mine)
    released = threading.Event()
    thread = threading.Thread(target=_renew, args=(bucket, mine, released), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _holder(bucket).get("id") == mine["id"]:
                bucket.remove(NAME)


def _take(bucket: Bucket, mine: dict[str, Any]) -> None:
    while not bucket.create(NAME, _content(mine)):
        holder = _holder(bucket)
        if holder.get("id") == mine["id"]:
            return  # it was created, and only the answer was lost
        if not holder:
            continue  # released just now
        silent = time.time() - holder["renewed"]
        if _is_alive(holder):
            raise Interrupted(
                f"{bucket.url} is held by a jaxdraft run on {holder['host']} (process {holder['process']}) since "
                f"{holder['since']}, heard of {max(0, silent):.0f} s ago: wait for it, or stop it. If it is gone, the "
                f"same command takes over {DEAD_AFTER:.0f} s after it was last heard of, or at once when you have "
                f"deleted {bucket.url}/{NAME}"
            )
        say(f"taking over from a run on {holder['host']} that was last heard of {silent:.0f} s ago")
        bucket.remove(NAME)
        if bucket.create(NAME, _content(mine)):
            time.sleep(SETTLED_AFTER)
            if _holder(bucket).get("id") == mine["id"]:
                return
        raise Interrupted(f"another run has just taken over {bucket.url}: wait for it, or stop it")


def _renew(bucket: Bucket, mine: dict[str, Any], released: threading.Event) -> None:
    while not released.wait(RENEWED_EVERY):
        try:
            holder = _holder(bucket)
            if holder and holder.get("id") != mine["id"]:
                say(f"stopping: {bucket.url} was taken over by a run on {holder['host']}")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if holder:
                bucket.write(NAME, _content(mine))
            else:
                bucket.create(NAME, _content(mine))
        except OSError as error:
            say(f"the lease could not be renewed ({error}); trying again")


def _content(mine: dict[str, Any]) -> bytes:
    return json.dumps({**mine, "renewed": time.time()}).encode()


def _holder(bucket: Bucket) -> dict[str, Any]:
    content = bucket.read(NAME)
    return json.loads(content) if content else {}


def _machine() -> str:
    """Tells machines, and containers with process numbers of their own, apart; empty where that cannot be told."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def is_held(bucket: Bucket) -> bool:
    """Whether a run that lives holds the lease."""
    holder = _holder(bucket)
    return bool(holder) and _is_alive(holder)


def _is_alive(holder: dict[str, Any]) -> bool:
    return not _is_dead(holder) and time.time() - holder["renewed"] < DEAD_AFTER


def _is_dead(holder: dict[str, Any]) -> bool:
    if not holder["machine"] or holder["machine"] != _machine():
        return False
    return holder["process"] == os.getpid() or not Path(f"/proc/{holder['process']}").exists()
