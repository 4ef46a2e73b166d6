// What stands around the searched words, below each result. Sphinx can show that, but it fetches the pages for it, which browsers
// refuse for plain files; here the text comes with the site, in sections.js (written by conf.py).
(() => {
  const BEFORE = 80, LENGTH = 240;
  const words = () => Scorer.wanted(); // scorer.js, which comes later, says what is asked for and where a text holds it

  function textOf(link) {
    const root = new URL(document.documentElement.dataset.content_root || "./", location.href).href;
    const [page, anchor] = link.href.slice(root.length).split("#");
    const sections = SECTIONS[decodeURIComponent(page.split("?")[0].replace(/\.html$/, ""))] || {};
    if (anchor && sections[anchor]) return sections[anchor];
    const parts = Object.values(sections);
    return parts.reduce((best, text) => (held(text) > held(best) ? text : best), parts[0] || "");
  }

  const held = (text) => words().filter((word) => Scorer.holds(text, word)).length;

  // The stretch of text that holds most of the words, cut where words begin.
  function excerpt(text) {
    let start = 0, most = 0;
    for (const word of words()) {
      for (const { index: at } of text.matchAll(new RegExp(Scorer.pattern(word), "giu"))) {
        const count = held(text.slice(at, at + LENGTH - BEFORE));
        if (count > most) [start, most] = [Math.max(0, at - BEFORE), count];
      }
    }
    const from = start ? text.indexOf(" ", start) + 1 : 0;
    return (from ? "… " : "") + text.slice(from, from + LENGTH) + (from + LENGTH < text.length ? " …" : "");
  }

  function marked(text) {
    const paragraph = document.createElement("p");
    paragraph.className = "context";
    const patterns = words().map((word) => Scorer.pattern(word));
    const parts = patterns.length ? text.split(new RegExp(`(${patterns.join("|")})`, "iu")) : [text];
    parts.forEach((part, index) => {
      const node = document.createElement(index % 2 ? "mark" : "span");
      node.textContent = part;
      paragraph.append(node);
    });
    return paragraph;
  }

  function show(item) {
    const link = item.querySelector("a");
    if (!link || item.querySelector(".context")) return;
    const text = textOf(link);
    if (text) item.append(marked(excerpt(text)));
  }

  document.addEventListener("DOMContentLoaded", () => {
    const results = document.getElementById("search-results");
    const look = () => results.querySelectorAll("ul.search > li").forEach(show);
    if (results) new MutationObserver(look).observe(results, { childList: true, subtree: true });
  });
})();
