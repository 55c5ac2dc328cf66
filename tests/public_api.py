"""What users may rely on: public names with their signatures, and all flags with their defaults.

``tests/public_api.txt`` holds them, so that a change of any shows in a review. To write it anew::

    python -m tests.public_api > tests/public_api.txt
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from toolkit import cli

MODULES = ("toolkit", "toolkit.freezing", "toolkit.isolation", "toolkit.rotograd")
ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


class _Found(Exception):
    """Carries a parser out of the function that has built it."""


def snapshot() -> str:
    """All of it, as text."""
    lines: list[str] = []
    for name in MODULES:
        lines += [f"[{name}]", *_module_lines(name), ""]
    lines += ["[gradient-bridge]", *_parser_lines(cli.build_parser()), ""]
    for name in RECIPES:
        lines += [f"[recipes/{name}.py]", *_parser_lines(recipe_parser(name)), ""]
    return "\n".join(lines)


def _module_lines(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    public = {each: getattr(module, each) for each in sorted(module.__all__)}
    for each, item in public.items():
        if not inspect.isclass(item):
            yield f"{each}{_signature(item)}"
            continue
        inherited = {base for base in item.__mro__[1:] if base in public.values()}
        own = [c for c in reversed(item.__mro__) if _is_ours(c) and c not in inherited]
        yield f"class {each}({', '.join(base.__name__ for base in item.__bases__)})"
        if any("__init__" in vars(owner) for owner in own):
            yield from (f"    {given}" for given in _signature(item).parameters.values())
        yield from sorted({line for owner in own for line in _member_lines(owner)})


def _is_ours(item: type) -> bool:
    return item.__module__.split(".")[0] == "toolkit"


def _member_lines(owner: type) -> Iterator[str]:
    """What one class adds: methods, properties, and the attributes that its docstring names."""
    fields = getattr(owner, "__dataclass_fields__", {})
    for name, value in vars(owner).items():
        if name.startswith("_") or name in fields:
            continue
        if isinstance(value, property):
            yield f"    .{name}: {_signature(value.fget).return_annotation}"
        elif callable(value):
            yield f"    .{name}{_signature(value)}"
    section = re.search(
        r"^Attributes:\n((?: .*\n?|\n)+)", inspect.getdoc(owner) or "", re.MULTILINE
    )
    for name in re.findall(r"^ {4}(\w+):", section[1] if section else "", re.MULTILINE):
        if name not in vars(owner):
            yield f"    .{name}"


class _Bare(str):
    """An annotation that a signature shows without quotes."""

    __repr__ = str.__str__


def _signature(item: Any) -> inspect.Signature:
    found = inspect.signature(item)
    parameters = [
        given
        if given.annotation is given.empty
        else given.replace(annotation=_Bare(given.annotation))
        for given in found.parameters.values()
    ]
    returned = found.return_annotation
    return found.replace(
        parameters=parameters,
        return_annotation=returned if returned is found.empty else _Bare(returned),
    )


def recipe_parser(name: str) -> argparse.ArgumentParser:
    """The parser that a recipe builds before it looks at the command line."""

    def catch(parser: argparse.ArgumentParser, *args: object) -> None:
        raise _Found(parser)

    recipe = importlib.import_module(f"recipes.{name}")
    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            recipe.parse_arguments()
        except _Found as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise AssertionError(f"recipes/{name}.py does not parse its command line")


def _parser_lines(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, of_command in action.choices.items():
                yield f"{prefix}{command}"
                yield from _parser_lines(of_command, f"{prefix}    ")
        elif not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            names = ", ".join(action.option_strings) or action.metavar or action.dest
            needed = " (required)" if action.required else ""
            yield f"{prefix}{names} = {_shown(action.default)}{needed}"


def _shown(default: object) -> str:
    return repr(str(default)) if isinstance(default, Path) else repr(default)


if __name__ == "__main__":
    sys.stdout.write(snapshot())
