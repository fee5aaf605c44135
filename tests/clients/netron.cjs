// node netron.cjs CHROMIUM URL NODE PICTURE: selects a node in Netron by its name, tells the properties that it shows.
const visit = require("./chromium.cjs");

const WINDOW = { viewport: { width: 1200, height: 860 } };

const [program, url, node, picture] = process.argv.slice(2);
visit(program, async (page, context) => {
  await context.addCookies([{ name: "consent", value: "1", url }]); // or it asks first
  await page.goto(url);
  await page.locator("body.default").waitFor({ timeout: 500_000 }); // the layout of a large graph takes a minute
  await page.keyboard.press("Control+F");
  await page.locator(".sidebar-find-query").fill(`"${node}"`);
  await page.locator(".sidebar-find-content li").first().dblclick();
  const properties = page.locator("#sidebar-content .sidebar-item");
  await properties.first().waitFor();
  await page.waitForTimeout(1000); // it scrolls there
  await page.screenshot({ path: picture });
  const shown = {};
  for (const item of await properties.all()) {
    const name = await item.locator(".sidebar-item-name input").inputValue();
    const value = await item.locator(".sidebar-item-value-list").innerText();
    shown[name] = value.replace(/^[+?]\n/, ""); // a button
  }
  return shown;
}, WINDOW);
