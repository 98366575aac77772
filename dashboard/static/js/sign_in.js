// The page that asks for the token. It goes out in a header, and is kept nowhere.

import * as theme from "./theme.js";

theme.apply();

const form = document.getElementById("sign-in");
const field = document.getElementById("token");
const trouble = document.getElementById("trouble");
const submit = form.querySelector("button[type=submit]");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = field.value.trim();
  if (!token) return say("Enter the server's API token.");
  if (!/^[!-~]+$/.test(token)) return say("A token has printable ASCII characters only, and no spaces.");
  submit.disabled = true;
  try {
    const answer = await fetch("/dashboard/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
    if (answer.ok) {
      field.value = "";
      location.reload();
      return undefined;
    }
    say(await reason(answer));
  } catch {
    say("There is no answer from the server.");
  } finally {
    submit.disabled = false;
  }
  return undefined;
});

document.getElementById("show").addEventListener("click", (event) => {
  const shown = field.type === "text";
  field.type = shown ? "password" : "text";
  event.currentTarget.setAttribute("aria-pressed", String(!shown));
  field.focus();
});

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answers ${answer.status}.`;
  }
}

function say(text) {
  trouble.textContent = text;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}
