// The stages that the model is cut into, how busy each is, and cutting it anew: tried first, then done.

import { h } from "../vdom.js";
import { changed, store } from "../store.js";
import { call } from "../api.js";
import { deviceList, layersOf, strip } from "../cuts.js";
import { meter } from "../charts.js";
import { badge, button, confirm, empty, field, locked, notify, panel, skeleton, wide } from "../ui.js";
import { bytes, duration, latency, percent, tokens, whole } from "../format.js";

export const title = "Pipeline";

const FRESH = { layers: null, devices: null, placement: "", objective: "", plan: null, error: "", asking: false, moving: false };
const local = { ...FRESH };
let turn = 0;

export function view() {
  const { pipeline, gpu } = store.state;
  const stages = pipeline?.stages || [];
  const devices = gpu?.devices || [];
  if (!pipeline?.model) return [h("header", { class: "page-head" }, h("h1", null, "Pipeline")), empty("No model is loaded", "Its stages appear here once one serves.", h("a", { class: "button primary", href: "#/models" }, "Load a model"))];
  return [
    h("header", { class: "page-head" }, h("h1", null, "Pipeline"), h("p", { class: "dim" },
      `${stages.length} ${stages.length === 1 ? "stage" : "stages"}, placed by ${pipeline.placement.strategy}${pipeline.placement.unused_devices.length ? `; unused: ${pipeline.placement.unused_devices.join(", ")}` : ""}`)),
    panel("Stages", { id: "stages" }, stageTable(stages)),
    prediction(pipeline.prediction, store.state.batcher),
    place(devices, stages),
  ];
}

function stageTable(stages) {
  return h("div", { class: "stages" }, stages.map((stage, index) => {
    const lately = store.rates[index];
    const busy = lately && lately.device === stage.device ? lately : null;
    return h("section", { class: "stage", key: stage.index, "aria-label": `Stage ${stage.index}` },
      h("div", { class: "stage-head" }, h("i", { class: `swatch stage-${index % 6}`, "aria-hidden": "true" }), h("h3", null, stage.device), h("span", { class: "dim" }, `layers ${stage.layers[0]}–${stage.layers[1]}`)),
      h("p", { class: "figure small" }, h("b", null, busy ? percent(busy.busy) : "–"), h("span", null, "busy lately")),
      meter(busy?.busy, `Stage ${stage.index} busy`),
      h("dl", { class: "facts" }, [
        ["Predicted busy", busy?.predicted == null ? "–" : percent(busy.predicted)],
        ["A forward pass", latency(stage.seconds_per_forward)],
        ["Passes", whole(stage.forwards)],
        ["Weights", bytes(stage.weight_bytes)],
        ["KV", bytes(stage.kv_bytes)],
        ["Workspace", bytes(stage.workspace_bytes)],
        ["Attention", stage.attention],
        ...(stage.streamed_layers.length ? [["Streamed", `${stage.streamed_layers.length} layers, ${bytes(stage.streamed_bytes)}, waited ${duration(stage.stream_wait_seconds)}`]] : []),
      ].map(([name, value]) => h("div", { key: name }, h("dt", null, name), h("dd", null, value)))));
  }));
}

function prediction(told, batcher) {
  if (!told) return panel("Predicted and measured", { id: "prediction" }, empty("No prediction", "The devices' speeds were not measured for this placement."));
  const { now } = told;
  const rates = Object.entries(told.tokens_per_second);
  const most = Math.max(...rates.map(([, value]) => value), batcher?.tokens_per_second || 0, 1);
  return panel("Predicted and measured", { id: "prediction", note: `Tokens per second with ${whole(told.context)} tokens of context` },
    h("ul", { class: "rates" }, rates.map(([streams, value]) => h("li", { key: streams }, h("span", null, `${streams} ${streams === "1" ? "stream" : "streams"}`), meter(value / most, `Predicted for ${streams} streams`, "predicted"), h("b", null, tokens(value)))),
      h("li", { key: "now", class: "now" }, h("span", null, now.streams ? `now, ${whole(now.streams)} running` : "now, nothing runs"), meter((now.measured || 0) / most, "Measured now"),
        h("b", null, tokens(now.measured), now.predicted ? h("small", null, ` of ${tokens(now.predicted)} predicted`) : null))),
    h("p", { class: "dim" }, `No step can be faster than ${latency(told.floor_seconds)} a token.`));
}

// -- cutting it anew ---------------------------------------------------------------------------------------------

function place(devices, stages) {
  const present = layersOf(devices, stages);
  const now = () => (local.layers?.length === devices.length ? local.layers : present);
  const layers = now();
  const total = present.reduce((sum, count) => sum + count, 0);
  const list = deviceList(devices);
  const reason = local.moving ? "The model is being moved." : locked();
  const setLayers = (make) => { local.layers = make(now()); outlookSoon(); };
  const wanted = request(layers, devices);
  const isOther = local.layers && local.layers.join() !== present.join();
  const sum = layers.reduce((all, count) => all + count, 0);
  return panel("Place it anew", { id: "place", note: "Requests go on while the model moves" },
    devices.length > 1 && sum === total
      ? h("div", { class: "cut-area" }, h("p", { class: "dim" }, "Drag a cut, or choose it and use the arrow keys. What it would bring appears below."), strip(devices, layers, setLayers))
      : h("p", { class: "dim" }, devices.length > 1 ? `The layers have to add up to ${total}; they are ${sum}.` : "One device holds all layers. Name more devices to split the model."),
    h("form", { class: "form", onsubmit: (event) => { event.preventDefault(); apply(wanted); } },
      devices.length > 1 ? h("fieldset", { class: "layer-fields" }, h("legend", null, "Layers on each device"), devices.map((device, index) =>
        h("label", { key: device.name, class: "field" }, h("span", null, device.name),
          h("input", { type: "number", min: 0, max: total, value: String(layers[index]), oninput: (event) => setLayers((each) => each.map((count, at) => (at === index ? Number(event.target.value) || 0 : count))) })))) : null,
      field("Devices", h("input", { name: "devices", value: local.devices ?? list ?? "", autocomplete: "off", spellcheck: "false", placeholder: "cuda:0=24GiB,cuda:1=16GiB",
        oninput: (event) => { local.devices = event.target.value; local.layers = null; outlookSoon(); } }), "Other devices or limits; the layers are then split by the strategy"),
      field("Strategy", h("select", { name: "placement", value: local.placement, onchange: (event) => { local.placement = event.target.value; local.layers = null; outlookSoon(); } },
        [["", "By hand, or as it is"], ["profiled", "profiled: for speed, by measurement"], ["vram", "vram: by free memory"], ["balanced", "balanced: evenly"]].map(([value, text]) => h("option", { key: value, value }, text)))),
      field("Objective", h("select", { name: "objective", value: local.objective, onchange: (event) => { local.objective = event.target.value; outlookSoon(); } },
        [["", "As it is"], ["throughput", "Throughput of all streams"], ["latency", "Latency of a stream"]].map(([value, text]) => h("option", { key: value, value }, text)))),
      outlook(total),
      h("div", { class: "actions" },
        button("Try it", () => ask(wanted), { reason: reason || (wanted ? null : "Name the devices first.") }),
        h("button", { type: "submit", class: "button primary", disabled: Boolean(reason || !local.plan || local.asking), title: reason || (local.plan ? "" : "Try it first.") }, "Move the model"),
        isOther || local.devices !== null || local.placement || local.objective ? button("Reset", reset, { kind: "quiet" }) : null)));
}

function request(layers, devices) {
  const list = (local.devices ?? deviceList(devices) ?? "").trim();
  if (!list) return null;
  const body = { devices: list };
  if (local.layers) body.layers = layers.join(",");
  else if (local.placement) body.placement = local.placement;
  if (local.objective) body.objective = local.objective;
  return body;
}

function reset() {
  turn += 1;
  Object.assign(local, FRESH);
  changed();
}

let planned = null;

function outlookSoon() {
  turn += 1;
  Object.assign(local, { plan: null, error: "", asking: false });
  clearTimeout(planned);
  changed();
  const layers = local.layers;
  const { gpu, pipeline } = store.state;
  const sum = (counts) => counts.reduce((all, count) => all + count, 0);
  if (layers && sum(layers) === sum(layersOf(gpu.devices, pipeline.stages)) && !locked()) {
    planned = setTimeout(() => ask(request(layers, gpu.devices)), 350);
  }
}

let asked = Promise.resolve();

// The server tries one placement at a time: the last one that is wanted waits for the one before.
async function ask(body) {
  const mine = ++turn;
  Object.assign(local, { asking: true, error: "" });
  changed();
  await asked;
  if (mine !== turn) return;
  asked = call("POST", "/api/pipeline/place", { ...body, dry_run: true }).then(
    (plan) => { if (mine === turn) Object.assign(local, { plan, error: "", asking: false }); },
    (error) => { if (mine === turn) Object.assign(local, { plan: null, error: error.message, asking: false }); });
  await asked;
  changed();
}

function outlook(total) {
  if (local.error) return h("p", { class: "alert error", role: "alert" }, local.error);
  if (local.asking) return skeleton(3);
  if (!local.plan) return null;
  const { plan } = local;
  const before = store.state.pipeline.prediction?.tokens_per_second || {};
  return h("div", { class: "outlook", "aria-live": "polite" }, h("h3", null, "What it would bring"),
    wide("What it would bring", h("table", null,
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "Device"), h("th", { scope: "col" }, "Layers"), ["Weights", "There already", "To read"].map((name) => h("th", { scope: "col", class: "number" }, name)), h("th", { scope: "col" }, "Read"))),
      h("tbody", null, plan.stages.map((stage) => h("tr", { key: stage.device }, h("td", null, h("b", null, stage.device)),
        h("td", null, `${stage.layers[0]}–${stage.layers[1]} (${stage.layers[1] - stage.layers[0] + 1} of ${total})`), h("td", { class: "number" }, bytes(stage.weight_bytes)), h("td", { class: "number" }, bytes(stage.kept_bytes)), h("td", { class: "number" }, bytes(stage.read_bytes)),
        h("td", null, stage.read_bytes ? (stage.beside ? badge("ok", "while it serves") : badge("warn", "while it pauses")) : "nothing")))))),
    h("dl", { class: "facts" }, [
      ["KV cache", `${whole(plan.kv_tokens)} tokens`], ["Takes about", duration(plan.estimated_seconds)], ["Pauses for about", duration(plan.estimated_pause_seconds)],
      ...Object.entries(plan.tokens_per_second || {}).map(([streams, value]) => [`${streams} ${streams === "1" ? "stream" : "streams"}`, `${tokens(value)} tok/s${change(value, before[streams])}`]),
    ].map(([name, value]) => h("div", { key: name }, h("dt", null, name), h("dd", null, value)))));
}

function change(value, before) {
  if (!before) return "";
  const share = value / before - 1;
  return Math.abs(share) < 0.005 ? ", as now" : `, ${share > 0 ? "+" : "−"}${Math.abs(share * 100).toFixed(0)} %`;
}

async function apply(body) {
  if (!local.plan || !(await confirm("Move the model?", `It takes about ${duration(local.plan.estimated_seconds)}, of which requests pause for about ${duration(local.plan.estimated_pause_seconds)}. If it fails, the model goes on where it is.`, "Move the model", "primary"))) return;
  Object.assign(local, { moving: true, error: "" });
  changed();
  try {
    const done = await call("POST", "/api/pipeline/place", body);
    notify(`The model has moved in ${duration(done.seconds)}; requests paused for ${duration(done.pause_seconds)}.`);
    reset();
  } catch (error) {
    Object.assign(local, { moving: false, error: error.message });
  }
  changed();
}
