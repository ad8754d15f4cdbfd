/** The page: loads the bundle that it lies in, and shows what it says. ?device=wasm and ?adapter=NAME choose. */

import { load } from "../edgepeft.js";

const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
const SHOWN = 5; // labels
const CALLED = { webgpu: "the GPU (WebGPU)", wasm: "the CPU (WebAssembly)" };
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
let stopped;

function added(tag, text, parent = $("output"), name = "") {
  const element = Object.assign(document.createElement(tag), { textContent: text, className: name });
  parent.append(element);
  return element;
}

function failed(error) {
  console.error(error);
  $("error").textContent = error.message;
}

function onProgress({ stage, file, loaded, total }) {
  $("progress").value = total ? loaded / total : 1;
  $("status").textContent =
    stage === "load" ? `Loading ${file}: ${megabytes(loaded)} of ${megabytes(total)} MB` : "Preparing the model…";
}

function state(model) {
  $("status").textContent = `Ready, on ${CALLED[model.device]}.`;
  $("notes").textContent = model.notes.join(". ");
  document.body.dataset.device = model.device;
}

function show(model) {
  $("name").textContent = document.title = model.name;
  state(model);
  $("progress").hidden = true;
  const names = model.adapters.length ? [...model.adapters, "none"] : [];
  for (const name of names) added("option", name, $("adapter")).value = name;
  $("adapter").parentElement.hidden = !names.length;
  $("adapter").value = model.adapter;
  $("form").hidden = false;
  model.kept.then(() => state(model));
}

async function classify(model, text) {
  const { label, score, scores } = await model.classify(text, { topK: SHOWN });
  $("output").replaceChildren();
  added("p", `${label} (${(100 * score).toFixed(1)} %)`, undefined, "asked");
  for (const [name, share] of Object.entries(scores)) {
    const row = added("label", `${name} `);
    row.append(Object.assign(document.createElement("meter"), { value: share }));
  }
}

async function write(model, text) {
  added("p", text, undefined, "asked");
  const place = added("p", "");
  stopped = new AbortController();
  $("stop").hidden = false;
  const options = { stream: true, signal: stopped.signal };
  const pieces = model.template ? model.chat(text, options) : model.generate(text, options);
  for await (const piece of pieces) {
    place.append(piece);
    await new Promise(requestAnimationFrame); // let the page show it
  }
}

async function answer(model) {
  $("error").textContent = "";
  $("go").disabled = true;
  try {
    await model.use($("adapter").value || model.adapter);
    await (model.classify ? classify : write)(model, $("text").value);
  } catch (error) {
    failed(error);
  } finally {
    state(model);
    $("go").disabled = false;
    $("stop").hidden = true;
  }
}

try {
  if (navigator.serviceWorker) navigator.serviceWorker.register("./sw.js").catch(failed);
  const options = { device: asked.get("device") ?? "auto", adapter: asked.get("adapter") ?? "default" };
  const model = await load(new URL("./", location.href), { ...options, onProgress });
  globalThis.model = model; // for the console
  $("form").addEventListener("submit", (event) => (event.preventDefault(), answer(model)));
  $("stop").addEventListener("click", () => stopped?.abort());
  show(model);
} catch (error) {
  $("status").textContent = "It could not be loaded.";
  $("progress").hidden = true;
  failed(error);
}
