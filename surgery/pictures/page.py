"""Writes a report's data as one HTML page without outside links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from surgery.inspection.show import Summary
from surgery.pictures.figure import Owner
from surgery.pictures.output_changes import OutputChange
from surgery.pictures.page_style import SCRIPT, STYLE, policy
from surgery.pictures.report_data import ReportData, SiteGroup
from surgery.pictures.style import colours_of
from surgery.pictures.svg import site_svg
from surgery.pictures.tree import Mark, TreeRow, owners_in
from surgery.pictures.tree_svg import LEGEND, short_number
from surgery.results import escaped, html_table

__all__ = ["page"]

_OPEN_ROWS = 60  # rows of a tree that is shown open
_CHANGES = 400  # modules in the table of changes


def page(data: ReportData) -> str:
    """The page of a report."""
    colours = colours_of(owners_in(data.rows))
    numbers = {path: number for number, group in enumerate(data.groups) for path in group.paths}
    sections: list[tuple[str, str, Iterator[str]]] = [
        ("summary", "Summary", _summary(data.summary)),
        ("tree", "Tree", _tree(data.rows, numbers, colours)),
        ("sites", "Sites", _sites(data.groups, colours)),
        ("parameters", "Parameters", _parameters(data)),
        ("outputs", "Outputs", _changes(data.changes, numbers) if data.rules else _norms(data.changes)),
        ("rules", "Rules", _rules(data.rules)),
    ]
    texts = [(name, head, "\n".join(parts)) for name, head, parts in sections]
    shown = [(name, head, text) for name, head, text in texts if text]
    title = escaped(data.title)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escaped(policy())}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            "<nav>" + "".join(f'<a href="#{name}">{head}</a>' for name, head, _ in shown) + "</nav>",
            *(f'<section><h2 id="{name}">{head}</h2>\n{text}</section>' for name, head, text in shown),
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )


def _summary(counts: Summary) -> Iterator[str]:
    share = f"{100 * counts.trainable / counts.total:.4g} %" if counts.total else "–"
    cards = [
        ("trainable parameters", f"{counts.trainable:,}"),
        ("of all", share),
        ("added by adapters", f"{counts.added:,}"),
        ("all parameters", f"{counts.total:,}"),
        ("merged", ", ".join(counts.merged) or "nothing"),
    ]
    yield '<div class="cards">'
    yield from (f'<div class="card"><b>{escaped(value)}</b><span>{name}</span></div>' for name, value in cards)
    yield "</div>"
    if counts.rows:
        names = ["adapter", "rule", "sites", "added", "trainable", "state"]
        rows = [[a, rule, f"{n:,}", f"{added:,}", f"{trained:,}", s] for a, rule, n, added, trained, s in counts.rows]
        yield _table(names, rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], raw: frozenset[int] = frozenset()) -> str:
    return f'<div class="wide">{html_table(names, rows, raw)}</div>'


# Tree and sites -----------------------------------------------------------------------------------------------


def _tree(rows: Sequence[TreeRow], numbers: Mapping[str, int], colours: Mapping[Owner, int]) -> Iterator[str]:
    """Nested lists of modules. A tree with many rows is open down to its second level."""
    yield '<div class="tree">'
    depth = 0
    for number, row in enumerate(rows):
        while depth > row.depth:
            yield "</details>"
            depth -= 1
        text = _row(row, numbers, colours)
        if number + 1 < len(rows) and rows[number + 1].depth > row.depth:
            opened = " open" if len(rows) <= _OPEN_ROWS or row.depth < 2 else ""
            yield f"<details{opened}><summary>{text}</summary>"
            depth += 1
        else:
            yield f'<div class="leaf">{text}</div>'
    yield "</details>" * depth + "</div>"
    yield f"<p>{LEGEND}</p>"


def _row(row: TreeRow, numbers: Mapping[str, int], colours: Mapping[Owner, int]) -> str:
    name = f"<b>{escaped(row.name)}</b>"
    if row.path in numbers and row.marks:
        name = f'<a href="#site-{numbers[row.path]}">{name}</a>'
    parts = [name]
    if row.repeats > 1:
        parts.append(f'<span class="tag">× {row.repeats}</span>')
    more = f" … {row.folded} modules" if row.folded else ""
    details = [
        escaped(row.type) + more,
        escaped(row.shape),
        f"{short_number(row.numbers)} parameters" if row.numbers else "",
    ]
    trained = " ●" if row.trained else ""
    parts.append(f'<span class="soft">{" · ".join(filter(None, details))}{trained}</span>')
    return " ".join([*parts, *(_mark(mark, colours) for mark in row.marks)])


def _mark(mark: Mark, colours: Mapping[Owner, int]) -> str:
    state = "" if mark.state == "live" else f", {mark.state}"
    count = f" ● {short_number(mark.trained)}" if mark.trained else f" {short_number(mark.added)}" if mark.added else ""
    text = escaped(f"{mark.owner.rule} [{mark.owner.adapter}{state}]{count}")
    return f'<span class="mark {mark.state} m{colours.get(mark.owner, 0)}">{text}</span>'


def _sites(groups: Sequence[SiteGroup], colours: Mapping[Owner, int]) -> Iterator[str]:
    if not groups:
        return
    total = sum(len(group.paths) for group in groups)
    yield f"<p>{total:,} sites. Sites with the same code and shapes are one entry: {len(groups):,}.</p>"
    yield '<p><input id="filter" type="search" placeholder="part of a path" aria-label="show sites by their path"></p>'
    for number, group in enumerate(groups):
        more = f" and {len(group.paths) - 1:,} more" if len(group.paths) > 1 else ""
        name = escaped(group.paths[0] or "the model itself") + more
        paths = escaped(" ".join(group.paths))
        yield f'<details class="site" id="site-{number}" data-paths="{paths}"><summary><b>{name}</b></summary>'
        if group.figure is not None:
            extra = {owner: n for n, owner in enumerate(group.figure.after.owners()) if owner not in colours}
            yield f'<div class="wide">{site_svg(group.figure, {**extra, **colours}, styled=False)}</div>'
            yield f"<details><summary>Code</summary><pre>{escaped(group.code)}</pre></details>"
            if group.generated:
                yield f"<details><summary>Generated code</summary><pre>{escaped(group.generated)}</pre></details>"
        else:
            drawn = sum(group.figure is not None for group in groups)
            yield f"<p>The first {drawn} entries have pictures. For this one, use draw(model, path).</p>"
        if len(group.paths) > 1:
            listed = "<br>".join(escaped(path) for path in group.paths)
            yield f'<details><summary>{len(group.paths):,} paths</summary><div class="paths">{listed}</div></details>'
        yield "</details>"


# Bars ---------------------------------------------------------------------------------------------------------


def _bar(value: float, most: float, part: float = 0.0, kind: str = "bar") -> str:
    """A bar of 240 pixels at most, with a coloured part."""
    width = 240 * value / most if most else 0.0
    coloured = 240 * part / most if most else 0.0
    width, coloured = (max(1.5, w) if w > 0 else 0.0 for w in (width, coloured))
    return (
        '<svg width="240" height="12" role="img" aria-hidden="true">'
        '<rect class="ground" width="240" height="12" rx="3"/>'
        f'<rect class="{kind}" width="{width:.1f}" height="12" rx="3"/>'
        f'<rect class="train" width="{coloured:.1f}" height="12" rx="3"/></svg>'
    )


def _parameters(data: ReportData) -> Iterator[str]:
    rows = data.summary.rows
    if rows:
        most = max(added for _, _, _, added, _, _ in rows)
        cells = [
            [f"{rule} [{a}]", _bar(added, most, trained), f"{added:,}", f"{trained:,}"]
            for a, rule, _, added, trained, _ in rows
        ]
        yield "<p>Added by adapters; in colour, what trains.</p>"
        yield _table(["rule", "", "added", "trainable"], cells, raw=frozenset({1}))
    parts = [row for row in data.rows if row.depth <= 2 and row.numbers]
    if parts:
        most = max(row.numbers for row in parts)
        cells = [[row.path or "(the model)", _bar(row.numbers, most, row.trained), f"{row.numbers:,}"] for row in parts]
        yield "<p>The base's own parameters; in colour, what trains.</p>"
        yield _table(["module", "", "parameters"], cells, raw=frozenset({1}))


def _changes(changes: Sequence[OutputChange], numbers: Mapping[str, int]) -> Iterator[str]:
    if not changes:
        return
    yield (
        "<p>The example with the live adapters, and without adapters: the norm of the difference as a part of the norm "
        "of the output, module by module in the order of the calls. Sites are links.</p>"
    )
    shown = (
        changes if len(changes) <= _CHANGES else [change for change in changes if not change.site or not change.path]
    )
    if len(shown) < len(changes):
        yield f"<p>{len(changes) - len(shown):,} sites are left out; repeated layers are listed.</p>"
    most = max((change.relative or 0.0 for change in shown), default=0.0)
    cells = []
    for change in shown[:_CHANGES]:
        name = escaped(change.path or "(the model)")
        if change.site and change.path in numbers:
            name = f'<a href="#site-{numbers[change.path]}">{name}</a>'
        relative = change.relative
        text = "other shape" if relative is None else "0" if relative == 0 else f"{100 * relative:.3g} %"
        cells.append([name, change.type, _bar(0.0, most, relative or 0.0), text, f"{change.norm:.4g}"])
    yield _table(["module", "type", "", "change", "norm without"], cells, raw=frozenset({0, 2}))


def _norms(changes: Sequence[OutputChange]) -> Iterator[str]:
    """The outputs of a model without adapters."""
    if changes:
        yield "<p>The example: the norm of each output, module by module in the order of the calls.</p>"
        most = max(change.norm for change in changes)
        cells = [
            [change.path or "(the model)", change.type, _bar(change.norm, most), f"{change.norm:.4g}"]
            for change in changes[:_CHANGES]
        ]
        yield _table(["module", "type", "", "norm"], cells, raw=frozenset({2}))


def _rules(rules: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    for adapter, text, language in rules:
        yield f'<details open><summary><b>{escaped(adapter)}</b> <span class="soft">{language}</span></summary>'
        yield f"<pre>{escaped(text)}</pre></details>"
