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

const sumOf = (layers) => layers.reduce((sum, count) => sum + count, 0);

// `change(make)` sets what `make` makes of the layers as they are by then: keys may come faster than frames.
export function strip(devices, layers, change) {
  const total = sumOf(layers);
  const bounds = layers.map((_, index) => sumOf(layers.slice(0, index + 1)));
  const owner = (layer) => bounds.findIndex((bound) => layer < bound);
  return h("div", { class: "strip" },
    h("div", { class: "strip-names", "aria-hidden": "true" }, devices.map((device, index) => layers[index]
      ? h("span", { key: device.name, style: { "flex-grow": String(layers[index]) } }, device.name) : null)),
    h("div", { class: "strip-track" },
      h("div", { class: total > 12 ? "strip-cells many" : "strip-cells", "aria-hidden": "true" }, Array.from({ length: total }, (_, layer) =>
        h("i", { key: layer, class: `layer stage-${owner(layer) % 6}`, title: `layer ${layer} on ${devices[owner(layer)]?.name}` }, total <= 48 ? String(layer) : ""))),
      bounds.slice(0, -1).map((_, index) => handle(devices, layers, bounds, index, change))));
}

const STEPS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -4, PageUp: 4, Home: -Infinity, End: Infinity };

function handle(devices, layers, bounds, index, change) {
  const bound = bounds[index];
  const total = bounds[bounds.length - 1];
  const stacked = bounds.slice(0, index).filter((other) => other === bound).length;
  return h("div", {
    key: `cut${index}`, class: "cut", role: "slider", tabindex: 0,
    "aria-label": `Cut between ${devices[index].name} and ${devices[index + 1].name}`,
    "aria-valuemin": index ? bounds[index - 1] : 0, "aria-valuemax": bounds[index + 1], "aria-valuenow": bound,
    "aria-valuetext": `${layers[index]} layers on ${devices[index].name}, ${layers[index + 1]} on ${devices[index + 1].name}`,
    style: { left: `${(100 * bound) / total}%`, "--stack": String(stacked) },
    onkeydown: (event) => {
      const step = STEPS[event.key];
      if (step === undefined) return;
      event.preventDefault();
      change((now) => moveCut(now, index, Math.min(total, Math.max(0, sumOf(now.slice(0, index + 1)) + step))));
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
      const at = Math.round((total * (event.clientX - track.left)) / track.width);
      if (at !== bound) change((now) => moveCut(now, index, Math.min(total, Math.max(0, at))));
    },
    onpointerup: (event) => { delete event.currentTarget.dataset.held; },
    onpointercancel: (event) => { delete event.currentTarget.dataset.held; },
  }, h("i", { "aria-hidden": "true" }));
}
