"""Runs a script as `python SCRIPT ...` would, and ends when the process that started it ends, even if that is killed.

    python study/job.py ppo.py --kl_coef 0

study/run.py starts its jobs through this file. Without it a killed study would leave jobs behind, which write into the
same folders as the jobs of the next start. The starting process holds the other end of standard input.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path


def main() -> None:
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)  # as python itself does
    if script.parts[0] == "-m":
        sys.argv = sys.argv[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
