// Conversations, kept in this browser alone.

const KEY = "vramancer.conversations";
const MOST = 100;

export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) || "[]");
    return Array.isArray(kept) ? kept.filter(isOne) : [];
  } catch {
    return [];
  }
}

function isOne(item) {
  return item && typeof item.id === "string" && Array.isArray(item.messages) && item.messages.every((message) => typeof message.content === "string" && ["user", "assistant"].includes(message.role));
}

// Keeps the newest; the oldest give way where the browser has no more room. Returns whether it could keep any.
export function save(conversations) {
  let kept = conversations.filter((one) => one.messages.length).slice(0, MOST);
  while (true) {
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
      return true;
    } catch {
      if (kept.length <= 1) return false;
      kept = kept.slice(0, Math.floor(kept.length / 2));
    }
  }
}

export function create() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", system: "", created: Date.now(), messages: [] };
}

export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return conversation.title || first?.content.trim().split("\n")[0].slice(0, 60) || "New conversation";
}

export function toMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system) parts.push(`> ${conversation.system.replace(/\n/g, "\n> ")}`);
  for (const message of conversation.messages) parts.push(`## ${message.role === "user" ? "You" : message.model || "Assistant"}`, message.content);
  return parts.join("\n\n") + "\n";
}

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
