"""setup.py without torch, with an old torch, without a compiler, with a broken one, with CUDA."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from cross import setup_names
from test_cuda import nvcc

import fastft

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, so that nothing here is touched."""
    for name in ("csrc", "fastft", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(tree, *arguments, path=(), **environment):
    """Runs setup.py; folders in `path` come before everything installed."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]}; sys.argv[0] = 'setup.py'; "
    code += "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def fake_torch(folder: Path, source: str) -> Path:
    package = folder / "fake"
    package.mkdir()
    (package / "torch").mkdir()
    (package / "torch" / "__init__.py").write_text(source)
    (package / "torch" / "utils").mkdir()
    (package / "torch" / "utils" / "__init__.py").touch()
    (package / "torch" / "utils" / "cpp_extension.py").touch()
    return package


@pytest.mark.parametrize("command", ["bdist_wheel", "build_ext", "editable_wheel"])
@pytest.mark.parametrize(
    "source, sentence",
    [
        ("raise ModuleNotFoundError('no torch', name='torch')", "this build sees none"),
        ("__version__ = '2.10.3+cpu'", "does not work with torch 2.10.3+cpu"),
    ],
)
def test_one_sentence_without_a_torch_that_fits(tree, command, source, sentence):
    done = setup(tree, command, path=[fake_torch(tree, source)])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sentence in done.stderr and "--no-build-isolation" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_metadata_needs_no_torch(tree):
    source = "raise ModuleNotFoundError('no torch', name='torch')"
    done = setup(tree, "--version", path=[fake_torch(tree, source)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == fastft.__version__


def test_a_broken_torch_raises(tree):
    done = setup(tree, "build_ext", path=[fake_torch(tree, "import a_part_of_torch")])
    assert done.returncode != 0
    assert "No module named 'a_part_of_torch'" in done.stderr


def test_without_a_compiler_a_python_wheel_that_works(tree):
    done = setup(tree, "bdist_wheel", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (/nonexistent/c++): installing without compiled kernels" in done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    installed = tree / "installed"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(installed)
    # An editable install offers its own fastft._C for any fastft that has none.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import torch, fastft.library as l; from fastft.ops.norm import rms_norm as f\n"
        "assert l.extension is None and l.operators()['rms_norm']['cpu'] == 'PyTorch reference'\n"
        "x = torch.randn(3, 8)\n"
        "torch.testing.assert_close(f(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    subprocess.run(command, cwd=installed, env=environment, check=True)


def test_a_compiler_that_fails_raises(tree):
    compiler = shutil.which("false")
    done = setup(tree, "build_ext", CXX=compiler)
    assert done.returncode != 0
    assert f"CalledProcessError: Command '['{compiler}'" in done.stderr


NO_CUDA = textwrap.dedent("""
    import torch, fastft
    from fastft import doctor, library
    from fastft.ops import cross_entropy
    assert library.extension.build_info()["cuda_architectures"] == ["9.0"]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastft_cuda::cross_entropy", "CUDA")
    assert "9.0" in doctor.text(doctor.examine())
    logits = torch.randn(3, 5)
    torch.testing.assert_close(
        fastft.ops.cross_entropy.cross_entropy(logits, torch.tensor([0, 4, -100])),
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 4, -100])),
    )
""")


def test_cuda_kernels_are_built_where_asked_and_load_without_cuda(tree):
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    done = setup(
        tree, "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST="9.0", CXXFLAGS="-O0",
        PATH=os.pathsep.join([str(Path(nvcc()).parent), os.environ["PATH"]]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run([sys.executable, "-c", NO_CUDA], cwd=tree, check=True)


@pytest.mark.parametrize(
    "cuda, nvcc, why",
    [
        ("13.0", None, "no nvcc"),
        ("13.2", "release 13.0, V13.0.88", None),
        ("12.6", "release 13.0, V13.0.88", "nvcc is of CUDA 13 and torch of CUDA 12.6"),
        (None, "release 13.0, V13.0.88", None),
    ],
)
def test_a_toolkit_of_another_cuda_than_torchs_is_not_used(tmp_path, cuda, nvcc, why):
    """Its runtime would ask for a driver that torch does not need."""
    names = setup_names()
    path = tmp_path / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{nvcc}'\n")
    path.chmod(0o755)
    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda))
    assert names["why_no_cuda"](torch, nvcc and str(path)) == why


def test_usual_architectures_are_those_the_compiler_knows(tmp_path, monkeypatch):
    names = setup_names()
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho sm_80 sm_90 sm_120\n")
    path.chmod(0o755)
    assert names["usual_architectures"](str(path)) == ["8.0", "9.0", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "usual")
    without_cuda = SimpleNamespace(version=SimpleNamespace(cuda=None))
    assert names["cuda_architectures"](without_cuda, str(path)) == ["8.0", "9.0", "12.0+PTX"]


def test_architectures_that_are_none_end_in_one_sentence(tree):
    done = setup(tree, "build_ext", TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "TORCH_CUDA_ARCH_LIST: expected numbers" in done.stderr and "'Hopper'" in done.stderr


@pytest.mark.slow
def test_wheel_and_source_distribution(tree):
    done = setup(tree, "sdist", "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith("fastft/_C.")]
    import tarfile

    (source,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*")}
    wanted |= {str(p.relative_to(ROOT)) for p in ROOT.glob("kernels/**/*.cu*")}
    assert wanted <= inside
