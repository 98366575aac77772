// A place to talk with the model. Conversations stay in this browser.

import { h } from "../vdom.js";
import { changed, store } from "../store.js";
import { answer, speed } from "../answerer.js";
import { create, download, load, save, titleOf, toMarkdown } from "../conversations.js";
import { markdown } from "../markdown.js";
import { button, confirm, copy, empty, field, notify } from "../ui.js";
import { latency, tokens, whole } from "../format.js";

export const title = "Chat";

const all = load();
const local = {
  current: all[0] || create(), draft: "", running: null, editing: null, edit: "",
  list: all.length > 0 && matchMedia("(min-width: 80rem)").matches, atEnd: true, log: null,
  settings: { temperature: "", max_tokens: "" },
};

export function view() {
  const model = store.state.pipeline?.model?.name;
  const { current } = local;
  return [
    h("header", { class: "page-head chat-page-head" }, h("h1", null, "Chat"), h("div", { class: "actions" },
      button("Conversations", () => { local.list = !local.list; changed(); }, { kind: "quiet", "aria-expanded": String(local.list), "aria-controls": "conversations" }),
      button("New", fresh, { kind: "quiet", iconName: "plus", disabled: !current.messages.length }))),
    h("div", { class: `chat${local.list ? " with-list" : ""}` },
      local.list ? conversations() : null,
      h("section", { class: "talk", "aria-label": "Conversation" },
        h("div", { class: "log", ref: watchLog, tabindex: 0, role: "log", "aria-label": "Messages", "aria-live": "off" },
          current.messages.length ? current.messages.map((message, index) => messageView(message, index)) : greeting(model)),
        h("p", { class: "hidden", "aria-live": "polite" }, local.running ? "The model is answering." : lastSaid(current)),
        composer(model))),
  ];
}

export function after() {
  if (local.log && local.atEnd) local.log.scrollTop = local.log.scrollHeight;
}

function watchLog(element) {
  local.log = element;
  element.addEventListener("scroll", () => { local.atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 40; });
}

function lastSaid(conversation) {
  const last = conversation.messages[conversation.messages.length - 1];
  return last?.role === "assistant" ? `Answer: ${last.content}` : "";
}

function greeting(model) {
  return empty(model ? `Ask ${model} something` : "No model is loaded", model ? "It answers from this server. The conversation is kept in this browser, and nowhere else." : "Load one first.",
    model ? h("div", { class: "suggestions" }, ["What is the capital of France?", "Tell me a short story.", "What does VRAMancer do?"].map((text) => h("button", { key: text, type: "button", class: "button", onclick: () => send(text) }, text)))
      : h("a", { class: "button primary", href: "#/models" }, "Load a model"));
}

function messageView(message, index) {
  const mine = message.role === "user";
  const running = local.running?.message === message;
  const last = index === local.current.messages.length - 1;
  if (local.editing === index) return editor(index);
  return h("article", { key: index, class: `message ${message.role}`, "aria-label": mine ? "You" : "Model" },
    h("p", { class: "who" }, mine ? "You" : message.model || "Model"),
    h("div", { class: "said" }, mine ? h("p", { class: "plain-text" }, message.content) : markdown(message.content, copy),
      running && !message.content ? h("p", { class: "thinking" }, "…") : null),
    message.error ? h("p", { class: "alert error", role: "alert" }, message.error) : null,
    h("div", { class: "message-foot" },
      mine ? null : h("span", { class: "dim" }, figures(message, running)),
      running ? null : [
        button("Copy", () => copy(message.content), { kind: "small quiet", iconName: "copy", "aria-label": mine ? "Copy question" : "Copy answer" }),
        mine ? button("Edit", () => { local.editing = index; local.edit = message.content; changed(); }, { kind: "small quiet", iconName: "edit", "aria-label": "Edit question", disabled: Boolean(local.running) }) : null,
        !mine && last ? button(message.error ? "Try again" : "Regenerate", () => again(), { kind: "small quiet", iconName: "again", "aria-label": message.error ? "Try again" : "Regenerate answer", disabled: Boolean(local.running) }) : null,
      ]));
}

function figures(message, running) {
  const parts = [];
  if (message.tokens) parts.push(`${whole(message.tokens)} tokens`);
  const rate = speed(message);
  if (rate) parts.push(`${tokens(rate)} tok/s`);
  if (message.firstSeconds != null) parts.push(`first after ${latency(message.firstSeconds)}`);
  if (!running && message.reason === "length") parts.push("cut off at the longest answer");
  if (!running && message.reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function editor(index) {
  const done = (text) => { local.editing = null; if (text !== undefined) resend(index, text); changed(); };
  return h("form", { key: index, class: "message user editing", onsubmit: (event) => { event.preventDefault(); done(local.edit); } },
    h("label", { class: "field" }, h("span", null, "Edit your question"), h("textarea", { rows: 3, value: local.edit, ref: (element) => setTimeout(() => element.focus()), oninput: (event) => { local.edit = event.target.value; }, onkeydown: (event) => { if (event.key === "Escape") done(); } })),
    h("div", { class: "actions" }, button("Keep it as it was", () => done(), { kind: "quiet" }), h("button", { type: "submit", class: "button primary" }, "Send again")));
}

function composer(model) {
  const reason = !model ? "No model is loaded." : store.status !== "live" ? "There is no connection to the server." : null;
  return h("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); if (!reason) send(local.draft); } },
    h("details", null, h("summary", null, "Settings of this conversation"), h("div", { class: "form" },
      field("Instructions", h("textarea", { rows: 2, value: local.current.system, placeholder: "How the model should answer", oninput: (event) => { local.current.system = event.target.value; keep(); } })),
      field("Temperature", h("input", { type: "number", min: 0, max: 2, step: 0.1, value: local.settings.temperature, placeholder: "the model's own", oninput: (event) => { local.settings.temperature = event.target.value; } })),
      field("Longest answer", h("input", { type: "number", min: 1, value: local.settings.max_tokens, placeholder: "as far as it goes", oninput: (event) => { local.settings.max_tokens = event.target.value; } }), "In tokens"))),
    h("div", { class: "composer-row" },
      h("label", { class: "hidden", for: "question" }, "Your question"),
      h("textarea", { id: "question", rows: 2, value: local.draft, placeholder: model ? `Ask ${model}` : "No model is loaded", oninput: (event) => { local.draft = event.target.value; changed(); },
        onkeydown: (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!reason) send(local.draft); } } }),
      local.running ? button("Stop", () => local.running.abort.abort(), { kind: "danger", iconName: "stop" })
        : h("button", { type: "submit", class: "button primary", disabled: Boolean(reason) || !local.draft.trim(), title: reason }, "Send")),
    h("p", { class: "dim small" }, reason || "Enter sends, Shift and Enter begins a new line"));
}

// -- talking -----------------------------------------------------------------------------------------------------

function send(text) {
  if (!text.trim() || local.running) return;
  local.current.messages.push({ role: "user", content: text.trim() });
  local.draft = "";
  generate();
}

function resend(index, text) {
  if (!text.trim() || local.running) return;
  local.current.messages.splice(index, Infinity, { role: "user", content: text.trim() });
  generate();
}

function again() {
  if (local.running) return;
  local.current.messages.pop();
  generate();
}

async function generate() {
  const { current } = local;
  const model = store.state.pipeline?.model?.name;
  const messages = current.messages.filter((message) => message.content && !(message.role === "assistant" && message.error)).map(({ role, content }) => ({ role, content }));
  if (current.system.trim()) messages.unshift({ role: "system", content: current.system.trim() });
  const message = { role: "assistant", content: "", model };
  const abort = new AbortController();
  current.messages.push(message);
  local.running = { message, abort };
  local.atEnd = true;
  if (!all.includes(current)) all.unshift(current);
  changed();
  const { temperature, max_tokens } = local.settings;
  const settings = { temperature: temperature === "" ? null : Number(temperature), max_tokens: max_tokens === "" ? null : Number(max_tokens) };
  try {
    await answer({ model, messages, settings, message, signal: abort.signal, told: changed });
  } catch (error) {
    if (error.name === "AbortError") message.reason = "stopped";
    else message.error = error.message;
  }
  local.running = null;
  keep();
  changed();
}

// -- conversations -----------------------------------------------------------------------------------------------

let warned = false;

function keep() {
  if (!save(all) && !warned) {
    warned = true;
    notify("This browser keeps no more: the conversation lasts as long as this page.", "error");
  }
}

function fresh() {
  local.running?.abort.abort();
  Object.assign(local, { current: create(), editing: null, atEnd: true });
  changed();
  document.getElementById("question")?.focus();
}

function conversations() {
  return h("aside", { class: "conversations", id: "conversations", "aria-label": "Conversations" },
    all.length ? h("ul", null, all.map((one) => h("li", { key: one.id },
      h("button", { type: "button", class: "conversation", "aria-current": one === local.current ? "true" : null, onclick: () => { local.running?.abort.abort(); Object.assign(local, { current: one, editing: null, atEnd: true }); changed(); } },
        h("b", null, titleOf(one)), h("small", null, `${one.messages.length} messages, ${new Date(one.created).toLocaleDateString("en-GB")}`)),
      button("Export", () => download(`${titleOf(one).replace(/[^\w-]+/g, "-").slice(0, 40)}.md`, toMarkdown(one), "text/markdown"), { kind: "small quiet", iconName: "down", "aria-label": `Export ${titleOf(one)}` }),
      button("Delete", () => remove(one), { kind: "small quiet", iconName: "trash", "aria-label": `Delete ${titleOf(one)}` }))))
      : h("p", { class: "dim" }, "No conversation is kept yet."),
    all.length ? h("div", { class: "actions" }, button("Export all", () => download("conversations.json", JSON.stringify(all, null, 2), "application/json"), { kind: "quiet" }), button("Delete all", removeAll, { kind: "danger-quiet" })) : null);
}

async function remove(one) {
  if (!(await confirm("Delete this conversation?", `“${titleOf(one)}” is kept nowhere else.`, "Delete"))) return;
  all.splice(all.indexOf(one), 1);
  if (one === local.current) fresh();
  save(all);
  changed();
}

async function removeAll() {
  if (!(await confirm("Delete all conversations?", "They are kept nowhere else.", "Delete all"))) return;
  all.length = 0;
  fresh();
  save(all);
  changed();
}
