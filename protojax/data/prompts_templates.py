"""Texts of classes: template sets, which are files, filled with what is known of each class.

A template set is a text file: one template a line with {fields} in it, '#' begins a comment. Fields of a class: `name`,
and whatever the data or a file of classes adds, such as coarse, genus, family, order, description.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from protojax.config import suggest
from protojax.data.captions import table_rows

_SETS = importlib.resources.files("protojax.data") / "assets" / "templates"
_TAXONOMY = ("kingdom", "phylum", "class", "order", "family", "genus")
Fields = Mapping[str, Sequence[str]]  # field -> its value for each class, '' where there is none


class Templates(NamedTuple):
    """name: of the set or file, for messages; lines: the templates."""

    name: str
    lines: tuple[str, ...]

    @property
    def digest(self) -> str:
        """8 hexadecimal digits: equal for sets of equal templates in equal order."""
        return hashlib.blake2b("\n".join(self.lines).encode(), digest_size=4).hexdigest()


def template_sets() -> tuple[str, ...]:
    """The names of the sets that are installed."""
    return tuple(sorted(entry.name.removesuffix(".txt") for entry in _SETS.iterdir() if entry.name.endswith(".txt")))


def open_templates(which: str | Path) -> Templates:
    """An installed set by its name, or a file. Raises ValueError when it is neither, holds no template, repeats one, or
    holds braces that are no field."""
    if str(which) in template_sets():
        text = (_SETS / f"{which}.txt").read_text(encoding="utf-8")
    elif Path(which).expanduser().is_file():
        text = Path(which).expanduser().read_text(encoding="utf-8-sig")
    else:
        raise ValueError(
            f"templates {str(which)!r}: neither an installed set ({', '.join(template_sets())}) nor a file"
            f"{suggest(str(which), template_sets())}"
        )
    stripped = (line.strip() for line in text.splitlines())
    lines = tuple(line for line in stripped if line and not line.startswith("#"))
    if not lines:
        raise ValueError(f"templates {which}: no template in it; write one a line, such as 'a photo of {{name}}'")
    repeated = sorted({line for line in lines if lines.count(line) > 1})
    if repeated:
        raise ValueError(f"templates {which}: {repeated[0]!r} stands there twice; leave one out")
    for line in lines:
        fields_of(line)
    return Templates(str(which), lines)


def fields_of(template: str) -> tuple[str, ...]:
    """The fields that a template names. Raises ValueError for anything in braces that is not a plain name."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; fields are written {{name}}, braces {{{{ and }}}}") from None
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in names:
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"template {template!r}: {{{name}}} is no field; write a plain name, such as {{name}}")
    return tuple(name for name, _, _ in names)


def class_texts(templates: Templates, class_names: Sequence[str], fields: Fields) -> list[tuple[str, ...]]:
    """[C][T]: every template filled for every class.

    Raises ValueError for a field that a class lacks (naming class, template and field), and for two classes that get
    the same texts: no text feature could tell them apart.
    """
    texts = []
    for c, name in enumerate(class_names):
        known = {field: values[c] for field, values in fields.items() if str(values[c]).strip()}
        for template in templates.lines:
            lacking = [field for field in fields_of(template) if field not in known]
            if lacking:
                raise ValueError(
                    f"class {name!r}, template {template!r} of {templates.name}: the field {lacking[0]!r} is missing"
                    f"{suggest(lacking[0], known)}; this class has: {', '.join(known) or 'none'}. Add it to the file "
                    "of classes, or use other templates"
                )
        texts.append(tuple(template.format(**known) for template in templates.lines))
    first: dict[tuple[str, ...], int] = {}
    for c, own in enumerate(texts):
        if (other := first.setdefault(own, c)) != c:
            raise ValueError(
                f"classes {class_names[other]!r} and {class_names[c]!r} get the same texts ({own[0]!r}): give them "
                "names of their own in a file of classes, or templates with another field"
            )
    return texts


# ------------------------------------------------------------------------------------------- fields of classes
def own_fields(class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What class names say: `name` (the last part of a path, '_' as spaces), `coarse` (the first part of deeper
    paths), and for iNaturalist 2021's (00000_Kingdom_..._Genus_epithet) the whole taxonomy with `species`."""
    parts = [name.split("_", 7) for name in class_names]
    if all(len(p) == 8 and re.fullmatch(r"\d+", p[0]) for p in parts):
        found = {level: tuple(p[i] for p in parts) for i, level in enumerate(_TAXONOMY, 1)}
        species = tuple(f"{p[6]} {p[7].replace('_', ' ')}" for p in parts)
        return {"name": species, "species": species, **found}
    fields = {"name": tuple(name.rsplit("/", 1)[-1].replace("_", " ").strip() for name in class_names)}
    if all("/" in name for name in class_names):
        fields["coarse"] = tuple(name.split("/", 1)[0].replace("_", " ") for name in class_names)
    return fields


def read_class_fields(path: str | Path, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Fields of classes from a file: a table (CSV, JSON lines, Parquet) whose first column is the class as the data
    names it, {class: {field: value}} in JSON, or a JSON list of objects with `name` (iNaturalist's categories).

    Raises ValueError for a missing or damaged file, a class that it names twice, and classes that it lacks.
    """
    path = Path(path).expanduser()
    rows = _class_rows(path)
    repeated = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{path} names the class {repeated[0]!r} twice; keep one row a class")
    known = dict(rows)
    lacking = [name for name in class_names if name not in known]
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} of {len(class_names)} classes, the first is {lacking[0]!r}"
            f"{suggest(lacking[0], known)}; it names {', '.join(map(repr, list(known)[:4]))}"
        )
    names = dict.fromkeys(field for name in class_names for field in known[name])
    return {field: tuple(known[name].get(field, "") for name in class_names) for field in names}


def _class_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    if path.suffix != ".json":
        tables = [list(row.items()) for row in table_rows(path)]
        if any(not row for row in tables):
            raise ValueError(f"{path}: a row is empty; the first column must name the class")
        return [(str(row[0][1]), _texts(dict(row[1:]))) for row in tables]
    if not path.is_file():
        raise ValueError(f"no such file: {path}; a file of classes is .csv, .jsonl, .parquet or .json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it again") from error
    if isinstance(found, dict) and isinstance(found.get("categories"), list):
        found = found["categories"]
    if isinstance(found, list) and all(isinstance(row, dict) and "name" in row for row in found):
        return [(str(row["name"]), _texts(row)) for row in found]
    if isinstance(found, dict) and all(isinstance(row, dict) for row in found.values()):
        return [(str(name), _texts(row)) for name, row in found.items()]
    raise ValueError(f"{path}: expected {{class: {{field: value}}}}, or a list of objects with 'name'")


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    texts = {str(k).strip(): str(v).strip() for k, v in row.items() if isinstance(v, str | int | float)}
    return {k: v for k, v in texts.items() if v}


def levels_of(fields: Fields) -> dict[str, tuple[str, ...]]:
    """The fields that are levels of a hierarchy: every class has one, and some classes share it."""
    found = {name: tuple(map(str, values)) for name, values in fields.items() if name != "name"}
    return {k: v for k, v in found.items() if all(v) and 1 < len(set(v)) < len(v)}
