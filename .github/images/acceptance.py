"""Draws acceptance.svg for the README: one answer with its accepted drafts in colour, and tau by K.

    python .github/images/acceptance.py

acceptance.json holds the answer: its tokens as a real decode emitted them, and whether each was a draft. The curves are
those of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
# benchmarks/RESULTS.md: "The larger run", "The quickstart, version 2.2" and "All algorithms on the quickstart", T = 0.
CURVES = {
    "smollm2_eagle3": ("a", {3: 2.264, 5: 2.505, 7: 2.603}),
    "quickstart": ("b", {3: 1.926, 5: 2.018, 7: 2.042}),
    "n-gram": ("c", {3: 1.558, 5: 1.633, 7: 1.664}),
}
WIDTH, TEXT_WIDTH = 880, 540
CHARACTER, LINE = 7.8, 24
STYLE = """
text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
.title { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-weight: 600 }
.note { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.note { font-size: 12px; fill: #59636e }
.draft { fill: #7ee2a0 } .own { fill: #e4e8ec }
.grid { stroke: #d1d9e0; stroke-width: 1 } .line { fill: none; stroke-width: 2.5 }
.a { stroke: #1a7f37; fill: #1a7f37 } .b { stroke: #0969da; fill: #0969da } .c { stroke: #9a6700; fill: #9a6700 }
text.a, text.b, text.c { stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 }
  .draft { fill: #1f6f3a } .own { fill: #2d333b } .grid { stroke: #3d444d }
  .a { stroke: #3fb950; fill: #3fb950 } .b { stroke: #58a6ff; fill: #58a6ff } .c { stroke: #d29922; fill: #d29922 }
}
.line { fill: none !important }
"""


def text(x: float, y: float, content: str, kind: str = "", extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}{extra}>{escape(content)}</text>'


def token_boxes(tokens: list[tuple[str, bool]], top: float) -> tuple[list[str], float]:
    """Lays tokens out in lines, one box each; returns the shapes and the y of the last line."""
    shapes, column, y = [], 0, top
    limit = int(TEXT_WIDTH / CHARACTER)
    for content, is_draft in tokens:
        for part in content.split("\n")[:-1]:
            assert not part.strip()  # a line ends in a token of its own
            column, y = 0, y + LINE
        content = content.rpartition("\n")[2]
        word = content.strip() or content
        column += len(content) - len(content.lstrip())
        if column + len(word) > limit:
            column, y = 0, y + LINE
        if not word.strip():
            continue
        x, width = 24 + column * CHARACTER, len(word) * CHARACTER
        kind = "draft" if is_draft else "own"
        shapes.append(f'<rect x="{x - 1:g}" y="{y - 14:g}" width="{width + 1:g}" height="19" rx="3" class="{kind}"/>')
        # Every font then fills its box exactly.
        shapes.append(text(x, y, word, extra=f' textLength="{width:g}" lengthAdjust="spacingAndGlyphs"'))
        column += len(word)
    return shapes, y


def chart(left: float, top: float, width: float, height: float) -> Iterator[str]:
    """Draws tau by K, from 1 (no gain) up."""

    def place(k: float, tau: float) -> tuple[float, float]:
        return left + (k - 3) / 4 * width, top + (3 - tau) / 2 * height

    for tau in (1, 1.5, 2, 2.5, 3):
        y = place(3, tau)[1]
        yield f'<line x1="{left:g}" x2="{left + width:g}" y1="{y:g}" y2="{y:g}" class="grid"/>'
        yield text(left - 8, y + 4, f"{tau:g}", "note", ' text-anchor="end"')
    for name, (kind, values) in CURVES.items():
        points = [place(*point) for point in values.items()]
        yield f'<polyline class="line {kind}" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>'
        yield from (f'<circle cx="{x:g}" cy="{y:g}" r="3.5" class="{kind}"/>' for x, y in points)
        below = 18 if kind == "c" else -9
        yield text(points[-1][0], points[-1][1] + below, name, f"title {kind}", ' font-size="12" text-anchor="end"')
    for k in (3, 5, 7):
        yield text(place(k, 1)[0], top + height + 18, f"K = {k}", "note", ' text-anchor="middle"')


def draw(answer: dict) -> str:
    """Draws the picture as SVG."""
    tokens = [(content, bool(is_draft)) for content, is_draft in answer["tokens"]]
    boxes, bottom = token_boxes(tokens, 100)
    height = max(bottom + 66, 300)
    legend = height - 22
    drafts = sum(is_draft for _, is_draft in tokens)
    shapes = [
        text(24, 30, "Prompt", "title"),
        text(24, 52, answer["prompt"], extra=' font-size="12"'),
        text(24, 74, f"Answer: {len(tokens)} tokens in {answer['passes']} passes of the large model", "title"),
        *boxes,
        f'<rect x="24" y="{legend - 12:g}" width="14" height="14" rx="3" class="draft"/>',
        text(44, legend, f"{drafts} accepted drafts", "note"),
        f'<rect x="180" y="{legend - 12:g}" width="14" height="14" rx="3" class="own"/>',
        text(200, legend, f"{len(tokens) - drafts} tokens of the large model", "note"),
        text(620, 30, "tau: tokens per pass, K drafted", "title"),
        *chart(640, 52, WIDTH - 640 - 28, height - 52 - 62),
        text(620, legend, "1 = no gain; held-out prompts, T = 0", "note"),
    ]
    label = (
        f"{drafts} of {len(tokens)} tokens of an answer are accepted drafts; tau by K for two draft models and n-gram"
    )
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" font-size="13"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *shapes, "</svg>\n"])


if __name__ == "__main__":
    answer = json.loads((HERE / "acceptance.json").read_text(encoding="utf-8"))
    (HERE / "acceptance.svg").write_text(draw(answer), encoding="utf-8")
