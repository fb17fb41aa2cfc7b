"""The config reference, written from the models that validate a config: `python -m flows.reference docs/config.md`."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flows.comparison import ComparisonSpec
from flows.config import StreamConfig, fields_of, is_model
from neft.baselines import BASELINES
from neft.protection import POLICIES
from neft.scoring import SCORERS

_HEAD = """# Config reference

Made by `make docs` from the models that validate a config; do not edit it by hand.

A config is one YAML file. Relative paths are relative to the file. Unknown keys are refused, with the nearest known
one. `neft run CONFIG --set a.b=c` overrides a key; an item of a list is named by its number (`tasks.0.data.limit=100`).
"""

_COMPARISON = """## A comparison

The YAML file of `neft compare`. `--set stream.a.b=c` overrides a key of its stream, be that a file or not.
"""


def reference() -> str:
    """The whole page, as Markdown."""
    sections = [_section(path, model) for path, model in _models(StreamConfig, "")]
    comparison = [_COMPARISON, _table(ComparisonSpec)]
    strategies = [
        _strategies("Scorers", "method.scorer", SCORERS),
        _strategies("Protection policies", "method.protection", POLICIES),
        _strategies("Baselines", "method.baseline", BASELINES),
    ]
    return "\n".join([_HEAD, *sections, *strategies, *comparison])


def _models(model: type[Any], path: str) -> Iterator[tuple[str, type[Any]]]:
    yield path, model
    for name, field in fields_of(model).items():
        inner = _inner(field.annotation)
        many = "[]" if inner and _is_list(field.annotation) else ""
        if inner is not None:
            yield from _models(inner, f"{path}.{name}{many}" if path else f"{name}{many}")


def _inner(annotation: Any) -> type[Any] | None:
    if is_model(annotation):
        return cast(type[Any], annotation)
    return next((found for part in get_args(annotation) if (found := _inner(part))), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(_is_list(part) for part in get_args(annotation))


def _section(path: str, model: type[Any]) -> str:
    title = f"`{path}`" if path else "Top level"
    return f"## {title}\n\n{_table(model)}"


def _table(model: type[Any]) -> str:
    rows = [
        _first_paragraph(model.__doc__),
        "",
        "| key | type | default | what it is |",
        "|---|---|---|---|",
    ]
    rows += [_row(name, field) for name, field in fields_of(model).items()]
    return "\n".join([*rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    return f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {field.description or ''} |".replace(
        "\n", " "
    )


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in get_args(annotation) if part is not type(None)))
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict or is_model(annotation):
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    value = field.default
    if value is None:
        return "-"
    if isinstance(value, BaseModel):
        shown = value.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return f"`{json.dumps(shown)}`" if shown else "its keys' defaults"
    return f"`{json.dumps(value)}`"


def _strategies(title: str, key: str, known: Mapping[str, type[Any]]) -> str:
    rows = [
        f"## {title}",
        "",
        f"Found by name under `{key}`.",
        "",
        "| name | options | what it does |",
        "|---|---|---|",
    ]
    for name, strategy in known.items():
        fields = getattr(strategy, "__dataclass_fields__", {})
        options = ", ".join(
            f"`{field.name}: {_option_default(field.default)}`"
            for field in fields.values()
            if field.init and not str(field.type).startswith("ClassVar")
        )
        rows.append(f"| `{name}` | {options or '-'} | {_first_paragraph(strategy.__doc__)} |")
    return "\n".join([*rows, ""])


def _option_default(value: Any) -> str:
    """As a config would have it; a file that comes with neft lies elsewhere on every machine."""
    if isinstance(value, Path):
        return "neft's own"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split()).replace("|", "\\|")


def main() -> None:
    """Write the page to the file named on the command line."""
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
