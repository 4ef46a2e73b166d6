"use strict";
// Samples: filter by run, step and text; sort by a column; the number of a token by a tap. Held-out texts: which are shown.
{
  const get = (id) => document.getElementById(id), grid = get("samples-table");
  if (grid) {
    const body = grid.tBodies[0], rows = [...body.rows];
    const run = get("samples-run"), step = get("samples-step"), find = get("samples-find"), count = get("samples-count");
    const filter = () => {
      const words = find.value.toLowerCase();
      let shown = 0;
      for (const row of rows) {
        const fits = (!run || !run.value || row.dataset.run === run.value) && (!step.value || row.dataset.step === step.value)
          && (!words || row.cells[1].textContent.toLowerCase().includes(words));
        row.hidden = !fits; shown += fits;
      }
      count.textContent = shown + " shown";
    };
    for (const control of [run, step, find]) if (control) control.addEventListener("input", filter);
    for (const button of grid.querySelectorAll("[data-sort]")) button.addEventListener("click", () => {
      const down = button.dataset.down === "1" ? 0 : 1, key = button.dataset.sort;
      for (const other of grid.querySelectorAll("[data-sort]")) delete other.dataset.down;
      button.dataset.down = down;
      const value = (row) => key === "text" ? row.cells[1].textContent : Number(row.dataset[key] ?? NaN);
      const order = (a, b) => { const x = value(a), y = value(b); return x < y ? -1 : x > y ? 1 : 0; };
      rows.sort((a, b) => (down ? order(b, a) : order(a, b)));
      body.append(...rows);
    });
    filter();
    const tip = document.createElement("output");
    tip.className = "tip"; tip.hidden = true;
    document.body.append(tip);
    document.addEventListener("click", (event) => {
      const token = event.target instanceof Element ? event.target.closest(".t") : null;
      tip.hidden = !token;
      if (!token) return;
      const box = token.getBoundingClientRect();
      tip.textContent = token.title;
      const left = Math.max(8, Math.min(box.left + window.scrollX, document.documentElement.clientWidth - tip.offsetWidth - 8));
      tip.style.left = left + "px";
      tip.style.top = box.bottom + window.scrollY + 4 + "px";
    });
  }
  const versions = get("versions");
  if (versions) versions.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("[data-key]") : null;
    if (!button) return;
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const version of document.querySelectorAll(".version")) if (version.dataset.key === button.dataset.key) version.hidden = !shown;
  });
}
