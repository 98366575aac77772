// Numbers for people.

export function bytes(value) {
  if (value == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let number = value, unit = 0;
  while (number >= 1000 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return `${unit === 0 ? number : digits(number)} ${units[unit]}`;
}

export function rate(value) {
  if (value == null) return "not measured";
  return value < 1e9 ? `${digits(value / 1e6)} MB/s` : `${digits(value / 1e9)} GB/s`;
}

export function plural(number, one, many = `${one}s`) {
  return `${whole(number)} ${number === 1 ? one : many}`;
}

// Three significant digits, as many places as that takes.
export function digits(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function tokens(value) {
  return value == null ? "–" : value >= 100 ? value.toFixed(0) : value.toFixed(1);
}

export function whole(value) {
  return value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: 0 });
}

export function percent(share) {
  return share == null || !Number.isFinite(share) ? "–" : `${Math.round(share * 100)} %`;
}

export function count(value) {
  for (const [unit, name] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (value >= unit) return `${digits(value / unit)} ${name}`;
  }
  return String(value);
}

export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// A latency: milliseconds below a second.
export function latency(seconds) {
  if (seconds == null) return "–";
  return seconds < 1 ? `${digits(seconds * 1000)} ms` : `${digits(seconds)} s`;
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

export const TIERS = {
  L1: "Devices", L2: "Other devices", L3: "Main memory", L4: "Other node", L5: "Disk", L6: "Remote",
};
