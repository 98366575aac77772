// The machines that serve, with their devices and the links between these.

import { h } from "../vdom.js";
import { store } from "../store.js";
import { meter } from "../charts.js";
import { badge, empty, panel, wide } from "../ui.js";
import { bytes, digits, duration, percent, rate, whole } from "../format.js";

export const title = "Cluster";

export function view() {
  const { nodes, system, pipeline } = store.state;
  const found = nodes?.nodes || [];
  return [
    h("header", { class: "page-head" }, h("h1", null, "Cluster"),
      h("p", { class: "dim" }, nodes ? `${found.length} ${found.length === 1 ? "node" : "nodes"}, ${taken(nodes.discovery)}` : "")),
    panel("Nodes", { id: "nodes" }, found.length
      ? h("ul", { class: "nodes" }, found.map(nodeView))
      : empty("No node", "The server tells of none."),
      nodes?.offer ? h("p", { class: "offer" }, offered(nodes.offer)) : null),
    nodes?.left_out?.length ? leftOut(nodes.left_out) : null,
    transfers(pipeline?.transfers || []),
    system ? machine(system) : null,
  ];
}

// Whether machines may join, and where.
function taken(discovery) {
  if (!discovery || discovery.status === "disabled") return "no others are taken in (--cluster-master)";
  const how = discovery.status === "advertised" ? "found by themselves" : "told where it is";
  return `workers are taken in at ${discovery.address}:${discovery.port}, ${how}`;
}

function offered(offer) {
  const streams = Math.max(...Object.keys(offer.tokens_per_second).map(Number));
  return `All nodes together would make ${digits(offer.tokens_per_second[streams])} tokens/s of ${streams} streams, not ${digits(offer.now[streams])}. Pipeline, Move the model: every device.`;
}

function leftOut(found) {
  return panel("Left out", { id: "left-out", note: "Machines that were refused" }, h("ul", { class: "nodes" }, found.map((each, index) =>
    h("li", { key: `${index}-${each.address}`, class: "node" }, h("div", { class: "node-head" }, h("h3", null, each.name), h("span", { class: "tag" }, each.address)), h("p", { class: "dim" }, each.reason)))));
}

function nodeView(node) {
  const { link } = node;
  return h("li", { key: node.id, class: "node" },
    h("div", { class: "node-head" }, h("h3", null, node.hostname), node.roles.map((role) => h("span", { key: role, class: "tag" }, role)),
      node.status === "leaving" ? badge("warn", "Leaving") : null),
    h("p", { class: "dim small" }, [node.address, node.processor, node.system, link ? `${whole(link.latency_s * 1e6)} µs, ${rate(link.bytes_per_second)}` : null, link && link.kind !== "unknown" ? link.kind : null, link?.encrypted ? "encrypted" : null,
      node.lends_bytes ? `${bytes(node.lent_bytes)} of ${bytes(node.lends_bytes)} offered to blocks of KV` : null].filter(Boolean).join(" · ")),
    node.devices.length
      ? h("ul", { class: "chips" }, node.devices.map((device) => {
        const held = node.layers?.[device.name];
        const layers = held ? `layers ${held[0]}–${held[1]}` : "";
        return h("li", { key: device.name, class: "chip" }, h("b", null, device.name), h("span", { class: "dim" }, layers || "no layers"),
          meter(device.used_bytes / device.limit_bytes, `${device.name} memory in use`), h("span", { class: "dim small" }, `${bytes(device.used_bytes)} of ${bytes(device.limit_bytes)}`));
      }))
      : h("p", { class: "dim" }, "No device in use."));
}

function transfers(found) {
  return panel("Transfers", { id: "transfers", note: "Since the start" }, found.length
    ? wide("Transfers", h("table", null,
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "From"), h("th", { scope: "col" }, "To"), h("th", { scope: "col" }, "Way"),
        ["Copies", "Bytes", "Rate"].map((name) => h("th", { scope: "col", class: "number" }, name)))),
      h("tbody", null, found.map((link) => h("tr", { key: `${link.method}-${link.src}-${link.dst}` },
        h("td", null, link.src), h("td", null, link.dst), h("td", null, link.method),
        h("td", { class: "number" }, whole(link.ops)), h("td", { class: "number" }, bytes(link.bytes)), h("td", { class: "number" }, rate(link.bytes_per_second)))))))
    : empty("Nothing was copied", "What goes from device to device is counted here."));
}

function machine(system) {
  const { cpu, memory, disk, process } = system;
  return panel("This machine", { id: "machine", note: `${system.hostname}, ${system.platform}` }, h("div", { class: "gauges" },
    gauge("Processor", percent(cpu.utilization_percent / 100), `${cpu.count} threads, load ${cpu.load_average.map((load) => digits(load)).join(", ")}`, cpu.utilization_percent / 100),
    gauge("Main memory", bytes(memory.total_bytes - memory.available_bytes), `of ${bytes(memory.total_bytes)}`, memory.used_percent / 100),
    gauge("Disk", `${bytes(disk.free_bytes)} free`, `of ${bytes(disk.total_bytes)} at ${disk.path}`, disk.used_percent / 100),
    h("div", { class: "gauge" }, h("h3", null, "This process"), h("p", { class: "figure small" }, h("b", null, bytes(process.resident_bytes))),
      h("p", { class: "dim" }, `process ${process.pid}, ${process.threads} threads, up ${duration(process.uptime_s)}`),
      system.read_only ? badge("warn", "Read-only") : null)));
}

function gauge(name, value, detail, share) {
  return h("div", { class: "gauge" }, h("h3", null, name), h("p", { class: "figure small" }, h("b", null, value)), meter(share, name), h("p", { class: "dim" }, detail));
}
