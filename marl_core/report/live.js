"use strict";
// A page of a run that is going reloads itself, and is then where it was: scrolled, chosen, unfolded.
{
  // A page inside a notebook's cell is a copy: there is nothing to load it from again.
  const copied = location.protocol === "about:", place = "marl report " + location.pathname;
  const seconds = copied ? 0 : Number(document.documentElement.dataset.live || 0);
  if (copied && document.getElementById("live")) document.getElementById("live").hidden = true;
  const fields = () => [...document.querySelectorAll("select[id], input[id]")];
  const folds = () => {  // each with a name that the next page has too: what is on a page grows while the run goes
    const seen = {};
    return [...document.querySelectorAll("details")].map((fold) => {
      const name = fold.closest("[data-metric]")?.dataset.metric ?? `${fold.closest("section")?.id} ${fold.querySelector("summary").textContent}`;
      seen[name] = (seen[name] || 0) + 1;
      return [`${name} ${seen[name]}`, fold];
    });
  };
  const zoom = document.getElementById("curve-controls"), sorted = () => document.querySelector("[data-sort][data-down]");
  const pressed = () => [...document.querySelectorAll("[aria-pressed]")];
  const store = { read: () => { try { return JSON.parse(sessionStorage.getItem(place)); } catch { return null; } },
    write: (state) => { try { sessionStorage.setItem(place, JSON.stringify(state)); } catch { /* a browser without storage */ } },
    clear: () => { try { sessionStorage.removeItem(place); } catch { /* as above */ } } };

  const state = copied ? null : store.read();
  if (!copied) store.clear();
  if (state) {
    for (const field of fields()) if (field.id in state.fields) {
      const value = state.fields[field.id];
      if (field.type === "checkbox") field.checked = value;
      else if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value)) field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    for (const button of pressed()) if (button.dataset.key in state.pressed && button.getAttribute("aria-pressed") !== state.pressed[button.dataset.key]) button.click();
    for (const [name, fold] of folds()) fold.open = state.open.includes(name);
    if (zoom && state.zoom) {
      [zoom.dataset.from, zoom.dataset.to] = state.zoom;
      zoom.dispatchEvent(new Event("zoom"));
    }
    const column = state.sorted && document.querySelector(`[data-sort="${CSS.escape(state.sorted[0])}"]`);
    for (let clicks = state.sorted?.[1] === "1" ? 1 : 2; column && clicks; clicks--) column.click();
    for (const metric of state.large) document.querySelector(`.card[data-metric="${CSS.escape(metric)}"] figcaption b`)?.click();
    window.scrollTo(0, state.scroll);
  }
  if (seconds) {
    const keep = () => store.write({
      fields: Object.fromEntries(fields().map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value])),
      pressed: Object.fromEntries(pressed().map((button) => [button.dataset.key, button.getAttribute("aria-pressed")])),
      open: folds().filter(([, fold]) => fold.open).map(([name]) => name), scroll: window.scrollY,
      zoom: zoom?.dataset.from ? [zoom.dataset.from, zoom.dataset.to] : null,
      sorted: sorted() ? [sorted().dataset.sort, sorted().dataset.down] : null,
      large: [...document.querySelectorAll(".card.large")].map((card) => card.dataset.metric),
    });
    const reads = () => document.hidden || String(document.getSelection() || "") || document.activeElement?.type === "search"
      || document.querySelector(".card svg:hover");
    setInterval(() => { if (!reads()) { keep(); location.reload(); } }, 1000 * seconds);
  }
}
document.documentElement.dataset.ready = "1";
