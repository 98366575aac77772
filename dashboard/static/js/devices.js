// What devices hold, as bars; who lends to whom, drawn between them.

import { h } from "./vdom.js";
import { bar, legend } from "./charts.js";
import { bytes, percent, digits } from "./format.js";

export function parts(device, blocks) {
  const own = device.own_kv_bytes;
  const backed = blocks?.with_memory || 0;
  const used = backed ? (own * (backed - blocks.free)) / backed : 0;
  const cached = backed ? (own * blocks.cached) / backed : 0;
  const each = [
    ["Weights", device.weights_bytes, "weights"],
    ["KV in use", used, "kv-used"],
    ["KV cached", cached, "kv-cached"],
    ["KV empty", Math.max(0, own - used - cached), "kv-empty"],
    ["Lent", device.lent_bytes, "lent"],
    ["Workspace", device.other_bytes, "other"],
    ["Free", device.free_bytes, "free"],
  ];
  return each.map(([name, value, kind]) => ({ name, value, kind, title: `${name}: ${bytes(value)}` }));
}

export function deviceBar(device, blocks, memory) {
  const found = parts(device, blocks).filter((part) => part.value > 0);
  const used = device.limit_bytes - device.free_bytes;
  const label = `${device.name}: ${found.map((part) => `${part.name} ${bytes(part.value)}`).join(", ")}`;
  const layers = (memory?.stages || []).filter((stage) => stage.device === device.name);
  return h("li", { key: device.name, class: "device", "data-device": device.name },
    h("div", { class: "device-head" }, h("h3", null, device.name),
      h("span", { class: "dim" }, layers.length ? layers.map((stage) => `layers ${stage.layers[0]}–${stage.layers[1]}`).join(", ") : "no layers"),
      h("span", { class: "device-use" }, h("b", null, bytes(used)), ` of ${bytes(device.limit_bytes)}`)),
    bar(found, device.limit_bytes, label),
    legend([...found.map((part) => ({ ...part, text: bytes(part.value) })),
      device.borrowed_bytes ? { name: "Borrowed elsewhere", kind: "borrowed", text: bytes(device.borrowed_bytes) } : null].filter(Boolean)));
}

// What the card itself says, as far as it does.
export function reading(gpu) {
  const told = gpu?.reading;
  if (!told) return [];
  const facts = [];
  if (told.utilization != null) facts.push(["Busy", percent(told.utilization)]);
  if (told.temperature_c != null) facts.push(["Temperature", `${digits(told.temperature_c)} °C`]);
  if (told.power_w != null) facts.push(["Power", `${digits(told.power_w)} W${told.power_limit_w ? ` of ${digits(told.power_limit_w)} W` : ""}`]);
  if (told.pcie_generation != null) facts.push(["PCIe", `${told.pcie_generation} × ${told.pcie_width ?? "?"}`]);
  if (told.other_bytes) facts.push(["Other programs", bytes(told.other_bytes)]);
  if (told.throttling?.length) facts.push(["Throttled", told.throttling.join(", ")]);
  return facts;
}

// Leases between the same two devices, together.
export function flows(leases) {
  const found = new Map();
  for (const lease of leases || []) {
    const key = `${lease.lender}>${lease.borrower}`;
    const flow = found.get(key) || { key, lender: lease.lender, borrower: lease.borrower, bytes: 0, blocks: 0, leases: 0, states: new Set() };
    flow.bytes += lease.bytes;
    flow.blocks += lease.blocks;
    flow.leases += 1;
    flow.states.add(lease.state);
    found.set(key, flow);
  }
  return [...found.values()];
}

// Arrows from lenders to borrowers at the side of the list; `tops` are the middles of the devices' bars, by name.
export function arrows(found, tops, height) {
  const width = 64;
  return h("svg", { class: "lease-lines", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    found.map((flow, index) => {
      const from = tops[flow.lender], to = tops[flow.borrower];
      if (from == null || to == null) return null;
      const bend = Math.min(width - 6, 26 + 14 * index);
      return h("g", { key: flow.key, class: "lease" },
        h("path", { d: `M2 ${from}C${bend} ${from} ${bend} ${to} 10 ${to}` }),
        h("path", { class: "head", d: `M12 ${to - 5}L2 ${to}L12 ${to + 5}Z` }));
    }));
}
