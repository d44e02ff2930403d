"""doctor tells the truth: about what is there, what is missing, and why."""

import re
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from fastft import doctor, library

ROOT = Path(__file__).parents[1]


def test_tells_what_serves_each_operator():
    found = doctor.examine()
    assert found["operators"] == library.operators()
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert library.extension is None or found["warnings"] == []
    shown = doctor.text(found)
    row = next(line for line in shown.splitlines() if line.startswith("rms_norm "))
    assert row.split()[1] == found["operators"]["rms_norm"]["cpu"].split()[0]
    if not torch.cuda.is_available():
        assert found["devices"]["cuda"] in shown


@pytest.mark.parametrize(
    "compiler, why",
    [("/nonexistent/c++", "there is no C++ compiler"), ("true", "was not compiled when")],
)
def test_tells_why_the_kernels_are_missing(monkeypatch, compiler, why):
    monkeypatch.setattr(library, "extension", None)
    monkeypatch.setattr(doctor, "_built_elsewhere", lambda: None)
    monkeypatch.setenv("CXX", compiler)
    found = doctor.examine()
    (warning,) = found["warnings"]
    assert why in warning
    assert found["build"] is None and found["devices"]["cpu"] == "fastft._C is missing"
    assert "kernels       none" in doctor.text(found)


def test_tells_which_fastft_with_kernels_a_clone_hides(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "extension", None)
    installed = tmp_path / "fastft"
    installed.mkdir()
    (installed / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    monkeypatch.setattr("sys.path", [str(ROOT), str(tmp_path), *sys.path])
    (warning,) = doctor.examine()["warnings"]
    assert f"{installed} has them; run Python in another folder" in warning


@pytest.mark.parametrize("name, version", [("torch", "2.10.1"), ("transformers", "5.16.4")])
def test_warns_of_old_versions(monkeypatch, name, version):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == name else real(n))
    warning = next(w for w in doctor.examine()["warnings"] if w.startswith(name))
    assert version in warning and doctor.OLDEST[name] in warning


@pytest.mark.parametrize(
    "name, version",
    [("torch", "2.14.0+cu130"), ("transformers", "6.0.0"), ("peft", "0.22.0"), ("trl", "2.0.0")],
)
def test_warns_of_versions_newer_than_those_tested(monkeypatch, name, version):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == name else real(n))
    (warning,) = [w for w in doctor.examine()["warnings"] if w.startswith(name)]
    assert warning.startswith(f"{name} {version} is newer than {doctor.TESTED[name]}")
    assert warning in doctor.text(doctor.examine())


@pytest.mark.parametrize(
    "name, version", [("torch", "2.11.0"), ("torch", "2.13.9+cpu"), ("transformers", "5.17.0.dev0")]
)
def test_is_silent_on_the_edges_of_what_is_supported(monkeypatch, name, version):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == name else real(n))
    warnings = [w for w in doctor.examine()["warnings"] if w.startswith(name)]
    # A pre-release comes before its release.
    assert len(warnings) == ("dev" in version)


def test_the_versions_tested_are_the_pinned_ones():
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [*pinned["optional-dependencies"]["test"], (ROOT / "Makefile").read_text()]
    for name, version in doctor.TESTED.items():
        found = [re.search(rf"\b{name}[=>]=(\d+\.\d+)", pin) for pin in pins]
        assert [match[1] for match in found if match] == [version], name
    wanted = {r for r in pinned["dependencies"] + pinned["optional-dependencies"]["finetune"]}
    for name, version in doctor.OLDEST.items():
        assert version is None or f"{name}>={version}" in wanted, name


def test_says_what_is_not_installed(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda n: None if n in ("transformers", "peft") else real(n)
    )
    found = doctor.examine()
    assert [w for w in found["warnings"] if w.startswith("transformers is not installed")]
    assert not [w for w in found["warnings"] if w.startswith("peft")]
    assert "peft          not installed" in doctor.text(found)
