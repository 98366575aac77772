// What the checks of all JavaScript clients share; see common.py, whose rules these are.
export const QUESTION = "What is the capital of France?";
export const CITIES = ["Oslo", "Lima", "Rome"];
export const CITY = {
  type: "object", properties: { city: { type: "string", enum: CITIES } }, required: ["city"], additionalProperties: false,
};
export const TOLD = "It rains in Oslo.";
export const GREETING = "Hello from the scripted model.";
const CUT_OFF = new Set(["LengthFinishReasonError", "Cut"]);
const MAX_DETAIL = 300;

export class Wit extends Error {}
export class Cut extends Error {}

// {url, model, token, embedding} of the server called demo or scripted.
export const served = (name) => JSON.parse(process.env[`CHECK_${name.toUpperCase()}`]);

// Runs a function against the server `on` and prints how it went.
export async function check(name, on, constrained, run) {
  let outcome = "ok", detail;
  try {
    detail = String(await run());
  } catch (error) {
    const wit = error instanceof Wit && !constrained;
    outcome = CUT_OFF.has(error.constructor.name) ? "length" : wit ? "wit" : "server";
    detail = `${error.constructor.name}: ${error.message}`;
  }
  detail = detail.split(/\s+/).join(" ").slice(0, MAX_DETAIL);
  console.log(`\n${JSON.stringify({ check: name, on, constrained, outcome, detail })}`);
}

export function same(found, expected) {
  const [left, right] = [JSON.stringify(found), JSON.stringify(expected)];
  if (left !== right) throw new Error(`${left} is not ${right}`);
  return left;
}

export function hoped(text, word = "Paris") {
  if (!text.includes(word)) throw new Wit(`${JSON.stringify(text)} has no ${word}`);
  return text;
}

export function whole(reason, ...reasons) {
  if (reason === "length") throw new Cut(reason);
  if (!reasons.includes(reason)) throw new Error(`it ended for ${reason}, not for ${reasons.join(" or ")}`);
}

export function inCities(args) {
  const given = typeof args === "string" ? JSON.parse(args) : args;
  if (Object.keys(given).join() !== "city" || !CITIES.includes(given.city)) throw new Error(JSON.stringify(given));
  return JSON.stringify(given);
}
