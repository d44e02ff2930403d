"""Who may import whom (nothing points upward), and what `import fastft` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each part may import itself and these; whatever is not listed here may import anything.
ALLOWED = {
    "foreign": set(),
    "library": {"_C"},
    "ops": {"library", "kernels"},
    "decode": {"foreign", "library", "ops"},
    "patch": {"foreign", "library", "ops", "decode"},
    "losses": {"library", "ops"},
    "finetune": {"foreign", "library", "ops", "patch", "decode", "losses"},
    "doctor": {"library", "ops"},
}
# Imported where they are used, never when fastft is.
HEAVY = ("transformers", "triton", "peft", "trl", "datasets", "matplotlib")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # kernels/ does not know under which name it is installed, so its files say `.common`.
            siblings = node.level == 1 and "kernels" in path.parts
            assert node.level == 0 or siblings, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts(names: set[str]) -> set[str]:
    """Of the names inside fastft, the part each belongs to; its own public names are no part."""
    inside = {name.split(".")[1] for name in names if name.startswith("fastft.")}
    return inside - {"__version__"}


@pytest.mark.parametrize("part", ALLOWED)
def test_nothing_points_upward(part):
    files = [*ROOT.glob(f"fastft/{part}.py"), *ROOT.glob(f"fastft/{part}/**/*.py")]
    assert files
    for path in files:
        upward = parts(imports(path)) - ALLOWED[part] - {part}
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_nobody_imports_the_commands():
    for path in ROOT.glob("fastft/**/*.py"):
        if path.name not in ("__main__.py", "cli.py"):
            assert "cli" not in parts(imports(path)), path


def test_kernels_know_nothing_of_fastft():
    for path in ROOT.glob("kernels/**/*.py"):
        assert not {n for n in imports(path) if n.split(".")[0] == "fastft"}, path


def test_the_rules_see_every_form_of_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import fastft.cli\ndef f():\n    from fastft import patch\n    import os\n")
    assert parts(imports(file)) == {"cli", "patch"}


def bound(path: Path) -> set[str]:
    """Names that a file binds outside functions, and the modules beside an __init__.py."""
    found = {p.stem for p in path.parent.iterdir()} if path.name == "__init__.py" else set()
    nodes = list(ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        nodes += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("folder", ["bench", "tests"])
def test_what_is_imported_within_functions_exists(folder):
    # The checks that need hours, a GPU or another machine run seldom.
    for path in ROOT.glob(f"{folder}/**/*.py"):
        for name in imports(path):
            module, _, last = name.rpartition(".")
            if module.split(".")[0] not in ("fastft", "bench", "tests"):
                continue
            module = module.replace("fastft.kernels", "kernels.triton")
            file = ROOT / module.replace(".", "/")
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            known = file.exists() and last in bound(file)
            assert known, f"{path.relative_to(ROOT)} imports {name}"


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["fastft", "fastft.finetune"])
def test_import_is_light(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_is_quick():
    code = (
        "import time, torch\nstart = time.process_time()\nimport fastft\n"
        "print(time.process_time() - start)"
    )
    # CPU time, since the machine may be busy; the run that was disturbed least counts.
    assert min(float(python(code)) for _ in range(5)) < 0.2


def test_no_path_of_one_machine():
    homes = ["/" + name + "/" for name in ("home", "root", "Users", "work")]
    suffixes = (".py", ".cpp", ".h", ".md", ".toml", ".cu")
    for folder in ("fastft", "csrc", "kernels", "tests", "bench", "docs", ".ci"):
        for path in ROOT.glob(f"{folder}/**/*"):
            if path.is_file() and (path.suffix in suffixes or folder == ".ci"):
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    assert not any(home in line for home in homes), f"{path}:{number}: {line}"


@pytest.mark.parametrize(
    "first", ["fastft", "fastft.patch", "fastft.ops.norm", "fastft.finetune.data"]
)
def test_patch_is_the_function_whatever_was_imported_first(first):
    code = (
        f"import importlib, pkgutil; importlib.import_module({first!r})\n"
        "import fastft, sys\n"
        "for module in pkgutil.iter_modules(sys.modules['fastft.patch'].__path__):\n"
        "    importlib.import_module('fastft.patch.' + module.name)\n"
        "print([n for n in fastft.__all__ if n != 'losses' and not callable(getattr(fastft, n))])"
    )
    assert python(code).strip() == "[]"


def test_commands_are_functions_whatever_was_imported_first():
    code = (
        "import importlib, types; importlib.import_module('fastft.finetune.train')\n"
        "import fastft.finetune as finetune\n"
        "from fastft.cli import CONFIGURED\n"
        "for module, _, function, _ in CONFIGURED.values():\n"
        "    importlib.import_module(module)\n"
        "    if not isinstance(getattr(finetune, function), types.FunctionType): print(function)"
    )
    assert python(code).strip() == ""
