// One picture: a class, a seed and a number of steps go through the ONNX graph, in this browser.

import * as ort from "./ort/ort.wasm.min.mjs";
import { TorchRandom } from "./noise.js";

const at = (id) => document.getElementById(id);
const facts = await (await fetch("model.json")).json();
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
let weights = null;
const sessions = {};

async function sessionOf(steps) {
  if (!sessions[steps]) {
    weights ??= new Uint8Array(await (await fetch(facts.weights)).arrayBuffer());
    sessions[steps] = await ort.InferenceSession.create(facts.graphs[steps].file, {
      executionProviders: ["wasm"],
      externalData: [{ path: facts.weights, data: weights }],
    });
  }
  return sessions[steps];
}

function feeds(seed, label, steps) {
  const random = new TorchRandom(seed), shape = [1, ...facts.shape];
  const count = facts.shape.reduce((a, b) => a * b), given = {};
  for (const name of facts.graphs[steps].inputs) {
    if (name === "label") given[name] = new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]);
    else given[name] = new ort.Tensor("float32", name === "noise" ? random.normals(count) : random.wideNormals(count), shape);
  }
  return given;
}

function show(image) {
  const [, , height, width] = image.dims, plane = height * width, canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const pixels = new ImageData(width, height);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = image.data[c * plane + i];
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  at("picture").src = at("save").href = canvas.toDataURL("image/png");
}

let running = false, again = false;

async function draw() {
  if (running) { again = true; return; }
  running = true;
  try {
    const seed = at("seed").value.trim(), steps = document.querySelector("[name=steps]:checked").value;
    if (!/^\d{1,20}$/.test(seed) || BigInt(seed) >= 2n ** 64n) throw new Error("A seed is a whole number below 2^64.");
    const label = facts.classes ? Number(at("class").value) : 0;
    if (!sessions[steps]) at("status").textContent = "Loading the model …";
    const session = await sessionOf(steps), given = feeds(seed, label, steps);
    const began = performance.now(), { image } = await session.run(given), took = performance.now() - began;
    show(image);
    const name = facts.classes ? `${facts.names[label] ?? `class ${label}`}, ` : "";
    at("picture").alt = `${name}seed ${seed}`;
    at("save").download = `seed-${seed}${facts.classes ? `-class-${label}` : ""}.png`;
    at("status").textContent = `${took < 10 ? took.toFixed(1) : Math.round(took)} ms in this browser`;
    document.body.dataset.drawn = `${seed}/${label}/${steps}`;
  } catch (error) {
    at("status").textContent = error.message ?? String(error);
  }
  running = false;
  if (again) { again = false; await draw(); }
}

function begin() {
  const wanted = new URLSearchParams(location.search);
  document.title = at("name").textContent = facts.name;
  at("about").textContent = facts.about;
  for (let label = 0; label < facts.classes; label++) at("class").add(new Option(facts.names[label] ?? `class ${label}`, label));
  at("classes").hidden = !facts.classes;
  at("half").hidden = !facts.half;
  at("picture").classList.toggle("small", facts.side <= 128);
  at("picture").style.maxWidth = `${16 * facts.side}px`; // larger, the squares hide what they show
  at("seed").value = wanted.get("seed") ?? "0";
  if (facts.classes) at("class").value = wanted.get("class") ?? "0";
  for (const radio of document.querySelectorAll("[name=steps]")) radio.checked = radio.value === (wanted.get("steps") ?? "1");
  at("form").addEventListener("input", draw);
  at("form").addEventListener("submit", (event) => event.preventDefault());
  at("dice").addEventListener("click", () => {
    at("seed").value = Math.floor(Math.random() * 2 ** 31);
    draw();
  });
}

begin();
await draw();
