"""Python in a process of its own, for what a process does once or only at its start."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in the source tree, with ``environment`` in place of any ``TORCH_*`` variables of this process.

    Raises:
        AssertionError: it failed; the message is its error output.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    own = {**inherited, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done
