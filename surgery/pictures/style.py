"""The colours and fonts of pictures, for light and dark pages. Colour-blind readers can tell the colours apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from surgery.pictures.figure import Owner

__all__ = ["border_css", "colours_of", "css"]

# Okabe and Ito's colours, darker on light pages and lighter on dark ones: (light, dark).
_COLOURS = (
    ("#b8500a", "#f0a35e"),  # vermillion
    ("#0a66a8", "#6db7ee"),  # blue
    ("#0b7a58", "#4fcfa5"),  # green
    ("#a1417f", "#e39ac6"),  # purple
    ("#7a6200", "#e0cb4c"),  # yellow
    ("#4b5bb5", "#a6b1f5"),  # indigo
)
_FONT = "Helvetica, Arial, 'Liberation Sans', system-ui, sans-serif"


def colours_of(owners: Iterable[Owner]) -> dict[Owner, int]:
    """A colour's number for each rule of an adapter, in their order; more than six begin again."""
    return {owner: number % len(_COLOURS) for number, owner in enumerate(dict.fromkeys(owners))}


def css() -> str:
    """The style of all SVG pictures. Its classes begin with `sg-`, so it can stand in a page."""
    light = _scheme({"paper": "#ffffff", "ink": "#1f2328", "soft": "#57606a", "line": "#6e7781", "base": "#f4f6f8"}, 0)
    dark = _scheme({"paper": "#0d1117", "ink": "#e6edf3", "soft": "#9da7b3", "line": "#8b949e", "base": "#1c2330"}, 1)
    return (
        f".sg{{font-family:{_FONT}}}"
        ".sg-title{font-size:13px;font-weight:600}.sg-detail{font-size:11px}.sg-head{font-size:15px;font-weight:600}"
        ".sg-mid{text-anchor:middle}.sg-box{stroke-width:1.3}.sg-own{fill-opacity:.13;stroke-width:1.8}"
        ".sg-arrow{fill:none;stroke-width:1.4}.sg-frozen{stroke-dasharray:5 3}.sg-end{fill:none;stroke:none}"
        ".sg-end-text{text-anchor:end}.sg-guide{fill:none;stroke-width:1}.sg-mark{fill-opacity:0}.sg-filled{fill-opacity:.45}"
        f"{light}@media (prefers-color-scheme:dark){{{dark}}}"
    )


def border_css() -> str:
    """The colours of the marks of a page, .m0 to .m5, as borders; the marks of merged adapters are filled."""
    light, dark = (
        "".join(
            f".m{n}{{border-color:{pair[place]}}}.m{n}.merged{{background:{pair[place]}73}}"
            for n, pair in enumerate(_COLOURS)
        )
        for place in (0, 1)
    )
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _scheme(colours: Mapping[str, str], place: int) -> str:
    rules = [
        f".sg-paper{{fill:{colours['paper']}}}",
        f".sg-ink{{fill:{colours['ink']}}}",
        f".sg-soft{{fill:{colours['soft']}}}",
        f".sg-line{{stroke:{colours['line']}}}",
        f".sg-tip{{fill:{colours['line']}}}",
        f".sg-base{{fill:{colours['base']};stroke:{colours['line']}}}",
        *(f".sg-c{n}{{fill:{pair[place]};stroke:{pair[place]}}}" for n, pair in enumerate(_COLOURS)),
        *(f".sg-l{n}{{stroke:{pair[place]}}}.sg-t{n}{{fill:{pair[place]}}}" for n, pair in enumerate(_COLOURS)),
    ]
    return "".join(rules)
