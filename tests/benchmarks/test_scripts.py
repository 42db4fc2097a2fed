"""Every script of the benchmarks runs as a command."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "@click.command" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_calls_its_command(script):
    started, _, last = (BENCHMARKS / script).read_text().partition('if __name__ == "__main__":\n')
    assert started and last.rstrip().endswith("    main()")


def test_the_script_of_the_readme_prints_its_help():
    command = [sys.executable, str(BENCHMARKS / "people.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--readme" in done.stdout
