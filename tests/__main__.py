"""The one check command: `python -m tests`. Lint, strict types, then the tests; stops at the first that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (
    ["ruff", "check", "."],
    ["mypy"],
    ["pytest", *sys.argv[1:]],
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
