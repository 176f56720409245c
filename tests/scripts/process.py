"""Scripts in processes of their own."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command, check=True):
    result = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result
