// Socket.IO 5 over Engine.IO 4, long polling alone: as much of the protocol as a page that only listens needs.

const PACKET_END = "\x1e";
const SILENCE_MS = 45000;  // the server says something every 20 s, if only that it is there
const LONGEST_WAIT_MS = 15000;

export class LiveSocket {
  // `headers()` go with every request; `on` has `event(name, data)`, `status(state, message)` and `signedOut()`.
  constructor(path, headers, on) {
    this.path = path;
    this.headers = headers;
    this.on = on;
    this.turn = 0;
    this.running = false;
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.turn += 1;
    this.failures = 0;
    this.loop(this.turn);
  }

  stop() {
    if (!this.running) return;
    this.running = false;
    this.turn += 1;
    if (this.sid) this.ask("POST", "1").catch(() => {});
    this.sid = null;
    this.abort?.abort();
    this.wake?.();
  }

  // Try again now instead of later.
  retry() {
    this.wake?.();
  }

  async loop(turn) {
    while (turn === this.turn) {
      try {
        await this.connect();
        while (turn === this.turn) await this.poll(turn);
      } catch (error) {
        if (turn !== this.turn) return;
        this.sid = null;
        if (error.status === 401) {
          this.on.signedOut();
          return;
        }
        this.failures += 1;
        this.on.status(error.status === 429 ? "full" : "lost", error.message);
        await this.wait(error.retryMs ?? Math.min(LONGEST_WAIT_MS, 500 * 2 ** this.failures));
      }
    }
  }

  wait(milliseconds) {
    return new Promise((resolve) => {
      const clock = setTimeout(resolve, milliseconds * (0.8 + 0.4 * Math.random()));
      this.wake = () => { clearTimeout(clock); resolve(); };
    });
  }

  async connect() {
    this.sid = null;
    const opened = await this.ask("GET");
    if (!opened.startsWith("0")) throw new Error("The server does not speak Socket.IO.");
    this.sid = JSON.parse(opened.split(PACKET_END)[0].slice(1)).sid;
    await this.ask("POST", "40");
  }

  async poll(turn) {
    const text = await this.ask("GET");
    for (const packet of text.split(PACKET_END)) {
      if (turn !== this.turn) return;
      if (packet === "2") await this.ask("POST", "3");
      else if (packet === "1") throw new Error("The server has ended the connection.");
      else if (packet.startsWith("40")) this.welcome();
      else if (packet.startsWith("42")) this.on.event(...JSON.parse(packet.slice(2)));
    }
  }

  welcome() {
    this.failures = 0;
    this.on.status("live", "");
  }

  async ask(method, body) {
    const abort = new AbortController();
    if (method === "GET") this.abort = abort;
    const clock = setTimeout(() => abort.abort(), SILENCE_MS);
    const query = new URLSearchParams({ EIO: "4", transport: "polling" });
    if (this.sid) query.set("sid", this.sid);
    try {
      const response = await fetch(`${this.path}?${query}`, {
        method, body, headers: this.headers(), signal: abort.signal, cache: "no-store", keepalive: body === "1",
      });
      const text = await response.text();
      if (!response.ok) throw refusal(response, text);
      return text;
    } finally {
      clearTimeout(clock);
    }
  }
}

function refusal(response, text) {
  let message = `The server answers ${response.status}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* something in between answered */ }
  const error = new Error(message);
  error.status = response.status;
  const after = Number(response.headers.get("Retry-After"));
  if (after > 0) error.retryMs = after * 1000;
  return error;
}
