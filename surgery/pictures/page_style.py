"""The style and the script of a report, both inline. The page's policy allows these texts alone, by their hashes."""

from __future__ import annotations

import base64
import hashlib

from surgery.pictures.style import border_css, css

__all__ = ["SCRIPT", "STYLE", "policy"]

STYLE = (
    """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #57606a; --line: #d0d7de; --tint: #f6f8fa;
  --bar: #8c959f; --train: #b8500a; --link: #0a5ca8; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9da7b3; --line: #30363d;
  --tint: #161b22; --bar: #6e7681; --train: #f0a35e; --link: #6db7ee; } }
body { margin: 0 auto; max-width: 1180px; padding: 24px 24px 80px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 Helvetica, Arial, "Liberation Sans", system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 8px; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav a { margin-right: 16px; } p, .soft { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 120px; }
.card b { display: block; font-size: 20px; font-weight: 600; } .card span { color: var(--soft); font-size: 12px; }
table { border-collapse: collapse; margin: 8px 0; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--soft); font-size: 12px; } td.n, th.n { text-align: right; white-space: nowrap; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto;
  font: 12px/1.5 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
details > summary { cursor: pointer; } .tree details > :not(summary) { margin-left: 20px; }
.tree summary, .tree .leaf { padding: 2px 0; } .tree .leaf { padding-left: 16px; } .tree b { font-weight: 600; }
.tag { display: inline-block; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; font-size: 12px; }
.mark { display: inline-block; border: 1.5px solid; border-radius: 10px; padding: 0 8px; margin-left: 6px;
  font-size: 12px; color: var(--ink); } .mark.idle { border-style: dashed; }
.site { border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 8px 14px; }
.site:target { border-color: var(--link); } .site[open] > summary { margin-bottom: 8px; }
.site svg { max-width: none; } .paths { columns: 2; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
.bar { fill: var(--bar); } .train { fill: var(--train); } .ground { fill: var(--tint); }
input { font: inherit; padding: 4px 10px; width: 320px; max-width: 90%; border: 1px solid var(--line);
  border-radius: 6px; background: var(--paper); color: var(--ink); }
"""
    + css()
    + border_css()
    + "\n"
)

SCRIPT = """
// A link to a site opens it; the field above the sites hides those without its text in one of their paths.
const open = () => {
  const site = document.getElementById(location.hash.slice(1));
  if (site instanceof HTMLDetailsElement) { site.open = true; site.scrollIntoView(); }
};
addEventListener("hashchange", open);
document.addEventListener("click", (event) => {
  if (event.target.closest("a[href^='#site-']")) setTimeout(open);
});
open();
const field = document.getElementById("filter");
if (field) field.addEventListener("input", () => {
  for (const site of document.querySelectorAll(".site"))
    site.hidden = !site.dataset.paths.toLowerCase().includes(field.value.toLowerCase());
});
"""


def policy() -> str:
    """The Content-Security-Policy of the page: nothing is loaded, and nothing else runs."""
    return f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
