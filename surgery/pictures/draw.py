"""`draw`: a picture of a model's tree, or of one site before and after."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from surgery.inspection.show import site_at
from surgery.patterns.wrappers import unwrap
from surgery.pictures.site_figure import site_figure
from surgery.pictures.style import colours_of
from surgery.pictures.svg import site_svg
from surgery.pictures.tree import owners_in, tree_rows
from surgery.pictures.tree_svg import tree_svg
from surgery.rewritten_model.verb_root import check_all_present

__all__ = ["Drawing", "draw"]


class Drawing(str):
    """An SVG document as text. Notebooks show it as a picture.

    >>> from torch import nn
    >>> from surgery import draw
    >>> drawing = draw(nn.Linear(8, 8))
    >>> drawing.startswith("<svg"), drawing.endswith("</svg>")
    (True, True)
    """

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x: auto">{self}</div>'

    def save(self, path: str | Path) -> Path:
        """Write the document to a file, and return the file's path."""
        path = Path(path)
        path.write_text(self + "\n", encoding="utf-8")
        return path


def draw(model: nn.Module, path: str | None = None, *, before: bool = True) -> Drawing:
    """Draw a model's tree; or one site, before and after.

    >>> from torch import nn
    >>> from surgery import apply_rules, draw
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), [LoraRule("0", rank=2, alpha=4)])
    >>> "LoraRule" in draw(model), "α / r = 4 / 2" in draw(model, "0")
    (True, True)

    The tree has a row for each module, with its shape and its parameters. Equal layers are one row (× 12), and so are
    parts without rules. A site has a mark for each rule, in the colour of the rule and its adapter; the marks of live
    adapters are outlines, those of idle adapters are dashed, those of merged adapters are filled. A dot says that
    parameters train; those of a merged adapter do not.

    The picture of a site has the module's own forward, and the forward with the live rules. Casts and changes of shape
    are left out. Values that parameters alone give are formulas in the box that uses them, and a long forward is
    folded. The lines below are each rule's formula and the idle and merged rules. Rules that look into the forward are
    drawn in the forward of the last call.

    Args:
        model: the model, untouched or rewritten.
        path: the site's module path; "" is the model itself. Default None: draw the tree.
        before: whether the picture of a site has the module's own forward, too; default True.

    Returns:
        The SVG document as text, which notebooks show as a picture. It follows the page's light or dark colours.

    Raises:
        MatchError: the model does not have the module, or no rule was applied to it.
        SurgeryError: a site is drawn and pygraphviz is missing (`pip install 'model-surgery[pictures]'`).
    """
    if path is None:
        check_all_present(model)
        rows = tree_rows(model)
        return Drawing(tree_svg(type(unwrap(model)).__name__, rows, colours_of(owners_in(rows))))
    module, state = site_at(model, path)
    figure = site_figure(module, state, path, before=before)
    owners = [*(owner for owner, _ in figure.formulas), *figure.after.owners()]
    return Drawing(site_svg(figure, colours_of(owners)))
