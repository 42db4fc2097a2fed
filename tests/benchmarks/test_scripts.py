"""Every script of the benchmarks runs as a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "@click.command" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_calls_its_command(script):
    assert 'if __name__ == "__main__":\n    main(' in (BENCHMARKS / script).read_text()


def test_the_script_of_the_readme_prints_its_help():
    command = [sys.executable, str(BENCHMARKS / "people.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0 and "--readme" in done.stdout
