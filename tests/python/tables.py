"""The tables of model families, read on their own: an expander that shares no code with the one in Rust."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).resolve().parents[2] / "rust" / "core" / "data"


@dataclass(frozen=True)
class Layer:
    """One module: output rows, input channels (0 for a vector), kernel, and the parameter's name where not `weight`."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    param: str | None = None
    # All input widths that occur, the first being `inputs`.
    widths: tuple[int, ...] = field(default=(), compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (self.outputs, *((self.inputs,) if self.inputs else ()), *self.kernel)


@dataclass
class Model:
    """A family in one of its sizes."""

    family: str
    variant: str | None
    # component -> canonical path -> layer
    components: dict[str, dict[str, Layer]] = field(default_factory=dict)
    # component -> namespace -> its path -> canonical paths, in order
    names: dict[str, dict[str, dict[str, tuple[str, ...]]]] = field(default_factory=dict)
    # component -> namespace -> paths whose halves are exchanged
    swapped: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    # component -> namespace -> its path -> the parameter's name, where it is no layer that adapters factor
    params: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)


def number(value: int | str, sizes: dict[str, int]) -> int:
    """An integer, or sums and products of integers and named sizes."""
    if isinstance(value, int):
        return value
    total = 0
    for term in value.split("+"):
        product = 1
        for part in term.split("*"):
            part = part.strip()
            product *= int(part) if part.isdigit() else sizes[part]
        total += product
    return total


def _braces(text: str) -> list[str]:
    groups = [part.split(",") if part is not None else None for part in re.findall(r"\{([^{}]*,[^{}]*)\}", text)]
    pieces = re.split(r"\{[^{}]*,[^{}]*\}", text)
    out = []
    for choice in itertools.product(*groups):
        parts = [pieces[0]]
        for picked, piece in zip(choice, pieces[1:], strict=True):
            parts += [picked.strip(), piece]
        out.append("".join(parts))
    return out


def _listed(row: dict[str, Any], lists: dict[str, dict[str, list[str]]], spaces: list[str]) -> list[dict[str, Any]]:
    """The row once for each entry of the paired lists that it names."""
    used = [name for name in lists if "{" + name + "}" in row[spaces[0]]]
    if not used:
        return [row]
    name, rows = used[0], []
    for i in range(len(lists[name][spaces[0]])):
        made = dict(row)
        for space in spaces:
            if space in row:
                made[space] = row[space].replace("{" + name + "}", lists[name][space][i])
        rows += _listed(made, lists, spaces)
    return rows


def _numbered(paths: list[str], blocks: dict[str, int]) -> list[list[str]]:
    """The paths for all values of the block variables that the first one has."""
    variables = list(dict.fromkeys(re.findall(r"\{(\w+)\}", paths[0])))
    out = []
    for values in itertools.product(*(range(blocks[v]) for v in variables)):
        filled = list(paths)
        for variable, value in zip(variables, values, strict=True):
            filled = [path.replace("{" + variable + "}", str(value)) for path in filled]
        out.append(filled)
    return out


def _row(model: Model, component: str, spaces: list[str], row: dict[str, Any], sizes: dict, blocks: dict) -> None:
    layers = model.components.setdefault(component, {})
    canonical = _braces(row[spaces[0]])
    op = row.get("op", "rename")
    outs = row["out"] if isinstance(row["out"], list) else [row["out"]]
    outs = [number(value, sizes) for value in outs]
    widths = row.get("in", [])
    widths = tuple(number(width, sizes) for width in (widths if isinstance(widths, list) else [widths]))
    inputs = widths[0] if widths else 0
    kernel = row.get("kernel", ())
    kernel = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    param = row.get("param", {}).get(spaces[0])
    for i, path in enumerate(canonical):
        layer = Layer(outs[i if op == "fuse" else 0], inputs, kernel, param, widths)
        for (filled,) in _numbered([path], blocks):
            before = layers.setdefault(filled, layer)
            assert before == layer, f"{model.family}: {filled} is {before} and {layer}"
    for space in spaces[1:]:
        if space not in row:
            continue
        names = model.names.setdefault(component, {}).setdefault(space, {})
        theirs = _braces(row[space])
        pairs = [(theirs[0], canonical)] if op == "fuse" else [(t, [c]) for t, c in zip(theirs, canonical, strict=True)]
        for their, ours in pairs:
            for filled in _numbered([*ours, their], blocks):
                assert filled[-1] not in names, f"{model.family}: {space} names {filled[-1]} twice"
                names[filled[-1]] = tuple(filled[:-1])
                if op == "only":
                    model.params.setdefault(component, {}).setdefault(space, {})[filled[-1]] = row["param"][space]
                if op == "swap_halves":
                    model.swapped.setdefault(component, {}).setdefault(space, set()).add(filled[-1])


def raw(family: str) -> dict[str, Any]:
    """The file of a family."""
    return tomllib.loads((DATA / "families" / f"{family}.toml").read_text(encoding="utf-8"))


def load(family: str) -> list[Model]:
    """All sizes of a family."""
    table = raw(family)
    models = []
    for variant in table.get("variant", [{}]):
        model = Model(table["name"], variant.get("name"))
        for part in table["component"]:
            source = part
            sizes = {**table.get("sizes", {}), **variant.get("sizes", {})}
            blocks = {**table.get("blocks", {}), **variant.get("blocks", {})}
            lists = table.get("lists", {})
            if "use" in part:
                source = tomllib.loads((DATA / "components" / f"{part['use']}.toml").read_text(encoding="utf-8"))
                sizes = {**source.get("sizes", {}), **sizes}
                blocks = {**source.get("blocks", {}), **blocks} if source.get("open") else source.get("blocks", {})
                lists = source.get("lists", {})
            spaces = source["namespaces"]
            for row in source["rows"]:
                if "variants" in row and model.variant not in row["variants"]:
                    continue
                for listed in _listed(row, lists, spaces):
                    _row(model, part["name"], spaces, listed, sizes, blocks)
        models.append(model)
    return models


def families() -> list[str]:
    """Names of all family files."""
    return sorted(path.stem for path in (DATA / "families").glob("*.toml"))
