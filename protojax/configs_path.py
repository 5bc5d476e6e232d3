"""Where config files are: a path, `configs/NAME.py` here, or `NAME` of those installed with the package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from protojax.config import suggest

PACKAGE = Path(__file__).parent


def directories() -> list[Path]:
    """Searched in this order: ./configs, the installed configs, and those of a source checkout."""
    return [d for d in (Path("configs"), PACKAGE / "configs", PACKAGE.parent / "configs") if d.is_dir()]


def find(name: str) -> Path:
    """The config file of a path or a name. Raises FileNotFoundError with the nearest name."""
    stem = name.removesuffix(".py")
    for candidate in (Path(name), Path(stem + ".py"), *(d / f"{stem}.py" for d in directories())):
        if candidate.is_file():
            return candidate
    short = stem.removeprefix("configs/")
    for directory in directories():
        if (directory / f"{short}.py").is_file():
            return directory / f"{short}.py"
    known = sorted({str(p.relative_to(d).with_suffix("")) for d in directories() for p in d.rglob("*.py")})
    raise FileNotFoundError(f"no config file {name!r}{suggest(short, known)}. Installed: {known}.")


def load(value: str) -> ml_collections.ConfigDict:
    """What `get_config` of FILE[:ARGUMENT] returns. Raises FileNotFoundError, and what the file raises."""
    name, colon, argument = value.partition(":")
    get_config = function_of(find(name), "get_config", "argument=''", "config")
    return get_config(argument) if colon else get_config()


def function_of(path: Path, name: str, signature: str, kind: str) -> Callable[..., Any]:
    """The function `name` of the Python file. Raises ValueError when it has none, and what the file raises."""
    spec = importlib.util.spec_from_file_location(f"protojax_{kind}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{path} has no function {name}({signature}): is it a {kind} file?")
    return getattr(module, name)


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(value of --config or None, the other arguments). The last one counts. Raises ValueError without a value."""
    value, rest, left = None, [], iter(resolve_arguments(arguments))
    for argument in left:
        if argument in ("--config", "-config"):
            value = next(left, "")
        elif argument.startswith(("--config=", "-config=")):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    if value == "":
        raise ValueError("--config needs a value: the name or path of a config file, with :ARM,FLAG if you like.")
    return value, rest


def resolve_arguments(arguments: list[str]) -> list[str]:
    """`--config=NAME:ARG` and `--config NAME:ARG` with NAME replaced by the file that it means."""
    out, follows = [], False
    for argument in arguments:
        head, separator, value = argument.partition("=")
        if follows:
            out.append(_resolve(argument))
        elif head in ("--config", "-config") and separator:
            out.append(f"--config={_resolve(value)}")
        else:
            out.append(argument)
        follows = argument in ("--config", "-config")
    return out


def _resolve(value: str) -> str:
    name, colon, argument = value.partition(":")
    if not name:
        return value
    return f"{find(name)}{colon}{argument}"
