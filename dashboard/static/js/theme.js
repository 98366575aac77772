// Dark or light: as the system says, unless somebody has chosen.

const KEY = "vramancer.theme";

export function chosen() {
  try {
    return localStorage.getItem(KEY) || "auto";
  } catch {
    return "auto";
  }
}

export function isDark() {
  const choice = chosen();
  return choice === "dark" || (choice === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
}

export function apply() {
  const choice = chosen();
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}

export function toggle() {
  try {
    localStorage.setItem(KEY, isDark() ? "light" : "dark");
  } catch { /* for this page only, then */ }
  apply();
}
