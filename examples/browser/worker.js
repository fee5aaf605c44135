// The language model, in a thread of its own so that the page stays alive while it thinks.
// Takes {prompt, tokens} and "stop"; answers {kind: "progress" | "ready" | "text" | "done" | "problem", ...}.
// A worker has no import map: the packages are named by their files.
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

const MODEL = "model/onnx/model_q4.onnx"; // as awq-onnx --target web -o FOLDER/ writes it
const DEVICES = {
  webgpu: {
    runtime: "./node_modules/onnxruntime-web/dist/ort.webgpu.min.mjs",
    options: { executionProviders: ["webgpu"], preferredOutputLocation: "gpu-buffer" }, // the cache stays there
  },
  // WebAssembly has no kernel for 4 bits: onnxruntime unpacks the weights of a MatMulNBits for every token. With this
  // setting, of which a MatMulNBits knows nothing, those of a DequantizeLinear (--format qdq) are unpacked once, while
  // the model is loaded: as fast as float32, several times as fast as MatMulNBits, see docs/clients.md.
  wasm: {
    runtime: "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs",
    options: { executionProviders: ["wasm"], extra: { session: { disable_quant_qdq: "1" } } },
  },
};
let ort;
let model;
let stopped;

/** The bytes of a file, told of while they come. */
async function download(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(Number(response.headers.get("Content-Length")));
  let received = 0;
  for await (const chunk of response.body) {
    bytes.set(chunk, received);
    received += chunk.length;
    postMessage({ kind: "progress", received, total: bytes.length });
  }
  return bytes;
}

async function json(name, otherwise) {
  const response = await fetch(`model/${name}`);
  if (response.ok) return response.json();
  if (otherwise) return otherwise;
  throw new Error(`model/${name}: ${response.status} ${response.statusText}`);
}

async function load() {
  const device = (await navigator.gpu?.requestAdapter()) ? "webgpu" : "wasm";
  const { runtime, options } = DEVICES[device];
  ort = await import(runtime);
  const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  const { eos_token_id: ends } = await json("generation_config.json", {});
  const bytes = await download(MODEL);
  const session = await ort.InferenceSession.create(bytes, options);
  model = { tokenizer, session, ends: [ends].flat() };
  postMessage({ kind: "ready", bytes: bytes.length, device, threads: ort.env.wasm.numThreads });
}

const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

function emptyCache(session) {
  const cache = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (name.startsWith("past_key_values")) cache[name] = new ort.Tensor(type, [], [1, shape[1], 0, shape[3]]);
  }
  return cache;
}

async function likeliest(logits) {
  const last = (await logits.getData()).subarray(-logits.dims.at(-1));
  return last.reduce((best, value, token) => (value > last[best] ? token : best), 0);
}

/** The likeliest next token, again and again; each step sees only what is new, the rest is in the cache. */
async function* greedy({ session, ends }, ids) {
  let cache = emptyCache(session);
  for (let seen = 0; ; ) {
    const total = seen + ids.length;
    const feed = {
      input_ids: row(ids),
      attention_mask: row(Array(total).fill(1)),
      position_ids: row(Array.from(ids, (_, index) => seen + index)),
    };
    const { logits, ...made } = await session.run({ ...cache, ...feed });
    const token = await likeliest(logits);
    for (const tensor of [logits, ...Object.values(cache)]) tensor.dispose();
    cache = {};
    for (const [name, tensor] of Object.entries(made)) cache[name.replace("present", "past_key_values")] = tensor;
    if (ends.includes(token)) return;
    yield token;
    seen = total;
    ids = [token];
  }
}

/** Lets messages in: the model runs without giving the thread away. */
function breathe() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

async function write({ prompt, tokens }) {
  stopped = false;
  const { tokenizer } = model;
  const begun = performance.now();
  const written = [];
  let first;
  for await (const token of greedy(model, tokenizer.encode(prompt, { add_special_tokens: false }).ids)) {
    written.push(token);
    first ??= performance.now();
    const text = tokenizer.decode(written, { skip_special_tokens: true });
    const speed = ((written.length - 1) / (performance.now() - first)) * 1000;
    postMessage({ kind: "text", text, speed, first: first - begun });
    await breathe();
    if (stopped || written.length >= tokens) break;
  }
  postMessage({ kind: "done" });
}

const problem = (error) => postMessage({ kind: "problem", message: error.message });

onmessage = ({ data }) => {
  if (data === "stop") stopped = true;
  else write(data).catch(problem);
};

load().catch(problem);
