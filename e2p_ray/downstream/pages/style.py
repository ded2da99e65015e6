"""The style of report.html: light and dark, narrow and wide, Latin and Japanese."""

STYLE = """
:root{
  color-scheme:light dark;
  --page:#f6f7f9;
  --card:#fff;
  --ink:#1b2430;
  --soft:#5c6876;
  --line:#dde2e8;
  --ok:#2f7d5b;
  --fallback:#c98a1b;
  --suppressed:#7f8b99;
  --dead:#b5443c;
  --bar:#3b6ea8;
  --quiet:#eef1f5;
  --s0:#3b6ea8;
  --s1:#c2611f;
  --s2:#2f7d5b;
  --s3:#8a4f9e;
  --s4:#7a6a1d;
  --s5:#5c6876
}
@media(prefers-color-scheme:dark) {
  :root{
    --page:#12161b;
    --card:#1a2027;
    --ink:#e5eaf0;
    --soft:#9aa6b4;
    --line:#2d3640;
    --ok:#4fae84;
    --fallback:#dda63f;
    --suppressed:#76828f;
    --dead:#d96a61;
    --bar:#6c9fd8;
    --quiet:#222a33;
    --s0:#6c9fd8;
    --s1:#e68a4c;
    --s2:#4fae84;
    --s3:#c08ad2;
    --s4:#c9b458;
    --s5:#9aa6b4
  }
}
*{box-sizing:border-box}
body{
  margin:0;
  background:var(--page);
  color:var(--ink);
  line-height:1.5;
  font-size:16px;
  font-family:system-ui,-apple-system,"Segoe UI","Hiragino Sans","Noto Sans JP","Noto Sans CJK JP",sans-serif
}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.55rem;margin:0 0 2px}
h2{font-size:1.1rem;margin:0 0 12px}
h3{font-size:.95rem;margin:0 0 6px}
p{margin:0 0 8px}
.soft{color:var(--soft)}
code,pre{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
section{
  background:var(--card);
  border:1px solid var(--line);
  border-radius:10px;
  padding:18px 20px;
  margin-top:16px
}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px;margin-top:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:1.45rem;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:20px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;font-size:.85rem;color:var(--soft)}
tr:last-child td,tr:last-child:not(:first-child) th{border-bottom:0}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.id{
  font:13px/1.8 ui-monospace,Menlo,Consolas,monospace;
  color:var(--soft);
  white-space:nowrap;
  width:1%;
  padding-right:18px
}
.sample{break-inside:avoid;padding:4px 0 14px}
.sample .title{font-weight:600;overflow-wrap:anywhere}
.sample .label{color:var(--soft);font-size:.8rem}
.pill{
  display:inline-block;
  border-radius:99px;
  padding:1px 11px;
  font-size:.85rem;
  border:1px solid var(--line);
  background:var(--quiet)
}
.pill.yes{background:var(--ok);border-color:var(--ok);color:var(--card)}
td[lang]{overflow-wrap:anywhere}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 14px;font-size:.85rem;color:var(--soft)}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
svg{width:100%;height:auto;display:block}
svg.stacked{height:20px;border-radius:5px}
.bar{fill:var(--bar)}
.rule{stroke:var(--line);stroke-width:1}
.axis{fill:var(--soft);font-size:12px}
.ok{fill:var(--ok);background:var(--ok)}
.fallback{fill:var(--fallback);background:var(--fallback)}
.suppressed{fill:var(--suppressed);background:var(--suppressed)}
.dead{fill:var(--dead);background:var(--dead)}
.wide{overflow-x:auto}
.wide td:first-child,.wide th:first-child{position:sticky;left:0;background:var(--card)}
.under{display:block;color:var(--soft);font-size:.78rem;font-weight:400}
.note{color:var(--soft);font-size:.85rem;margin:8px 0 0}
.verdict{font-size:1.15rem;font-weight:600;margin:0 0 10px}
.pill.no{background:var(--dead);border-color:var(--dead);color:var(--card)}
tr.main td,.wide tr.main td:first-child{background:var(--quiet)}
h3+table,h3+.wide{margin-bottom:14px}
.wide+h3{margin-top:20px}
.grid+.wide{margin-top:16px}
svg.plot{max-width:500px}
.name{fill:var(--ink);font-size:12.5px}
.name.main{font-weight:700}
.dot{fill:var(--soft)}
.whisker{stroke:var(--soft);stroke-width:1.6}
.dot.main,.dot.peer{fill:var(--bar)}
.whisker.main,.whisker.peer{stroke:var(--bar);stroke-width:2.2}
.above{paint-order:stroke;stroke:var(--card);stroke-width:3px}
.zero{stroke:var(--ink);stroke-width:1.2}
.level{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:5 4}
.gain{fill:var(--ok)}
.loss{fill:var(--dead)}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.band{opacity:.16}
.s0{--own:var(--s0)}
.s1{--own:var(--s1)}
.s2{--own:var(--s2)}
.s3{--own:var(--s3)}
.s4{--own:var(--s4)}
.s5{--own:var(--s5)}
.curve{stroke:var(--own)}
.marker,.band{fill:var(--own)}
.key i[class^=s]{background:var(--own)}
@media(max-width:560px) {
  main{padding:16px 10px 40px}
  section{padding:14px 12px}
  .tiles{grid-template-columns:repeat(2,1fr)}
}
pre{overflow:auto;background:var(--quiet);border-radius:8px;padding:12px;margin:10px 0 0}
summary{cursor:pointer}
"""
