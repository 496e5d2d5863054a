"""The report: one file without outside links, safe with any name, true about outputs, and looked at in Chromium."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("pygraphviz", reason="pictures are laid out with graphviz")

from surgery import SurgeryError, activate, apply_rules, draw, merge, remove, report, show  # noqa: E402
from surgery.pictures.output_changes import output_changes  # noqa: E402
from surgery.rules import IA3Rule, LoraRule, PromptRule, TrainRule  # noqa: E402
from tests.reports.gallery import Text  # noqa: E402
from tests.support import ROOT  # noqa: E402

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&'"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.query(x)) + self.value(x)


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def rewritten(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = Model(layers)
    apply_rules(
        model, [LoraRule("query", rank=2, alpha=4, init="random", layers=list(range(1, layers))), TrainRule("head")]
    )
    apply_rules(model, [IA3Rule("value")], adapter="other")
    activate(model, "default")
    return model


class Page(HTMLParser):
    """The tags of a page, their attributes, and whether each is closed."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_without_outside_links(tmp_path: Path) -> None:
    file = report(rewritten(), tmp_path / "new" / "surgery.html", example_inputs=torch.ones(2, 8))
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert [path.name for path in file.parent.iterdir()] == ["surgery.html"]
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "style", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#")
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {(attributes["href"] or "")[1:] for _, attributes in page.tags if "href" in attributes}
    assert links <= targets and {"summary", "tree", "sites", "parameters", "outputs", "rules"} <= targets


def test_the_policy_allows_the_pages_own_style_and_script_alone(tmp_path: Path) -> None:
    import base64
    import hashlib

    text = report(rewritten(), tmp_path / "surgery.html").read_text(encoding="utf-8")
    policies = [a["content"] for tag, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    (style,), (script,) = (re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("style", "script"))
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    assert policies == [f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"]


def test_it_says_what_the_verbs_say(tmp_path: Path) -> None:
    from html import unescape

    model = rewritten()
    text = unescape(report(model, tmp_path / "surgery.html").read_text(encoding="utf-8"))
    assert show(model, "layers.1.query") in text and show(model, "layers.1.query", generated=True) in text
    assert "rule: lora" in text and "IA3Rule [other, idle]" in text
    assert "layers.1.query and 1 more" in text and "layers.0.value and 2 more" in text
    assert 'id="outputs"' not in text  # without an example


def test_names_are_escaped(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict({HOSTILE: nn.Linear(8, 8), "rest": nn.ReLU()}))
    hostile_class = type(HOSTILE, (nn.Linear,), {})
    model.add_module("odd", hostile_class(8, 8))
    apply_rules(model, [LoraRule(nn.Linear, rank=2)])
    text = report(model, tmp_path / "a.html", example_inputs=torch.ones(1, 8), title=HOSTILE).read_text(
        encoding="utf-8"
    )
    tags = [tag for tag, _ in Page(text).tags]
    assert tags.count("script") == 1 and "img" not in tags


@pytest.mark.parametrize("name", ["<script>", "a\x07b", "a\x00b", "a\ud800b", "a\ufffeb", "é 名前", "]]>"], ids=ascii)
def test_pictures_are_xml_with_any_name(name: str, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    model = apply_rules(nn.Sequential(OrderedDict({name: nn.Linear(8, 8), "rest": nn.ReLU()})), LoraRule(name, rank=2))
    for drawing in (draw(model), draw(model, name)):
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
        ElementTree.fromstring(drawing.save(tmp_path / "a.svg").read_bytes())
    Page(report(model, tmp_path / "a.html").read_text(encoding="utf-8"))


def test_changes_are_those_of_plain_hooks() -> None:
    model, x = rewritten(), torch.randn(2, 8)
    changes = {change.path: change for change in output_changes(model, x)}
    values: dict[str, list[torch.Tensor]] = {}
    for clean in (False, True):
        if clean:
            remove(model)
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, out, name=name: values.setdefault(name, []).append(out.detach()))
        with torch.no_grad():
            model.eval()(x)
        for module in model.modules():
            module._forward_hooks.clear()
    for path, change in changes.items():
        live, base = (value.double() for value in values[path])
        # The same numbers added in another order: float64 sums of float32 outputs.
        assert change.norm == pytest.approx(float(base.norm()), rel=1e-5)
        assert change.change == pytest.approx(float((live - base).norm()), rel=1e-4, abs=1e-7)
    assert changes["layers.0"].change == 0 and changes["layers.1"].relative and changes[""].relative
    assert list(changes)[-1] == "" and changes["layers.1.query"].site and not changes["layers.1"].site


def test_a_report_does_not_change_the_model(tmp_path: Path) -> None:
    model = rewritten().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    report(model, tmp_path / "surgery.html", example_inputs=(torch.ones(2, 8),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(module.training for module in model.modules()) and torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_of_another_shape_are_named(tmp_path: Path) -> None:
    model = apply_rules(nn.Sequential(Text()), [PromptRule("0", length=2)])
    text = report(model, tmp_path / "a.html", example_inputs=torch.ones(1, 4, dtype=torch.long)).read_text("utf-8")
    assert "Outputs" in text


def test_thousands_of_sites_are_few_entries(tmp_path: Path) -> None:
    file = report(rewritten(layers=500), tmp_path / "a.html")
    text = file.read_text(encoding="utf-8")
    assert text.count('class="site"') == 3 and "1,000 sites" in text and len(text) < 300_000


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential, torch.compile], ids=["wrapper", "host", "compiled"])
def test_models_in_other_modules(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = wrap(rewritten())
    text = report(model, tmp_path / "a.html", example_inputs=torch.ones(2, 8)).read_text(encoding="utf-8")
    assert text.count('class="site"') == 3 and 'href="#site-0"' in text and "rule: lora" in text
    path = "0.layers.1.query" if wrap is nn.Sequential else "layers.1.query"
    assert draw(model, path).startswith("<svg") and "LoraRule" in draw(model) and f"{path} and 1 more" in text


def test_an_untouched_model_has_a_tree(tmp_path: Path) -> None:
    text = report(Model(2), tmp_path / "a.html").read_text(encoding="utf-8")
    assert 'id="tree"' in text and 'id="sites"' not in text and 'id="outputs"' not in text


def test_an_untouched_model_runs_on_an_example(tmp_path: Path) -> None:
    model, x = Model(2).eval(), torch.ones(2, 8)
    text = report(model, tmp_path / "a.html", example_inputs=x).read_text(encoding="utf-8")
    Page(text)
    rows = re.findall(r"<td[^>]*>(layers\.\d|\(the model\))</td><td[^>]*>(\w+)</td>.*?<td[^>]*>([\d.]+)</td>", text)
    hidden = model.layers[0](x)
    values = {"layers.0": hidden, "layers.1": model.layers[1](hidden), "(the model)": model(x)}
    expected = [(path, f"{float(value.detach().double().norm()):.4g}") for path, value in values.items()]
    assert 'id="outputs"' in text and [(path, norm) for path, _, norm in rows] == expected
    assert {change.change for change in output_changes(model, x)} == {0.0}


def test_refusals(tmp_path: Path) -> None:
    model = rewritten()
    with pytest.raises(SurgeryError, match="a report is one file"):
        report(model, tmp_path)
    with pytest.raises(SurgeryError, match="the example call fails"):
        report(model, tmp_path / "a.html", example_inputs=torch.ones(2, 3))
    merge(model)
    report(model, tmp_path / "merged.html")
    with pytest.raises(SurgeryError, match="can't be computed"):
        report(model, tmp_path / "a.html", example_inputs=torch.ones(2, 8))
    assert [file.name for file in tmp_path.iterdir()] == ["merged.html"]


# In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> tuple[str, dict[str, str]]:
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    unpacked = ROOT / "examples" / "web" / "node_modules" / ".chromium"
    if found is None and (unpacked / "chromium").exists():  # make web-test unpacks it
        libraries = {"LD_LIBRARY_PATH": f"{unpacked}/al2023/lib", "FONTCONFIG_FILE": f"{unpacked}/fonts.conf"}
        return str(unpacked / "chromium"), {**os.environ, **libraries}
    if found is None:
        pytest.skip("needs Chromium: on the path, named by CHROMIUM, or unpacked by make web-test")
    return found, dict(os.environ)


def run_browser(browser: tuple[str, dict[str, str]], folder: Path, url: str, *flags: str) -> str:
    path, env = browser
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")
    words = [path, *quiet, f"--user-data-dir={folder / 'profile'}", *flags, url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    if done.returncode:
        pytest.skip(f"the browser does not start: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def test_a_link_to_a_site_opens_it_in_chromium(browser: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    file = report(rewritten(), tmp_path / "surgery.html", example_inputs=torch.ones(2, 8))
    dom = run_browser(browser, tmp_path, f"{file.as_uri()}#site-1", "--dump-dom")
    opened = [a["id"] for tag, a in Page(dom).tags if a.get("class") == "site" and "open" in a]
    assert opened == ["site-1"]  # the script ran under the page's policy


def test_the_page_is_light_or_dark_in_chromium(browser: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    image, stat = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageStat")
    file = report(rewritten(), tmp_path / "surgery.html")
    shades = []
    for scheme in (1, 0):  # Chromium's numbers of light and dark
        picture = tmp_path / f"{scheme}.png"
        flags = (f"--screenshot={picture}", "--window-size=900,700", f"--blink-settings=preferredColorScheme={scheme}")
        run_browser(browser, tmp_path, f"{file.as_uri()}#site-0", *flags)
        shades.append(stat.Stat(image.open(picture).convert("L")).mean[0])
    assert shades[0] > 200 and shades[1] < 60
