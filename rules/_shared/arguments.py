"""Which of a module's arguments go to which parameters of another module's forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from surgery import Site, SiteError

__all__ = ["Arguments", "arguments_for", "why_called_otherwise"]

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Arguments(NamedTuple):
    """The arguments of a call: positional, by name, further positional ones, and mappings of further keyword arguments.

    `exact`: the first two have all of the site's arguments, and none of these is optional.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]
    more: Any
    extra: tuple[Any, ...]
    exact: bool


def arguments_for(site: Site, kind: type[nn.Module], inputs: Mapping[str, str | None] | None, label: str) -> Arguments:
    """Returns a site's arguments for another class's forward. `said`: its parameter → the site's argument, or None."""
    ours, theirs = _parameters(site.base_class), _parameters(kind)
    values = site.inputs
    if not any(p.kind not in _STARRED for p in ours.values()):  # a wrapper: it passes all arguments on
        star, stars = (next((n for n, p in ours.items() if p.kind is kind_of_star), None) for kind_of_star in _STARRED)
        return Arguments((), {}, values[star] if star else (), (values[stars],) if stars else (), False)
    mapped = _mapped(site, kind, ours, theirs, dict(inputs or {}), label)
    positional, named, gap = list[Any](), dict[str, Any](), False
    for name, parameter in theirs.items():
        if parameter.kind in _STARRED:
            continue
        if name not in mapped:
            gap = True
        elif parameter.kind in _BY_POSITION and not gap:
            positional.append(values[mapped[name]])
        else:
            named[name] = values[mapped[name]]
    kinds = {parameter.kind for parameter in theirs.values()}
    free = [name for name, p in ours.items() if p.kind not in _STARRED and name not in mapped.values()]
    star, stars = (next((n for n, p in ours.items() if p.kind is kind_of_star), None) for kind_of_star in _STARRED)
    more: Any = values[star] if star is not None and inspect.Parameter.VAR_POSITIONAL in kinds else ()
    rest = {name: values[name] for name in free} if inspect.Parameter.VAR_KEYWORD in kinds else {}
    extra = (*([rest] if rest else []), *([values[stars]] if stars is not None else []))
    if inspect.Parameter.VAR_POSITIONAL in kinds and not gap:
        positional += [
            values[name] for name in free if name not in rest and ours[name].default is inspect.Parameter.empty
        ]
    exact = not free and star is None and stars is None
    exact = exact and all(parameter.default is parameter.empty for parameter in ours.values())
    return Arguments(tuple(positional), named, more, extra, exact)


def why_called_otherwise(
    ours: type[nn.Module], theirs: type[nn.Module], inputs: Mapping[str, str | None] | None
) -> str | None:
    """Returns why callers of one class can't call the other one in the same way, or None.

    Only the name of the first parameter may differ: callers pass it by position.
    """
    forward, own = f"{theirs.__name__}.forward", f"{ours.__name__}.forward"
    if any(source != name for name, source in (inputs or {}).items()):
        return f"the rule's inputs={dict(inputs or {})!r} give its arguments other names, and a plain call does not"
    present, other = _parameters(ours), _parameters(theirs)
    kinds = {parameter.kind for parameter in other.values()}
    names = [name for name, parameter in present.items() if parameter.kind not in _STARRED]
    positions = [name for name, parameter in other.items() if parameter.kind not in _STARRED]
    starred = [parameter.kind for parameter in present.values() if parameter.kind in _STARRED]
    if not names:  # a wrapper passes everything on
        return None
    for index, name in enumerate(names):
        same = index < len(positions) and positions[index] == name
        renamed = index == 0 and bool(positions) and positions[0] not in names and name not in positions
        if not same and not renamed and not (name not in positions and inspect.Parameter.VAR_KEYWORD in kinds):
            return f"{own} takes {', '.join(present)}; {forward} takes {', '.join(other) or 'nothing'}"
    if any(kind not in kinds for kind in starred):
        return f"{own} takes any arguments, and {forward} takes {', '.join(other)}"
    return None


def _mapped(
    site: Site,
    kind: type[nn.Module],
    ours: Mapping[str, inspect.Parameter],
    theirs: Mapping[str, inspect.Parameter],
    inputs: dict[str, str | None],
    label: str,
) -> dict[str, str]:
    """Returns the other forward's parameter → the site's argument."""
    plain = [name for name, parameter in theirs.items() if parameter.kind not in _STARRED]
    names = [name for name, parameter in ours.items() if parameter.kind not in _STARRED]
    forward, own = f"{kind.__name__}.forward", f"{site.base_class.__name__}.forward"
    for name, source in inputs.items():
        if name not in plain or (source is not None and source not in names):
            raise SiteError(
                f"{label} says inputs={{{name!r}: {source!r}}}",
                where=site.path,
                why=f"{forward} takes {', '.join(plain) or 'nothing'}; {own} takes {', '.join(names)}",
                fix="name a parameter of the one, and of the other",
            )
    mapping = {name: source for name, source in inputs.items() if source is not None}
    mapping |= {name: name for name in plain if name in names and name not in inputs}

    def free(of: list[str], taken: Any, parameters: Mapping[str, inspect.Parameter], needed: bool) -> list[str]:
        left = [name for name in of if name not in taken]
        return [n for n in left if not needed or parameters[n].default is inspect.Parameter.empty]

    def pair(targets: list[str], sources: list[str]) -> None:
        mapping.update(zip(targets, sources, strict=False))

    taken = lambda: {*mapping, *inputs}  # noqa: E731
    if plain and plain[0] not in taken() and names[0] not in mapping.values():
        mapping[plain[0]] = names[0]
    pair(free(plain, taken(), theirs, False), free(names, mapping.values(), ours, True))
    pair(free(plain, taken(), theirs, True), free(names, mapping.values(), ours, False))
    if lacking := free(plain, taken(), theirs, True):
        raise SiteError(
            f"{forward} needs {', '.join(lacking)}",
            where=site.path,
            why=f"{own} takes {', '.join(names)}",
            fix="give them a default, or say which arguments they are: inputs={…}",
        )
    unsure = free(plain, taken(), theirs, False)
    if unsure and not inputs and (left := free(names, mapping.values(), ours, False)):
        raise SiteError(
            f"{label} can't tell whether {forward} is to get {left[0]!r} of {own} as its {unsure[0]!r}",
            where=site.path,
            why="both are optional, and have other names",
            fix=f"inputs={{{unsure[0]!r}: {left[0]!r}}}, or inputs={{{unsure[0]!r}: None}} for its default",
        )
    return mapping


def _parameters(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    try:
        parameters = list(inspect.signature(kind.forward).parameters.items())[1:]
    except (TypeError, ValueError):  # written in C
        parameters = list(inspect.signature(lambda self, *args, **kwargs: None).parameters.items())[1:]
    return dict(parameters)
