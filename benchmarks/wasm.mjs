// node wasm.mjs MODULES MODEL PROMPT TOKENS: decodes greedily on WebAssembly, on one thread, in the session that the page of
// examples/browser makes. Prints the milliseconds of CPU time per token and the bytes of memory.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const [modules, model, prompt, tokens] = process.argv.slice(2);
const ort = await import(pathToFileURL(`${modules}/onnxruntime-web/dist/ort.wasm.min.mjs`));
ort.env.wasm.numThreads = 1;
const options = { executionProviders: ["wasm"], extra: { session: { disable_quant_qdq: "1" } } };
const session = await ort.InferenceSession.create(await readFile(model), options);

const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

let cache = {};
for (const { name, shape } of session.inputMetadata) {
  if (name.startsWith("past_key_values")) cache[name] = new ort.Tensor("float32", [], [1, shape[1], 0, shape[3]]);
}

/** The likeliest token after ids, which come after so many that the cache has seen. */
async function next(ids, seen) {
  const mask = row(Array(seen + ids.length).fill(1));
  const positions = row(ids.map((_, index) => seen + index));
  const feed = { ...cache, input_ids: row(ids), attention_mask: mask, position_ids: positions };
  const { logits, ...made } = await session.run(feed);
  cache = {};
  for (const [name, tensor] of Object.entries(made)) cache[name.replace("present", "past_key_values")] = tensor;
  const last = logits.data.subarray(-logits.dims.at(-1));
  return last.reduce((best, value, token) => (value > last[best] ? token : best), 0);
}

const given = JSON.parse(prompt);
let token = await next(given, 0);
const before = process.cpuUsage();
for (let step = 0; step < Number(tokens); step++) token = await next([token], given.length + step);
const { user, system } = process.cpuUsage(before);
const memory = process.resourceUsage().maxRSS * 1024;
console.log(JSON.stringify({ milliseconds: (user + system) / 1000 / Number(tokens), memory }));
