"""Makes the pages of the manual that are generated: mkdocs calls the functions named `on_...`.

The table of configuration fields comes from `alphagrpo_jax.config` and the default's values from
`configs/grpo.py`, so that no option is described twice. Pages that live beside what they describe
(the cards of the shipped models, CONTRIBUTING.md, CHANGELOG.md) are shown from where they are.

    python docs/hooks.py    # prints the tables
"""

import dataclasses
import html
import pathlib
import re
import runpy
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pydantic

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIELDS_MARK = "<!-- the table of fields -->"
LONGEST_UNBROKEN = 30  # characters of a default value; longer ones may be broken anywhere
ASSETS = "alphagrpo_jax/shapes/assets"
PAGES = {
    "cards/umm.md": f"{ASSETS}/umm/README.md",
    "cards/verifier.md": f"{ASSETS}/verifier/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


class FieldRow(NamedTuple):
    """A configuration field as the manual shows it."""

    key: str  # as in --config.KEY
    values: str  # type, choices or range
    default: Any
    description: str


class Section(NamedTuple):
    """The fields of one section of the configuration; those without a section are named ""."""

    name: str
    description: str
    rows: list[FieldRow]


def sections() -> list[Section]:
    """Reads all sections of `Config`: fields without a section first, then one entry for each."""
    sys.path.insert(0, str(ROOT))
    try:
        from alphagrpo_jax.config import Config

        default = runpy.run_path(str(ROOT / "configs" / "grpo.py"))["get_config"]().to_dict()
    finally:
        sys.path.remove(str(ROOT))
    schemas = pydantic.TypeAdapter(Config).json_schema()
    without_section, with_section = Section("", "", []), []
    for name, kind in _fields(Config):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            rows = list(_rows(f"{name}.", kind, default[name], schemas["$defs"]))
            with_section.append(Section(name, _joined(kind.__doc__ or ""), rows))
        else:
            without_section.rows.append(_row("", Config, name, schemas, default[name]))
    return [without_section, *with_section]


def fields_markdown() -> str:
    """The tables of all sections, as Markdown."""
    tables = []
    for section in sections():
        title = f"`{section.name}`" if section.name else "Fields without a section"
        lines = [f"### {title}", ""]
        if section.description:
            lines += [section.description, ""]
        lines += ["| field | default | values | meaning |", "|---|---|---|---|"]
        for row in section.rows:
            cells = (f"`{row.key}`", _code(row.default), row.values, row.description)
            lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _fields(section: type) -> list[tuple[str, Any]]:
    """Names and types of a section's fields: its own before those that it inherits."""
    types = typing.get_type_hints(section)
    names = [name for cls in section.__mro__ for name in vars(cls).get("__annotations__", ())]
    return [(name, types[name]) for name in dict.fromkeys(names)]


def _rows(
    prefix: str, section: type, default: Mapping[str, Any], schemas: Mapping[str, Any]
) -> Iterator[FieldRow]:
    """The fields of a section and of the sections in it; `schemas` are those of all sections."""
    for name, kind in _fields(section):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _rows(f"{prefix}{name}.", kind, default[name], schemas)
        else:
            yield _row(prefix, section, name, schemas[section.__name__], default[name])


def _row(
    prefix: str, section: type, name: str, schema: Mapping[str, Any], default: Any
) -> FieldRow:
    # pydantic takes the text below a field from the class that declares it, not from its bases.
    fields = (vars(cls).get("__pydantic_fields__", {}).get(name) for cls in section.__mro__)
    texts = [field.description for field in fields if field is not None and field.description]
    values = _values(schema["properties"][name])
    return FieldRow(f"{prefix}{name}", values, default, _joined(texts[0] if texts else ""))


def _values(field: Mapping[str, Any]) -> str:
    """Type and limits of a field, in words."""
    if "enum" in field:
        return " or ".join(_code(choice) for choice in field["enum"])
    if "const" in field:
        return _code(field["const"])
    if field.get("type") == "array":
        items = field.get("prefixItems") or [field.get("items", {})]
        inner = _values(items[0])
        return f"{len(items)} times {inner}" if "prefixItems" in field else f"list of {inner}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
    text = names.get(field.get("type", ""), "any")
    limits = (
        ("from", field.get("minimum")),
        ("above", field.get("exclusiveMinimum")),
        ("to", field.get("maximum")),
        ("below", field.get("exclusiveMaximum")),
    )
    words = [f"{word}\u00a0{_number(limit)}" for word, limit in limits if limit is not None]
    return " ".join((text, *words))


def _number(value: float) -> str:
    """A limit as it is read best: powers of two that stand for "no limit" as such."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and value >= 1 << 20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(value: Any) -> str:
    """A value as code; a text as a flag takes it, and in quotes where it is empty."""
    text = value if isinstance(value, str) and value else repr(value)
    if len(text) <= LONGEST_UNBROKEN:
        return f"`{text}`"
    return f'<code class="long">{html.escape(text).replace("|", "&#124;")}</code>'


def _joined(text: str) -> str:
    return " ".join(text.split())


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that live elsewhere in the repository; called by mkdocs."""
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for linked, file in PAGES.items():
            text = text.replace(f"]({file})", f"]({linked})")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the table of fields where a page asks for it; called by mkdocs.

    Links to files that the manual shows as pages lead to these pages. In tables, GitHub wants a bar
    in code escaped, while this generator would show the backslash.
    """
    markdown = re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), markdown)
    for page, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown.replace(FIELDS_MARK, fields_markdown()) if FIELDS_MARK in markdown else markdown


if __name__ == "__main__":
    print(fields_markdown())  # noqa: T201
