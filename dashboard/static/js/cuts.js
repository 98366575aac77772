// The model's layers as a strip, cut into one part for each device. A cut is dragged, or moved with arrow keys.

import { h } from "./vdom.js";

// Layers on each device, from the stages of a placement.
export function layersOf(devices, stages) {
  return devices.map((device) => {
    const stage = stages.find((one) => one.device === device.name);
    return stage ? stage.layers[1] - stage.layers[0] + 1 : 0;
  });
}

// The devices of a placement as the API takes them; null where their speed would have to be told too.
export function deviceList(devices) {
  if (devices.some((device) => device.backend === "sim")) return null;
  return devices.map((device) => `${device.name.split("#")[0]}=${device.limit_bytes}B`).join(",");
}

// Cut `index` is between devices `index` and `index + 1`; it goes to `at` layers, no further than its neighbours.
export function moveCut(layers, index, at) {
  const before = layers.slice(0, index).reduce((sum, count) => sum + count, 0);
  const both = layers[index] + layers[index + 1];
  const first = Math.min(both, Math.max(0, at - before));
  return layers.map((count, position) => (position === index ? first : position === index + 1 ? both - first : count));
}

export function strip(devices, layers, onChange) {
  const total = layers.reduce((sum, count) => sum + count, 0);
  let sum = 0;
  const bounds = layers.map((count) => (sum += count));
  const owner = (layer) => bounds.findIndex((bound) => layer < bound);
  return h("div", { class: "strip" },
    h("div", { class: "strip-names", "aria-hidden": "true" }, devices.map((device, index) => layers[index]
      ? h("span", { key: device.name, style: { "flex-grow": String(layers[index]) } }, device.name) : null)),
    h("div", { class: "strip-track" },
      h("div", { class: total > 12 ? "strip-cells many" : "strip-cells", "aria-hidden": "true" }, Array.from({ length: total }, (_, layer) =>
        h("i", { key: layer, class: `layer stage-${owner(layer) % 6}`, title: `layer ${layer} on ${devices[owner(layer)]?.name}` }, total <= 48 ? String(layer) : ""))),
      bounds.slice(0, -1).map((bound, index) => handle(devices, layers, index, bound, total, bounds, onChange))));
}

function handle(devices, layers, index, bound, total, bounds, onChange) {
  const low = index ? bounds[index - 1] : 0;
  const high = bounds[index + 1];
  const set = (at) => { if (at !== bound) onChange(moveCut(layers, index, at)); };
  const stacked = bounds.slice(0, index).filter((other) => other === bound).length;
  return h("div", {
    key: `cut${index}`, class: "cut", role: "slider", tabindex: 0,
    "aria-label": `Cut between ${devices[index].name} and ${devices[index + 1].name}`,
    "aria-valuemin": low, "aria-valuemax": high, "aria-valuenow": bound,
    "aria-valuetext": `${layers[index]} layers on ${devices[index].name}, ${layers[index + 1]} on ${devices[index + 1].name}`,
    style: { left: `${(100 * bound) / total}%`, "--stack": String(stacked) },
    onkeydown: (event) => {
      const to = { ArrowLeft: bound - 1, ArrowDown: bound - 1, ArrowRight: bound + 1, ArrowUp: bound + 1, PageDown: bound - 4, PageUp: bound + 4, Home: low, End: high }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      set(Math.min(high, Math.max(low, to)));
    },
    onpointerdown: (event) => {
      event.preventDefault();
      event.currentTarget.focus();
      event.currentTarget.setPointerCapture(event.pointerId);
      event.currentTarget.dataset.held = "1";
    },
    onpointermove: (event) => {
      if (!event.currentTarget.dataset.held) return;
      const track = event.currentTarget.parentElement.getBoundingClientRect();
      set(Math.min(high, Math.max(low, Math.round((total * (event.clientX - track.left)) / track.width))));
    },
    onpointerup: (event) => { delete event.currentTarget.dataset.held; },
    onpointercancel: (event) => { delete event.currentTarget.dataset.held; },
  }, h("i", { "aria-hidden": "true" }));
}
