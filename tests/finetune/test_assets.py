"""assets on small wheels of its own: fetched once, checked, atomic."""

import hashlib
import zipfile

import pytest

from fastft.finetune import UserError, assets

METADATA = "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"


@pytest.fixture
def asset(tmp_path, monkeypatch):
    """An asset in a wheel that pip finds in a folder, with no index and no network."""
    wheel = tmp_path / "index" / "tiny_asset-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_asset/numbers.json", "[1, 2, 3]")
        archive.writestr("tiny_asset/__init__.py", "raise SystemError('imported')")
        archive.writestr("tiny_asset-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return assets.Asset("tiny-asset==1.0", digest, "tiny_asset/numbers.json", "1 kB", "none")


def changed(asset, **fields):
    return assets.Asset(**{**vars(asset), **fields})


def entries(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_fetches_once(asset, tmp_path, monkeypatch):
    monkeypatch.setitem(assets.DATASETS, "tiny", asset)
    path = assets.dataset("tiny", tmp_path / "cache")
    assert path.read_text() == "[1, 2, 3]"
    assert entries(tmp_path / "cache") == ["data", "data/numbers.json"]
    monkeypatch.setattr(assets, "_download", None)
    assert assets.dataset("tiny", tmp_path / "cache") == path


def test_fetches_a_folder(asset, tmp_path, monkeypatch):
    folder = changed(asset, member="tiny_asset/")
    monkeypatch.setitem(assets.DATASETS, "tiny", folder)
    monkeypatch.setitem(assets.MODELS, "tiny", folder)
    for found in (assets.dataset, assets.model):
        path = found("tiny", tmp_path / "cache")
        assert path.name == "tiny" and entries(path) == ["__init__.py", "numbers.json"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sha256": "0" * 64}, "not the file that is pinned here"),
        ({"member": "tiny_asset/other.json"}, "holds no tiny_asset/other.json"),
        ({"requirement": "tiny-asset==2.0"}, "could not download"),
    ],
)
def test_failures_are_told_and_leave_nothing(asset, tmp_path, monkeypatch, fields, message):
    monkeypatch.setitem(assets.DATASETS, "tiny", changed(asset, **fields))
    with pytest.raises(UserError, match=message):
        assets.dataset("tiny", tmp_path / "cache")
    assert entries(tmp_path / "cache") == ["data"]


def test_an_interrupted_conversion_leaves_no_half_model(asset, tmp_path, monkeypatch):
    monkeypatch.setitem(assets.MODELS, "tiny", asset)

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text(gguf.read_text())
        if interrupt:
            raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert", convert)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        assets.model("tiny", tmp_path / "cache")
    assert entries(tmp_path / "cache") == ["models"]
    interrupt = False
    folder = assets.model("tiny", tmp_path / "cache")
    assert (folder / "config.json").read_text() == "[1, 2, 3]"
    assert entries(folder.parent) == ["tiny", "tiny/config.json"]


def test_another_process_made_it_meanwhile(tmp_path):
    target = tmp_path / "model"

    def make(part):
        part.mkdir()
        (part / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()

    assert entries(assets._once(target, make)) == ["theirs"]


def test_a_source_distribution_is_read_too(tmp_path):
    import tarfile

    file = tmp_path / "x.json"
    file.write_text("[]")
    archive = tmp_path / "tiny-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as source:
        source.add(file, "tiny-1.0/data/x.json")
    assets._extract(archive, "tiny-1.0/data/x.json", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "[]"


def test_nothing_is_unpacked_outside_of_its_folder(tmp_path):
    archive = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("tiny/../../../evil", "")
    with pytest.raises(UserError, match="which leads out of its folder"):
        assets._extract(archive, "tiny/", tmp_path / "cache" / "out")
    assert entries(tmp_path) == [archive.name]
