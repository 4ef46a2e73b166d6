"use strict";
// A page of a run that is going reloads itself, and is then where it was: scrolled, chosen, unfolded.
{
  const seconds = Number(document.documentElement.dataset.live || 0), place = "marl report " + location.pathname;
  const fields = () => [...document.querySelectorAll("select[id], input[id]")];
  const folds = () => [...document.querySelectorAll("details")];
  const pressed = () => [...document.querySelectorAll("[aria-pressed]")];
  const store = { read: () => { try { return JSON.parse(sessionStorage.getItem(place)); } catch { return null; } },
    write: (state) => { try { sessionStorage.setItem(place, JSON.stringify(state)); } catch { /* a browser without storage */ } },
    clear: () => { try { sessionStorage.removeItem(place); } catch { /* as above */ } } };

  const state = store.read();
  store.clear();
  if (state) {
    for (const field of fields()) if (field.id in state.fields) {
      const value = state.fields[field.id];
      if (field.type === "checkbox") field.checked = value;
      else if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value)) field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    for (const button of pressed()) if (button.dataset.key in state.pressed && button.getAttribute("aria-pressed") !== state.pressed[button.dataset.key]) button.click();
    folds().forEach((fold, index) => { fold.open = Boolean(state.open[index]); });
    for (const metric of state.large) document.querySelector(`.card[data-metric="${CSS.escape(metric)}"] figcaption b`)?.click();
    window.scrollTo(0, state.scroll);
  }
  if (seconds) {
    const keep = () => store.write({
      fields: Object.fromEntries(fields().map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value])),
      pressed: Object.fromEntries(pressed().map((button) => [button.dataset.key, button.getAttribute("aria-pressed")])),
      open: folds().map((fold) => fold.open), scroll: window.scrollY,
      large: [...document.querySelectorAll(".card.large")].map((card) => card.dataset.metric),
    });
    const reads = () => document.hidden || String(document.getSelection() || "") || document.activeElement?.type === "search"
      || document.querySelector(".card svg:hover");
    setInterval(() => { if (!reads()) { keep(); location.reload(); } }, 1000 * seconds);
  }
}
document.documentElement.dataset.ready = "1";
