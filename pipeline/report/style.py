"""How the pages look: one set of colours for light, dark and print, from a phone's width up."""

from __future__ import annotations

from pipeline.report.contours import CASING_RGB, COARSE_RGB, REFINED_RGB, TRUTH_RGB


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


SHARED_STYLE = (
    f""":root{{color-scheme:light dark;--coarse:{_css(COARSE_RGB)};--refined:{_css(REFINED_RGB)};
--truth:{_css(TRUTH_RGB)};--casing:{_css(CASING_RGB)};"""
    + """
--paper:light-dark(#f4f6f9,#0d1118);--card:light-dark(#fff,#161c27);--ink:light-dark(#141a26,#e8ecf3);
--soft:light-dark(#566074,#9aa6ba);--edge:light-dark(#d9dee7,#2a3343);--well:light-dark(#eceff4,#0f141d);
--focus:light-dark(#0b66c3,#7cc4ff);--before:light-dark(#c99a00,#ffd83d);--after:light-dark(#1681cf,#4db8ff);--bound:light-dark(#7a5bb5,#b79cf0);
--gain:light-dark(#0a7a4c,#4fd09a);--loss:light-dark(#c0342b,#ff8078)}
:root:has([name=theme][value=light]:checked){color-scheme:light}
:root:has([name=theme][value=dark]:checked){color-scheme:dark}
*{box-sizing:border-box}
html{scroll-padding-top:4rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--focus);outline-offset:2px}
header,main,.top>div{max-width:80rem;margin:auto;padding:0 1.5rem}
h1{margin:2rem 0 .75rem;font-size:2rem;line-height:1.2;letter-spacing:-.02em}
h2{margin:0;font-size:1.35rem;line-height:1.3}
.lead{max-width:46rem;margin:0 0 1.25rem;font-size:1.2rem}
.facts{display:flex;flex-wrap:wrap;gap:.75rem 2.5rem;margin:0 0 1.25rem}
.facts dt,.caption,figcaption,caption,legend,small{color:var(--soft);font-size:.875rem}
.facts dd{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:0 0 1.5rem}
i{display:inline-block;width:1.75rem;height:.4rem;margin-right:.6rem;vertical-align:middle;border-radius:.2rem;
box-shadow:0 0 0 1.5px var(--casing)}
i.coarse{background:var(--coarse)}i.refined{background:var(--refined)}
.panel{margin:0 0 1.5rem;padding:1.5rem;background:var(--card);border:1px solid var(--edge);border-radius:.75rem}
.caption{margin:.15rem 0 1rem}
fieldset{margin:0;padding:0;border:0;font-size:.9rem}
label{display:inline-flex;gap:.3rem;align-items:center;cursor:pointer}
input{accent-color:var(--after)}
table{width:100%;border-collapse:collapse;overflow-wrap:normal;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{padding-bottom:.35rem;text-align:left}
th,td{padding:.3rem 0 .3rem 1rem;border-top:1px solid var(--edge);text-align:right;font-weight:400;vertical-align:top}
th{color:var(--soft)}th:first-child,td:first-child{padding-left:0;text-align:left;overflow-wrap:anywhere}
small{display:block}
path{vector-effect:non-scaling-stroke}
figure{margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}
.pair div{position:relative}
.pair i{width:1.1rem;height:.25rem;margin-right:.45rem}
.top{position:sticky;top:0;z-index:5;background:var(--card);border-bottom:1px solid var(--edge)}
.top>div{display:flex;gap:1.5rem;align-items:center;min-height:3rem}
.top nav{display:flex;gap:1.25rem;min-width:0;overflow-x:auto;scrollbar-width:none;white-space:nowrap;font-size:.9rem}
.top a{padding:.75rem 0;color:var(--soft);text-decoration:none}
.top a:hover{color:var(--ink);text-decoration:underline}
.top a:focus-visible{outline-offset:-2px}
.theme{display:flex;flex:none;margin-left:auto;border:1px solid var(--edge);border-radius:.5rem;font-size:.8rem}
.theme legend,.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.theme input{position:absolute;opacity:0}
.theme span{padding:.2rem .65rem;border-radius:.4rem;color:var(--soft)}
.theme :checked+span{background:var(--well);color:var(--ink);font-weight:600}
.theme :focus-visible+span{outline:2px solid var(--focus)}
@media(max-width:56rem){.panel{padding:1rem}header,main,.top>div{padding:0 .75rem}h1{font-size:1.6rem}
.lead{font-size:1.05rem}.facts dd{font-size:1.1rem}}
@media print{:root{color-scheme:light!important}.top{display:none}.panel{break-inside:avoid}body{font-size:12px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)

FRAMES_STYLE = """
.frame{display:flex;gap:2rem;align-items:flex-start}aside{flex:1 0 20rem}
svg{display:block;width:100%;height:auto;border-radius:.35rem;overflow:hidden;fill:none;stroke-linejoin:round}
.frame>svg{--line:1.4px;--cased:2.6px;flex:100 1 0;font-size:32rem}
.casing{stroke:var(--casing);stroke-width:var(--cased);stroke-opacity:.75}
.line{stroke-width:var(--line)}.line.coarse{stroke:var(--coarse)}.line.refined{stroke:var(--refined)}
section:has([value=coarse]:checked) .frame use.refined:not(.line),
section:has([value=refined]:checked) .frame use.coarse:not(.line),
section:has([value=none]:checked) .frame :is(use.coarse,use.refined):not(.line){display:none}
.shown{display:flex;flex-wrap:wrap;gap:.25rem .9rem;margin:0 0 1rem}
.crops{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));gap:1.5rem;margin-top:1.5rem}
.pair svg{--line:2px;--cased:4px;image-rendering:pixelated}
.pair span{position:absolute;left:.5rem;bottom:.5rem;padding:.1rem .6rem;border-radius:1rem;color:#fff;font-size:.8rem;
background:rgba(10,14,24,.78)}
figcaption{margin-top:.4rem}figcaption b{color:var(--ink)}
@media(max-width:56rem){.frame{flex-direction:column}.frame>svg,aside{flex:none;width:100%}}
@media print{.shown{display:none}.frame{flex-direction:row}.frame>svg{flex:100 1 0}aside{flex:1 0 20rem}
.crops{grid-template-columns:1fr 1fr}}
"""

PAGE_STYLE = """
h2 small{display:inline;margin-left:.5rem;font-weight:400}
h3{margin:0;font-size:1rem}
i.bound{background:var(--bound)}
i.truth{background:repeating-linear-gradient(90deg,var(--truth) 0 .4rem,var(--casing) .4rem .55rem)}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1rem;margin:0 0 1.5rem;padding:0;
list-style:none}
.headline>li{padding:1rem 1.25rem;background:var(--card);border:1px solid var(--edge);border-radius:.75rem}
.headline b{display:flex;flex-wrap:wrap;column-gap:.3rem;align-items:baseline}
.headline b{font-size:2rem;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.headline p{margin:0;font-variant-numeric:tabular-nums}
.gain{color:var(--gain)}.loss{color:var(--loss)}.same{color:var(--soft)}.gain,.loss{font-weight:600}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,32rem),1fr));gap:1.5rem;margin-bottom:1.5rem}
.columns>.panel{margin:0;min-width:0}
.columns>.panel:last-child:nth-child(odd){grid-column:1/-1}
.scroll{overflow-x:auto}.scroll[tabindex]{max-height:31rem;overflow:auto}
.scroll thead :is(th,td){position:sticky;top:0;z-index:1;background:var(--card);border:0;
box-shadow:inset 0 -1px var(--edge)}
.text{text-align:left}td.text{min-width:6rem;overflow-wrap:anywhere}
th button{padding:0;border:0;background:none;color:inherit;font:inherit;cursor:pointer}
th button:hover{color:var(--ink)}
th[aria-sort] button::after{content:" ↓"}th[aria-sort=ascending] button::after{content:" ↑"}
.bars th[scope=row]{color:var(--ink)}
.bars th[scope=row]{min-width:9rem}
.bars .plot{width:36%;min-width:4rem}
.bars tbody>tr>*{vertical-align:middle}
.bars svg{display:block;width:100%;height:.95rem}
.bars td:last-child{white-space:nowrap}
rect.coarse{fill:var(--before)}rect.refined{fill:var(--after)}rect.bound{fill:var(--bound)}
.chart{position:relative;height:11rem;margin-top:2rem;border-bottom:1px solid var(--soft)}
.chart svg{position:absolute;inset:0;width:100%;height:100%}
.chart rect{fill:var(--after)}.chart rect.gain{fill:var(--gain)}.chart rect.loss{fill:var(--loss)}
.chart rect.hit{fill:transparent}.chart rect.hit:hover{fill:var(--soft);fill-opacity:.15}
.chart span{position:absolute;top:-1.3rem;right:0;color:var(--soft);font-size:.8rem}
.chart::before{content:"";position:absolute;inset:0 0 auto;border-top:1px dashed var(--edge)}
.axis{position:relative;height:1.6rem;margin-bottom:.5rem;font-size:.8rem;color:var(--soft)}
.axis span{position:absolute;top:.2rem;transform:translateX(-50%);white-space:nowrap;font-variant-numeric:tabular-nums}
.axis .first{transform:none}.axis .last{transform:translateX(-100%)}
details{font-size:.9rem}summary{color:var(--soft);cursor:pointer}
.tools{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;margin-bottom:.75rem}
.tools label,.tools button{min-height:2.25rem;padding:0 .75rem;border:1px solid var(--edge);border-radius:.5rem;
background:var(--card);color:var(--ink);font:inherit;font-size:.9rem;user-select:none}
.tools label{gap:.45rem}.tools label i{width:1.1rem;margin:0}
.tools label:has(:checked){background:var(--well)}
.tools label:hover,.tools button:hover{border-color:var(--soft)}
.tools :has(:focus-visible){outline:2px solid var(--focus);outline-offset:1px}
.tools button{min-width:2.75rem;font-size:1.1rem;cursor:pointer}
.pager{display:flex;gap:.5rem;align-items:center;margin-left:auto}
.pager output{min-width:4.5rem;text-align:center;font-variant-numeric:tabular-nums}
:root:not(.js) .js-only{display:none!important}
.cards{position:relative;display:flex;gap:1rem;overflow-x:auto;scroll-snap-type:x mandatory;scrollbar-width:none;
overscroll-behavior-x:contain;border-radius:.35rem}
.cards:focus-visible{outline-offset:4px}
:root:not(.js) .cards{scrollbar-width:thin}
.card{display:grid;grid-template-columns:minmax(0,1fr) 33rem;gap:.75rem 1.5rem;flex:0 0 100%;align-content:start;
scroll-snap-align:start;scroll-snap-stop:always;scroll-margin-top:9rem}
.card header{grid-column:1/-1;max-width:none;margin:0;padding:0}
.card header p{margin:0;color:var(--soft);font-size:.9rem}
.well{display:grid;place-items:center;height:35.5rem;background:var(--well);border-radius:.35rem;container-type:size}
.stage{--ratio:1;position:relative;width:min(100cqw,100cqh*var(--ratio));aspect-ratio:var(--ratio)}
.stage svg{position:absolute;inset:0;width:100%;height:100%}
.small image{image-rendering:pixelated}
.card svg{display:block;overflow:hidden;border-radius:.35rem;stroke-linejoin:round}
.card :is(svg,g){fill:none}
.casing{stroke:var(--casing);stroke-width:3.4px;stroke-opacity:.75}
.line{stroke-width:1.7px}.truth .line{stroke-dasharray:6 4}
.coarse>.line{stroke:var(--coarse)}.refined>.line{stroke:var(--refined)}.truth>.line{stroke:var(--truth)}
.close-ups{display:grid;gap:1rem;align-content:start}
.close-ups p{margin:0;color:var(--soft);font-size:.875rem}
.pair svg{width:100%;height:auto;image-rendering:pixelated}
.pair .casing{stroke-width:4.6px}.pair .line{stroke-width:2.4px}
.pair span{position:absolute;left:.5rem;bottom:.5rem;padding:0 .6rem;border-radius:1rem;color:#fff;font-size:.8rem;
background:rgba(10,14,24,.78)}
figcaption{margin-top:.25rem}
.gallery:has(.see-coarse:not(:checked)) .contour.coarse,.gallery:has(.see-refined:not(:checked)) .contour.refined,
.gallery:has(.see-truth:not(:checked)) .contour.truth{display:none}
.cut,.divide{display:none}
.gallery:has(.see-slider:checked) .stage{
.contour.coarse{display:block;clip-path:inset(0 calc(100% - var(--cut,50%)) 0 0)}
.contour.refined{display:block;clip-path:inset(0 0 0 var(--cut,50%))}
.coarse .line{fill:var(--coarse);fill-opacity:.28}.refined .line{fill:var(--refined);fill-opacity:.28}
.divide{display:block;position:absolute;top:0;bottom:0;left:var(--cut,50%);width:2px;margin-left:-1px;background:#fff;
box-shadow:0 0 0 1px var(--casing);pointer-events:none}
.cut{display:block}
}
.divide::after{content:"↔";position:absolute;top:50%;left:50%;display:grid;place-items:center;width:2.5rem;
height:2.5rem;margin:-1.25rem;border-radius:50%;background:#fff;color:#0a0e18;font-size:1.2rem;
box-shadow:0 0 0 2px var(--casing)}
.stage:has(.cut:focus-visible) .divide::after{outline:3px solid var(--after);outline-offset:2px}
.cut{position:absolute;left:-1.25rem;top:0;width:calc(100% + 2.5rem);height:100%;margin:0;appearance:none;opacity:0;
pointer-events:none;touch-action:pan-y}
.cut::-webkit-slider-thumb{appearance:none;width:2.5rem;height:2.5rem;cursor:ew-resize;pointer-events:auto}
.cut::-moz-range-thumb{width:2.5rem;height:2.5rem;cursor:ew-resize;pointer-events:auto}
.strip{display:flex;gap:.4rem;margin-top:1rem;padding:3px;overflow-x:auto;scrollbar-width:thin;position:relative}
.strip a{position:relative;flex:0 0 4.25rem;height:4.25rem;border-radius:.35rem;overflow:hidden}
.strip a:hover{box-shadow:0 0 0 2px var(--soft)}
.strip a[aria-current]{box-shadow:0 0 0 3px var(--after)}
.strip svg{display:block;width:100%;height:100%}
.none{margin:0;color:var(--soft)}
@media(max-width:70rem){.card{grid-template-columns:minmax(0,1fr)}.well{height:30rem}
.close-ups{grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}}
@media(max-width:56rem){.headline{grid-template-columns:1fr 1fr;gap:.6rem}.headline>li{padding:.75rem}
.headline b{font-size:1.6rem}.bars table{font-size:.82rem}.axis{font-size:.64rem}.bars .plot{width:26%}
.bars th[scope=row]{min-width:5rem}th,td{padding-left:.55rem}
.tools label,.tools button{min-height:2.75rem;padding:0 .6rem}.tools input{position:absolute;opacity:0}
.tools label:not(:has(:checked)){color:var(--soft)}.tools label:not(:has(:checked)) i{opacity:.3}
.well{height:min(30rem,85vw)}}
@media print{.tools,.strip,.cut,.divide{display:none!important}.scroll[tabindex]{max-height:none;overflow:visible}
.cards{display:block}.card{display:none}.card.current,:root:not(.js) .card:first-child{display:grid}
.card{grid-template-columns:1fr 1fr}.well{height:20rem}}
"""
