"use strict";
// Curves: the value of every run at the step under the pointer, in place of the last values.
for (const svg of document.querySelectorAll(".card svg")) {
  const lines = [...svg.querySelectorAll("[data-values]")].map((node) => ({
    values: JSON.parse(node.dataset.values), name: node.dataset.name, ink: node.getAttribute("class").split(" ").pop(),
  }));
  const rule = svg.querySelector(".rule"), last = svg.parentNode.querySelector(".last"), before = [...last.childNodes];
  const box = svg.viewBox.baseVal, left = Number(svg.dataset.left), right = Number(svg.dataset.right);
  const low = Number(svg.dataset.low), high = Number(svg.dataset.high);
  const say = (text, ink) => { const span = document.createElement("span"); span.textContent = text; span.className = ink; return span; };
  svg.addEventListener("pointermove", (event) => {
    const at = (event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth * box.width;
    const step = low + (Math.min(right, Math.max(left, at)) - left) / (right - left) * (high - low);
    const near = lines.map((line) => line.values.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)));
    const x = left + (near[0][0] - low) / (high - low) * (right - left);
    rule.setAttribute("x1", x); rule.setAttribute("x2", x); rule.style.visibility = "visible";
    last.replaceChildren(say("step " + near[0][0], "dim"), ...near.map((point, i) => say(String(point[1]), lines[i].ink)));
  });
  svg.addEventListener("pointerleave", () => { rule.style.visibility = "hidden"; last.replaceChildren(...before); });
}
// Samples: filter by run, step and text; sort by a column.
const grid = document.getElementById("samples-table");
if (grid) {
  const body = grid.tBodies[0], rows = [...body.rows], get = (id) => document.getElementById(id);
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
}
document.documentElement.dataset.ready = "1";
