// node page.cjs CHROMIUM GPU URL PROMPT TOKENS [FOLDER]: lets the page of examples/browser write, tells what it shows.
// FOLDER: for pictures of it, wide and narrow, light and dark.
const path = require("node:path");
const visit = require("./chromium.cjs");

// Minutes, on a GPU in software.
const PATIENCE = { timeout: 500_000 };
const WIDTHS = { wide: 1000, narrow: 360 };

async function pictures(page, folder) {
  for (const [name, width] of Object.entries(WIDTHS)) {
    await page.setViewportSize({ width, height: 640 });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await page.screenshot({ path: path.join(folder, `${name}-${colorScheme}.png`) });
    }
  }
}

const [program, gpu, url, prompt, tokens, folder] = process.argv.slice(2);
visit(program, async (page) => {
  const problems = [];
  page.on("pageerror", (error) => problems.push(error.message));
  await page.goto(url);
  await page.locator("[data-state=ready], [data-state=problem]").waitFor(PATIENCE);
  await page.locator("#prompt").fill(prompt);
  await page.locator("#tokens").fill(tokens);
  await page.locator("#go").click({ timeout: 1000 }).catch((error) => problems.push(error.message));
  await page.locator("[data-state=done], [data-state=problem]").waitFor(PATIENCE);
  if (folder) await pictures(page, folder);
  const shown = { problems };
  for (const id of ["written", "speed", "first", "size", "device", "problem"]) {
    shown[id] = await page.locator(`#${id}`).textContent();
  }
  return shown;
}, { gpu });
