"use strict";
// The charts: drawn anew from the page's values when an axis, smoothing or a part is chosen; values under the pointer; CSV.
{
  const runs = JSON.parse(document.getElementById("values").textContent).runs;
  const get = (id) => document.getElementById(id), bar = get("curve-controls");
  const view = { x: "steps", log: false, smooth: 0, from: null, to: null };
  const cards = [...document.querySelectorAll(".card[data-metric]")].map((figure) => ({
    figure, metric: figure.dataset.metric, svg: figure.querySelector("svg"), last: figure.querySelector(".last"),
    before: [...figure.querySelector(".last").childNodes],
  }));
  const LEFT = 46, TOP = 8, MAX_POINTS = 600, INKS = 6;

  const element = (name, attributes, text) => {
    const node = document.createElementNS(cards[0].svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  // Round numbers that cover a range in about `count` steps of 1, 2 or 5 times a power of ten.
  const ticks = (low, high, count) => {
    if (!(high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) { const room = (Math.abs(low) || 1) / 2; low -= room; high += room; }
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
    const found = [];
    for (let i = Math.floor(low / step); i <= Math.ceil(high / step - 1e-9); i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  };
  const logTicks = (low, high) => {
    const first = Math.floor(low), last = Math.ceil(high), stride = Math.max(1, Math.ceil((last - first) / 4)), found = [];
    for (let power = first; power <= last; power += stride) found.push(power);
    return found.length > 1 ? found : [first, first + 1];
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const spoken = (seconds) => {
    const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
    return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${Number(seconds.toFixed(1))} s`;
  };
  const unit = (span) => (span > 2 * 86400 ? [86400, " d"] : span > 2 * 3600 ? [3600, " h"] : span > 120 ? [60, " min"] : [1, " s"]);
  const clock = (at, span) => {
    const date = new Date(at * 1000);
    return span > 2 * 86400 ? date.toLocaleDateString([], { month: "short", day: "numeric" })
      : date.toLocaleTimeString([], span > 600 ? { hour: "2-digit", minute: "2-digit" } : {});
  };
  const where = (x, span) => (view.x === "steps" ? "step " + x : view.x === "elapsed" ? spoken(x) : new Date(x * 1000).toLocaleString());

  // Exponential moving average that starts without a bias to 0, as trackers have it.
  const smoothed = (points) => {
    let sum = 0, weight = 0;
    return points.map(([x, y]) => { sum = view.smooth * sum + (1 - view.smooth) * y; weight = view.smooth * weight + 1 - view.smooth; return [x, sum / weight]; });
  };
  const curves = (metric) => runs.map((run, index) => {
    const xs = run[view.x], ys = run.values[metric] || [], all = [];
    ys.forEach((y, i) => { if (y !== null && xs[i] !== null) all.push([xs[i], y]); });
    const even = all.length > 1 ? smoothed(all) : all;
    const inside = (points) => points.filter(([x]) => view.from === null || (x >= view.from && x <= view.to));
    return { name: run.name, ink: "ink-" + (index % INKS), raw: inside(all), line: inside(even), run };
  });
  // A log axis has no place for 0 and below: a line is broken at such steps, and the card says how many there are.
  const drawable = (point) => !view.log || point[1] > 0;
  const pieces = (points) => {
    const found = [];
    let open = false;
    for (const point of points) {
      if (drawable(point) && !open) found.push([]);
      open = drawable(point);
      if (open) found[found.length - 1].push(point);
    }
    return found;
  };
  const thin = (points, stride) => (stride < 2 ? points : points.filter((_, i) => i % stride === 0 || i === points.length - 1));
  const sayMissing = (card, count) => {
    if (!card.missing) {
      card.missing = document.createElement("p");
      card.missing.className = "missing about dim";
      card.svg.after(card.missing);
    }
    card.missing.hidden = !count;
    card.missing.textContent = `${count} step${count === 1 ? "" : "s"} with 0 or less: not shown on a log axis`;
  };

  const draw = (card) => {
    const { svg } = card, width = Math.max(200, svg.clientWidth), height = card.figure.classList.contains("large") ? 380 : 170;
    const right = width - 8, bottom = height - 22, found = curves(card.metric).filter((curve) => curve.raw.some(drawable));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    card.scale = null;
    sayMissing(card, found.flatMap((curve) => curve.raw).filter((point) => !drawable(point)).length);
    if (!found.length) {
      svg.append(element("text", { x: width / 2, y: height / 2, class: "nothing" }, view.log ? "no value above 0 for a log axis" : "no value here"));
      return;
    }
    const scaled = (y) => (view.log ? Math.log10(y) : y);
    const shown = found.flatMap((curve) => [...(view.smooth ? curve.line : []), ...curve.raw]);
    let lowX = Infinity, highX = -Infinity, low = Infinity, high = -Infinity;
    for (const [x, y] of shown) {
      lowX = Math.min(lowX, x); highX = Math.max(highX, x);
      if (drawable([x, y])) { low = Math.min(low, scaled(y)); high = Math.max(high, scaled(y)); }
    }
    if (view.from !== null) { lowX = view.from; highX = view.to; }
    if (highX <= lowX) highX = lowX + 1;
    const yTicks = view.log ? logTicks(low, high) : ticks(low, high, 4);
    low = Math.min(low, yTicks[0]); high = Math.max(high, yTicks[yTicks.length - 1]);
    const across = (x) => LEFT + ((x - lowX) / (highX - lowX)) * (right - LEFT);
    const up = (y) => bottom - ((scaled(y) - low) / (high - low)) * (bottom - TOP);
    const grid = element("g", { class: "grid" }), span = highX - lowX, [size, name] = unit(span);
    for (const tick of yTicks) {
      const at = bottom - ((tick - low) / (high - low)) * (bottom - TOP);
      grid.append(element("line", { x1: LEFT, x2: right, y1: at, y2: at }), element("text", { x: LEFT - 6, y: at + 3, class: "y" }, short(view.log ? 10 ** tick : tick)));
    }
    const count = Math.max(2, Math.min(10, Math.floor(width / 75)));
    for (const tick of view.x === "elapsed" ? ticks(lowX / size, highX / size, count).map((x) => x * size) : ticks(lowX, highX, count)) {
      if (tick < lowX - 1e-9 || tick > highX + 1e-9 || (view.x === "steps" && !Number.isInteger(tick))) continue;
      const text = view.x === "steps" ? tick.toLocaleString("en") : view.x === "elapsed" ? short(tick / size) + name : clock(tick, span);
      grid.append(element("text", { x: across(tick), y: height - 6, class: "x" }, text));
    }
    svg.append(grid);
    for (const curve of found) for (const step of curve.run.resumed) {
      const index = curve.run.steps.findIndex((other) => other > step), x = view.x === "steps" ? step : (curve.run[view.x][index] ?? null);
      if (x === null || x < lowX || x > highX) continue;
      const mark = element("line", { x1: across(x), x2: across(x), y1: TOP, y2: bottom, class: "resumed " + curve.ink });
      mark.append(element("title", {}, `resumed after step ${step}`));
      svg.append(mark);
    }
    const line = (all, kind, curve) => {
      const stride = Math.ceil(all.length / MAX_POINTS);
      for (const points of pieces(all)) piece(thin(points, stride), kind, curve);
    };
    const piece = (points, kind, curve) => {
      if (points.length === 1) svg.append(element("circle", { cx: across(points[0][0]), cy: up(points[0][1]), r: 2.5, class: `dot ${kind} ${curve.ink}` }));
      else svg.append(element("polyline", { points: points.map(([x, y]) => `${across(x).toFixed(1)},${up(y).toFixed(1)}`).join(" "), class: `line ${kind} ${curve.ink}`, "data-name": curve.name }));
    };
    for (const curve of found) {
      if (view.smooth && curve.raw.length > 1) line(curve.raw, "faint", curve);
      line(view.smooth ? curve.line : curve.raw, "", curve);
    }
    const rule = element("line", { class: "rule", y1: TOP, y2: bottom }), part = element("rect", { class: "part-chosen", y: TOP, height: bottom - TOP, x: 0, width: 0 });
    svg.append(part, rule);
    card.scale = { lowX, highX, right, width, across, rule, part, found };
  };
  const drawAll = () => cards.forEach(draw);

  const pointed = (card, event) => {
    const { lowX, highX, right, width } = card.scale, box = card.svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    return lowX + ((Math.min(right, Math.max(LEFT, at)) - LEFT) / (right - LEFT)) * (highX - lowX);
  };
  const say = (text, ink) => { const span = document.createElement("span"); span.textContent = text; span.className = ink; return span; };
  for (const card of cards) {
    const { svg, last, before } = card;
    let start = null;
    svg.addEventListener("pointermove", (event) => {
      if (!card.scale) return;
      const { across, rule, part, found } = card.scale, x = pointed(card, event);
      const near = found.map((curve) => (view.smooth ? curve.line : curve.raw).reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)));
      rule.setAttribute("x1", across(near[0][0])); rule.setAttribute("x2", across(near[0][0])); rule.style.visibility = "visible";
      last.replaceChildren(say(where(near[0][0]), "dim"), ...near.map((point, i) => say(String(Number(point[1].toPrecision(5))), found[i].ink)));
      if (start !== null) {
        part.setAttribute("x", across(Math.min(start, x))); part.setAttribute("width", Math.abs(across(x) - across(start)));
      }
    });
    svg.addEventListener("pointerdown", (event) => { if (card.scale && event.button === 0) { start = pointed(card, event); svg.setPointerCapture(event.pointerId); } });
    svg.addEventListener("pointerup", (event) => {
      if (start === null || !card.scale) return;
      const end = pointed(card, event), { lowX, highX } = card.scale;
      if (Math.abs(end - start) > (highX - lowX) * 0.03) { view.from = Math.min(start, end); view.to = Math.max(start, end); zoomed(); }
      start = null;
    });
    svg.addEventListener("pointercancel", () => { start = null; });
    svg.addEventListener("pointerleave", () => { if (card.scale) card.scale.rule.style.visibility = "hidden"; last.replaceChildren(...before); });
    svg.addEventListener("dblclick", () => { view.from = view.to = null; zoomed(); });
    const name = card.figure.querySelector("figcaption b");
    name.setAttribute("role", "button"); name.tabIndex = 0;
    const enlarge = () => { card.figure.classList.toggle("large"); draw(card); };
    name.addEventListener("click", enlarge);
    name.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(); } });
  }
  // The part that is shown stands at the bar too, where live.js reads it, and writes it with an event.
  const zoomed = () => {
    get("curve-whole").hidden = view.from === null;
    for (const end of ["from", "to"]) if (view[end] === null) delete bar.dataset[end]; else bar.dataset[end] = view[end];
    drawAll();
  };

  const date = (at) => {
    const found = new Date(at * 1000);
    return at === null || Number.isNaN(found.getTime()) ? "" : found.toISOString().slice(0, 19).replace("T", " ") + " UTC";
  };
  // Values of one run as a file with the columns of `marl report --csv`: what the page holds, which of a very long run is every n-th step.
  const csv = (run) => {
    const names = Object.keys(run.values);
    const rows = run.steps.map((step, i) => [step, run.time[i], date(run.time[i]), run.elapsed[i], ...names.map((name) => run.values[name][i])]);
    const cell = (value) => (value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    return [["step", "time", "date", "elapsed", ...names], ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  };
  if (bar) {
    bar.hidden = get("curve-help").hidden = false;
    get("curve-resumed").hidden = !runs.some((run) => run.resumed.length);
    const option = (name) => get("curve-x").querySelector(`[value=${name}]`);
    for (const name of ["elapsed", "time"]) if (!runs.some((run) => run[name].some((at) => at !== null))) option(name).remove();
    const chosen = () => {
      if (view.x !== get("curve-x").value) view.from = view.to = null;
      view.x = get("curve-x").value; view.log = get("curve-log").checked; view.smooth = Number(get("curve-smooth").value);
      get("curve-smooth-value").textContent = get("curve-smooth").value;
      zoomed();
    };
    for (const id of ["curve-x", "curve-log", "curve-smooth"]) get(id).addEventListener("input", chosen);
    get("curve-whole").addEventListener("click", () => { view.from = view.to = null; zoomed(); });
    bar.addEventListener("zoom", () => { view.from = Number(bar.dataset.from); view.to = Number(bar.dataset.to); zoomed(); });
    for (const button of bar.querySelectorAll("[data-csv]")) {
      const run = runs[Number(button.dataset.csv)];
      button.title = run.stride > 1 ? `every ${run.stride}th step; all of them: marl report RUN --csv FILE` : "every number of every step";
      button.addEventListener("click", () => {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([csv(run)], { type: "text/csv" }));
        link.download = `${run.name.replace(/[^\w.-]+/g, "-")}.csv`;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      });
    }
  }
  drawAll();
  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 100); });
}
