// Calls to the API through the dashboard, with the session's header. Errors have the server's words.

import { store } from "./store.js";

const CSRF_HEADER = "X-Dashboard-Session";

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function headers() {
  return { [CSRF_HEADER]: store.csrf };
}

export function toSignIn() {
  location.reload();  // the page is the way to sign in for who is not
}

export async function openSession() {
  const found = await readJson(await fetch("/dashboard/session", { cache: "no-store" }));
  store.csrf = found.csrf;
  store.version = found.version || "";
}

export async function signOut() {
  await fetch("/dashboard/session", { method: "DELETE", headers: headers() });
  toSignIn();
}

export async function call(method, path, body) {
  return readJson(await ask(method, path, body));
}

export async function ask(method, path, body, signal) {
  const options = { method, headers: headers(), signal, cache: "no-store" };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  try {
    return await fetch(`/dashboard/call${path}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("There is no answer from the server.", 0, "no_answer");
  }
}

async function readJson(response) {
  if (response.status === 401) toSignIn();
  if (!response.ok) throw await errorOf(response);
  return response.status === 204 ? null : response.json();
}

export async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, response.status, error.code);
  } catch {
    return new ApiError(`The server answers ${response.status}.`, response.status, null);
  }
}

// The `data:` events of an answer that streams.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const text = line.slice(5).trim();
        if (text === "[DONE]") return;
        yield JSON.parse(text);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
