"""A kernel has the same name in every folder, and the implementations of its benchmark agree."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pfstorer_rt.kernels import reference

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("attention", "gated_projection", "spade_norm", "geglu")


@pytest.fixture
def benchmark_script(monkeypatch):
    """Function (name, **constants) -> the script benchmarks/NAME.py as a new module with these constants."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)

    def load(name, **constants):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vars(module).update(constants)
        return module

    yield load
    for name in set(sys.modules) - before:
        if name in ("roofline", "common"):
            del sys.modules[name]


def test_every_kernel_has_definition_row_test_and_benchmark():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "kernels" / "README.md").read_text(), re.MULTILINE)
    assert tuple(rows) == NAMES
    jitted = {p.stem for p in (ROOT / "kernels" / "ops").glob("*.py") if "_kernel(\n" in p.read_text()}
    assert jitted == set(NAMES)
    for name in NAMES:
        assert callable(getattr(reference, name))
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()
        assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_benchmarks_without_a_gpu_write_nothing(name, benchmark_script, without_gpu, tmp_path):
    output = tmp_path / "a.csv"
    result = CliRunner().invoke(benchmark_script(name).main, ["-o", str(output)])
    assert result.exit_code == 1 and "NVIDIA GPU, and torch sees none" in result.output
    assert "Nothing was measured" in result.output and not output.exists()


SMALL = {
    "attention": {"LENGTHS": ((17, 33),), "BATCHES": (2,), "fastest_tile": lambda q, k, v: None},
    "gated_projection": {"LEVELS": ((9, 64),), "BATCHES": (2,)},
    "spade_norm": {"MAPS": ((32, 3),), "BATCHES": (2,)},
    "geglu": {"LEVELS": ((9, 16),), "BATCHES": (2,)},
}


@pytest.mark.parametrize("name", NAMES)
def test_all_implementations_of_a_benchmark_agree(name, benchmark_script, device):
    script = benchmark_script(name, **SMALL[name])
    if name == "attention":
        generators = [script.cases(torch.float16, 2, 64, backward) for backward in (False, True)]
        generators.append(script.masked_cases(torch.float16, 2, 64))
    elif name == "gated_projection":
        generators = [script.projections(torch.float16), script.blocks(torch.float16)]
    elif name == "spade_norm":
        generators = [script.cases(torch.float16, modulated) for modulated in (True, False)]
    else:
        generators = [script.cases(torch.float16)]
    # Compiling takes minutes and does not change the results.
    with (
        torch.device(device),
        torch.set_grad_enabled(name == "attention"),
        torch.compiler.set_stance("force_eager"),
    ):
        cases = [case for generator in generators for case in generator]
        for case in cases:
            assert case.operations > 0 and case.bytes > 0
            results = [flat(way()) for way_name, way in case.ways.items() if runs_here(way_name, device)]
            assert len(results) >= 2
            for other in results[1:]:
                assert (other - results[0]).abs().max() <= 2e-2 * results[0].abs().max()


def runs_here(way, device):
    return device.type == "cuda" or not way.startswith(("sdpa ", "xformers")) or way in ("sdpa compiled", "sdpa, mask")


def flat(result):
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.detach().float().flatten() for part in parts])
