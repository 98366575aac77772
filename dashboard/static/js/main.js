// The page around the pages: what is shown, the connection, and keys.

import { h, render } from "./vdom.js";
import { changed, hear, store, subscribe } from "./store.js";
import { LiveSocket } from "./socket.js";
import { headers, openSession, signOut, toSignIn } from "./api.js";
import * as theme from "./theme.js";
import { button, icon, skeleton } from "./ui.js";
import { clock } from "./format.js";
import * as overview from "./pages/overview.js";
import * as memory from "./pages/memory.js";
import * as pipeline from "./pages/pipeline.js";
import * as requests from "./pages/requests.js";
import * as cluster from "./pages/cluster.js";
import * as models from "./pages/models.js";
import * as chat from "./pages/chat.js";

const PAGES = { overview, memory, pipeline, requests, cluster, models, chat };
const HIDDEN_MS = 60000;  // a page that nobody sees for so long watches no more

let current = null;

const socket = new LiveSocket("/socket.io/", headers, {
  event(name, data) {
    if (!hear(name, data)) {  // something is missing: begin anew
      socket.stop();
      socket.start();
    }
  },
  status(status, message) {
    if (status !== "live" && store.status === "live") store.since = Date.now() / 1000;
    Object.assign(store, { status, message });
    changed();
  },
  signedOut: toSignIn,
});

function route() {
  const name = location.hash.replace(/^#\//, "") || "overview";
  const next = PAGES[name] ? name : "overview";
  if (next === current) return;
  const first = current === null;
  current = next;
  document.title = `${PAGES[current].title} – VRAMancer`;
  const main = document.getElementById("main");
  main.dataset.page = current;
  PAGES[current].enter?.();
  draw();
  if (!first) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function draw() {
  render(document.getElementById("rail"), rail());
  render(document.getElementById("banner"), banner());
  const main = document.getElementById("main");
  document.body.dataset.status = store.status === "live" && !store.state?.trouble ? "live" : store.state ? "stale" : "opening";
  render(main, h("div", { key: current, class: `page page-${current}` }, store.state ? PAGES[current].view() : waiting()));
  PAGES[current].after?.();
}

function waiting() {
  return [h("header", { class: "page-head" }, h("h1", null, PAGES[current].title)),
    store.status === "opening" || store.status === "live" ? h("div", { "aria-busy": "true" }, h("p", { class: "hidden" }, "Loading"), skeleton(6)) : null];
}

function rail() {
  const waitingNumber = store.state?.queue?.unfinished;
  return [
    h("div", { class: "brand" }, h("span", { class: "mark", "aria-hidden": "true" }), h("span", { class: "brand-name" }, "VRAMancer")),
    h("ul", { class: "nav" }, Object.entries(PAGES).map(([name, page]) => h("li", { key: name },
      h("a", { href: `#/${name}`, "aria-current": name === current ? "page" : null }, icon(name), h("span", null, page.title),
        name === "requests" && waitingNumber ? h("b", { class: "pill" }, String(waitingNumber)) : null)))),
    h("div", { class: "rail-foot" },
      h("p", { class: `connection ${store.status}`, role: "status" }, h("i", { "aria-hidden": "true" }), { live: "Live", opening: "Connecting", lost: "Not connected", full: "Full" }[store.status]),
      h("button", { type: "button", class: "icon-button", "aria-label": theme.isDark() ? "Switch to light" : "Switch to dark", onclick: () => { theme.toggle(); changed(); } }, icon(theme.isDark() ? "sun" : "moon")),
      h("button", { type: "button", class: "icon-button", "aria-label": "Sign out", onclick: signOut }, icon("out"))),
  ];
}

function banner() {
  const trouble = store.state?.trouble;
  if (store.status === "lost") {
    return h("div", { class: "banner" }, icon("warn"), h("p", null, h("b", null, "No connection to the server"), store.since ? ` since ${clock(store.since)}. ` : ". ", store.state ? "What you see is how it was then. " : "", "Trying again…"),
      button("Try now", () => socket.retry(), { kind: "small" }));
  }
  if (store.status === "full") return h("div", { class: "banner" }, icon("warn"), h("p", null, store.message), button("Try now", () => socket.retry(), { kind: "small" }));
  if (trouble) return h("div", { class: "banner" }, icon("warn"), h("p", null, h("b", null, "The server does not tell its state. "), trouble));
  return null;
}

let hiddenSince = null;

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hiddenSince = setTimeout(() => socket.stop(), HIDDEN_MS);
  } else {
    clearTimeout(hiddenSince);
    socket.start();
  }
});
addEventListener("pagehide", () => socket.stop());
addEventListener("pageshow", (event) => { if (event.persisted) socket.start(); });
addEventListener("hashchange", route);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});

theme.apply();
subscribe(draw);
route();
try {
  await openSession();
  socket.start();
} catch (error) {
  Object.assign(store, { status: "lost", message: error.message });
  changed();
  setTimeout(toSignIn, 5000);
}
