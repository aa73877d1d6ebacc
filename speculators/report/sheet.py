"""The style sheet of the HTML page: light or dark as the reader prefers, one column on a phone."""

from __future__ import annotations

SHEET = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1a1d21; --muted: #5b636d; --grid: #e3e6ea;
  --good: #176b3a; --bad: #b3261e; --mark: #fff3cd;
  --s0: #0b62b8; --s1: #c2410c; --s2: #0f766e; --s3: #8a3ffc; --s4: #a16207;
  --s5: #be185d; --s6: #4d7c0f; --s7: #7c2d12;
  --b0: #6b7280; --b1: #9ca3af; --b2: #4b5563; --shade: rgb(0 0 0 / .28);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --panel: #1d2125; --ink: #e8eaed; --muted: #a3abb5; --grid: #333a41;
    --good: #7bd69a; --bad: #ff8f85; --mark: #4a3d0f;
    --s0: #6cb2ff; --s1: #ff9a62; --s2: #4fd1c5; --s3: #c4a1ff; --s4: #e5c04b;
    --s5: #ff8ac0; --s6: #a3d65c; --s7: #e0a58b;
    --b0: #9aa3ad; --b1: #6f7883; --b2: #c3cad2; --shade: rgb(0 0 0 / .8);
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul { margin: .4rem 0; }
ul { padding-left: 1.2rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: var(--s0); }
.note { color: var(--muted); font-size: .88rem; }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.lead { font-weight: 600; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--panel); border-radius: .5rem; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figcaption .note { display: block; font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0 0; font-size: .85rem; }
.keys span { display: inline-flex; align-items: center; gap: .4rem; min-width: 0; }
.keys i { flex: none; width: 1.5rem; border-top: 2px solid; }
.keys i.dashed { border-top-style: dashed; }
.keys i.dotted { border-top-style: dotted; }
.scroll { max-width: 100%; margin: .5rem 0; --ground: var(--paper); }
/* A shade at an edge beyond which there is more: covers that move with the content hide it at the ends. */
.scroll, pre {
  overflow-x: auto; background:
  linear-gradient(to right, var(--ground) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--ground) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100% no-repeat scroll,
  var(--ground);
}
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td { max-width: 26rem; overflow-wrap: break-word; }
table.narrow td { white-space: nowrap; max-width: none; }
tr.differs td { background: var(--mark); }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
pre { --ground: var(--panel); padding: .8rem; border-radius: .5rem; font-size: .82rem; }
"""
