"""Pictures of sites: every rule's figure is in a paper's form, and its layout is clean by measure."""

from __future__ import annotations

import functools
import itertools
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pygraphviz", reason="pictures are laid out with graphviz")

from surgery import MatchError, Rule, Site, Structure, activate, apply_rules, draw, merge, rule  # noqa: E402
from surgery.inspection.show import site_at  # noqa: E402
from surgery.pictures.figure import Figure, SiteFigure  # noqa: E402
from surgery.pictures.layout import Layout, Rectangle, place_figure, shown_text  # noqa: E402
from surgery.pictures.site_figure import site_figure  # noqa: E402
from surgery.rules import IA3Rule, LoraRule  # noqa: E402
from tests.reports.gallery import EXAMPLES, SHOWN  # noqa: E402

PLUMBING = {
    "to",
    "getattr",
    "dtype",
    "same_dtype",
    "in_dtype",
    "in_dtype_of",
    "view",
    "reshape",
    "hidden_of",
    "with_hidden",
}


def figure_at(model: nn.Module, path: str) -> SiteFigure:
    module, state = site_at(model, path)
    return site_figure(module, state, path)


@functools.cache
def gallery_figure(name: str) -> SiteFigure:
    rule, make = SHOWN[name]
    model = nn.Sequential(OrderedDict(m=make())).eval()
    return figure_at(apply_rules(model, [rule], example_inputs=EXAMPLES.get(name)), "m")


def titles(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [box.title for box in figure.boxes]


# The data -------------------------------------------------------------------------------------------------------


def test_lora_is_drawn_as_in_its_paper() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(384, 384)), [LoraRule("0", rank=8, alpha=16, dropout=0.1)])
    figure = figure_at(model, "0")
    assert titles(figure.before) == ["input", "W", "output"]
    boxes = {box.key: box for box in figure.after.boxes}
    assert [(box.title, box.details) for box in boxes.values() if box.owner is not None] == [
        ("dropout 0.1", ()),
        ("A", ("8×384",)),
        ("B", ("384×8",)),
        ("· 2", ("α / r = 16 / 8",)),
        ("+", ()),
    ]
    arrows = [(boxes[arrow.source].title, boxes[arrow.target].title) for arrow in figure.after.arrows]
    assert arrows == [
        *(("input", "W"), ("input", "dropout 0.1"), ("dropout 0.1", "A"), ("A", "B"), ("B", "· 2")),
        *(("W", "+"), ("· 2", "+"), ("+", "output")),
    ]
    trained = {box.title: box.trained for box in boxes.values() if box.kind == "operation"}
    assert trained == {"W": None, "dropout 0.1": None, "A": True, "B": True, "· 2": None}


def test_idle_and_merged_rules_are_notes() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_rules(model, [IA3Rule("0")], adapter="blue")
    apply_rules(model, [LoraRule("0", rank=2, init="random")], adapter="red")
    activate(model, "red")
    assert figure_at(model, "0").notes == ("idle: IA3Rule [blue]",)
    merge(model)
    figure = figure_at(model, "0")
    assert figure.notes == ("idle: IA3Rule [blue]", "merged into the weights: LoraRule [red]")
    assert titles(figure.after) == ["input", "W", "output"]
    picture = draw(model, "0")
    assert "idle: IA3Rule [blue]" in picture and "merged into the weights: LoraRule [red]" in picture


def test_a_weight_of_an_adapter_is_a_note() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2)])
    activate(model, "default", {"default": 0.5})
    figure = figure_at(model, "0")
    assert figure.notes == ("LoraRule [default] has the weight 0.5",)
    assert len(figure.after.boxes) <= 9


class Tower(nn.Module):
    """Twelve operations of its own, between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for _ in range(12):
            y = y.sin()
        return self.last(y)


@rule("test-sines")
class SinesRule(Rule):
    """The third sine of a tower becomes 2 sin(x)."""

    def rewrite(self, site: Site) -> None:
        sines = site.find(Structure(lambda x: torch.sin(x)))
        site.replace(sines[2].root, sines[2].root * 2.0)


def test_a_long_forward_is_folded() -> None:
    model = nn.Sequential(Tower())
    apply_rules(model, [SinesRule("0")], example_inputs=torch.ones(1, 8))
    figure = figure_at(model, "0")
    assert figure.before is not None
    (folded,) = [box for box in figure.before.boxes if box.kind == "folded"]
    assert folded.title == "Tower" and folded.details[0] == "14 operations"
    assert titles(figure.after)[0] == "x" and "· 2" in titles(figure.after) and len(figure.after.boxes) < 9


@pytest.mark.parametrize("name", SHOWN)
def test_every_rule_is_in_a_papers_form(name: str) -> None:
    figure = gallery_figure(name)
    assert figure.formulas, "a rule's docstring begins with its formula"
    words = {word for text in titles(figure.after) for word in text.replace("(", " ").split()}
    assert not words & PLUMBING
    keys = [box.key for box in figure.after.boxes]
    assert len(keys) == len(set(keys)) <= 12
    ends = {end for arrow in figure.after.arrows for end in (arrow.source, arrow.target)}
    assert ends == set(keys), "every box has an arrow, and every arrow its boxes"
    assert figure.after.owners(), "the rule has boxes"
    assert figure.before is not None and not figure.before.owners()


# The layout -----------------------------------------------------------------------------------------------------


def overlap(a: Rectangle, b: Rectangle, room: float) -> bool:
    across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return across > -room and down > -room


def points_of(curve: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, float]]:
    """Points along an arrow's Bézier curves."""
    for start in range(0, len(curve) - 1, 3):
        a, b, c, d = (torch.tensor(point) for point in curve[start : start + 4])
        for step in torch.linspace(0, 1, 33):
            left = 1 - step
            point = left**3 * a + 3 * left**2 * step * b + 3 * left * step**2 * c + step**3 * d
            yield float(point[0]), float(point[1])


def touches(point: tuple[float, float], box: Rectangle, margin: float) -> bool:
    x, y = point
    return box.x - margin <= x <= box.x + box.width + margin and box.y - margin <= y <= box.y + box.height + margin


def check_layout(figure: Figure, layout: Layout) -> None:
    for a, b in itertools.combinations(layout.boxes.values(), 2):
        assert not overlap(a, b, room=4.0)
    for arrow, curve in zip(figure.arrows, layout.arrows, strict=True):
        assert touches(curve[0], layout.boxes[arrow.source], 1.5) and touches(
            curve[-1], layout.boxes[arrow.target], 1.5
        )
        others = [box for key, box in layout.boxes.items() if key not in (arrow.source, arrow.target)]
        assert not [box for box in others for point in points_of(curve) if touches(point, box, -0.5)], arrow
        for end in (arrow.source, arrow.target):  # nor through its own boxes
            assert not any(touches(point, layout.boxes[end], -3.0) for point in points_of(curve)), arrow


@pytest.mark.parametrize("name", SHOWN)
def test_no_box_overlaps_another_and_no_arrow_runs_behind_a_box(name: str) -> None:
    figure = gallery_figure(name)
    for part in (figure.before, figure.after):
        assert part is not None
        check_layout(part, place_figure(part))


def test_boxes_have_room_for_their_texts() -> None:
    """Beside the widths of Helvetica, by matplotlib's metrics."""
    text_path = pytest.importorskip("matplotlib.textpath").TextPath
    font = pytest.importorskip("matplotlib.font_manager").FontProperties(family="DejaVu Sans", weight="bold")
    for name in SHOWN:
        figure = gallery_figure(name).after
        layout = place_figure(figure)
        for box in figure.boxes:
            title, _ = shown_text(box)
            if len(title) > 1:
                width = text_path((0, 0), title.replace("ᵀ", "T"), size=13, prop=font).get_extents().width
                assert width <= layout.boxes[box.key].width, (name, title)


# The document ---------------------------------------------------------------------------------------------------


def test_the_document_is_well_formed_and_escapes_names() -> None:
    hostile = '<script>alert("x")</script>&'
    model = nn.Sequential(OrderedDict({hostile: nn.Linear(8, 8)}))
    apply_rules(model, [LoraRule(nn.Linear, rank=2)], adapter="default")
    for text in (draw(model, hostile), draw(model)):
        ElementTree.fromstring(text)
        assert "<script" not in text and "&lt;script&gt;" in text


def test_a_path_that_is_not_a_site() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), [LoraRule("0")])
    with pytest.raises(MatchError, match="no rule was applied here"):
        draw(model, "1")
    with pytest.raises(MatchError, match="no module 'nowhere'"):
        draw(model, "nowhere")


def test_a_drawing_is_text_and_a_picture_in_notebooks(tmp_path) -> None:
    model = apply_rules(nn.Linear(8, 8), [LoraRule(nn.Linear)])
    drawing = draw(model, "")
    assert isinstance(drawing, str) and drawing in drawing._repr_html_()
    assert drawing.save(tmp_path / "a.svg").read_text(encoding="utf-8") == drawing + "\n"


def test_without_pygraphviz_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from surgery import SurgeryError

    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0")])
    with pytest.raises(SurgeryError, match=r"pip install 'model-surgery\[pictures\]'"):
        draw(model, "0")
    assert draw(model).startswith("<svg")  # a tree needs no layout


def test_colours_differ_by_adapter_and_rule() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_rules(model, [LoraRule("0", rank=2)], adapter="red")
    apply_rules(model, [IA3Rule("0")], adapter="blue")
    activate(model, ["red", "blue"])
    picture = draw(model, "0")
    assert all(f"sg-own sg-c{number}" in picture for number in (0, 1))
