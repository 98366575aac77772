// The server's state as this page knows it, and who wants to hear of changes.

const KEPT = 300;

export const store = {
  state: null,       // the snapshot; null until the first one
  status: "opening", // opening, live, lost, full
  message: "",
  since: 0,          // when the connection was lost
  number: 0,
  history: [],       // [time, tok/s, running, waiting, first token p50 p95 p99, between tokens p50 p95 p99]
  rates: {},         // what is computed from two looks: busy share by stage
  csrf: "",
  version: "",
};

const listeners = new Set();
let planned = false;

export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

// Have everybody draw again, once, before the next frame. Hidden pages have no frames, and nobody to see them.
export function changed() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    for (const listener of listeners) listener();
  });
}

// Changes in their order: `[path, value]` sets what is at a path, `[path]` takes it out. Returns the changed state.
export function patched(state, patch) {
  let root = state;
  for (const [path, ...value] of patch) {
    if (!path.length) {
      root = value[0];
      continue;
    }
    let at = root;
    for (const key of path.slice(0, -1)) at = at[key];
    const last = path[path.length - 1];
    if (value.length) at[last] = value[0];
    else delete at[last];
  }
  return root;
}

export function sample(state) {
  const batcher = state.batcher || {};
  const latency = batcher.latency || {};
  const point = [state.time, batcher.tokens_per_second ?? null, batcher.running ?? null, batcher.waiting ?? null];
  for (const kind of ["first_token", "between_tokens"]) {
    for (const name of ["p50", "p95", "p99"]) point.push(latency[kind]?.[name] ?? null);
  }
  return point;
}

// Returns false for news that do not follow what is known: then the whole has to come again.
export function hear(name, data) {
  const before = store.state && busyOf(store.state);
  if (name === "snapshot") {
    store.state = data.state;
    const known = new Set(data.history.map((point) => point[0]));
    store.history = [...store.history.filter((point) => !known.has(point[0])), ...data.history].slice(-KEPT);
    store.history.sort((a, b) => a[0] - b[0]);
  } else if (name === "patch") {
    if (!store.state || data.number !== store.number + 1) return false;
    store.state = patched(store.state, data.patch);
    store.history.push(sample(store.state));
    if (store.history.length > KEPT) store.history.shift();
  } else {
    return true;
  }
  store.number = data.number;
  store.rates = rates(before, busyOf(store.state));
  changed();
  return true;
}

function busyOf(state) {
  const stages = state.pipeline?.stages || [];
  return { time: state.time, stages: stages.map((stage) => [stage.device, stage.busy_seconds, stage.predicted_seconds]) };
}

const looks = [];

// The share of the last seconds that each stage was busy, and what was predicted for it.
function rates(before, now) {
  if (before && before.stages.length !== now.stages.length) looks.length = 0;
  looks.push(now);
  while (looks.length > 6) looks.shift();
  const first = looks[0];
  const elapsed = now.time - first.time;
  if (elapsed < 0.5) return store.rates;
  return Object.fromEntries(now.stages.map(([device, busy, predicted], index) => {
    const [, was, predictedWas] = first.stages[index] || [];
    if (was === undefined || busy < was) return [index, null];
    const expected = predicted === null || predictedWas === null ? null : (predicted - predictedWas) / elapsed;
    return [index, { device, busy: Math.min(1, (busy - was) / elapsed), predicted: expected }];
  }));
}
