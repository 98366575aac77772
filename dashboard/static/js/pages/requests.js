// What runs and waits, and ending it.

import { h } from "../vdom.js";
import { changed, store } from "../store.js";
import { call } from "../api.js";
import { meter } from "../charts.js";
import { attempt, badge, button, confirm, empty, locked, panel, wide } from "../ui.js";
import { duration, whole } from "../format.js";
import { tasks } from "./overview.js";

export const title = "Requests";

const ending = new Set();

export function view() {
  const queue = store.state.queue;
  const shown = queue?.requests || [];
  for (const id of ending) if (!shown.some((request) => request.id === id)) ending.delete(id);
  const more = (queue?.unfinished || 0) - shown.length;
  return [
    h("header", { class: "page-head" }, h("h1", null, "Requests"),
      h("p", { class: "dim", "aria-live": "polite" }, queue ? `${whole(queue.running)} running, ${whole(queue.waiting)} waiting` : "")),
    queue ? panel("Queue", { id: "queue" }, h("div", { class: "gauges" },
      gauge("Sequences", queue.unfinished_sequences, queue.limit, "held by unfinished requests"),
      gauge("Prompt tokens", queue.prompt_tokens, queue.prompt_tokens_limit, "of all that run and wait"),
      h("div", { class: "gauge" }, h("h3", null, "Circuit breaker"), h("p", null, badge(queue.circuit_breaker.state === "closed" ? "ok" : "error", queue.circuit_breaker.state)),
        h("p", { class: "dim" }, queue.circuit_breaker.last_error || "no failed steps in a row")))) : null,
    panel("Unfinished requests", { id: "unfinished", note: "Oldest first" }, shown.length
      ? wide("Unfinished requests", h("table", { class: "requests" },
        h("thead", null, h("tr", null, h("th", { scope: "col" }, "Request"), h("th", { scope: "col" }, "State"), h("th", { scope: "col", class: "number" }, "Age"),
          h("th", { scope: "col", class: "number" }, "Prompt"), h("th", { scope: "col", class: "number" }, "Generated"), h("th", { scope: "col" }, h("span", { class: "hidden" }, "Actions")))),
        h("tbody", null, shown.map((request) => h("tr", { key: request.id },
          h("td", { class: "mono clip", title: request.id }, request.id),
          h("td", { "data-label": "State" }, badge(request.state === "running" ? "run" : "wait", request.state)),
          h("td", { class: "number", "data-label": "Age" }, duration(request.age_seconds)),
          h("td", { class: "number", "data-label": "Prompt" }, whole(request.prompt_tokens)), h("td", { class: "number", "data-label": "Generated" }, whole(request.generated_tokens)),
          h("td", { class: "number" }, button(ending.has(request.id) ? "Ending…" : "Cancel", () => end(request.id),
            { kind: "small", reason: ending.has(request.id) ? "It ends with its next step." : locked(), "aria-label": `Cancel request ${request.id}` })))))))
      : empty("Nothing runs", "Requests appear here from the moment they come in until their answer ends.")),
    more > 0 ? h("p", { class: "dim" }, `and ${whole(more)} more`) : null,
    tasks(),
  ];
}

function gauge(name, value, limit, detail) {
  return h("div", { class: "gauge" }, h("h3", null, name), h("p", { class: "figure small" }, h("b", null, whole(value)), h("span", null, `of ${whole(limit)}`)),
    meter((value || 0) / (limit || 1), name), h("p", { class: "dim" }, detail));
}

async function end(id) {
  if (!(await confirm("Cancel this request?", `${id} ends now; its client gets what there is by then.`, "Cancel the request"))) return;
  ending.add(id);
  changed();
  if (!(await attempt(`Request ${id} was cancelled.`, () => call("POST", `/api/requests/${encodeURIComponent(id)}/cancel`)))) ending.delete(id);
  changed();
}
