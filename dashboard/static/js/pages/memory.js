// Who holds what: devices and what they lend, then the tiers below with their blocks.

import { h } from "../vdom.js";
import { changed, store } from "../store.js";
import { call } from "../api.js";
import { arrows, deviceBar, flows, reading } from "../devices.js";
import { meter } from "../charts.js";
import { attempt, badge, button, confirm, empty, locked, panel } from "../ui.js";
import { bytes, percent, plural, rate, TIERS, whole } from "../format.js";

export const title = "Memory";

const local = { block: null, busy: false, tops: {}, height: 0 };

export function view() {
  const { memory, pipeline } = store.state;
  const devices = memory?.devices || [];
  const found = flows(memory?.leases);
  return [
    h("header", { class: "page-head" }, h("h1", null, "Memory"), h("p", { class: "dim" }, kvLine(memory))),
    panel("Devices", { id: "memory-devices", note: "Weights, own KV, what is lent and what is free" },
      devices.length
        ? h("div", { class: found.length ? "lease-frame has-leases" : "lease-frame", ref: watchSize },
          h("ul", { class: "devices" }, devices.map((device) => deviceBar(device, memory.kv_blocks, pipeline))),
          found.length ? arrows(found, local.tops, local.height) : null)
        : empty("No device in use", "Load a model to see what holds what."),
      devices.length ? lending(devices, found) : null,
      readings()),
    panel("Tiers below the devices", { id: "tiers", note: "KV that has no place on a device" },
      memory?.tiers?.length ? memory.tiers.map((tier, index) => tierView(tier, memory.tiers, index))
        : empty("No tier is in use", "memory.host_bytes, memory.disk_path and memory.remote_url make tiers.")),
    blockPanel(memory),
  ];
}

function kvLine(memory) {
  const blocks = memory?.kv_blocks;
  if (!blocks) return "";
  const size = blocks.size_tokens;
  return `KV cache for ${whole(blocks.with_memory * size)} tokens: ${whole((blocks.with_memory - blocks.free) * size)} in use, ${whole(blocks.cached * size)} kept for prompts that begin alike`;
}

// Arrows need to know where the bars are.
function watchSize(frame) {
  const measure = () => {
    const top = frame.getBoundingClientRect().top;
    const tops = {};
    for (const row of frame.querySelectorAll("[data-device]")) {
      const box = row.querySelector(".bar").getBoundingClientRect();
      tops[row.dataset.device] = Math.round(box.top - top + box.height / 2);
    }
    const height = Math.round(frame.getBoundingClientRect().height);
    if (JSON.stringify([tops, height]) !== JSON.stringify([local.tops, local.height])) {
      Object.assign(local, { tops, height });
      changed();
    }
  };
  new ResizeObserver(measure).observe(frame);
}

function lending(devices, found) {
  const reason = local.busy ? "This takes a moment." : locked();
  return h("div", { class: "lending" },
    h("h3", null, "Lending"),
    found.length
      ? h("ul", { class: "plain" }, found.map((flow) => h("li", { key: flow.key },
        h("b", null, flow.lender), " lends ", h("b", null, flow.borrower), ` ${bytes(flow.bytes)}: ${plural(flow.blocks, "block")} in ${plural(flow.leases, "lease")}, ${[...flow.states].join(", ")}`)))
      : h("p", { class: "dim" }, "No device borrows at the moment."),
    h("div", { class: "actions" }, devices.filter((device) => device.lent_bytes > 0).map((device) => button(`Take back from ${device.name}`, () => reclaim(device.name), { kind: "small", reason }))),
    h("details", { class: "dim" }, h("summary", null, "Have a device lend again that took everything back"),
      h("div", { class: "actions" }, devices.map((device) => button(`Let ${device.name} lend again`, () => lend(device.name), { kind: "small", reason })))));
}

async function reclaim(device) {
  if (!(await confirm(`Take back what ${device} lent?`, "Requests go on; their blocks move elsewhere. The device lends no more until it is told to.", "Take back"))) return;
  await change(() => call("POST", "/api/memory/reclaim", { device }), (answer) => `${bytes(answer.bytes)} come back to ${device}.`);
}

const lend = (device) => change(() => call("POST", "/api/memory/lend", { device }), (answer) => `${device} lends again; ${bytes(answer.bytes)} can be lent now.`);

async function change(work, said) {
  local.busy = true;
  changed();
  await attempt(said, work);
  local.busy = false;
  changed();
}

function readings() {
  const told = (store.state.gpu?.devices || []).map((device) => [device.name, reading(device)]).filter(([, facts]) => facts.length);
  return told.length ? h("div", { class: "readings" }, told.map(([name, facts]) => h("div", { key: name }, h("h3", null, name),
    h("dl", null, facts.map(([what, value]) => h("div", { key: what }, h("dt", null, what), h("dd", null, value))))))) : null;
}

function tierView(tier, tiers, index) {
  const below = tiers[index + 1];
  const moves = tier.moves.map((move) => `${plural(move.blocks, move.kind)} from ${(TIERS[move.from] || move.from).toLowerCase()} to ${move.to ? (TIERS[move.to] || move.to).toLowerCase() : "nowhere"}`);
  return h("section", { class: "tier", key: tier.tier, "aria-label": TIERS[tier.tier] || tier.tier },
    h("div", { class: "tier-head" }, h("h3", null, TIERS[tier.tier] || tier.tier), h("span", { class: "dim" }, [tier.medium, tier.codec !== "none" ? tier.codec : null].filter(Boolean).join(", ")),
      tier.stopped ? badge("warn", tier.stopped) : null,
      h("span", { class: "device-use" }, h("b", null, bytes(tier.used_bytes)), ` of ${bytes(tier.capacity_bytes)}`)),
    meter(tier.used_bytes / tier.capacity_bytes, `${TIERS[tier.tier] || tier.tier} in use`, "tier-meter"),
    h("dl", { class: "facts" }, [
      ["Blocks", whole(tier.blocks)],
      ["Found", tier.hits + tier.misses ? `${percent(tier.hits / (tier.hits + tier.misses))} of ${whole(tier.hits + tier.misses)}` : "never looked up"],
      ["Reads", rate(tier.read_bytes_per_second)], ["Writes", rate(tier.write_bytes_per_second)],
    ].map(([name, value]) => h("div", { key: name }, h("dt", null, name), h("dd", null, value)))),
    moves.length ? h("p", { class: "dim small" }, moves.join("; ")) : null,
    tier.hottest.length ? heat(tier, below) : h("p", { class: "dim" }, "No blocks here yet."));
}

export function heatOf(hotness) {
  return hotness <= 0.05 ? 0 : hotness < 0.25 ? 1 : hotness < 0.5 ? 2 : hotness < 1 ? 3 : hotness < 2 ? 4 : 5;
}

function heat(tier) {
  const name = TIERS[tier.tier] || tier.tier;
  const more = tier.blocks - tier.hottest.length;
  const inside = local.block?.tier === tier.tier && tier.hottest.some((block) => block.block === local.block.hash);
  return h("div", null,
    h("div", { class: "heat", role: "group", "aria-label": `Hottest blocks of ${name}`, onkeydown: moveFocus },
      tier.hottest.map((block, index) => {
        const chosen = inside && local.block.hash === block.block;
        return h("button", {
          key: block.block, type: "button", class: `cell heat-${heatOf(block.hotness)}${block.pinned ? " pinned" : ""}`,
          tabindex: chosen || (!inside && index === 0) ? 0 : -1, "aria-pressed": String(chosen),
          "aria-label": `Block ${block.block.slice(0, 8)}, hotness ${block.hotness.toFixed(2)}${block.pinned ? ", in use" : ""}`,
          title: `${block.block.slice(0, 12)}…  hotness ${block.hotness.toFixed(2)}`,
          onclick: () => { local.block = chosen ? null : { tier: tier.tier, hash: block.block }; changed(); },
        });
      })),
    h("p", { class: "heat-scale", "aria-hidden": "true" }, "cold", [0, 1, 2, 3, 4, 5].map((level) => h("i", { key: level, class: `cell heat-${level}` })), "hot",
      more > 0 ? h("span", null, `and ${whole(more)} cooler`) : null));
}

function moveFocus(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined) return;
  const cells = [...event.currentTarget.children].filter((cell) => cell.tagName === "BUTTON");
  const columns = Math.max(1, cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length);
  const vertical = event.key === "ArrowDown" || event.key === "ArrowUp";
  const at = cells.indexOf(document.activeElement);
  const to = Math.min(cells.length - 1, Math.max(0, at + (vertical ? step * columns : step)));
  event.preventDefault();
  cells.forEach((cell, index) => { cell.tabIndex = index === to ? 0 : -1; });
  cells[to].focus();
}

function blockPanel(memory) {
  if (!local.block) return null;
  const { tier: name, hash } = local.block;
  const tiers = memory?.tiers || [];
  const holders = tiers.filter((tier) => tier.hottest.some((block) => block.block === hash));
  const block = holders[0]?.hottest.find((one) => one.block === hash);
  const index = tiers.findIndex((tier) => tier.tier === name);
  const reason = local.busy ? "This takes a moment." : locked();
  const below = tiers.slice(index + 1)[0];
  return h("aside", { class: "sheet", "aria-label": "Chosen block" },
    h("div", { class: "sheet-head" }, h("h2", null, "Block"), h("button", { type: "button", class: "button quiet", onclick: () => { local.block = null; changed(); } }, "Close")),
    h("p", { class: "mono" }, hash),
    h("p", { "aria-live": "polite" }, holders.length ? `In ${holders.map((tier) => (TIERS[tier.tier] || tier.tier).toLowerCase()).join(" and ")}, hotness ${block.hotness.toFixed(2)}${block.pinned ? ", in use" : ""}.` : "No longer among the hottest of any tier."),
    h("div", { class: "actions" },
      button("Promote to main memory", () => move(hash, "promote"), { reason: reason || (name === "L3" ? "It is in main memory already." : null) }),
      button(below ? `Demote to ${(TIERS[below.tier] || below.tier).toLowerCase()}` : "Demote", () => move(hash, "demote"), { reason: reason || (name !== "L3" ? "Only blocks of main memory can be sent down." : below ? null : "There is no tier below.") })));
}

async function move(hash, which) {
  await change(() => call("POST", `/api/memory/blocks/${hash}/${which}`), `Block ${hash.slice(0, 8)} is ${which}d.`);
  const to = which === "promote" ? "L3" : store.state.memory?.tiers?.[1]?.tier;
  if (local.block?.hash === hash && to) local.block = { tier: to, hash };
  changed();
}

