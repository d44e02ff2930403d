"""Several adapters of one base model in one folder, each in a folder of its own name.

A task learned by a new adapter takes nothing from the others: `fastft train --adapter-name tags`
trains one beside those that the model's folder has, and keeps them with it. `run/tags` is then a
model as any other, and in PEFT `model.load_adapter("run/model/tags", "tags")`.
"""

import shutil
from pathlib import Path

from fastft.finetune import UserError, loading, methods
from fastft.finetune.run_folder import RunFolder, readable


def held(source: str | Path) -> dict[str, Path]:
    """The adapters in a run's or an adapter's folder by their names; none of any other model."""
    folder = Path(source).expanduser()
    run = RunFolder(folder)
    folder = run.model if run.record.is_file() else folder
    if not folder.is_dir():
        return {}
    if (folder / loading.ADAPTER).is_file():
        return {own_name(folder): folder}
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{loading.ADAPTER}"))}


def own_name(folder: Path) -> str:
    """A run's name rather than that of the folder in it that holds its model."""
    run = RunFolder(folder.parent)
    of_run = run.model == folder and run.record.exists()
    return (folder.resolve().parent if of_run else folder.resolve()).name


def base(source: str, name: str) -> str:
    """What the adapters in source are for, or source; name is that of one to be trained there.

    Raises: UserError where there is one of this name, or they have several base models.
    """
    found = held(source)
    if name in found:
        raise UserError(f"adapter_name: {source} has an adapter {name!r} already")
    bases = {methods.read_settings(folder)["base_model_name_or_path"] for folder in found.values()}
    if len(bases) > 1:
        raise UserError(f"{source}: its adapters are for different models: {', '.join(bases)}")
    return bases.pop() if bases else source


def copy(folder: Path, target: Path) -> None:
    """The files of an adapter and its tokenizer: no links, and no format that is not read."""
    with readable(str(folder)):
        target.mkdir()
        for file in folder.iterdir():
            known = file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model")
            if known and file.is_file() and not file.is_symlink():
                shutil.copyfile(file, target / file.name)
