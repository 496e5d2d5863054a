"""The tables of docs/reference/programs.md, from the profiles of programs: `python -m tests.reports.targets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from surgery import TargetProfile, target_profiles
from tests.support import ROOT

PAGE = ROOT / "docs" / "reference" / "programs.md"
MARKS = ("<!-- made by python -m tests.reports.targets -->\n", "<!-- end -->\n")
SCALES = {
    "module": "one for each module",
    "scale": "one",
    "alpha": "one alpha, divided by each module's rank",
    "none": "1",
}


def facts(profile: TargetProfile) -> Iterator[tuple[str, str, str]]:
    """Yields label, value, and the field that the source is given for."""
    yield "format", f"`{profile.format}`", "format"
    yield "methods", ", ".join(profile.methods) + (", DoRA" if profile.dora else ""), "methods dora"
    largest = f"at most {profile.largest_rank}" if profile.largest_rank else "any"
    default = f"; {profile.default_rank} without `{profile.rank_option}`" if profile.default_rank else ""
    yield (
        "rank",
        ("one for all modules" if profile.ranks == "one" else largest) + default,
        "ranks largest_rank default_rank",
    )
    yield "scale", SCALES[profile.scale], "scale rslora"
    yield "bias of LoRA", _yes(profile.lora_bias), "lora_bias"
    yield "aLoRA", _yes(profile.invocation), "invocation"
    yield (
        "convolutions",
        {"all": "yes", "pointwise": "kernels of size 1", "none": "no"}[profile.convolutions],
        ("convolutions"),
    )
    by_class = "of some classes" if profile.embedding_classes else ""
    yield "embeddings", _names(profile.embeddings) or by_class or "no", "embeddings"
    yield "output layer", _names(profile.heads) or by_class or "no", "heads embeddings"
    yield "of tied weights", _yes(profile.tied), "tied"
    yield "in full", _names(profile.trained) or "no", "trained"
    yield "modules", _names(profile.modules) or "any", "modules paths"
    yield "written together", "; ".join(map(_names, profile.groups)) or "nothing", "groups"
    counts = [f"{len(profile.classes)} classes"] if profile.classes else []
    counts += [f"{len(profile.model_types)} values of `model_type`"] if profile.model_types else []
    yield "models", ", ".join(counts) or "any", "classes model_types"
    yield "dtypes", ", ".join(profile.dtypes) or "any", "dtypes"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _names(names: Iterable[str]) -> str:
    return ", ".join("any" if name == "*" else f"`{name}`" for name in names)


def text() -> str:
    """What stands between the marks."""
    lines: list[str] = []
    for name, profile in target_profiles().items():
        lines += [f"## {profile.title}", "", f"`target={name!r}`, {profile.title} {profile.version}", ""]
        lines += ["| fact | what it takes | source |", "|---|---|---|"]
        for label, value, fields in facts(profile):
            sources = dict.fromkeys(profile.sources[each] for each in fields.split() if each in profile.sources)
            if not sources and label != "format":
                continue  # the profile does not say it
            lines.append(f"| {label} | {value} | {', '.join(f'`{source}`' for source in sources)} |")
        lines += ["", f"    {profile.command.replace('{rank}', '16')}", ""]
        lines += [f"- {note}" for note in profile.notes] + ([""] if profile.notes else [])
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with today's tables."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    return before + MARKS[0] + "\n" + text() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
