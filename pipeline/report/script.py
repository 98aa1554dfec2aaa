"""What the page does beyond showing: paging, the slider, sorting. Without it all numbers and cards are still there."""

PAGE_SCRIPT = r"""
const root = document.documentElement;
root.classList.add("js");

const galleries = [...document.querySelectorAll(".gallery")].filter(el => el.querySelector(".card")).map(el => {
  const scroller = el.querySelector(".cards"), cards = [...el.querySelectorAll(".card")];
  const strip = el.querySelector(".strip"), links = [...strip.children], place = el.querySelector("output");
  let at = -1;
  const mark = i => {
    if (i === at) return;
    at = i;
    cards.forEach((card, k) => { card.inert = k !== i; card.classList.toggle("current", k === i); });
    links.forEach(link => link.removeAttribute("aria-current"));
    links[i].setAttribute("aria-current", "true");
    place.value = `${i + 1} / ${cards.length}`;
    strip.scrollLeft = links[i].offsetLeft - (strip.clientWidth - links[i].offsetWidth) / 2;
  };
  const show = i => {
    mark((i + cards.length) % cards.length);
    scroller.scrollTo({ left: cards[at].offsetLeft, behavior: "instant" });
  };
  const go = i => {
    show(i);
    history.replaceState(null, "", "#" + cards[at].id);
  };
  scroller.addEventListener("scroll", () => {
    const step = cards.length > 1 ? cards[1].offsetLeft - cards[0].offsetLeft : 1;
    mark(Math.min(Math.max(Math.round(scroller.scrollLeft / step), 0), cards.length - 1));
  });
  el.querySelector(".previous").addEventListener("click", () => go(at - 1));
  el.querySelector(".next").addEventListener("click", () => go(at + 1));
  links.forEach((link, k) => link.addEventListener("click", event => { event.preventDefault(); go(k); }));
  el.addEventListener("input", event => {
    if (!event.target.matches(".cut")) return;
    el.style.setProperty("--cut", event.target.value + "%");
    el.querySelectorAll(".cut").forEach(range => { range.value = event.target.value; });
  });
  show(0);
  return { el, cards, show, by: step => go(at + step) };
});

const showHash = () => galleries.forEach(({ cards, show }) => {
  const i = cards.findIndex(card => "#" + card.id === location.hash);
  if (i >= 0) show(i);
});
addEventListener("hashchange", showHash);
showHash();

const keys = { c: ".see-coarse", r: ".see-refined", t: ".see-truth", s: ".see-slider" };
document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const middle = innerHeight / 2, target = event.target;
  const gallery = galleries.find(({ el }) => {
    const box = el.getBoundingClientRect();
    return el.contains(target) || (target === document.body && box.top < middle && box.bottom > middle);
  });
  if (!gallery) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && target.type !== "range") {
    event.preventDefault();
    gallery.by(step);
  }
  gallery.el.querySelector(keys[event.key] ?? null)?.click();
});

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, k) => row.cells[k].dataset.value ?? row.cells[k].textContent;
  heads.forEach((head, k) => {
    if (head.matches(".plot")) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => {
        const [x, y] = [value(a, k), value(b, k)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const less = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -less : less;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
"""
