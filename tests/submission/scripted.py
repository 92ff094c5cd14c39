"""Stands in for `jobs/check.py` in these tests: a job that starts at once and does what its argument says.

The argument is `/<lines>/<seconds between them>/<end>/<anything>`, where the end is an exit status, `killed` for a
signal, or `orphaned` for the death of the process by which Ray runs the job. On SIGTERM it takes as long as a
checkpoint might.
"""

import os
import signal
import sys
import time

import psutil


def saved(signum: int, frame: object) -> None:
    print("saving", flush=True)
    time.sleep(4)  # longer than the 3 s that Ray gives by itself
    print("saved", flush=True)
    os._exit(130)


signal.signal(signal.SIGTERM, saved)
print(f"argument {sys.argv[1]}", flush=True)
lines, seconds, end, _ = sys.argv[1].removeprefix("/").split("/", 3)
for number in range(int(lines)):
    print(f"line {number}", flush=True)
    time.sleep(float(seconds))
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "orphaned":
    next(parent for parent in psutil.Process().parents() if parent.name().startswith("ray::")).kill()
    time.sleep(60)
sys.exit(int(end))
