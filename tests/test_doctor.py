"""doctor tells the truth: about what is there, what is missing, and why."""

import pytest
import torch

from fastft import doctor, library


def test_tells_what_serves_each_operator():
    found = doctor.examine()
    assert found["operators"] == library.operators()
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["warnings"] == ([] if library.extension else found["warnings"])
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
    monkeypatch.setenv("CXX", compiler)
    found = doctor.examine()
    (warning,) = found["warnings"]
    assert why in warning
    assert found["build"] is None and found["devices"]["cpu"] == "fastft._C is missing"
    assert "kernels       none" in doctor.text(found)


@pytest.mark.parametrize("name, version", [("torch", "2.10.1"), ("transformers", "5.16.4")])
def test_warns_of_old_versions(monkeypatch, name, version):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == name else real(n))
    warning = next(w for w in doctor.examine()["warnings"] if w.startswith(name))
    assert version in warning and doctor.OLDEST[name] in warning


def test_says_what_is_not_installed(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda n: None if n in ("transformers", "peft") else real(n)
    )
    found = doctor.examine()
    assert [w for w in found["warnings"] if w.startswith("transformers is not installed")]
    assert not [w for w in found["warnings"] if w.startswith("peft")]
    assert "peft          not installed" in doctor.text(found)
