"""The style sheet of the report, with a light and a dark form, for screens and for paper."""

from __future__ import annotations

LIGHT = (
    "--paper:#fff;--card:#f6f7f9;--ink:#1c2024;--soft:#555e68;--line:#d5dae0;--link:#0b57a4;--good:#146c34;"
    "--open:#8a4b00;--warn:#fff4df;--s0:#0b62a4;--s1:#c2410c;--s2:#15803d;--s3:#7e22ce;--s4:#b91c1c;--s5:#0e7490;"
    "--s6:#854d0e;--s7:#be185d;"
)
DARK = (
    "--paper:#14171a;--card:#1d2126;--ink:#e7eaee;--soft:#a8b1bb;--line:#39414a;--link:#7cb8f5;--good:#7ed69a;"
    "--open:#f0b35a;--warn:#33290f;--s0:#6db3f2;--s1:#fb923c;--s2:#6ee7a0;--s3:#c9a1f7;--s4:#f98080;--s5:#5fd3e6;"
    "--s6:#e0b25c;--s7:#f593c0;"
)
STROKES = "".join(f".s{n}{{stroke:var(--s{n})}}circle.s{n}{{fill:var(--s{n})}}" for n in range(8))

STYLE = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}}
body{{margin:0 auto;max-width:72rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}}
h1{{font-size:1.7rem;line-height:1.2;margin:.5rem 0}}
h2{{font-size:1.35rem;line-height:1.25;margin:2.5rem 0 .5rem;border-bottom:2px solid var(--line);padding-bottom:.25rem}}
h3{{font-size:1.1rem;line-height:1.3;margin:0 0 .75rem}}
h4{{font-size:1rem;margin:0}}
p{{margin:.5rem 0;max-width:46rem}}
a{{color:var(--link)}}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{{outline:3px solid var(--link);outline-offset:2px}}
.skip{{position:absolute;left:-100rem}}
.skip:focus{{position:static}}
nav ul{{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;margin:1rem 0 0;padding:0}}
.note,caption,figcaption,dt{{color:var(--soft)}}
.note{{font-size:.875rem}}
.table,details{{margin:1.25rem 0}}
.scroll{{overflow-x:auto;border:1px solid var(--line);border-radius:.375rem}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:.5rem .75rem;font-weight:600;color:var(--ink)}}
th,td{{text-align:left;vertical-align:top;padding:.375rem .75rem;border-top:1px solid var(--line);overflow-wrap:normal}}
tbody th{{font-weight:500;position:sticky;left:0;background:var(--paper);min-width:6.5rem}}
td a{{white-space:nowrap}}
caption span{{display:inline-block;position:sticky;left:.75rem;max-width:calc(100vw - 4rem)}}
.text{{min-width:24rem}}
.words{{min-width:9rem}}
thead th{{background:var(--card);font-weight:600}}
.number{{text-align:right;white-space:nowrap}}
summary{{cursor:pointer;font-weight:600;padding:.25rem 0}}
article{{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;margin:1.25rem 0}}
article .scroll{{background:var(--paper)}}
.state{{font-size:.8rem;font-weight:600;color:var(--good);white-space:nowrap;margin-left:.25rem}}
.state.open{{color:var(--open);white-space:normal}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.125rem 1rem;margin:0 0 1rem;font-size:.9rem}}
dd{{margin:0}}
@media (min-width:60rem){{dl{{grid-template-columns:max-content 1fr max-content 1fr}}}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}}
.charts.wide{{max-width:36rem;margin-top:.75rem}}
figure{{margin:0;background:var(--paper);border:1px solid var(--line);border-radius:.375rem;padding:.5rem}}
figcaption{{font-size:.875rem;font-weight:600}}
.nothing{{color:var(--soft);font-size:.875rem}}
svg.chart{{display:block;width:100%;height:auto}}
svg text{{font-size:12px;fill:var(--ink);font-family:inherit}}
svg .end{{text-anchor:end}}
svg .middle{{text-anchor:middle}}
svg polyline{{fill:none;stroke-width:2;stroke-linejoin:round}}
svg line{{stroke-width:2}}
svg line.grid{{stroke:var(--line);stroke-width:1}}
svg line.axis{{stroke:var(--soft);stroke-width:1}}
{STROKES}
.warnings{{background:var(--warn);border-left:4px solid var(--open);border-radius:.25rem;padding:.5rem .75rem;
margin:1rem 0}}
.warnings ul{{margin:.25rem 0;padding-left:1.25rem;font-size:.9rem}}
img{{display:block;max-width:100%;height:auto;background:#fff;border-radius:.25rem}}
@media (max-width:34rem){{
body{{padding:.75rem}}
dl{{grid-template-columns:7rem 1fr;gap:.25rem .75rem}}
th,td{{padding:.375rem .5rem}}
svg text{{font-size:13.5px}}
}}
@media print{{
:root{{color-scheme:light;{LIGHT}}}
body{{max-width:none;font-size:10pt;padding:0}}
nav,.skip{{display:none}}
.scroll{{overflow:visible}}
details::details-content{{content-visibility:visible;block-size:auto}}
figure,tr,img,.warnings{{break-inside:avoid}}
h2,h3,summary,caption{{break-after:avoid}}
a{{color:inherit;text-decoration:none}}
}}
"""
