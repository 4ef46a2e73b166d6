// The order of what the search finds (conf.py's `html_search_scorer`): a title or a name that was asked for, then the pages that hold
// the words side by side, last those that are there to look things up, which hold nearly every word.
window.Scorer = (() => {
  const LAST = /^(CHANGELOG|docs\/(api|reliability|architecture|upstream)|benchmarks\/.*)$/;
  const wanted = () => (new URLSearchParams(location.search).get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);

  // Where a text holds a word: whole, or as the beginning of a longer one if it has more than three letters ("of" is not in "off").
  function pattern(word) {
    const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), inside = "[\\p{L}\\p{N}_]";
    const before = /^[\p{L}\p{N}_]/u.test(word) ? `(?<!${inside})` : "";
    return before + escaped + (word.length > 3 || !/[\p{L}\p{N}_]$/u.test(word) ? "" : `(?!${inside})`);
  }

  const holds = (text, word) => new RegExp(pattern(word), "iu").test(text);

  // The share of the words that one section of the page holds, 0 to 1; its heading counts as much as its text.
  function together(page) {
    const sections = typeof SECTIONS === "undefined" ? {} : SECTIONS[page] || {};
    const counts = Object.entries(sections).map(([anchor, text]) => {
      const heading = anchor.replaceAll("-", " ");
      return wanted().reduce((sum, word) => sum + holds(heading, word) + holds(text, word), 0);
    });
    return Math.max(0, ...counts) / (2 * Math.max(1, wanted().length));
  }

  // The share of a page's title that was asked for, 0 to 1.
  function titled(title) {
    const parts = title.split(/\s+/);
    return parts.filter((part) => wanted().some((word) => holds(part, word))).length / parts.length;
  }

  function score([page, title, anchor, description, found, file, kind]) {
    if (kind === "object") return /\.[A-Z]\w*\./.test(title) ? found - 30 : found; // a class's fields have everyday names
    if (kind === "title") return found + 100 + (LAST.test(page) ? -100 : 0);
    return found + 10 * together(page) + 10 * titled(title) + (LAST.test(page) ? -100 : 0);
  }

  // Sphinx's own numbers, but a name of the API that was asked for by its full name comes before every text.
  return {
    score, wanted, pattern, holds,
    objNameMatch: 40, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
    title: 15, partialTitle: 7, term: 5, partialTerm: 2,
  };
})();
