// One answer of the model, as it comes.

import { ask, errorOf, events, toSignIn } from "./api.js";

// Streams into `message`: content, tokens, seconds to the first token and from it on; `told()` after each piece.
export async function answer({ model, messages, settings, message, signal, told }) {
  const begun = performance.now();
  let first = null;
  const body = { model, messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  for (const [name, value] of Object.entries(settings)) if (value !== null && value !== "") body[name] = value;
  const response = await ask("POST", "/v1/chat/completions", body, signal);
  if (response.status === 401) toSignIn();
  if (!response.ok) throw await errorOf(response);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    const now = performance.now();
    if (choice?.delta?.reasoning_content) first ??= now;
    if (choice?.delta?.content) {
      first ??= now;
      message.content += choice.delta.content;
    }
    if (event.usage) message.tokens = event.usage.completion_tokens;
    if (choice?.finish_reason) message.reason = choice.finish_reason;
    if (first !== null) {
      message.firstSeconds = (first - begun) / 1000;
      message.seconds = (now - first) / 1000;
    }
    told();
  }
  if (!message.reason) throw new Error("The answer ended too early.");
}

// Tokens per second after the first one.
export function speed(message) {
  return message.tokens > 1 && message.seconds > 0 ? (message.tokens - 1) / message.seconds : null;
}
