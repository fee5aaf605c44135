// A headless Chromium that asks this machine alone.
const { chromium } = require("playwright-core");

const QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"];

/** What `look` returns, given a new page, is printed as JSON. program: of Chromium. */
module.exports = async function visit(program, look, options = {}) {
  const browser = await chromium.launch({
    executablePath: program,
    args: ["--no-sandbox", "--disable-gpu", "--disable-sync", ...QUIET],
  });
  try {
    const context = await browser.newContext(options);
    await context.route((url) => !["localhost", "127.0.0.1"].includes(url.hostname), (route) => route.abort());
    console.log(JSON.stringify(await look(await context.newPage(), context)));
  } finally {
    await browser.close();
  }
};
