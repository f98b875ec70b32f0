"use strict";
// A chart is drawn when it comes near the screen. Controls and legends switch what charts show.
// Tags of a renderer: [part, index of its legend entry]; of an axis: ["axis", dimension, scale].
const page = JSON.parse(document.getElementById("page").textContent);
const view = { x: "steps", y: "loss", band: "ci", logx: false, logy: true };
const drawn = new Map(); // number of a chart -> its figures, from top to bottom
const hidden = page.charts.map(() => new Set());
Bokeh.set_log_level("error");

function setAxis(figure, dimension, ends, wantsLog, label) {
  const kind = (wantsLog && ends.log) || !ends.linear ? "log" : "linear";
  for (const model of [...figure.below, ...figure.left, ...figure.center]) {
    if (model.tags[0] !== "axis" || model.tags[1] !== dimension) continue;
    model.visible = model.tags[2] === kind;
    if ("axis_label" in model) model.axis_label = label;
  }
  const Scale = Bokeh.Models.get(kind === "log" ? "LogScale" : "LinearScale");
  figure[`${dimension}_scale`] = new Scale();
  const [start, end] = ends[kind];
  figure[`${dimension}_range`].setv({ start, end, reset_start: start, reset_end: end });
}

// Sets round ticks on logarithmic axes, also where less than two decades are visible.
function setTicks(figure) {
  for (const axis of [...figure.below, ...figure.left].filter((a) => a.type === "LogAxis")) {
    const { start, end } = figure.below.includes(axis) ? figure.x_range : figure.y_range;
    const [low, high] = [Math.log10(start), Math.log10(end)];
    if (!(high > low)) continue;
    const stride = Math.ceil((high - low) / 6);
    const steps = high - low < 1 ? [1, 1.5, 2, 3, 4, 5, 7] : high - low < 3 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let power = stride * Math.floor(low / stride); power <= high; power += stride)
      ticks.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(3))));
    axis.ticker.ticks = ticks.filter((tick) => tick >= start && tick <= end);
  }
}

function setFields(figure, metric) {
  const band = `${metric}_${view.band === "off" ? "ci" : view.band}`;
  for (const { glyph, tags } of figure.renderers) {
    glyph.x = { field: view.x };
    if (tags[0] === "line" || tags[0] === "cross") glyph.y = { field: metric };
    if (tags[0] === "band") glyph.setv({ y1: { field: `${band}_low` }, y2: { field: `${band}_high` } });
  }
}

function setView(figures, ranges) {
  const metric = ranges.y[view.y] ? view.y : "loss";
  const last = figures.length - 1;
  figures.forEach((figure, row) => {
    setAxis(figure, "x", ranges.x[view.x], view.logx, row === last ? page.labels[view.x] : "");
    if (row === 0) setAxis(figure, "y", ranges.y[metric], view.logy, page.labels[metric]);
    setFields(figure, metric);
    for (const model of figure.center)
      if (model.tags[0] === "target") model.visible = metric === "loss";
  });
}

function update(number) {
  const { ranges, ink } = page.charts[number];
  const figures = drawn.get(number) ?? [];
  if (ranges.x) setView(figures, ranges);
  const text = getComputedStyle(document.body).color;
  for (const renderer of figures.flatMap((figure) => figure.renderers)) {
    const [part, entry] = renderer.tags;
    renderer.visible = !hidden[number].has(entry) && !(part === "band" && view.band === "off");
    if (ink.includes(entry))
      renderer.glyph[part === "band" ? "fill_color" : "line_color"] = { value: text };
  }
}

async function draw(box) {
  const number = Number(box.dataset.chart);
  if (drawn.has(number)) return;
  drawn.set(number, []);
  const { roots } = await Bokeh.embed.embed_item(page.charts[number].item, box.id);
  const root = roots[0].model;
  const figures = root.children ?? [root];
  drawn.set(number, figures);
  for (const figure of figures) {
    for (const range of [figure.x_range, figure.y_range])
      range.change.connect(() => setTicks(figure));
    setTicks(figure);
  }
  update(number);
  box.dataset.drawn = "yes";
}

function toggle(legend, entry, alone) {
  const keys = [...legend.querySelectorAll("button")];
  const off = new Set(keys.filter((key) => key.ariaPressed === "false").map((key) => key.dataset.entry));
  const others = keys.map((key) => key.dataset.entry).filter((other) => other !== entry);
  if (alone) {
    const already = off.size === others.length && !off.has(entry);
    off.clear();
    if (!already) others.forEach((other) => off.add(other));
  } else if (!off.delete(entry)) off.add(entry);
  for (const key of keys) key.ariaPressed = String(!off.has(key.dataset.entry));
  for (const number of legend.dataset.charts.split(" ").map(Number)) {
    hidden[number] = new Set([...off].map(Number));
    update(number);
  }
}

for (const legend of document.querySelectorAll(".legend[data-charts]")) {
  for (const kind of ["click", "dblclick"])
    legend.addEventListener(kind, (event) => {
      const key = event.target.closest("button");
      if (key) toggle(legend, key.dataset.entry, kind === "dblclick");
    });
}

document.getElementById("controls").addEventListener("change", ({ target }) => {
  view[target.name] = target.type === "checkbox" ? target.checked : target.value;
  for (const number of drawn.keys()) update(number);
});

const boxes = [...document.querySelectorAll("[data-chart]")];
const near = new IntersectionObserver(
  (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => draw(e.target)),
  { rootMargin: "600px" },
);
boxes.forEach((box) => near.observe(box));
addEventListener("beforeprint", () => boxes.forEach(draw));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const box of boxes.filter((box) => drawn.has(Number(box.dataset.chart)))) {
    drawn.delete(Number(box.dataset.chart));
    box.replaceChildren();
    draw(box);
  }
});
