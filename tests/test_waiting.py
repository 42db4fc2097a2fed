"""How long OpenMP's threads spin: the package sets it before torch is loaded, unless the user chose something."""

import os
import re
import subprocess
import sys

import pytest


def spin_count(**environment):
    """What GNU OpenMP reports when it is loaded."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    shown = subprocess.run(
        [sys.executable, "-c", "import pfstorer_rt, torch"],
        env={**kept, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return re.search(r"GOMP_SPINCOUNT = '(\w+)'", shown)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_waiting_threads_spin_briefly_unless_the_user_chose_otherwise():
    assert spin_count() == "5000"
    assert spin_count(GOMP_SPINCOUNT="77") == "77"
    assert spin_count(OMP_WAIT_POLICY="active") != "5000"
