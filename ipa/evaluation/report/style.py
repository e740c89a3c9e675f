"""The page's style and its one script, as they stand in the file."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #fbfbfa; --card: #fff; --ink: #1b1b1a; --soft: #63625e; --line: #e2e1dc;
  --mark: #eef3fb; --warn: #8a4b00;
  --s0: #2a78d6; --s1: #eb6834; --s2: #1baf7a; --s3: #4a3aa7; --s4: #eda100; --s5: #e34948;
  --s6: #008300; --s7: #e87ba4; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #161615; --card: #1f1f1d; --ink: #ecebe7; --soft: #a5a49d; --line: #383733;
  --mark: #22303f; --warn: #f0b26a;
  --s0: #3987e5; --s1: #d95926; --s2: #199e70; --s3: #9085e9; --s4: #c98500; --s5: #e66767;
  --s6: #2fa32f; --s7: #d55181; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 8px 0 4px; text-wrap: balance; }
h2 { font-size: 20px; margin: 44px 0 4px; }
h3 { font-size: 16px; margin: 20px 0 8px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.soft { color: var(--soft); }
code { font: 0.87em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; }
a { color: var(--s0); text-underline-offset: 3px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  -webkit-overflow-scrolling: touch; }
.scroll:has(.shots) { width: fit-content; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; }
.scores { width: 100%; font-variant-numeric: tabular-nums; }
.scores th, .scores td { padding: 7px 8px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.scores tbody tr:last-child > * { border-bottom: 0; }
.scores thead th { vertical-align: bottom; font-weight: 600; font-size: 13px; line-height: 1.3; }
.scores th button { all: unset; cursor: pointer; display: inline; }
.scores th button:hover { text-decoration: underline; text-underline-offset: 3px; }
.scores th button:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; border-radius: 2px; }
.scores th[aria-sort="ascending"] button::after { content: " ▴"; }
.scores th[aria-sort="descending"] button::after { content: " ▾"; }
.scores .number { text-align: right; }
.scores td.number { white-space: nowrap; }
.scores .flag { text-align: center; width: 70px; }
.scores th:first-child { position: sticky; left: 0; background: var(--card); z-index: 1;
  min-width: 190px; max-width: 290px; }
.scores tbody th { font-weight: 600; }
.scores th code { display: block; font-weight: 400; color: var(--soft); }
.scores tbody tr:hover > * { background: var(--mark); }
.interval { display: block; font-size: 12px; line-height: 1.3; color: var(--soft); }
.best { font-weight: 700; }
.best .interval { font-weight: 400; }
.note { font-size: 13px; line-height: 1.4; color: var(--warn); overflow-wrap: anywhere; }
.about { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 12px 0; font-size: 14px; }
.about dt { font-weight: 600; }
.about dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; max-width: 90ch; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.chart { margin: 0; padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.chart figcaption { font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { font-size: 13px; fill: var(--soft); }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .s7 { --c: var(--s7); }
.band { fill: var(--c); opacity: 0.14; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; }
circle { fill: var(--c); stroke: var(--card); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 0; padding: 0;
  font-size: 13px; }
.key { display: inline-block; width: 18px; border-top: 3px solid var(--c); vertical-align: middle; margin-right: 7px; }
.key.dashed { border-top-style: dashed; }
.shots th, .shots td { padding: 6px; text-align: left; vertical-align: top; font-size: 12px; line-height: 1.35; }
.shots thead th { font-weight: 600; vertical-align: bottom; }
.shots thead code { font-weight: 400; color: var(--soft); }
.shots tbody th { position: sticky; left: 0; z-index: 1; background: var(--card); font-weight: 400;
  border-right: 1px solid var(--line); }
.shots thead th:first-child { position: sticky; left: 0; z-index: 1; background: var(--card);
  border-right: 1px solid var(--line); }
.shot { display: block; width: var(--shot); height: var(--shot); object-fit: contain; border-radius: 4px;
  background: color-mix(in srgb, var(--ink) 6%, transparent); }
.none { display: grid; place-items: center; color: var(--soft); font-size: 12px; }
.shots th, .shots td, .shots .words { width: calc(var(--shot) + 12px); }
.words { display: block; color: var(--soft); overflow-wrap: anywhere; margin-top: 3px; }
.shots { --shot: 128px; }
.cards, .many { --shot: 104px; }
.cards { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--n) * (var(--shot) + 6px) + 28px)), 1fr)); }
.card { margin: 0; padding: 10px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.card .row { display: flex; flex-wrap: wrap; gap: 6px; }
.card .row > :first-child { outline: 2px solid var(--soft); outline-offset: 1px; margin: 0 4px 0 3px; }
.card figcaption { margin-top: 8px; font-size: 13px; line-height: 1.4; }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 8px 0; }
summary { cursor: pointer; padding: 8px 14px; font-weight: 600; }
details .about { margin: 0; padding: 4px 14px 14px; }
@media (max-width: 640px) {
  main { padding: 14px 14px 48px; } h1 { font-size: 24px; }
  .shots, .cards, .many { --shot: 92px; } .chart text { font-size: 19px; }
  .scores th:first-child { min-width: 120px; max-width: 140px; }
  .about { grid-template-columns: 1fr; gap: 0; } .about dd { margin-bottom: 8px; } }
"""

# Rows go by a cell's data-order; those without one stay at the end, whichever the direction.
SCRIPT = """
for (const head of document.querySelectorAll(".scores thead th")) {
  head.querySelector("button").addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0];
    const before = head.getAttribute("aria-sort");
    const now = before === null ? head.dataset.first : before === "ascending" ? "descending" : "ascending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", now);
    const sign = now === "ascending" ? 1 : -1, isNumber = "number" in head.dataset;
    const order = (row) => row.querySelector(`[data-column="${head.dataset.column}"]`)?.dataset.order;
    const compare = (a, b) => isNumber ? a - b : a.localeCompare(b, undefined, { numeric: true });
    const rows = [...body.rows].sort((a, b) => {
      const [one, two] = [order(a), order(b)];
      if (one === undefined || two === undefined) return (one === undefined) - (two === undefined);
      return sign * compare(one, two);
    });
    body.append(...rows);
  });
}
"""
