"""How do formulas get onto a page? As MathML, made when the site is built: no script and no font is loaded to read it.

A hook of MkDocs. ``pymdownx.arithmatex`` finds the formulas, in pages and docstrings alike.
"""

from __future__ import annotations

import html as entities
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', flags=re.DOTALL)
_CONVERTER = LatexToMathML()


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Replace each formula of a page.

    Raises:
        PluginError: A formula is not understood.
    """
    try:
        return _FORMULA.sub(_mathml, html)
    except LatexError as error:
        raise PluginError(f"A formula in {page.file.src_uri}: {error}") from error


def _mathml(found: re.Match[str]) -> str:
    is_block = found[1] == "div"
    mathml = _CONVERTER.convert_with_local_state(entities.unescape(found[2]).strip(), displaystyle=is_block)
    return f'<div class="formula">{mathml}</div>' if is_block else mathml
