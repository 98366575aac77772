// All at a glance: the model, how fast it is, what runs, what is wrong.

import { h } from "../vdom.js";
import { store } from "../store.js";
import { lineChart, meter, legend } from "../charts.js";
import { deviceBar } from "../devices.js";
import { badge, empty, icon, panel, wide } from "../ui.js";
import { count, duration, latency, percent, plural, TIERS, tokens, whole } from "../format.js";

export const title = "Overview";

export function view() {
  const { pipeline, batcher, queue, memory, system } = store.state;
  if (!pipeline?.model) return [head(pipeline, system), alerts(), noModel()];
  const now = store.state.time;
  const column = (index) => store.history.map((point) => [point[0], point[index]]);
  const kv = batcher?.kv_blocks;
  return [
    head(pipeline, system),
    alerts(),
    h("div", { class: "tiles" },
      tile("Throughput", tokens(batcher?.tokens_per_second), "tok/s", predicted(pipeline), meter(share(pipeline, batcher), "Measured, of what was predicted")),
      tile("Requests", whole(queue?.running), "running", `${whole(queue?.waiting)} waiting of ${whole(queue?.limit)}`, meter((queue?.waiting || 0) / (queue?.limit || 1), "Queue in use")),
      tile("Batch", whole(batcher?.batch_size), `of ${whole(batcher?.max_batch_size)}`, `${whole(batcher?.batch_tokens)} tokens in the last step`, meter((batcher?.batch_size || 0) / (batcher?.max_batch_size || 1), "Batch in use")),
      tile("KV cache", kv?.total ? percent((kv.total - kv.free) / kv.total) : "–", "in use", `${whole(pipeline.kv_cache.tokens)} tokens, ${percent(batcher?.prefix_hit_rate)} of prompts cached`, meter(kv?.total ? (kv.total - kv.free) / kv.total : 0, "KV cache in use"))),
    h("div", { class: "columns" },
      panel("Tokens per second", { id: "throughput" },
        lineChart({ label: "Tokens per second", now, text: (value) => `${tokens(value)}`, fill: true, least: 1,
          series: [{ name: "Generated", color: "accent", points: column(1) }] })),
      latencies(batcher, now, column)),
    panel("Devices", { id: "devices", actions: h("a", { href: "#/memory", class: "more" }, "Memory in detail") },
      memory?.devices?.length
        ? h("ul", { class: "devices" }, memory.devices.map((device) => deviceBar(device, memory.kv_blocks, pipeline)))
        : empty("No device in use")),
    tasks(),
  ];
}

function head(pipeline, system) {
  const model = pipeline?.model;
  return h("header", { class: "page-head" },
    h("div", null, h("h1", null, model ? model.name : "No model is loaded"),
      model ? h("p", { class: "dim" }, `${count(model.parameters)} parameters in ${model.dtype}, context ${whole(model.max_model_len)}, loaded in ${duration(model.load_seconds)}`) : null),
    h("div", { class: "page-state" },
      pipeline ? badge(pipeline.ready ? "ok" : "warn", pipeline.ready ? "Ready" : pipeline.state) : null,
      system?.read_only ? badge("warn", "Read-only") : null,
      system ? h("span", { class: "dim" }, `up ${duration(system.process.uptime_s)}`) : null));
}

function noModel() {
  return panel("Model", { id: "model" }, empty("Nothing to serve yet", "Load a model to see it at work.", h("a", { class: "button primary", href: "#/models" }, "Load a model")));
}

function predicted(pipeline) {
  const now = pipeline.prediction?.now;
  return now?.predicted ? `${tokens(now.predicted)} predicted for ${plural(now.streams, "stream")}` : "nothing runs now";
}

function share(pipeline, batcher) {
  const expected = pipeline.prediction?.now?.predicted;
  return expected ? (batcher?.tokens_per_second || 0) / expected : 0;
}

function tile(name, value, unit, detail, picture) {
  return h("section", { class: "tile", "aria-label": name },
    h("h2", null, name), h("p", { class: "figure" }, h("b", null, value), h("span", null, unit)), h("p", { class: "dim" }, detail), picture);
}

const KINDS = [["first_token", "First token", 4], ["between_tokens", "Between tokens", 7]];
const COLORS = ["series-1", "series-2", "series-3"];

function latencies(batcher, now, column) {
  const told = batcher?.latency;
  if (!told) return panel("Latency", { id: "latency" }, empty("No percentiles", "This server does not tell its latencies."));
  const [key, name, first] = KINDS[0];
  const names = ["p50", "p95", "p99"];
  const series = names.map((each, index) => ({ name: each, color: COLORS[index], points: column(first + index) }));
  return panel("Latency", { id: "latency", note: `${name}, seconds from request to answer` },
    told[key]?.count ? lineChart({ label: name, now, series, text: (value) => latency(value) }) : empty("Nothing measured yet", "Percentiles appear with the first requests."),
    legend(names.map((each, index) => ({ name: each, kind: COLORS[index] }))),
    wide("Latency percentiles", h("table", { class: "numbers" },
      h("thead", null, h("tr", null, h("th", { scope: "col" }, ""), names.map((each) => h("th", { scope: "col" }, each)))),
      h("tbody", null, [...KINDS, ["request", "Whole request"]].map(([kind, label]) => h("tr", { key: kind },
        h("th", { scope: "row" }, label), names.map((each) => h("td", null, latency(told[kind]?.[each]))))))))); 
}

export function troubles() {
  const { health, alerts: told, pipeline, memory } = store.state;
  const checks = Object.entries(health?.checks || {}).filter(([, check]) => check.status !== "ok")
    .map(([name, check]) => ({ key: `check-${name}`, kind: check.status === "error" ? "error" : "warn", name: `${name}: ${check.status}`, text: check.detail || "" }));
  const firing = (told?.firing || []).map((alert, index) => ({ key: `alert-${alert.name}-${index}`, kind: alert.severity === "critical" ? "error" : "warn",
    name: alert.name, text: alert.summary || Object.entries(alert.labels).map(([label, value]) => `${label} ${value}`).join(", ") }));
  if (told?.trouble) firing.push({ key: "prometheus", kind: "warn", name: "Prometheus", text: told.trouble });
  const notes = (pipeline?.notes || []).map((text, index) => ({ key: `note-${index}`, kind: "info", name: "Placement", text }));
  const tiers = Object.entries(memory?.tier_troubles || {}).filter(() => !checks.some((check) => check.key === "check-tiers"))
    .map(([name, text]) => ({ key: `tier-${name}`, kind: "warn", name: `${TIERS[name] || name} is not used`, text }));
  return [...checks, ...firing, ...tiers, ...notes];
}

function alerts() {
  const found = troubles();
  return h("div", { class: "alerts", "aria-live": "polite" }, found.length
    ? h("ul", null, found.map((one) => h("li", { key: one.key, class: `alert ${one.kind}` }, icon(one.kind === "info" ? "overview" : "warn"), h("b", null, one.name), h("span", null, one.text))))
    : null);
}

export function tasks() {
  const told = store.state.tasks;
  if (!told) return null;
  const rows = [...told.running, ...told.recent.slice(0, 8)];
  return panel("Background work", { id: "tasks", note: "Loading, moving and unloading" },
    rows.length ? wide("Background work", h("table", null,
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "What"), h("th", { scope: "col" }, "State"), h("th", { scope: "col", class: "number" }, "Took"))),
      h("tbody", null, rows.map((task) => h("tr", { key: task.id },
        h("td", null, h("b", null, task.kind), " ", h("span", { class: "dim" }, task.detail || ""), task.error ? h("p", { class: "trouble small" }, task.error) : null),
        h("td", null, badge({ completed: "ok", refused: "warn", failed: "error" }[task.status] || "run", task.status)),
        h("td", { class: "number" }, duration(task.seconds)))))))
      : empty("Nothing in the background", "Loads and moves appear here while they run."));
}
