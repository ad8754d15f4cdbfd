/**
 * The page without a network: its few small files, the newest where there is a network, else those of last time.
 *
 * The model's files are not its business: the module keeps them by their digests (web/files.js).
 */

const SHELL = [
  "./",
  "edgepeft.js",
  "web/page.js",
  ...["adapters", "cache", "chat", "classifier", "digits", "engine", "files", "generator", "graph", "model"].map(
    (name) => `web/${name}.js`,
  ),
  ...["sampling", "tokens"].map((name) => `web/${name}.js`),
  ...["jinja.js", "tokenizers.min.mjs"].map((name) => `web/vendor/${name}`),
  ...["ort.webgpu.min", "ort-wasm-simd-threaded.asyncify", "ort.wasm.min", "ort-wasm-simd-threaded"].map(
    (name) => `web/vendor/${name}.mjs`,
  ),
];
const NAME = `edgepeft-page:${registration.scope}`;
const urls = SHELL.map((name) => new URL(name, registration.scope).href);

async function newest(request, url) {
  const cache = await caches.open(NAME);
  try {
    const answer = await fetch(request);
    if (answer.ok) await cache.put(url, answer.clone());
    return answer;
  } catch (error) {
    const kept = await cache.match(url);
    if (kept) return kept;
    throw error;
  }
}

addEventListener("install", (event) => {
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(urls)).then(() => skipWaiting()));
});

addEventListener("activate", (event) => event.waitUntil(clients.claim()));

addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  url.search = url.hash = "";
  if (url.pathname.endsWith("/index.html")) url.pathname = url.pathname.slice(0, -"index.html".length);
  if (event.request.method === "GET" && urls.includes(url.href)) event.respondWith(newest(event.request, url.href));
});
