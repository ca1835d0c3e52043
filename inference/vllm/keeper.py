"""Runs a command, and ends it when standard input ends: so it does when whoever started this is gone, however it went.

It is started as a file, by any Python and without cotune. The command's own children are ended with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

_PATIENCE = 20.0
"""Seconds for the command to end by itself."""


def main() -> None:
    """Runs the command of its arguments, and ends it once its own standard input is closed."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def watch() -> None:
        sys.stdin.buffer.read()
        command.terminate()
        threading.Timer(_PATIENCE, command.kill).start()

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    print(f"ended with exit code {command.wait()}", flush=True)
    os.killpg(0, signal.SIGKILL)  # what it may have left, and this process


if __name__ == "__main__":
    main()
