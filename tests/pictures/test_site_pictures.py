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

from surgery import (  # noqa: E402
    MatchError,
    Rule,
    Site,
    Structure,
    activate,
    apply_rules,
    draw,
    merge,
    rule,
    rules,  # noqa: E402
    summary,
    unmerge,
)
from surgery.inspection.show import site_at  # noqa: E402
from surgery.pictures.figure import Figure, SiteFigure  # noqa: E402
from surgery.pictures.layout import Layout, Rectangle, place_figure, shown_text  # noqa: E402
from surgery.pictures.site_figure import site_figure  # noqa: E402
from surgery.pictures.tree import tree_rows  # noqa: E402
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


# Transformers ---------------------------------------------------------------------------------------------------


@rule("test-temperature")
class TemperatureRule(Rule):
    """softmax(scores / t)."""

    def rewrite(self, site: Site) -> None:
        for match in site.find(Structure(lambda scores: torch.softmax(scores, -1)), leaves=False):
            temperature = site.param("temperature", (1,), 1.0)
            site.replace(match.bindings["scores"], match.bindings["scores"] / temperature)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50, attn_implementation="eager")).eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


CASES = {
    "an edit inside attention": (bert, [TemperatureRule("attention.self")], "encoder.layer.0.attention.self"),
    "a prompt at the model": (bert, [rules.PromptRule("", length=2)], ""),
    "three rules": (
        bert,
        [LoraRule("query", rank=2), IA3Rule("query"), rules.OftRule("query", block_size=4)],
        "encoder.layer.0.attention.self.query",
    ),
    "DoRA on a Conv1D": (gpt2, [LoraRule("c_attn", rank=2, dora=True, dropout=0.1)], "h.0.attn.c_attn"),
    "LoRA on a convolution": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), [LoraRule("0", rank=2)], "0"),
    "LoRA on an attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), [LoraRule("0", rank=2)], "0"),
    "edits of layers": (
        bert,
        [rules.BottleneckRule("layer.0", size=4), rules.ReftRule("layer.0", rank=2)],
        "encoder.layer.0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sites_of_real_models_have_small_clean_pictures(name: str) -> None:
    make, applied, path = CASES[name]
    model = make()
    example = {"input_ids": torch.arange(4).view(1, 4)} if name == "an edit inside attention" else None
    figure = figure_at(apply_rules(model, applied, example_inputs=example), path)
    assert figure.before is not None and len(figure.after.boxes) <= 13
    assert {owner.rule for owner in figure.after.owners()} == {type(rule).__name__ for rule in applied}
    for part in (figure.before, figure.after):
        assert sum(box.kind == "input" for box in part.boxes) <= 4
        check_layout(part, place_figure(part))


def test_the_factor_between_folded_parts_of_attention() -> None:
    model = apply_rules(
        bert(), [TemperatureRule("attention.self")], example_inputs={"input_ids": torch.arange(4).view(1, 4)}
    )
    figure = figure_at(model, "encoder.layer.0.attention.self")
    assert [box.title for box in figure.after.boxes if box.kind != "input"] == [
        *("BertSelfAttention", "/ temperature", "BertSelfAttention", "output")
    ]


# The tree -------------------------------------------------------------------------------------------------------


def test_a_tree_folds_layers_that_look_the_same() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "act": nn.ReLU()}) for _ in range(12))
    model = apply_rules(nn.ModuleDict({"layers": layers, "head": nn.Linear(8, 2)}), [LoraRule("up", rank=2)])
    rows = {row.name: row for row in tree_rows(model)}
    assert list(rows) == ["model", "layers", "0–11", "up", "act", "head"] and rows["0–11"].repeats == 12
    assert rows["up"].shape == "4 → 8" and rows["up"].path == "layers.0.up"
    assert [(mark.owner.rule, mark.state, mark.added, mark.trained) for mark in rows["up"].marks] == [
        ("LoraRule", "live", 24, 24)
    ]
    assert rows["model"].numbers == sum(p.numel() for n, p in model.named_parameters() if ".adapters." not in n)
    text = draw(model)
    assert "× 12" in text and "LoraRule [default] ● 24" in text


def test_a_layer_with_another_rule_stands_alone() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(6))
    model = apply_rules(nn.ModuleDict({"layers": layers}), [LoraRule("up", rank=2, layers=[2])])
    names = [row.name for row in tree_rows(model) if row.depth]
    assert [name for name in names if name[0].isdigit()] == ["0–1.up", "2.up", "3–5.up"]


def test_merged_and_idle_marks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_rules(model, [IA3Rule("1")], adapter="blue")
    apply_rules(model, [LoraRule("0", rank=2)], adapter="red")
    activate(model, "red")
    merge(model, "red")
    states = {mark.owner.adapter: mark.state for row in tree_rows(model) for mark in row.marks}
    assert states == {"blue": "idle", "red": "merged"}
    assert "sg-filled" in draw(model) and "sg-frozen" in draw(model)
    assert "●" not in draw(model).replace("●: trains", "")  # a merged adapter does not train
    assert summary(model).trainable == 0 == sum(row["trainable"] for row in summary(model).to_rows())
    assert summary(unmerge(model)).trainable == 16 and "LoraRule [red] ● 16" in draw(model)
