"""If a rule does not find its structure in a module, the error says why, and which module contains it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, Rule, Structure, apply_rules, plan_rules, remove, rule
from surgery.testing import Snapshot
from tests.support.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@rule("test-border-swish")
class SwishRule(Rule):
    def rewrite(self, site: Any) -> None:
        for occurrence in site.find(Structure(lambda x: F.gelu(x))):
            x = occurrence.bindings["x"]
            site.replace(occurrence.root, x * torch.sigmoid(x))


SOFTMAX = Structure(lambda scores: torch.softmax(scores, -1))


@rule("test-border-soft")
class SoftRule(Rule):
    def rewrite(self, site: Any) -> None:
        for occurrence in site.find(SOFTMAX):
            site.replace(occurrence.root, occurrence.root * 0.5)


@rule("test-border-sharper")
class SharperRule(Rule):
    def rewrite(self, site: Any) -> None:
        heads = site.module.config.num_attention_heads
        site.around(sharper, site.param("t", (heads, 1, 1), 2.0))


def sharper(t: Tensor) -> Any:
    def attend(inner: Any, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(module, query * t, *args, **kwargs)

    return attend


@pytest.fixture(params=["eager", "sdpa"])
def bert(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: Any = FAMILIES["bert"].make().eval()
    model.set_attn_implementation(request.param)
    return model, FAMILIES["bert"].inputs()


def problems(model: nn.Module, tested_rule: Rule, inputs: Any) -> list[Any]:
    return plan_rules(model, [tested_rule], example_inputs=inputs).problems


def test_an_activation_that_is_a_child(bert: Any) -> None:
    model, inputs = bert
    for tested_rule in (SwishRule("intermediate"), SwishRule("re:.*encoder\\.layer\\.\\d+")):
        first, *_ = problems(model, tested_rule, inputs)
        assert first.what == "SwishRule.rewrite changes nothing"
        assert "gelu(x, 'none') is not in Bert" in first.why and "any of the pattern's operations" in first.why
        assert "intermediate_act_fn', a GELUActivation, whose own forward has gelu" in first.fix
    before, expected = Snapshot(model), model(**inputs)[0]
    apply_rules(model, SwishRule("intermediate_act_fn"), example_inputs=inputs)
    assert not torch.allclose(model(**inputs)[0], expected)
    remove(model)
    assert before.differences(model) == []


def test_a_softmax_behind_a_registry(bert: Any) -> None:
    model, inputs = bert
    function = f"{model.config._attn_implementation}_attention_forward"
    (error, _) = problems(model, SoftRule("attention.self"), inputs)
    eager = model.config._attn_implementation == "eager"
    way = "contains it: look into it with site.find(…, leaves=False)" if eager else "put a function around it"
    assert error.fix.startswith(f"its forward takes {function} from a registry") and way in error.fix
    (error, _) = problems(model, SoftRule("re:.*encoder\\.layer\\.\\d+"), inputs)
    assert error.fix.startswith(f"its 'attention.self' takes {function} from a registry")
    assert "target that module" in error.fix


def test_a_function_around_the_one_from_the_registry(bert: Any) -> None:
    """Doubling the scores equals doubling the scaling."""
    model, inputs = bert
    apply_rules(model, SharperRule("attention.self"), example_inputs=inputs)
    live = model(**inputs)[0]
    remove(model)
    for layer in model.bert.encoder.layer:
        layer.attention.self.scaling *= 2
    torch.testing.assert_close(live, model(**inputs)[0], rtol=1e-4, atol=1e-5)


class Nearly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, 0)


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.ReLU(), Nearly()])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def test_the_nearest_miss_is_told() -> None:
    (error,) = problems(Nearly(), SoftRule(Nearly), torch.randn(3, 4))
    assert "nearest miss, 0 of 1 operations" in error.why and error.fix == "target a module whose own forward has it"
    (error,) = problems(Holds(), SoftRule(Holds), torch.randn(3, 4))
    assert "any of the pattern's operations" in error.why and error.fix == "target a module whose own forward has it"


@rule("test-border-first")
class FirstRule(Rule):
    unpacks: bool = False

    def rewrite(self, site: Any) -> None:
        matches = site.find(SOFTMAX)
        (first,) = matches if self.unpacks else (matches[0],)
        site.replace(first.root, first.root * 0.5)


@pytest.mark.parametrize("unpacks", [False, True])
def test_a_rewrite_that_fails_for_want_of_a_match_tells_why(unpacks: bool) -> None:
    (error,) = problems(Nearly(), FirstRule(Nearly, unpacks=unpacks), torch.randn(3, 4))
    assert error.what == "FirstRule.rewrite fails" and "test_border.py" in error.why
    assert "softmax(scores, -1) is not in Nearly.forward: nearest miss, 0 of 1 operations" in error.why
    (error,) = problems(Deep(), FirstRule(Deep, unpacks=unpacks), torch.randn(3, 4))
    assert error.fix == "target its 'inner', a Softly, whose own forward has softmax(scores, -1)"


class Softly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Softly()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(x) * scale


def test_many_sites_are_looked_at_once_and_told_together(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.authoring.missed_structure as border

    model, inputs = bert
    looked: list[int] = []
    before = border._search
    monkeypatch.setattr(border, "_search", lambda *args: looked.append(1) or before(*args))
    border._answers.clear()
    with pytest.raises(PlanError) as caught:
        apply_rules(model, SoftRule("attention.self"), example_inputs=inputs)
    assert len(caught.value.problems) == 2 and len(looked) == 1
    assert caught.value.problems[0].fix == caught.value.problems[1].fix


def test_a_rule_that_looks_for_nothing_is_told_as_before() -> None:
    @rule("test-border-idle")
    class Idle(Rule):
        def rewrite(self, site: Any) -> None: ...

    (error,) = problems(nn.Linear(2, 2), Idle(nn.Linear), torch.ones(2))
    assert error.why is None and error.fix == "return the new output, or use site.replace(old, new)"
