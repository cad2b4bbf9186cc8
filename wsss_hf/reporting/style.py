"""The style sheet of the HTML report, with a light and a dark theme."""

from .pictures import RAMP

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #5b6676; --line: #e2e6ec;
  --accent: #3566d6; --track: #e9edf3; --series-0: #3566d6; --series-1: #d9632a; --series-2: #2a9d6f;
  --series-3: #c04fc0; --series-4: #8c1d2f; --series-5: #b08a00; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #98a3b3;
  --line: #2b3340; --accent: #7aa2ff; --track: #262e3a; --series-0: #6f9bff; --series-1: #ff9a4d; --series-2: #4fd6a0;
  --series-3: #d77bf0; --series-4: #ff4f6d; --series-5: #f0e36a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Inter, Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { margin: 0 0 20px; font-size: 28px; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 44px 0 14px; font-size: 18px; }
dl { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 0; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; font-weight: 550; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
.card th, .card td { padding: 8px 14px; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
.card tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-size: 12.5px; font-weight: 600; }
.card .figures th { white-space: normal; vertical-align: bottom; line-height: 1.3; }
.figures .figure { text-align: right; } .figures td:first-child { font-weight: 600; }
.main { color: var(--accent); font-weight: 700; }
.classes td:not(:first-child) { min-width: 150px; }
.classes b { font-weight: 500; display: inline-block; width: 3.2em; text-align: right; }
.bar { display: inline-block; width: calc(100% - 3.4em); height: 9px; border-radius: 5px; background: var(--track);
  overflow: hidden; vertical-align: middle; }
.bar i { display: block; height: 100%; border-radius: 5px; background: var(--accent); }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
  vertical-align: -1px; box-shadow: inset 0 0 0 1px rgb(128 128 128 / .35); }
.chips { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; margin: 0; }
.chip { display: inline-flex; align-items: center; padding: 1px 10px; border: 1px solid var(--line);
  border-radius: 99px; background: var(--card); font-size: 13px; }
.chip small { color: var(--soft); margin-left: 8px; }
.ramp { width: 90px; height: 10px; margin: 0 7px; border-radius: 5px;
  background: linear-gradient(90deg, RAMP_COLORS); }
.plot { padding: 18px; } .plot svg { display: block; width: 100%; max-width: 760px; margin: 0 auto; }
.plot .chips { justify-content: center; margin-top: 14px; }
svg text { fill: var(--soft); font-size: 12px; } svg .grid { stroke: var(--line); }
svg polyline, svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.plot .key { display: inline; width: 30px; height: 12px; margin: 0 7px 0 0; }
.examples { margin-top: 14px; table-layout: fixed; border-collapse: separate; border-spacing: 0; }
.examples th { position: sticky; top: 0; z-index: 1; padding: 10px 6px; text-align: left; background: var(--page);
  border-bottom: 1px solid var(--line); font-size: 13.5px; color: var(--ink); }
.examples td { padding: 14px 6px; vertical-align: top; border-bottom: 1px solid var(--line); }
figure { margin: 0; } figure img { display: block; width: 100%; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 12px; text-align: center; }
.many { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.examples .chips { margin-top: 8px; } code { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 720px) { main { padding: 24px 12px; } .examples td, .examples th { padding: 6px 3px; } }
""".replace("RAMP_COLORS", ", ".join(RAMP))
