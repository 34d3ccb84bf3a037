"""How do docstrings, whose roles and formulas are reStructuredText, become Markdown? An extension of griffe."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from griffe import Extension, Module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from griffe import Object

PACKAGE = "lightning_regularize"


class Docstrings(Extension):
    """Rewrite all docstrings of the package, once it is loaded and names can be looked up."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Each docstring in the scope it stands in."""
        for each in _objects(pkg):
            if each.docstring is not None:
                each.docstring.value = to_markdown(each.docstring.value, each.resolve)
                if each.is_class and "NamedTuple" in map(str, each.bases):  # whose constructor griffe does not see
                    each.docstring.value = each.docstring.value.replace("Args:\n", "Attributes:\n", 1)


def to_markdown(text: str, resolve: Callable[[str], str]) -> str:
    """Translate one docstring.

    Args:
        text: Google style, with ``.. math::``, roles, simple tables and definition lists in reStructuredText.
        resolve: The full path of a name in the docstring's scope.

    Returns:
        Google style, with Markdown of Python-Markdown's kind.
    """
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)References:\n +", r"\1*References:* ", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)\.\. math::((?:.*\n?)(?:\1 +\S.*\n?)*)", _math_block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":(?:attr|class|data|func|meth|mod):`([^`]+)`", lambda role: _link(role[1], resolve), text)
    text = re.sub(r"\\ (?=\w)", "", text)  # what separates a role from the letter after it
    text = re.sub(r"^``(\w+)``\n {4}((?:.*\n?)(?: {4}.*\n?)*)", _definition, text, flags=re.MULTILINE)
    text = re.sub(r"^( *)(=+(?: +=+)+)\n(.*)\n\2\n((?:.*\n)+?)\1\2$", _table, text, flags=re.MULTILINE)
    return "\n".join(_lists(text.split("\n")))


def _objects(module: Module) -> Iterator[Object]:
    queue: list[Object] = [module]
    for each in queue:
        queue += [member for member in each.members.values() if not member.is_alias]
    yield from queue


def _math_block(found: re.Match[str]) -> str:
    indent, formula = found[1], " ".join(found[2].split())
    return f"{indent}$$\n{indent}{formula}\n{indent}$$\n"


def _link(target: str, resolve: Callable[[str], str]) -> str:
    name = target.removeprefix("~")
    shown = name.rpartition(".")[2] if target.startswith("~") else name
    if not name.startswith(PACKAGE):
        first, dot, rest = name.partition(".")
        name = resolve(first) + dot + rest
    if "._" in name:  # of a private module, which has no page
        return f"`{shown}`"
    return f"[`{shown}`][{name}]"


def _definition(found: re.Match[str]) -> str:
    return f"`{found[1]}`\n:   {found[2]}\n"


def _table(found: re.Match[str]) -> str:
    indent, rule, header, body = found.groups()
    columns = [match.span() for match in re.finditer("=+", rule)]
    columns[-1] = columns[-1][0], None
    rows: list[list[str]] = []
    for line in (header, *body.splitlines()):
        cells = [line[len(indent) :][slice(*column)].strip() for column in columns]
        if cells[0]:
            rows.append(cells)
        else:  # goes on with the row above
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    rows.insert(1, ["---"] * len(columns))
    return "\n".join(f"{indent}| {' | '.join(row)} |" for row in rows)


def _lists(lines: list[str]) -> Iterator[str]:
    """Python-Markdown wants what belongs to an item of a list indented by four, not by two."""
    item = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("* "):
            item = indent
            yield line.replace("* ", "*   ", 1)
            continue
        if line.strip() and item is not None and indent <= item:
            item = None
        yield line if item is None or not line.strip() else "  " + line
