"""Settings of the commands: a dataclass each, read from a flat YAML file and from flags over it.

    fastft train settings.yaml --learning-rate 1e-4

A key of the file is a field's name, a flag the same with hyphens; both are parsed by the same code
and a flag wins. In Python the dataclass itself is the interface: TrainConfig(model=..., data=...).
"""

import argparse
import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from fastft.finetune import UserError

LARGEST_SEED = 2**32 - 1  # that NumPy takes


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with a help text and the bounds of its value; required without default."""
    bounds = {"least": least, "most": most, "above": above}
    metadata = {"help": help, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Config:
    """What every command's settings share: values are checked when they are made.

    A field is str, int, float, bool, Literal, list of one of them, or one of these or None.
    """

    # The field, a list of texts, that has `key: [..]` of a file's lists for fields of one value.
    LISTS: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if not _is(value, hints[item.name]):
                raise UserError(f"{item.name}: expected {_named(hints[item.name])}, got {value!r}")
            _check_bounds(item, value)
            if isinstance(value, int) and not isinstance(value, bool) and _floats(hints[item.name]):
                setattr(self, item.name, float(value))
        self.check()

    def check(self) -> None:
        """Raises UserError where values do not belong together."""


Kind = TypeVar("Kind", bound=Config)


def read(kind: type[Kind], command: str, arguments: list[str]) -> Kind:
    """The settings that a command line asks for: `[file.yaml] [--flag value ...]`.

    Raises: UserError for a file that cannot be read, an unknown key or flag (with the nearest
    name), and a value of the wrong type. --help prints every field and ends the process.
    """
    files, arguments = _settings_files(arguments)
    if len(files) > 1:
        raise UserError(f"one settings file at a time, got {' and '.join(files)}")
    known = {item.name for item in fields(kind)}
    hints = get_type_hints(kind)
    lists = {n for n in known if any(get_origin(h) is list for h in alternatives(hints[n]))}
    flags, given_lists = [], set[str]()
    for argument in arguments:
        if not argument.startswith("--"):
            flags.append(argument if argument == "-h" else _value(argument))
            continue
        flag, joined, value = argument.partition("=")
        flag = flag.replace("_", "-")  # a key as the file has it will do
        name = flag.removeprefix("--").replace("-", "_")
        if not {name, name.removeprefix("no_")} & {*known, "help"}:
            raise _unknown(flag, name, known, flag=True)
        # argparse would keep the last one alone.
        if name in given_lists:
            raise UserError(f"{flag}: given twice; its values go behind one {flag}")
        given_lists |= {name} & lists
        flags.append(flag + joined + value)
    given = [*(_flags_of(files[0], kind) if files else []), *flags]
    values, rest = _parser(kind, command).parse_known_args(given)
    if rest:
        extra = rest[0].removeprefix(ESCAPE)
        raise UserError(f"unexpected argument {extra!r}; `fastft {command} --help` lists them")
    return kind(**vars(values))


def _settings_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The YAML files named, first of all or by --config, and the other arguments."""
    rest = list(arguments)
    files = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    for argument in [a for a in rest if a == "--config" or a.startswith("--config=")]:
        at = rest.index(argument)
        _, joined, file = rest.pop(at).partition("=")
        if not joined and at < len(rest):
            file = rest.pop(at)
        if not file:
            raise UserError("--config: expected a file")
        files.append(file)
    return files, rest


# Before a value that starts with a hyphen, which argparse would take for a flag.
ESCAPE = "\0"


def _value(text: str) -> str:
    return ESCAPE + text if text.startswith("-") else text


def _unescaped(hint: type) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return hint(text.removeprefix(ESCAPE))

    value.__name__ = hint.__name__  # argparse's messages say it
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        shown = message.replace(repr(ESCAPE)[1:-1], "").replace(ESCAPE, "")
        raise UserError(shown.removeprefix("argument "))


def _parser(kind: type[Config], command: str) -> argparse.ArgumentParser:
    # Not transformers' HfArgumentParser: it gives a field's metadata to argparse whole, so that
    # bounds have no place, and takes a second to import.
    parser = _Parser(
        prog=f"fastft {command}",
        usage=f"fastft {command} [settings.yaml] [--key value ...]",
        description=inspect.cleandoc(kind.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the dataclass has the defaults
        allow_abbrev=False,
    )
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint = next(one for one in alternatives(hints[item.name]) if one is not type(None))
        options: dict[str, Any] = {"required": _default_of(item) is MISSING}
        if get_origin(hint) is list:
            hint, options["nargs"] = get_args(hint)[0], "+"
        if get_origin(hint) is Literal:
            options |= {"choices": get_args(hint), "type": _unescaped(type(get_args(hint)[0]))}
        elif hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": _unescaped(hint), "metavar": hint.__name__.upper()}
        text = f"{item.metadata.get('help', '')}{_shown(_default_of(item))}".replace("%", "%%")
        names = [f"--{item.name.replace('_', '-')}"]
        parser.add_argument(*names, dest=item.name, help=text.strip(), **options)
    return parser


def _shown(default: Any) -> str:
    """What the help says of a default; of None and of no values the text itself does."""
    if default is MISSING:
        return " (required)"
    if default is None or default == []:
        return ""
    values = default if isinstance(default, list) else [default]
    # Spaces and newlines would not be seen.
    told = (repr(v) if isinstance(v, str) and v != "".join(v.split()) else str(v) for v in values)
    return f" (default: {' '.join(told)})"


def _default_of(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _flags_of(path: str, kind: type[Config]) -> list[str]:
    """A YAML file as flags, so that one parser types both; null leaves a field at its default."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        held = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        why = str(getattr(error, "problem", error)).splitlines()[0]
        raise UserError(f"{path}: not YAML{line}: {why}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected lines of `key: value`") from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise UserError(f"{path}: a value that YAML cannot read: {error}") from None
    if not isinstance(held, dict):
        raise UserError(f"{path}: expected lines of `key: value`")
    flags, known, hints = [], {f.name: f for f in fields(kind)}, get_type_hints(kind)
    lists = []
    for key, value in held.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise _unknown(f"{path}: {key}", name, known)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not values or any(isinstance(v, list | dict) for v in values):
            raise UserError(f"{path}: {key}: expected a value or a list of values, got {value!r}")
        kinds = {get_origin(one) or one for one in alternatives(hints[name])}
        if kind.LISTS is not None and isinstance(value, list) and list not in kinds:
            lists.append(f"{name}: {yaml.safe_dump(value, default_flow_style=True).strip()}")
            if _default_of(known[name]) is not MISSING:
                continue
            value, values = value[0], value[:1]
        if isinstance(value, bool) != (bool in kinds) or list in {type(value)} - kinds:
            expected = _named(hints[name])
            raise UserError(f"{path}: {key}: expected {expected}, got {value!r}")
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [flag, *(_value(str(v)) for v in value)]
        else:
            flags.append(f"{flag}={value}")  # joined: no value is taken for a flag of its own
    if lists and kind.LISTS is not None:
        held = [str(entry) for entry in held.get(kind.LISTS) or ()]
        flags += [f"--{kind.LISTS.replace('_', '-')}", *held, *lists]
    return flags


def _unknown(shown: str, name: str, known: Iterable[str], flag: bool = False) -> UserError:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if not near:
        return UserError(f"{shown}: no such setting")
    meant = "--" + near[0].replace("_", "-") if flag else near[0]
    return UserError(f"{shown}: no such setting; did you mean {meant}?")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is(value: Any, hint: Any) -> bool:
    for one in alternatives(hint):
        if get_origin(one) is Literal:
            fits = value in get_args(one)
        elif get_origin(one) is list:
            fits = isinstance(value, list) and all(_is(v, get_args(one)[0]) for v in value)
        elif one is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif one is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, one)
        if fits:
            return True
    return False


def _floats(hint: Any) -> bool:
    return float in alternatives(hint) and int not in alternatives(hint)


def _named(hint: Any) -> str:
    names = []
    for one in alternatives(hint):
        if get_origin(one) is Literal:
            names += [repr(v) for v in get_args(one)]
        elif get_origin(one) is list:
            names.append(f"a list of {_named(get_args(one)[0])}")
        else:
            names.append("None" if one is type(None) else one.__name__)
    return " or ".join(names)


def _check_bounds(item: Field[Any], value: Any) -> None:
    bounds = item.metadata.get("bounds", {})
    for one in value if isinstance(value, list) else [value]:
        if one is None:
            continue
        if "least" in bounds and not one >= bounds["least"]:
            raise UserError(f"{item.name}: expected at least {bounds['least']}, got {one}")
        if "most" in bounds and not one <= bounds["most"]:
            raise UserError(f"{item.name}: expected at most {bounds['most']}, got {one}")
        if "above" in bounds and not one > bounds["above"]:
            raise UserError(f"{item.name}: expected more than {bounds['above']}, got {one}")
        if bounds and isinstance(one, float) and not math.isfinite(one):
            raise UserError(f"{item.name}: expected a finite number, got {one}")
