// Live curves and bars, as SVG of our own. Each has its text: what a curve shows now is also written beside it.

import { h } from "./vdom.js";

const WIDTH = 600;
const HEIGHT = 100;
const SPAN_S = 300;

// A ceiling for a scale: 1, 2 or 5 times a power of ten.
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const lead = value / power;
  return (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10) * power;
}

// The curve's pieces: where nothing was measured, or nobody looked for a while, it breaks off.
export function pieces(points, now, top) {
  const found = [];
  let piece = [];
  let last = null;
  for (const [time, value] of points) {
    const gone = value == null || now - time > SPAN_S;
    if ((gone || (last !== null && time - last > 10)) && piece.length) {
      found.push(piece);
      piece = [];
    }
    last = time;
    if (gone) continue;
    const x = WIDTH * (1 - (now - time) / SPAN_S);
    const y = HEIGHT * (1 - Math.min(1, value / top));
    piece.push([Math.round(x * 10) / 10, Math.round(y * 10) / 10]);
  }
  if (piece.length) found.push(piece);
  return found;
}

const path = (piece) => "M" + piece.map(([x, y]) => `${x} ${y}`).join("L") + (piece.length === 1 ? "h0.1" : "");
const area = (piece) => `${path(piece)}L${piece[piece.length - 1][0]} ${HEIGHT}L${piece[0][0]} ${HEIGHT}Z`;

// `series`: {name, color, points: [[time, value]]}; `text(value)` writes a value with its unit.
export function lineChart({ label, series, now, text, fill = false, least = 0 }) {
  const shown = series.flatMap((one) => one.points.filter(([time]) => now - time <= SPAN_S).map(([, value]) => value ?? 0));
  const top = ceiling(Math.max(least, ...shown, 0));
  return h("figure", { class: "chart" },
    h("div", { class: "chart-body" },
      h("div", { class: "chart-scale", "aria-hidden": "true" }, h("span", null, text(top)), h("span", null, text(top / 2)), h("span", null, "0")),
      h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": summary(label, series, text) },
        [0, 0.5, 1].map((share) => h("line", { key: `line${share}`, class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT * share, y2: HEIGHT * share })),
        series.map((one) => pieces(one.points, now, top).map((piece, index) => [
          fill ? h("path", { key: `area-${one.name}-${index}`, class: `area ${one.color}`, d: area(piece) }) : null,
          h("path", { key: `${one.name}-${index}`, class: `curve ${one.color}`, d: path(piece) }),
        ])))),
    h("div", { class: "chart-times", "aria-hidden": "true" }, h("span", null, "5 min ago"), h("span", null, "now")));
}

export function summary(label, series, text) {
  const parts = series.map(({ name, points }) => {
    const values = points.map(([, value]) => value).filter((value) => value != null);
    if (!values.length) return `${name}: nothing measured`;
    const last = points[points.length - 1][1];
    return `${name}: now ${last == null ? "none" : text(last)}, lowest ${text(Math.min(...values))}, highest ${text(Math.max(...values))}`;
  });
  return `${label}, last 5 minutes. ${parts.join(". ")}.`;
}

// A bar of parts: {name, value, kind}, of `total`.
export function bar(parts, total, label) {
  return h("div", { class: "bar", role: "img", "aria-label": label },
    parts.filter((part) => part.value > 0).map((part) => h("i", {
      key: part.name, class: `part ${part.kind}`, title: part.title || part.name,
      style: { width: `${Math.max(0, (100 * part.value) / total).toFixed(3)}%` },
    })));
}

export function legend(items) {
  return h("ul", { class: "legend" }, items.map((item) => h("li", { key: item.name },
    h("i", { class: `swatch ${item.kind}`, "aria-hidden": "true" }), h("span", null, item.name), item.text ? h("b", null, item.text) : null)));
}

export function meter(share, label, kind = "") {
  const percent = Math.round(100 * Math.min(1, Math.max(0, share || 0)));
  return h("div", { class: `meter ${kind}`, role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": percent },
    h("i", { style: { width: `${percent}%` } }));
}
