// The live chart: draws the plot that chart.py sends as SVG whose marks are DOM nodes. Fetches nothing, needs nothing.
// User text enters the page as text alone (textContent, attributes), never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const HTML = ["div", "button", "span", "a", "canvas"];
const NEAR = 16; // px from which a mark is touched
const EVERYTHING = "Everything in view";
const DASHES = { "--": "6 4", ":": "2 3" };
const STARS = { s: [4, 45], "^": [3, 0], D: [4, 0], v: [3, 180], P: [4, 0, 0.35], X: [4, 45, 0.35], "*": [5, 0, 0.45], p: [5, 0], h: [6, 0] };
const LOOK = `text { font: 12px system-ui, sans-serif; fill: currentColor; pointer-events: none; user-select: none }
  .names text { paint-order: stroke; stroke: var(--fedlab-paper); stroke-width: 3px }
  text.bold { font-weight: 700 }
  .grid { stroke: currentColor; opacity: 0.15 }
  .frame { fill: none; stroke: currentColor; opacity: 0.5 }
  .ring { fill: none; stroke: currentColor; stroke-width: 2 }
  .mark { stroke-width: 0.8; pointer-events: all; cursor: pointer }
  .mark[fill=none] { stroke-width: 1.4 }
  .line { fill: none; stroke-width: 1.3 }
  .line.bold { stroke-width: 2.4 }
  .line.lit { stroke: currentColor; stroke-width: 2.6 }`.replace(/^ */gm, ".fedlab-svg "); // a style element speaks to the whole page
let charts = 0;

const set = (node, attributes) => Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value)) || node;

function make(tag, attributes = {}, ...inside) {
  const node = set(HTML.includes(tag) ? document.createElement(tag) : document.createElementNS(SVG, tag), attributes);
  node.append(...inside);
  return node;
}

function button(words, act, ...inside) {
  const node = make("button", { type: "button", ...words }, ...inside);
  return Object.assign(node, { onclick: () => act(node) });
}

const label = (x, y, text, anchor = "middle", more = {}) => make("text", { x, y, "text-anchor": anchor, ...more }, text);
const short = (text, most) => ([...text].length > most ? `${[...text].slice(0, Math.max(1, most - 1)).join("")}…` : text);
const last = (list) => list[list.length - 1];

// The outline of a marker around 0, 0: a circle, a polygon, or a star where an inner radius is given.
function shape(marker, r) {
  if (!STARS[marker]) return `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
  const [corners, turn, inner = 0] = STARS[marker];
  const count = inner ? 2 * corners : corners;
  const points = Array.from({ length: count }, (_, i) => {
    const [angle, reach] = [((turn - 90) * Math.PI) / 180 + (2 * Math.PI * i) / count, 1.25 * r * (inner && i % 2 ? inner : 1)];
    return `${(reach * Math.cos(angle)).toFixed(2)},${(reach * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${points.join("L")}Z`;
}

// ---- axes

function write(value, units) {
  const [size, unit] = units.find(([size]) => Math.abs(value) >= 0.9995 * size) || last(units);
  const scaled = value / size;
  return `${Math.abs(scaled) >= 999.5 ? scaled.toFixed(0) : Number(scaled.toPrecision(3))} ${unit}`.trimEnd();
}

function evenly(low, high, most, whole) {
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = power * ([1, 2, 5].find((part) => part * power * most >= high - low) || 10);
  const wide = whole ? Math.max(1, Math.round(step)) : step;
  const first = Math.ceil(low / wide);
  return Array.from({ length: Math.floor(high / wide) - first + 1 }, (_, i) => Number(((first + i) * wide).toPrecision(12)));
}

// Ticks with their words on an axis that is seen from `low` to `high`, logarithms where the axis is logarithmic.
function ticks(axis, [low, high], most) {
  if (axis.names.length) return axis.names.map((name, i) => [i, name]).filter(([i]) => i >= low && i <= high);
  if (!axis.log) return evenly(low, high, most, axis.whole).map((value) => [value, String(value)]);
  const parts = high - low < 1.7 ? [1, 2, 5] : high - low < 3 ? [1, 3] : [1];
  const powers = Array.from({ length: Math.ceil(high - low) + 2 }, (_, i) => 10 ** (Math.floor(low) + i));
  const inside = powers.flatMap((power) => parts.map((part) => part * power)).filter((v) => v >= 10 ** low && v <= 10 ** high);
  return (inside.length > 1 ? inside : evenly(10 ** low, 10 ** high, most)).map((value) => [value, write(value, axis.units)]);
}

// ---- the chart

class Chart {
  constructor(model, el) {
    Object.assign(this, { model, nodes: new Map(), off: new Set(), view: null, lit: null, drag: null, id: `fedlab-${++charts}` });
    const tools = [
      ["+", "Zoom in", () => this.zoom(0.7)],
      ["−", "Zoom out", () => this.zoom(1 / 0.7)],
      ["Reset", "Reset zoom", () => this.see(null, EVERYTHING)],
      ["SVG", "Save as SVG", () => this.save(new Blob([this.drawing()], { type: "image/svg+xml" }), "svg")],
      ["PNG", "Save as PNG", () => this.picture()],
      ["CSV", "Save data as CSV", () => this.save(new Blob([this.table()], { type: "text/csv" }), "csv")],
    ].map(([text, words, act]) => button({ "aria-label": words, title: words }, act, text));
    this.svg = make("svg", { class: "fedlab-svg", role: "group", "aria-roledescription": "chart", tabindex: -1 }, make("style", {}, LOOK));
    this.clip = make("rect");
    this.svg.append(make("clipPath", { id: this.id }, this.clip));
    for (const name of ["axes", "lines", "bars", "rings", "marks", "names"]) {
      const clipped = name === "axes" || name === "names" ? {} : { "clip-path": `url(#${this.id})` };
      this[name] = make("g", { class: name, ...clipped, ...(name === "marks" ? {} : { "aria-hidden": "true" }) });
      this.svg.append(this[name]);
    }
    this.legend = make("div", { class: "fedlab-legend", role: "group", "aria-label": "Shown" });
    this.tip = make("div", { class: "fedlab-tip", "aria-hidden": "true" });
    this.says = make("div", { class: "fedlab-says", role: "status" });
    this.root = make("div", { class: "fedlab-chart" }, make("div", { class: "fedlab-tools" }, ...tools));
    this.root.append(this.svg, this.legend, this.tip, this.says);
    el.append(this.root);
    this.listen();
    this.update();
    model.on("change:plot change:earlier", () => this.update());
    model.on("change:chosen", () => this.place());
    this.sizes = new ResizeObserver(() => this.place());
    this.sizes.observe(this.root);
    model.set("ready", true);
    model.save_changes();
  }

  // Take up a new plot: marks that stay keep their nodes, new ones glide in from their neighbour.
  update() {
    const [text, behind, before] = [this.model.get("plot"), this.model.get("earlier"), this.plot];
    const plot = JSON.parse(text);
    if (!plot.x || (text === this.text && behind === this.behind)) return;
    if (behind !== this.behind) this.old = JSON.parse(behind);
    Object.assign(this, { text, behind, plot, dots: [...this.old, ...plot.marks] });
    this.kinds = new Map(plot.kinds.map((kind) => [kind.name, kind]));
    if (!before || before.x.label + before.y.label !== plot.x.label + plot.y.label) this.view = null;
    const [left, fresh, places] = [new Set(this.nodes.keys()), [], new Map([...this.nodes].map(([key, node]) => [key, node.at]))];
    for (const mark of this.dots) {
      left.delete(mark.key);
      const node = this.nodes.get(mark.key) || make("path", { class: "mark", role: "button", tabindex: -1 });
      if (!this.nodes.has(mark.key)) fresh.push(node);
      else if (node.mark === mark) continue;
      const { color, marker } = this.kinds.get(mark.kind);
      const look = mark.hollow ? { fill: "none", stroke: color, "stroke-opacity": 0.8 } : { fill: color, stroke: "currentColor", "stroke-opacity": 1 };
      const words = [mark.name || mark.kind, ...mark.tip.map((pair) => pair.join(" "))].join(", ");
      set(node, { ...look, d: shape(marker, this.dots.length > 300 ? 3.5 : 5), "aria-label": words }).mark = mark;
      this.nodes.set(mark.key, node);
    }
    left.forEach((key) => this.nodes.get(key).remove());
    left.forEach((key) => this.nodes.delete(key));
    this.marks.append(...fresh);
    this.order = [...this.nodes.values()].sort((one, other) => one.mark.x - other.mark.x || one.mark.y - other.mark.y);
    this.svg.setAttribute("aria-label", plot.alt);
    if (!before || JSON.stringify(before.kinds) !== JSON.stringify(plot.kinds)) this.entries();
    this.place();
    if (!before || fresh.length > 50 || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    this.order.forEach((node, i) => {
      const [own, beside] = [places.get(node.mark.key), i && places.get(this.order[i - 1].mark.key)];
      const from = own || beside;
      if (!from || !node.at || String(from) === String(node.at) || (own && this.order.length > 300)) return;
      const frames = [from, node.at].map(([x, y]) => ({ transform: `translate(${x}px, ${y}px)` }));
      node.animate(frames, { duration: 250, easing: "ease-out" });
    });
  }

  shows({ kind, hollow }) {
    return !this.off.has(kind) && !(hollow && this.plot.kinds.some((one) => one.hollow && this.off.has(one.name)));
  }

  // Put everything where it belongs for the present size, zoom, legend and choice.
  place() {
    const width = this.root.clientWidth;
    if (!this.plot || !width) return;
    const height = Math.max(230, Math.min(380, 0.6 * width));
    this.shown = this.plot.lines.filter((line) => this.shows(line));
    const ends = width > 520 ? this.shown.filter((line) => line.end) : [];
    const [left, right, top, bottom] = [52, width - (ends.length ? Math.min(170, 0.25 * width) : 14), 10, height - 42];
    const { x, y } = this.plot;
    const warp = x.log ? Math.log10 : (value) => value;
    this.seen = this.view || { x: x.ends.map(warp), y: y.ends };
    const [[x0, x1], [y0, y1]] = [this.seen.x, this.seen.y];
    this.area = { left, right, top, bottom, width, height };
    this.px = (value) => Math.round(10 * (left + ((warp(value) - x0) / (x1 - x0)) * (right - left))) / 10;
    this.py = (value) => Math.round(10 * (bottom - ((value - y0) / (y1 - y0)) * (bottom - top))) / 10;
    set(this.svg, { viewBox: `0 0 ${width} ${height}`, width, height });
    set(this.clip, { x: left - 6, y: top - 6, width: right - left + 12, height: bottom - top + 12 });
    this.draw_axes();
    this.draw_lines();
    const [chosen, rings] = [this.model.get("chosen"), []];
    for (const [key, node] of this.nodes) {
      const [at, shown, pressed] = [[this.px(node.mark.x), this.py(node.mark.y)], this.shows(node.mark), key === chosen];
      if (String(at) !== String(node.at)) node.setAttribute("transform", `translate(${at})`);
      if (shown !== node.shown) node.style.display = shown ? "" : "none";
      if (pressed !== node.pressed) node.setAttribute("aria-pressed", pressed);
      if (pressed && shown) rings.push(make("circle", { class: "ring", cx: at[0], cy: at[1], r: 11 }));
      Object.assign(node, { at, shown, pressed });
    }
    this.rings.replaceChildren(...rings);
    this.rover(this.nodes.get(chosen) || this.marks.querySelector("[tabindex='0']") || this.order[0]);
    this.draw_names(ends);
    this.point(null);
  }

  // One mark can be reached with Tab; from there the arrow keys go on.
  rover(node) {
    this.marks.querySelectorAll("[tabindex='0']").forEach((old) => set(old, { tabindex: -1 }));
    if (node) set(node, { tabindex: 0 });
  }

  draw_axes() {
    const { left, right, top, bottom, height } = this.area;
    const [{ x, y, note }, middle] = [this.plot, (top + bottom) / 2];
    const parts = [make("path", { class: "frame", d: `M${left},${top}V${bottom}H${right}` })];
    let free = -Infinity;
    for (const [value, words] of ticks(x, this.seen.x, (right - left) / 80)) {
      const [at, text] = [this.px(value), short(words, 14)];
      parts.push(make("path", { class: "grid", d: `M${at},${top}V${bottom}` }));
      if (at - 3.1 * text.length < free) continue;
      free = at + 3.1 * text.length + 6;
      parts.push(label(at, bottom + 16, text));
    }
    for (const [value, text] of ticks(y, this.seen.y, (bottom - top) / 36)) {
      parts.push(make("path", { class: "grid", d: `M${left},${this.py(value)}H${right}` }), label(left - 7, this.py(value) + 4, text, "end"));
    }
    parts.push(label((left + right) / 2, height - 8, short(x.label, 70)), label((left + right) / 2, middle, note));
    parts.push(label(0, 0, y.label, "middle", { transform: `translate(12 ${middle}) rotate(-90)` }));
    this.axes.replaceChildren(...parts);
  }

  // Lines with their bands, and the intervals of each kind as one path.
  draw_lines() {
    const [parts, bars, chosen] = [[], new Map(), this.model.get("chosen")];
    for (const line of this.shown) {
      const { color, dash } = this.kinds.get(line.kind);
      const points = line.points.map(([x, y]) => [this.px(x), this.py(y)]);
      if (line.steps) points.push([Math.max(this.area.right + 8, last(points)[0]), last(points)[1]]);
      if (line.band.length) {
        const sides = [1, 0].map((side) => line.band.map((pair, i) => `${points[i][0]},${this.py(pair[side])}`));
        parts.push(make("path", { d: `M${[...sides[0], ...sides[1].reverse()].join("L")}Z`, fill: color, opacity: 0.25 }));
      }
      const d = `M${points[0]}${points.slice(1).map(([x, y]) => (line.steps ? `H${x}V${y}` : `L${x},${y}`)).join("")}`;
      const name = `line${line.bold ? " bold" : ""}${line.key === chosen ? " lit" : ""}`;
      parts.push(make("path", { d, stroke: color, "stroke-dasharray": DASHES[dash] || "none", class: name, "data-key": line.key }));
    }
    for (const { kind, x, low, high } of this.dots.filter((mark) => mark.low !== null && this.shows(mark)))
      bars.set(kind, `${bars.get(kind) || ""}M${this.px(x)},${this.py(low)}V${this.py(high)}`);
    this.lines.replaceChildren(...parts);
    this.bars.replaceChildren(...[...bars].map(([kind, d]) => make("path", { d, stroke: this.kinds.get(kind).color, opacity: 0.9 })));
  }

  // Names beside their marks, where no other name stands; what lines are, right of where they end.
  draw_names(ends) {
    const { right, top, bottom, width } = this.area;
    const [parts, taken] = [[], []];
    for (const { mark, at: [x, y] } of this.order) {
      const name = short(mark.name.trim(), 24);
      if (!name || !this.shows(mark) || !this.inside([x, y])) continue;
      const wide = 7 * [...name].length;
      const from = x + wide + 8 > right ? x - wide - 8 : x + 8;
      if (taken.some(([a, b, c]) => from < b && a < from + wide && Math.abs(c - y) < 15)) continue;
      taken.push([from, from + wide, y]);
      parts.push(from < x ? label(x - 8, y - 5, name, "end") : label(from, y - 5, name, "start"));
    }
    const placed = ends.map((line) => ({ line, y: this.py(last(line.points)[1]) })).sort((one, other) => one.y - other.y);
    placed.forEach((one, i) => (one.y = Math.max(one.y, i ? placed[i - 1].y + 15 : top)));
    placed.reverse().forEach((one, i) => (one.y = Math.min(one.y, i ? placed[i - 1].y - 15 : bottom)));
    const most = Math.floor((width - right - 10) / 6.6);
    const labels = placed.map(({ line, y }) => label(right + 8, y + 4, short(line.end, most), "start", { class: line.bold ? "bold" : "" }));
    this.names.replaceChildren(...parts, ...labels);
  }

  entries() {
    const toggle = (name) => (node) => {
      if (!this.off.delete(name)) this.off.add(name);
      node.setAttribute("aria-pressed", !this.off.has(name));
      this.place();
    };
    const buttons = this.plot.kinds.map((kind) => {
      const words = short(kind.name.trim() || "(empty)", 40);
      return button({ "aria-pressed": !this.off.has(kind.name) }, toggle(kind.name), this.swatch(kind), words);
    });
    this.legend.replaceChildren(...buttons);
  }

  swatch({ name, color, marker, dash, hollow }, place = {}) {
    const line = { d: "M0,8H22", stroke: color, "stroke-width": 2, "stroke-dasharray": DASHES[dash] || "none" };
    const dot = { d: shape(marker, 4.5), transform: "translate(11 8)", fill: hollow ? "none" : color, stroke: hollow ? color : "none" };
    const drawn = [...(this.plot.lines.some((one) => one.kind === name) ? [line] : []), ...(marker ? [dot] : [])];
    return make("svg", { width: 22, height: 16, "aria-hidden": "true", ...place }, ...drawn.map((look) => make("path", look)));
  }

  // ---- pointer and keys

  listen() {
    const on = (name, act, options) => this.svg.addEventListener(name, act, options);
    on("pointermove", (event) => (this.drag ? this.pan(event) : this.point(this.hit(event))));
    on("pointerleave", () => this.drag || this.point(null));
    on("pointerdown", (event) => {
      if (event.button) return;
      this.svg.setPointerCapture(event.pointerId);
      this.drag = { x: event.clientX, y: event.clientY, view: this.seen, hit: this.hit(event), moved: false };
    });
    on("pointerup", () => {
      const drag = this.drag;
      this.drag = null;
      if (drag && !drag.moved && drag.hit) this.choose(drag.hit.key);
    });
    on("pointercancel", () => (this.drag = null));
    on("dblclick", () => this.see(null, EVERYTHING));
    on("wheel", (event) => this.wheel(event), { passive: false });
    on("focusin", ({ target }) => target.mark && target.matches(":focus-visible") && (this.rover(target), this.point(target.mark)));
    on("focusout", () => this.point(null));
    on("keydown", (event) => this.key(event));
  }

  where(event) {
    const { left, top } = this.svg.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  inside([x, y]) {
    const { left, right, top, bottom } = this.area;
    return x >= left - 6 && x <= right + 6 && y >= top - 6 && y <= bottom + 6;
  }

  // The mark, else the line, that is under the pointer or near it.
  hit(event) {
    const [x, y] = this.where(event);
    if (!this.inside([x, y])) return null;
    let [found, least] = [null, NEAR];
    for (const { mark, at, shown } of this.nodes.values()) {
      const far = Math.hypot(at[0] - x, at[1] - y);
      if (far <= least && shown) [found, least] = [mark, far];
    }
    for (const line of found ? [] : this.shown.filter((line) => line.end)) {
      const after = line.points.findIndex(([value]) => this.px(value) >= x);
      if (after < 1) continue;
      const [[x0, y0], [x1, y1]] = line.points.slice(after - 1, after + 1).map(([a, b]) => [this.px(a), this.py(b)]);
      const far = Math.abs(y0 + ((y1 - y0) * (x - x0)) / (x1 - x0) - y);
      if (far < least) [found, least] = [{ ...line, at: [x, y], tip: [] }, far];
    }
    return found;
  }

  // Say all that is known of a mark or line beside it, or nothing.
  point(one) {
    if (this.lit === (one && one.key)) return;
    this.lit = one && one.key;
    const chosen = this.model.get("chosen");
    for (const { classList, dataset } of this.lines.querySelectorAll("[data-key]")) classList.toggle("lit", [this.lit, chosen].includes(dataset.key));
    this.svg.style.cursor = one ? "pointer" : "";
    this.tip.style.display = one ? "grid" : "none";
    if (!one) return;
    const pairs = one.tip.flatMap((pair) => pair.map((words) => make("span", {}, short(words, 200))));
    const head = short(one.end || one.name.trim() || one.kind.trim(), 200);
    this.tip.replaceChildren(make("span", { class: "fedlab-head" }, head), ...pairs); // no lists: JupyterLab has styles for them
    const [x, y] = one.at || this.nodes.get(one.key).at;
    const [outer, inner, wide] = [this.root.getBoundingClientRect(), this.svg.getBoundingClientRect(), this.tip.offsetWidth];
    const [right, left] = [x + 14 + wide <= outer.width, x - 14 >= wide];
    const tall = right || left ? Math.max(0, y - this.tip.offsetHeight / 2) : y + 14;
    this.tip.style.left = `${right ? x + 14 : left ? x - 14 - wide : Math.max(0, outer.width - wide)}px`;
    this.tip.style.top = `${inner.top - outer.top + tall}px`;
  }

  choose(key) {
    this.model.set("chosen", key);
    this.model.save_changes();
    const node = this.nodes.get(key);
    if (node) node.focus({ preventScroll: true });
    this.says.textContent = `Chosen: ${node ? node.getAttribute("aria-label") : this.plot.lines.find((line) => line.key === key).end}`;
    this.place();
  }

  key(event) {
    const shown = this.order.filter((one) => this.shows(one.mark));
    const at = shown.indexOf(event.target);
    const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 };
    const acts = { "+": () => this.zoom(0.7), "-": () => this.zoom(1 / 0.7), 0: () => this.see(null, EVERYTHING), Escape: () => this.point(null) };
    const act = acts[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || at < 0) return;
    if (event.key in steps) {
      const next = shown[Math.max(0, Math.min(shown.length - 1, steps[event.key]))];
      if (!this.inside(next.at)) this.see(null, EVERYTHING);
      next.focus({ preventScroll: true });
    } else if (event.key === "Enter" || event.key === " ") this.choose(event.target.mark.key);
    else if (act) act();
    else return;
    event.preventDefault();
    event.stopPropagation(); // Jupyter has shortcuts of its own
  }

  // The page keeps its wheel until the chart is in use, or Ctrl is held.
  wheel(event) {
    if (!event.ctrlKey && !event.metaKey && !this.root.contains(document.activeElement)) return;
    event.preventDefault();
    this.zoom(event.deltaY < 0 ? 0.85 : 1 / 0.85, this.where(event));
  }

  zoom(factor, at) {
    const { left, right, top, bottom } = this.area;
    const [x, y] = at || [(left + right) / 2, (top + bottom) / 2];
    const about = ([low, high], share) => [low, high].map((end) => end + (1 - factor) * (low + (high - low) * share - end));
    const view = { x: about(this.seen.x, (x - left) / (right - left)), y: about(this.seen.y, (bottom - y) / (bottom - top)) };
    this.see(view, factor < 1 ? "Zoomed in" : "Zoomed out");
  }

  pan({ clientX, clientY }) {
    const [{ x, y, view }, { left, right, top, bottom }] = [this.drag, this.area];
    this.drag.moved ||= Math.hypot(clientX - x, clientY - y) > 4;
    const moved = ([low, high], share) => [low, high].map((end) => end + (high - low) * share);
    const shifted = { x: moved(view.x, (x - clientX) / (right - left)), y: moved(view.y, (clientY - y) / (bottom - top)) };
    if (this.drag.moved) this.see(shifted);
  }

  // Show this part of the plot; null is all of it, and grows with it.
  see(view, words) {
    this.view = view;
    this.place();
    if (words) this.says.textContent = words;
  }

  // ---- saving

  save(blob, ending) {
    const name = this.plot.alt.split(":")[0].toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60);
    const link = make("a", { href: URL.createObjectURL(blob), download: `${name}.${ending}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  // The SVG as a file of its own: colours as they are on this page, the legend below.
  drawing() {
    const [{ width, height }, shown] = [this.area, this.plot.kinds.filter((kind) => !this.off.has(kind.name))];
    const [ink, paper] = [getComputedStyle(this.root).color, getComputedStyle(this.tip).backgroundColor];
    const tall = height + 20 * shown.length + 6;
    const copy = set(this.svg.cloneNode(true), { viewBox: `0 0 ${width} ${tall}`, height: tall, style: `color: ${ink}; --fedlab-paper: ${paper}` });
    copy.prepend(make("rect", { width, height: tall, fill: paper }));
    shown.forEach((kind, i) => {
      const y = height + 20 * i;
      copy.append(this.swatch(kind, { x: 52, y }), label(80, y + 12, short(kind.name, 80), "start"));
    });
    return new XMLSerializer().serializeToString(copy).toWellFormed().replace(/[\0-\x08\v\f\x0e-\x1f\ufffe\uffff]/g, ""); // as XML asks
  }

  async picture() {
    const image = Object.assign(new Image(), { src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(this.drawing())}` });
    await image.decode();
    const canvas = set(make("canvas"), { width: 2 * image.width, height: 2 * image.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => this.save(blob, "png"), "image/png");
  }

  table() {
    const { x, y, lines } = this.plot;
    const heads = [...new Set(this.dots.flatMap((mark) => mark.tip.map(([head]) => head)))];
    const told = (mark, tip = new Map(mark.tip)) => heads.map((head) => tip.get(head));
    const rows = this.dots.map((mark) => [mark.kind, mark.name, mark.x, mark.y, mark.low, mark.high, ...told(mark)]);
    const bare = lines.filter((line) => !line.steps && !this.dots.some((mark) => mark.kind === line.kind));
    for (const line of bare) rows.push(...line.points.map(([a, b], i) => [line.kind, "", a, b, ...(line.band[i] || [])]));
    return [["kind", "name", x.label, y.label, "low", "high", ...heads], ...rows].map((row) => row.map(cell).join(",")).join("\r\n");
  }
}

// A cell of a CSV file; text that a spreadsheet would take for a formula is kept from it.
function cell(value) {
  if (typeof value !== "string") return value ?? "";
  const text = /^[=+@\t\r-]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// Charts on a page without a kernel take the place of their pictures, except in print.
export function wake() {
  for (const place of document.querySelectorAll("[data-plot]")) {
    const state = { ...place.dataset, chosen: JSON.parse(place.dataset.plot).current };
    place.model = {
      get: (name) => state[name],
      set: (name, value) => Object.assign(state, { [name]: value }) && place.dispatchEvent(new Event(`change:${name}`)),
      on: (events, act) => events.split(" ").forEach((event) => place.addEventListener(event, act)),
      save_changes: () => {},
    };
    place.classList.add("fedlab-awake");
    new Chart(place.model, place);
  }
}

export default {
  render({ model, el }) {
    const chart = new Chart(model, el);
    return () => chart.sizes.disconnect();
  },
};
