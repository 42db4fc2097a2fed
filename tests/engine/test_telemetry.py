"""ONNX Runtime records nothing about the user."""

import os
import subprocess
import sys


def test_nothing_is_written_to_the_home_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    opened = "import pfstorer_rt, onnxruntime; onnxruntime.SessionOptions(); onnxruntime.get_available_providers()"
    subprocess.run([sys.executable, "-c", opened], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []
