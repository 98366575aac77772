// OpenAI's client for JavaScript.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CITIES, CITY, GREETING, QUESTION, TOLD, check, hoped, inCities, same, served, whole } from "./common.mjs";

const demo = served("demo"), scripted = served("scripted");
const client = new OpenAI({ baseURL: `${demo.url}/v1`, apiKey: demo.token, maxRetries: 0 });
const other = new OpenAI({ baseURL: `${scripted.url}/v1`, apiKey: scripted.token, maxRetries: 0 });
const asked = [{ role: "user", content: QUESTION }], rain = [{ role: "user", content: "What is the weather in Oslo?" }];
const weather = { name: "weather", description: "Says what the weather in a city is.", parameters: CITY };
const tools = [{ type: "function", function: weather }];
const limit = { max_tokens: 1000, temperature: 0 };
const City = z.object({ city: z.enum(CITIES) });

await check("chat", "demo", false, async () => {
  const answer = await client.chat.completions.create({ model: demo.model, messages: asked, ...limit });
  return hoped(answer.choices[0].message.content);
});
await check("chat streamed", "demo", false, async () => {
  const stream = client.chat.completions.stream({
    model: demo.model, messages: asked, stream_options: { include_usage: true }, ...limit,
  });
  let text = "";
  stream.on("content", (delta) => { text += delta; });
  const final = await stream.finalChatCompletion();
  same(text, final.choices[0].message.content);
  if (!final.usage.completion_tokens) throw new Error("no usage");
  return hoped(text);
});
await check("tools, named", "demo", true, async () => {
  const tool_choice = { type: "function", function: { name: "weather" } };
  const { choices: [choice] } = await client.chat.completions.create({
    model: demo.model, messages: rain, tools, tool_choice, ...limit,
  });
  whole(choice.finish_reason, "tool_calls");
  return inCities(choice.message.tool_calls[0].function.arguments);
});
await check("tools, required, streamed", "demo", true, async () => {
  const final = await client.chat.completions.stream({
    model: demo.model, messages: rain, tools, tool_choice: "required", parallel_tool_calls: false, ...limit,
  }).finalChatCompletion();
  whole(final.choices[0].finish_reason, "tool_calls");
  return inCities(final.choices[0].message.tool_calls[0].function.arguments);
});
await check("runTools", "scripted", false, async () => {
  let given;
  const run = (args) => { given = args; return "rain"; };
  const runner = other.chat.completions.runTools({
    model: scripted.model, messages: rain,
    tools: [{ type: "function", function: { ...weather, parse: JSON.parse, function: run } }],
  });
  same(await runner.finalContent(), TOLD);
  return inCities(given);
});
await check("runTools, streamed", "scripted", false, async () => {
  let given;
  const runner = other.chat.completions.runTools({
    model: scripted.model, messages: rain, stream: true,
    tools: [{ type: "function", function: { ...weather, parse: JSON.parse, function: (a) => { given = a; return "rain"; } } }],
  });
  same(await runner.finalContent(), TOLD);
  return inCities(given);
});
await check("chat.completions.parse", "demo", true, async () => {
  const answer = await client.chat.completions.parse({
    model: demo.model, messages: rain, response_format: zodResponseFormat(City, "city"), ...limit,
  });
  return answer.choices[0].message.parsed.city;
});
await check("parse, strict tool", "demo", true, async () => {
  const answer = await client.chat.completions.parse({
    model: demo.model, messages: rain, tools: [zodFunction({ name: "weather", parameters: City })],
    tool_choice: "required", parallel_tool_calls: false, ...limit,
  });
  return answer.choices[0].message.tool_calls[0].function.parsed_arguments.city;
});
await check("embeddings", "demo", false, async () => {
  const { data } = await client.embeddings.create({ model: demo.embedding, input: ["one text", "two texts"] });
  same(data.length, 2);
  return `${data[0].embedding.length} numbers`;
});
await check("responses", "demo", false, async () => {
  const answer = await client.responses.create({ model: demo.model, input: asked, temperature: 0 });
  return hoped(answer.output_text);
});
await check("responses streamed, tools", "scripted", false, async () => {
  const stream = other.responses.stream({
    model: scripted.model, input: rain, tools: [{ type: "function", ...weather, strict: false }],
  });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  same([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
  const final = await stream.finalResponse();
  return inCities(final.output.at(-1).arguments);
});
await check("responses.parse", "demo", true, async () => {
  const answer = await client.responses.parse({
    model: demo.model, input: rain, text: { format: zodTextFormat(City, "city") }, max_output_tokens: 1000,
  });
  return answer.output_parsed.city;
});
await check("responses in the background", "scripted", false, async () => {
  let answer = await other.responses.create({ model: scripted.model, input: asked, background: true });
  same(answer.status, "queued");
  while (["queued", "in_progress"].includes(answer.status)) answer = await other.responses.retrieve(answer.id);
  return same(answer.output_text, GREETING);
});
