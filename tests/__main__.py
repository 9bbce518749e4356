"""The one check command: `python -m tests`. Lint, strict types, then the tests; stops at the first that fails.

Two processes share the tests, file by file, as what a file's tests have in common is made once; `-n 0` for one process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    ["ruff", "check", "."],
    ["mypy"],
    ["pytest", "-n", "2", "--dist", "loadfile", *sys.argv[1:]],
)


def main() -> int:
    for module, *arguments in CHECKS:
        print("$", module, *arguments, flush=True)
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
