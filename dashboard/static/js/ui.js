// Parts that pages share: panels, badges, empty states, icons, notices, and asking before something is done.

import { h, render } from "./vdom.js";
import { store } from "./store.js";

const ICONS = {
  overview: "M3 12h4l3-8 4 16 3-8h4",
  memory: "M4 6h16v4H4zM4 14h16v4H4zM8 6v4M8 14v4",
  pipeline: "M3 8h5v8H3zM16 8h5v8h-5zM8 12h8M13 9l3 3-3 3",
  requests: "M4 6h16M4 12h16M4 18h10",
  cluster: "M12 4v5M12 9l-6 6M12 9l6 6M9 4h6v0M4 15h5v5H4zM15 15h5v5h-5z",
  models: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  chat: "M4 5h16v11H9l-5 4z",
  sun: "M12 8a4 4 0 100 8 4 4 0 000-8zM12 2v2M12 20v2M4.9 4.9l1.4 1.4M17.7 17.7l1.4 1.4M2 12h2M20 12h2M4.9 19.1l1.4-1.4M17.7 6.3l1.4-1.4",
  moon: "M20 14.5A8.5 8.5 0 119.5 4a7 7 0 0010.5 10.5z",
  out: "M14 4h5v16h-5M10 8l-4 4 4 4M6 12h9",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  stop: "M7 7h10v10H7z",
  send: "M5 12h13M12 6l6 6-6 6",
  again: "M20 11a8 8 0 10-2.3 6.3M20 5v6h-6",
  edit: "M4 20h4L19 9l-4-4L4 16z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  plus: "M12 5v14M5 12h14",
  down: "M12 4v12M7 11l5 5 5-5M5 20h14",
  ok: "M5 13l4 4 10-10",
  warn: "M12 4l9 16H3zM12 10v4M12 17v.5",
};

export function icon(name) {
  return h("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true", focusable: "false" },
    h("path", { d: ICONS[name] }));
}

export function panel(title, props, ...children) {
  const { id, actions, note, ...rest } = props || {};
  return h("section", { class: "panel", "aria-labelledby": id, ...rest },
    h("header", { class: "panel-head" }, h("h2", { id }, title), note ? h("p", { class: "note" }, note) : null,
      actions ? h("div", { class: "actions" }, actions) : null),
    children);
}

export function badge(kind, text) {
  const mark = { ok: "ok", warn: "warn", error: "close" }[kind];
  return h("span", { class: `badge ${kind}` }, mark ? icon(mark) : null, text);
}

export function empty(title, text, ...more) {
  return h("div", { class: "empty" }, h("p", { class: "empty-title" }, title), text ? h("p", null, text) : null, more);
}

export function skeleton(lines) {
  return h("div", { class: "skeleton", "aria-hidden": "true" },
    Array.from({ length: lines }, (_, index) => h("div", { key: index })));
}

export function button(label, onclick, props = {}) {
  const { iconName, kind = "", reason, ...rest } = props;
  return h("button", {
    type: "button", class: `button ${kind}`, onclick, ...rest,
    title: reason || rest.title, disabled: Boolean(rest.disabled || reason),
  }, iconName ? icon(iconName) : null, h("span", { class: iconName && rest["aria-label"] ? "hidden" : "" }, label));
}

// Why nothing can be changed now; null if it can.
export function locked() {
  if (store.state?.system?.read_only) return "The server is in read-only mode.";
  if (store.status !== "live") return "There is no connection to the server.";
  return null;
}

// What is wider than the screen is scrolled, also by keys.
export function wide(label, ...children) {
  return h("div", { class: "table-wrap", tabindex: 0, role: "group", "aria-label": label }, children);
}

export function field(label, control, help) {
  return h("label", { class: "field" }, h("span", null, label), control, help ? h("small", null, help) : null);
}

// -- notices: said to screen readers, shown for a while ----------------------------------------------------------

const notices = [];
let nextNotice = 0;

export function notify(text, kind = "ok") {
  const notice = { text, kind, id: nextNotice++ };
  notices.push(notice);
  if (notices.length > 4) notices.shift();
  drawNotices();
  setTimeout(() => drop(notice), kind === "error" ? 12000 : 5000);
}

function drop(notice) {
  const index = notices.indexOf(notice);
  if (index >= 0) notices.splice(index, 1);
  drawNotices();
}

function drawNotices() {
  render(document.getElementById("notices"), notices.map((notice) =>
    h("div", { key: notice.id, class: `notice ${notice.kind}` }, icon(notice.kind === "error" ? "warn" : "ok"),
      h("p", null, notice.text),
      h("button", { type: "button", class: "icon-button", "aria-label": "Dismiss", onclick: () => drop(notice) }, icon("close")))));
}

// Do something that takes a while, and say how it went.
export async function attempt(what, work) {
  try {
    const result = await work();
    if (what) notify(typeof what === "function" ? what(result) : what);
    return result;
  } catch (error) {
    notify(error.message, "error");
    return null;
  }
}

// -- asking ------------------------------------------------------------------------------------------------------

export function confirm(title, text, action, kind = "danger") {
  return new Promise((resolve) => {
    const dialog = document.getElementById("ask");
    const end = (answer) => { dialog.onclose = null; dialog.close(); resolve(answer); };
    dialog.onclose = () => resolve(false);
    render(dialog, h("h2", { id: "ask-title" }, title), h("p", null, text), h("div", { class: "actions" },
      button("Cancel", () => end(false)), button(action, () => end(true), { kind })));
    dialog.showModal();
  });
}

// Over plain http browsers have no clipboard but the old one.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "hidden";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) {
      notify("The browser does not let the page copy.", "error");
      return;
    }
  }
  notify("Copied.");
}
