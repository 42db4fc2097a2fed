"""The structure: allowed imports, installed packages, and the lengths of files and functions."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "pfstorer_rt": ROOT / "pfstorer_rt",
    "pfstorer_rt.export": ROOT / "export",
    "pfstorer_rt.kernels": ROOT / "kernels" / "ops",
}

# A part and the parts below it that it may import; a part is a module or package of pfstorer_rt.
PLAIN = {"errors", "extras", "settings", "config", "files", "progress", "console"}
FORMATS = {
    "arrays",
    "checks",
    "base_config",
    "imaging",
    "tiling",
    "diffusion",
    "identity",
    "plan",
    "base_files",
    "onnx_message",
    "graph_check",
}
NETWORKS = PLAIN | FORMATS | {"device", "encryption", "ops", "models"}
MAY_IMPORT = {
    "errors": set(),
    "temporary": set(),
    "arrays": set(),
    "extras": {"errors"},
    "onnx_message": set(),
    "graph_check": {"onnx_message"},
    "checks": set(),
    "device": {"errors"},
    "encryption": {"errors", "extras"},
    "archive": {"files"},
    "base_config": {"errors", "config", "files", "checks", "diffusion"},
    "base_files": {"errors", "config", "files", "checks", "base_config"},
    "settings": {"errors"},
    "config": {"settings"},
    "progress": set(),
    "console": {"errors", "progress"},
    "files": {"errors", "temporary"},
    "signing": {"errors", "files"},
    "tiling": {"errors", "config", "arrays"},
    "diffusion": {"errors", "extras", "config", "arrays"},
    "identity": {"encryption", "errors", "config", "files", "checks"},
    "plan": {"errors", "config", "diffusion", "graph_check", "files", "signing", "checks", "archive"},
    "imaging": {"errors", "extras", "config", "files", "tiling"},
    "faces": {"errors", "extras", "config", "files", "imaging"},
    "degradation": {"errors", "config", "files", "imaging"},
    "kernels": {"errors"},
    "ops": {"errors", "extras", "files", "kernels"},  # files: where timings are kept
    "models": PLAIN | FORMATS | {"ops"},
    "engine": NETWORKS,
    "runtime": NETWORKS | {"engine", "faces", "degradation"},
    "training": NETWORKS | {"faces", "degradation"},
    "export": NETWORKS | {"engine", "runtime"},  # runtime: a plan is compared with its original on whole images
    "evaluation": PLAIN | {"imaging", "faces", "degradation"},
    "demo": PLAIN | {"plan", "imaging", "faces", "degradation", "models", "training", "export", "runtime"},
    "fix": PLAIN | {"identity", "plan", "imaging", "models", "training", "runtime"},
    "study": PLAIN | {"checks", "imaging"},
    "studio": NETWORKS
    | {"engine", "runtime", "training", "export", "faces", "degradation", "evaluation", "study", "temporary"},
    "cli": NETWORKS
    | {"engine", "runtime", "training", "export", "faces", "degradation", "evaluation", "demo", "fix"}
    | {"studio"},
    "": set(),  # pfstorer_rt/__init__.py: names only, resolved on first use
}
"""Not here on purpose: anything -> cli, runtime -> training or export, pfstorer_rt -> kernels but by ops."""

NEED_EXTRAS = {"models", "training", "export", "kernels", "studio"}
"""The parts that import packages of the extras [train], [export], [studio] and [gpu] as soon as they are imported."""
NEED_TORCH = {
    "pfstorer_rt.degradation.batched",
    "pfstorer_rt.degradation.blur",
    "pfstorer_rt.degradation.degrade",
    "pfstorer_rt.degradation.draws",
    "pfstorer_rt.degradation.folder",
    "pfstorer_rt.degradation.jpeg",
    "pfstorer_rt.degradation.steps",
    "pfstorer_rt.demo",
    "pfstorer_rt.engine.cuda",
    "pfstorer_rt.device",
    "pfstorer_rt.engine.graphs",
    "pfstorer_rt.engine.tensorrt",
    "pfstorer_rt.engine.torch",
    "pfstorer_rt.evaluation.perceptual",
    "pfstorer_rt.faces.recognizer",
    "pfstorer_rt.imaging.perceptual",
    "pfstorer_rt.ops",
}
"""The modules of the other parts that import PyTorch as soon as they are imported."""


def source_files():
    """(module name, path) of every file that is installed."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            words = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *words]).removesuffix(".__init__"), path


MODULES = dict(source_files())


@cache
def parsed(path):
    return ast.parse(path.read_text())


def imports(name, path, tables=True):
    """(line, absolute module name) of every import in a file, in functions too, and of names in string tables."""
    tree = parsed(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif tables and isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            yield node.lineno, node.value


def part_of(module):
    """Which part of pfstorer_rt a module name lies in; None for other packages."""
    words = module.split(".")
    if words[0] != "pfstorer_rt":
        return None
    return words[1] if len(words) > 1 and words[1] in MAY_IMPORT else ""


def test_every_package_is_in_the_graph():
    assert {part_of(name) for name in MODULES} == set(MAY_IMPORT) and len(MODULES) > 40
    unknown = [name for name in MODULES if part_of(name) == "" and name not in ("pfstorer_rt", "pfstorer_rt.__main__")]
    assert not unknown, "say in MAY_IMPORT what these may import"


def test_imports_follow_the_graph():
    wrong = []
    for name, path in MODULES.items():
        part = part_of(name)
        for line, module in imports(name, path):
            target = part_of(module)
            table = part == ""  # the public names are strings, looked up when they are used
            if target is not None and target != part and target not in MAY_IMPORT[part] and not table:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {target or module}")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_imports_the_standard_library_alone():
    body = ast.parse((ROOT / "pfstorer_rt" / "__init__.py").read_text()).body
    found = {a.name for n in body if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module) for n in body if isinstance(n, ast.ImportFrom)}
    assert found and {name.split(".")[0] for name in found} <= set(sys.stdlib_module_names)


def test_the_graph_has_no_cycle():
    order, left = [], {part: set(below) for part, below in MAY_IMPORT.items()}
    while left:
        ready = [part for part, below in left.items() if below <= set(order)]
        assert ready, f"a circle among {sorted(left)}"
        order += ready
        left = {part: below for part, below in left.items() if part not in ready}


def test_no_two_modules_import_each_other():
    left = {}
    for name, path in MODULES.items():
        found = {m if m in MODULES else m.rpartition(".")[0] for _, m in imports(name, path, tables=False)}
        left[name] = (found & set(MODULES)) - {name, "pfstorer_rt"}
    while left:
        ready = {name for name, below in left.items() if not below & set(left)}
        assert ready, left
        left = {name: below for name, below in left.items() if name not in ready}


def imported_at_once(path):
    """Third-party packages that a file imports as soon as it is imported itself: not in functions, not for types."""
    pending, found = list(parsed(path).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or "TYPE_CHECKING" in ast.unparse(node)[:20]:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found - set(sys.stdlib_module_names) - {"pfstorer_rt"}


def test_the_runtime_imports_only_its_own_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {re.split(r"[<>=;\[ ]", text)[0] for text in project["dependencies"]}
    allowed = {{"pillow": "PIL"}.get(name, name) for name in own}
    for name, path in MODULES.items():
        if part_of(name) not in NEED_EXTRAS:
            known = allowed | ({"torch"} if name in NEED_TORCH else set())
            assert imported_at_once(path) <= known, f"{name}: import it in a function, inside `extras.needed_by`"


def test_kernels_import_only_torch_and_triton():
    for name, path in MODULES.items():
        if part_of(name) == "kernels":
            foreign = {m.split(".")[0] for _, m in imports(name, path)} - set(sys.stdlib_module_names)
            assert foreign <= {"torch", "triton", "pfstorer_rt"}, name


def test_folders_of_the_checkout_are_imported_by_their_installed_names():
    for name, path in MODULES.items():
        for line, module in imports(name, path):
            assert module.split(".")[0] not in ("export", "kernels", "tests", "benchmarks"), f"{name}:{line}"
        if part_of(name) in ("export", "kernels"):  # siblings relatively, so that the folder may move
            nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
            own = [n.module for n in nodes if not n.level and part_of(n.module) == part_of(name)]
            assert not own, name


def test_the_package_list_names_every_folder():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    assert sorted(setup["packages"]) == sorted(on_disk)
    assert setup["package-dir"] == {"pfstorer_rt.export": "export", "pfstorer_rt.kernels": "kernels/ops"}
    assert not (ROOT / "kernels" / "__init__.py").exists()
    loose = [p for folder in FOLDERS.values() for p in folder.rglob("*.py") if not (p.parent / "__init__.py").exists()]
    assert not loose


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)  # a Triton kernel is one body
            assert kernel or node.end_lineno - node.lineno < 80, f"{node.name} in {name}"


def test_the_architecture_page_lists_every_file():
    page, folder, listed = (ROOT / "docs" / "architecture.md").read_text(), "", set()
    for line in page.splitlines():
        if found := re.match(r"### `(.+)/`", line):
            folder = found[1]
        elif found := re.match(r"\| `(\w+\.py)` \|", line):
            listed.add(f"{folder}/{found[1]}")
    on_disk = {str(path.relative_to(ROOT)) for path in MODULES.values() if path.name != "__init__.py"}
    assert listed == on_disk, f"missing: {sorted(on_disk - listed)}, stale: {sorted(listed - on_disk)}"


def test_the_networks_are_imported_without_bitsandbytes(tmp_path):
    """It would download compiled code and run it, where the package `kernels` is installed."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("print('imported')\n")
    code = "import sys, pfstorer_rt.models.base; print('bitsandbytes' in sys.modules)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
