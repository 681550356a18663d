"""The look of the run page: one style sheet and the slider's script, both inside the page."""

CSS = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #4a5568; --faint: #718096; --line: #e2e8f0;
  --paper: #ffffff; --back: #f7fafc; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8edf4; --soft: #b6c2d2; --faint: #8b99ab; --line: #2e3a4a;
  --paper: #161c26; --back: #0e131b; --accent: #7ab8f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 64px; }
header h1 { margin: 0 0 4px; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; }
header p { margin: 0 0 18px; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 20px; font-size: 15px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 18px; }
h2 { margin: 0 0 10px; font-size: 20px; } h3 { margin: 18px 0 6px; font-size: 16px; }
p { margin: 0 0 10px; } .note { color: var(--soft); font-size: 14.5px; }
svg { display: block; width: 100%; height: auto; } .narrow { display: none; }
@media (max-width: 700px) { main { padding: 14px 10px 40px; } section { padding: 14px 12px; }
  .wide { display: none; } .narrow { display: block; } header h1 { font-size: 24px; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
table.facts td:first-child { white-space: nowrap; color: var(--soft); width: 1%; }
code, pre { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto;
  margin: 0 0 10px; }
summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
.slider { display: flex; gap: 14px; align-items: center; margin: 0 0 12px; }
.slider input { flex: 1; min-width: 0; accent-color: var(--accent); height: 28px; }
.slider output { min-width: 9em; text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; background: #ffffff; border-radius: 6px; padding: 6px; text-align: center; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; image-rendering: auto; }
figure img[hidden] { display: none; }
@media print { .wide { display: block; } .narrow { display: none; } section { break-inside: avoid; } }
"""

SCRIPT = """
const slider = document.getElementById("sample-slider");
if (slider) {
  const pictures = Array.from(document.querySelectorAll("#sample-pictures img"));
  const shown = document.getElementById("sample-step");
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
    shown.textContent = pictures[Number(slider.value)].alt;
  };
  slider.addEventListener("input", show);
  show();
}
"""
