// Vercel's AI SDK with its provider for servers that speak OpenAI's API.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { CITIES, GREETING, QUESTION, TOLD, check, hoped, inCities, same, served, whole } from "./common.mjs";

const provider = (server) => createOpenAICompatible({
  name: "vramancer", baseURL: `${server.url}/v1`, apiKey: server.token, supportsStructuredOutputs: true, includeUsage: true,
});
const demo = served("demo"), scripted = served("scripted");
const model = provider(demo)(demo.model), other = provider(scripted)(scripted.model);
const limit = { maxOutputTokens: 1000, temperature: 0, maxRetries: 0 };
const City = z.object({ city: z.enum(CITIES) });
const prompt = "What is the weather in Oslo?";
const weather = (seen) => tool({
  description: "Says what the weather in a city is.", inputSchema: City,
  execute: async (given) => { seen.push(given); return "rain"; },
});

await check("generateText", "demo", false, async () => {
  const answer = await generateText({ model, prompt: QUESTION, ...limit });
  whole(answer.finishReason, "stop");
  return hoped(answer.text);
});
await check("streamText, thoughts", "scripted", false, async () => {
  const answer = streamText({ model: other, prompt: QUESTION, maxRetries: 0 });
  let text = "", thoughts = "";
  for await (const part of answer.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "reasoning-delta") thoughts += part.text;
    if (part.type === "error") throw part.error;
  }
  same(thoughts, "It is a greeting.");
  const usage = await answer.usage;
  const thought = usage.outputTokenDetails?.reasoningTokens ?? usage.reasoningTokens;
  if (!(thought > 0)) throw new Error(`no reasoning tokens in ${JSON.stringify(usage)}`);
  return same(text, GREETING);
});
await check("generateObject", "demo", true, async () => {
  const answer = await generateObject({ model, schema: City, prompt, ...limit });
  return inCities(answer.object);
});
await check("streamObject", "demo", true, async () => {
  const answer = streamObject({ model, schema: City, prompt, ...limit });
  for await (const _ of answer.partialObjectStream);
  return inCities(await answer.object);
});
await check("generateText, Output.object", "demo", true, async () => {
  const answer = await generateText({ model, output: Output.object({ schema: City }), prompt, ...limit });
  return inCities(answer.output);
});
await check("tools, required", "demo", true, async () => {
  const answer = await generateText({
    model, prompt, tools: { weather: weather([]) }, toolChoice: "required", stopWhen: stepCountIs(1), ...limit,
  });
  whole(answer.finishReason, "tool-calls");
  return inCities(answer.toolCalls[0].input);
});
await check("tools, auto, two steps", "scripted", false, async () => {
  const seen = [];
  const answer = await generateText({
    model: other, prompt, tools: { weather: weather(seen) }, stopWhen: stepCountIs(3), maxRetries: 0,
  });
  inCities(seen[0]);
  return same(answer.text, TOLD);
});
await check("tools, auto, streamed, two steps", "scripted", false, async () => {
  const seen = [];
  const answer = streamText({
    model: other, prompt, tools: { weather: weather(seen) }, stopWhen: stepCountIs(3), maxRetries: 0,
  });
  const text = await answer.text;
  inCities(seen[0]);
  return same(text, TOLD);
});
await check("embedMany", "demo", false, async () => {
  const embedder = provider(demo).textEmbeddingModel?.(demo.embedding) ?? provider(demo).embeddingModel(demo.embedding);
  const { embeddings } = await embedMany({ model: embedder, values: ["one text", "two texts"] });
  return `${embeddings.length} of ${embeddings[0].length} numbers`;
});
