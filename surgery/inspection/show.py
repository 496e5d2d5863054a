"""`summary` and `show`: parameter counts, and the code of a site."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.errors import MatchError, abbreviate, near_misses
from surgery.forward.own_forward import own_forward
from surgery.inspection.readable_forward import readable_forward
from surgery.patterns.module_walk import every_path
from surgery.patterns.wrappers import unwrap
from surgery.results import Displayed, Report, Table
from surgery.rewritten_model.verb_root import check_all_present, records_in
from surgery.state.adapter_tensors import is_adapter_key, tensors_of
from surgery.state.records import SiteState, merged_adapters, model_state, site_state, sites
from surgery.state.site_links import module_at
from surgery.transaction.gradient_flags import is_lazy
from surgery.weaving.generated_class import recipe_of

__all__ = ["Summary", "count_parameters", "show", "site_at", "summary"]


@dataclass(frozen=True)
class Summary(Displayed, Report):
    """Adapters, sites and parameters of a model. Prints as a table. Each tensor counts once."""

    trainable: int
    added: int
    total: int
    rows: tuple[tuple[str, str, int, int, int, str], ...]  # adapter, rule, sites, added, trainable, state
    merged: tuple[str, ...]

    def _display_parts(self) -> list[str | Table]:
        share = 100 * self.trainable / self.total if self.total else 0.0
        head = (
            f"trainable {self.trainable:,} || added {self.added:,} || total {self.total:,} || trainable {share:.4f} %"
        )
        rows = [[a, rule, f"{n:,}", f"{added:,}", f"{trained:,}", s] for a, rule, n, added, trained, s in self.rows]
        parts: list[str | Table] = [head]
        if rows:
            parts.append(Table(["adapter", "rule", "sites", "added", "trainable", "state"], rows))
        if self.merged:
            parts.append(f"merged: {', '.join(self.merged)}")
        return parts

    __repr__ = Displayed.__str__  # instead of the dataclass's

    def to_dict(self) -> dict[str, Any]:
        """The counts, the merged adapters, and under "rules" a mapping for each row."""
        names = ("adapter", "rule", "sites", "added", "trainable", "state")
        return {
            "trainable": self.trainable,
            "added": self.added,
            "total": self.total,
            "rules": [dict(zip(names, row, strict=True)) for row in self.rows],
            "merged": list(self.merged),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each adapter and rule: adapter, rule, sites, added, trainable, state."""
        return self.to_dict()["rules"]


def summary(model: nn.Module) -> Summary:
    """Count the parameters of a model: in total, trainable, and by adapter and rule.

    >>> from torch import nn
    >>> from surgery import apply_rules, summary
    >>> from surgery.rules import LoraRule
    >>> print(summary(apply_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2)])))
    trainable 32 || added 32 || total 104 || trainable 30.7692 %
    adapter  rule      sites  added  trainable  state
    default  LoraRule      1     32         32  live

    The model may be untouched, rewritten, or a part of a rewritten model. If parts were rewritten separately, each
    adapter is listed with the path of its part.

    Args:
        model: the model.

    Returns:
        A `Summary`. `total` counts the base and the adapters; a packed parameter counts as the numbers that it encodes,
        as in PEFT. `trainable` leaves out merged adapters, which do not train. The `state` of a row is live (with its
        weight if that is not 1), idle or merged.

    Raises:
        SurgeryError: a site of the model is missing.

    PEFT: `print_trainable_parameters`.
    """
    check_all_present(model)
    rows: list[tuple[str, str, int, int, int, str]] = []
    merged: list[str] = []
    folded: set[int] = set()  # ids of the tensors of merged adapters, which no call reads
    structure = 0
    records = records_in(unwrap(model), nested=True) or {"": model}
    for path, root in records.items():
        begin = f"{path}: " if path and len(records) > 1 else ""
        rows += [(begin + row[0], *row[1:]) for row in _rows(root)]
        names = merged_adapters(root)
        merged += [begin + name for name in names]
        folded |= {id(t) for _, site, _ in sites(root) for name in names for t in tensors_of(site, name).values()}
        structure += sum(row[3] for row in _structure_rows(root))
    parameters = list(model.named_parameters())
    return Summary(
        trainable=sum(_numbers_in(p) for _, p in parameters if p.requires_grad and id(p) not in folded),
        added=sum(p.numel() for name, p in parameters if rows and is_adapter_key(model, name)) + structure,
        total=sum(_numbers_in(p) for _, p in parameters),
        rows=tuple(rows),
        merged=tuple(merged),
    )


def _rows(root: nn.Module) -> list[tuple[str, str, int, int, int, str]]:
    """A row for each adapter and rule: sites, added and trainable parameters, and the adapter's state."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    states: dict[str, str] = {}
    for _, module, site in sites(root):
        for applied in site.applied:
            name, adapter_tensors = applied.adapter, tensors_of(module, applied.adapter)
            rule_tensors = [adapter_tensors[key] for key in applied.tensors if key in adapter_tensors]
            row = counts[name, applied.rule.label]
            row[0] += 1
            row[1] += sum(tensor.numel() for tensor in rule_tensors if isinstance(tensor, nn.Parameter))
            row[2] += sum(tensor.numel() for tensor in rule_tensors if tensor.requires_grad)
            if site.merged is not None and name in site.merged.adapters:
                states[name] = "merged"
            elif name not in states:
                live = "live" if applied.weight == 1.0 else f"live × {applied.weight:g}"
                states[name] = live if applied.live else "idle"
    for (name, _), row in counts.items():
        row[2] = 0 if states[name] == "merged" else row[2]
    rows = [(name, rule, *row, states[name]) for (name, rule), row in counts.items()]
    return [*_structure_rows(root), *rows]  # type: ignore[list-item]


def _structure_rows(root: nn.Module) -> list[tuple[str, str, int, int, int, str]]:
    """A row for each structural rule: the edited modules, and the parameters that it made. It is always in force."""
    state = model_state(root)
    rows = []
    for record in state.structure if state is not None else ():
        made = [(tensor, tensor.whole) for tensor in record.tensors]
        sizes = [(math.prod(tensor.shape), whole.requires_grad) for tensor, whole in made if _is_parameter(whole)]
        added, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        rows.append((record.adapter, record.rule.label, len(record.steps), added, trained, "live"))
    return rows


def _is_parameter(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The counts of parameters that require gradients, also those of merged adapters, and of all parameters."""
    parameters = list(model.parameters())
    return sum(_numbers_in(p) for p in parameters if p.requires_grad), sum(map(_numbers_in, parameters))


def _numbers_in(parameter: Any) -> int:
    """The count of numbers that a parameter stands for; 4-bit parameters pack two in a byte."""
    if is_lazy(parameter):
        return 0
    count = parameter.numel() or getattr(
        parameter, "ds_numel", 0
    )  # DeepSpeed's ZeRO 3 leaves an empty tensor and stores the count here
    return count * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else count


def show(model: nn.Module, path: str = "", *, generated: bool = False) -> str:
    """Write the forward of a site as Python code, with each rule's own lines under the rule's name.

    >>> from torch import nn
    >>> from surgery import apply_rules, show
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2, alpha=4, dropout=0.1)])
    >>> print(show(model, "0"))
    # 0: Linear + LoraRule [default]
    def forward(self, input):
        y = F.linear(input, self.weight, self.bias)
        # LoraRule [default]
        A, B = self.adapters.default.A, self.adapters.default.B
        x = F.dropout(input.to(A.dtype), 0.1, self.training)
        branch = F.linear(F.linear(x, A), B) * 2.0
        return (y + branch).to(y.dtype)

    Variables have their names from the rule's code. `y` is the site's output, `super().forward` the module's own
    forward, and `F` is `torch.nn.functional`. Functions have short names; if two names are equal, the module's name is
    added. If a rule looks into the forward, the text has code for each kind of call so far. Idle and merged adapters
    are comments.

    The code computes the same values as the site. It leaves out the checks of the kind of call, and the order of writes
    to a cache if a rule runs a forward twice.

    Args:
        model: the model.
        path: the site's module path; "" is the model itself.
        generated: return the code that runs instead. It has fast forms instead of a rule's lines, direct access to
            tensors, and the rule of each line.

    Returns:
        The code as text.

    Raises:
        MatchError: the model does not have the module, or no rule was applied to it; with `generated`, no rule is live.
    """
    module, state = site_at(model, path)
    if generated:
        recipe = recipe_of(type(module))
        if recipe is None:
            raise MatchError("no rule is live here", where=path, why=f"{type(module).__name__} runs its own forward")
        sources = dict.fromkeys([recipe.source, *(variant.source for variant in reversed(state.variants))])
        return f"# {path or '(the model itself)'}: {recipe.label}\n" + "\n\n".join(map(str.rstrip, sources))
    merged = state.merged.adapters if state.merged is not None else ()
    names: dict[str, list[str]] = {"live": [], "idle": [], "merged into its tensors": []}
    for applied in state.applied:
        where = "merged into its tensors" if applied.adapter in merged else "live" if applied.live else "idle"
        names[where].append(f"{applied.rule.label} [{applied.adapter}]")
    live = names.pop("live")
    heads = [f"# {path or '(the model itself)'}: {' + '.join(filter(None, [state.base.__name__, ', '.join(live)]))}"]
    heads += [f"# {where}: {', '.join(rules)}" for where, rules in names.items() if rules]
    if not live:
        return "\n".join([*heads, f"# no rule is live: {state.base.__name__}.forward runs as it is"])
    return "\n".join([*heads, str(readable_forward(module, state, own_forward(module, state.base)))])


def site_at(model: nn.Module, path: str) -> tuple[nn.Module, SiteState]:
    """The module at a path and its record. `MatchError` if the path is not a site."""
    check_all_present(model)
    modules = dict(model.named_modules(remove_duplicate=False)) | dict(
        every_path(model)
    )  # paths with and without wrappers
    below = list(records_in(model).values())
    if (path not in modules or site_state(modules[path]) is None) and len(below) == 1 and module_at(below[0], path):
        modules = dict(every_path(below[0]))  # a path inside the wrapped model
    if path not in modules:
        fix = "name a path of model.named_modules()"
        raise MatchError(f"the model has no module {path!r}", why=near_misses(path, modules), fix=fix)
    state = site_state(modules[path])
    if state is None:
        where = [site_path for site_path, _, _ in sites(below[0] if len(below) == 1 else model)]
        raise MatchError(
            "no rule was applied here",
            where=path or "the model itself",
            why=f"sites are {abbreviate(where)}" if where else "the model does not have adapters",
            fix="name a site; adapters(model) lists them" if where else "apply_rules(model, rules) first",
        )
    return modules[path], state
