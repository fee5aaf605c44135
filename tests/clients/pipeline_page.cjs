// node pipeline_page.cjs CHROMIUM URL TASK INPUT OPTIONS SESSION: as pipeline.cjs, in a browser, on WebAssembly.
// Tells the seconds too. SESSION: settings of the session (JSON). URL: where examples/browser/serve.py serves the model and the packages.
const visit = require("./chromium.cjs");

const PACKAGES = {
  imports: {
    "@huggingface/transformers": "/node_modules/@huggingface/transformers/dist/transformers.web.js",
    "onnxruntime-web/webgpu": "/node_modules/onnxruntime-web/dist/ort.webgpu.min.mjs",
    "onnxruntime-common": "/node_modules/onnxruntime-common/dist/esm/index.js",
  },
};
const PAGE = `<!doctype html><script type="importmap">${JSON.stringify(PACKAGES)}</script>`;

async function made([task, input, options, session]) {
  const { env, pipeline } = await import("@huggingface/transformers");
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/" });
  env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
  const session_options = { extra: { session } };
  const run = await pipeline(task, "model", { dtype: "q4", device: "wasm", session_options });
  const begun = performance.now();
  const output = await run(input, options);
  return { output, seconds: (performance.now() - begun) / 1000 };
}

const [program, url, task, ...json] = process.argv.slice(2);
visit(program, async (page) => {
  await page.route("**/pipeline", (route) => route.fulfill({ contentType: "text/html", body: PAGE }));
  await page.goto(`${url}pipeline`);
  return page.evaluate(made, [task, ...json.map((one) => JSON.parse(one))]);
});
