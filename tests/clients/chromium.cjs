// A headless Chromium that asks this machine alone.
const { chromium } = require("playwright-core");

const QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"];

// SwiftShader is a GPU in software: slow, but it runs the same shaders.
const GPU = {
  none: ["--disable-gpu"],
  software: ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"],
};

/** What `look` returns, given a new page, is printed as JSON. program: of Chromium; gpu: a key of GPU. */
module.exports = async function visit(program, look, { gpu = "none", ...options } = {}) {
  const browser = await chromium.launch({
    executablePath: program,
    args: ["--no-sandbox", "--disable-sync", ...QUIET, ...GPU[gpu]],
  });
  try {
    const context = await browser.newContext(options);
    await context.route((url) => !["localhost", "127.0.0.1"].includes(url.hostname), (route) => route.abort());
    console.log(JSON.stringify(await look(await context.newPage(), context)));
  } finally {
    await browser.close();
  }
};
