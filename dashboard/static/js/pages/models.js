// Which model serves, which others could, and changing it.

import { h } from "../vdom.js";
import { changed, store } from "../store.js";
import { call } from "../api.js";
import { badge, button, confirm, empty, field, locked, notify, panel, skeleton } from "../ui.js";
import { bytes, duration } from "../format.js";
import { tasks } from "./overview.js";

export const title = "Models";

const local = { list: null, trouble: "", form: { model: "", dtype: "", quantize: "", devices: "", length: "" }, job: null, error: "" };

export function enter() {
  refresh();
}

async function refresh() {
  try {
    local.list = await call("GET", "/api/models");
    local.trouble = "";
  } catch (error) {
    local.trouble = error.message;
  }
  changed();
}

let shownModel;

export function view() {
  const served = store.state.pipeline?.model?.name ?? null;
  if (shownModel !== undefined && shownModel !== served) refresh();  // somebody else has changed it
  shownModel = served;
  return [
    h("header", { class: "page-head" }, h("h1", null, "Models"), h("p", { class: "dim" }, served ? `${served} is served` : "No model is loaded")),
    progress(),
    panel("On this machine", { id: "models", actions: button("Look again", refresh, { kind: "quiet" }) },
      local.trouble ? h("p", { class: "alert error" }, local.trouble) : null,
      local.list ? list(local.list) : local.trouble ? null : skeleton(3)),
    panel("Load a model", { id: "load", note: "It replaces the one that serves now, once it is ready" }, form()),
    tasks(),
  ];
}

function list(found) {
  if (!found.data.length) return empty("No model was found", "Load one by its hub id or its directory.");
  return h("ul", { class: "models" }, found.data.map((model) => h("li", { key: model.path, class: "model" },
    h("div", null, h("h3", null, model.id), h("p", { class: "dim clip", title: model.path }, `${bytes(model.size_bytes)} · ${model.path}`)),
    model.loaded ? badge("ok", "Serving") : null,
    h("div", { class: "actions" }, model.loaded
      ? button("Unload", unload, { reason: busy(), kind: "danger-quiet" })
      : button("Load", () => load({ model: model.id }), { reason: busy(), "aria-label": `Load ${model.id}` })))));
}

function busy() {
  return local.job ? "Something is being loaded." : locked();
}

function form() {
  const typed = (name) => (event) => { local.form[name] = event.target.value; changed(); };
  return h("form", { class: "form", onsubmit: (event) => { event.preventDefault(); submit(); } },
    field("Model", h("input", { name: "model", value: local.form.model, oninput: typed("model"), placeholder: "owner/name or a directory", required: true, maxlength: 4096, autocomplete: "off", spellcheck: "false" }),
      "A hub id, or a directory with config.json and safetensors"),
    field("Number format", h("select", { name: "dtype", value: local.form.dtype, onchange: typed("dtype") },
      [["", "As the settings say"], ["auto", "The checkpoint's own"], ["bfloat16", "bfloat16"], ["float16", "float16"], ["float32", "float32"]].map(([value, text]) => h("option", { key: value, value }, text)))),
    field("Quantize", h("select", { name: "quantize", value: local.form.quantize, onchange: typed("quantize") },
      [["", "As the settings say"], ["none", "No"], ["int8", "int8"], ["int4", "int4"]].map(([value, text]) => h("option", { key: value, value }, text))), "While it is loaded; not for a model that is quantized already"),
    field("Longest context", h("input", { name: "length", type: "number", min: 1, value: local.form.length, oninput: typed("length"), placeholder: "the model's own" }), "Tokens of prompt and answer"),
    field("Devices", h("input", { name: "devices", value: local.form.devices, oninput: typed("devices"), placeholder: "as the settings say", autocomplete: "off", spellcheck: "false" }), "Such as cuda:0=24GiB,cuda:1=16GiB"),
    h("div", { class: "actions" }, h("button", { type: "submit", class: "button primary", disabled: Boolean(busy()), title: busy() }, "Load"),
      busy() ? h("span", { class: "dim" }, busy()) : null));
}

function submit() {
  const { model, dtype, quantize, devices, length } = local.form;
  if (!model.trim()) return;
  const wanted = { model: model.trim() };
  if (dtype) wanted.dtype = dtype;
  if (quantize) wanted.quantize = quantize;
  if (devices.trim()) wanted.devices = devices.trim();
  if (length) wanted.max_model_len = Number(length);
  load(wanted);
}

function progress() {
  return h("div", { "aria-live": "polite" },
    local.job ? h("section", { class: "panel job", "aria-label": "Under way" },
      h("p", null, h("b", null, local.job.what), ` for ${duration((Date.now() - local.job.begun) / 1000)}`),
      h("p", { class: "dim" }, taskLine() || "The model that serves now goes on until the new one is ready, if there is room for both."),
      h("div", { class: "meter running", role: "progressbar", "aria-label": local.job.what }, h("i"))) : null,
    local.error ? h("section", { class: "panel" }, h("p", { class: "alert error" }, h("b", null, "It was not loaded."), h("span", null, local.error)),
      button("Dismiss", () => { local.error = ""; changed(); }, { kind: "quiet" })) : null);
}

function taskLine() {
  const running = (store.state.tasks?.running || []).map((task) => `${task.kind} ${task.detail || ""}`.trim());
  return running.join(", ");
}

async function load(wanted) {
  const served = store.state.pipeline?.model?.name;
  if (served && !(await confirm(`Load ${wanted.model}?`, `It replaces ${served}. Requests that run get a moment to end; those that come later are for the new model.`, "Load", "primary"))) return;
  await run(`Loading ${wanted.model}`, () => call("POST", "/api/models/load", wanted), (answer) => `${answer.id} serves now.`);
}

async function unload() {
  const served = store.state.pipeline?.model?.name;
  if (!(await confirm(`Unload ${served}?`, "Running requests end first. Nothing is served until another model is loaded.", "Unload"))) return;
  await run(`Unloading ${served}`, () => call("POST", "/api/models/unload"), (answer) => `${answer.unloaded} was unloaded.`);
}

async function run(what, work, said) {
  local.job = { what, begun: Date.now() };
  local.error = "";
  const tick = setInterval(changed, 500);
  changed();
  try {
    notify(said(await work()));
  } catch (error) {
    local.error = error.message;
  }
  clearInterval(tick);
  local.job = null;
  refresh();
}
