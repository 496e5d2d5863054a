// One model in memory; each call is fed the tensors of the adapter that the menu names.

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

import { readAdapter } from "./adapters.js";

const element = (id) => document.getElementById(id);

function state(name, text) {
  element("state").textContent = text;
  document.body.dataset.state = name;
}

async function fetched(name) {
  const response = await fetch(`files/${name}`);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

const bytes = async (name) => new Uint8Array(await (await fetched(name)).arrayBuffer());
const json = async (name) => (await fetched(name)).json();

/** The model, its tokenizer, and the adapters that were asked for so far. */
class Model {
  static async load() {
    const made = new Model();
    made.about = await json("page.json");
    made.tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
    made.session = await ort.InferenceSession.create(await bytes("model.onnx"), { executionProviders: ["wasm"] });
    // Slots are inputs, which have to be fed: this is what they hold without an adapter.
    made.none = readAdapter(await bytes("model.onnx.defaults.onnx_adapter"));
    made.held = new Map([["", fed(made.none.tensors)]]);
    return made;
  }

  /** An adapter's tensors, from its file the first time; sites that it is not on stay as they are without one. */
  async adapter(name) {
    if (!this.held.has(name)) {
      const { tensors, base } = readAdapter(await bytes(`adapters/${name}.onnx_adapter`));
      if (base !== this.none.base) throw new Error(`${name} is for another model, or for other slots`);
      this.held.set(name, { ...this.held.get(""), ...fed(tensors) });
    }
    return this.held.get(name);
  }

  async score(text, name) {
    const slots = await this.adapter(name);
    const ids = this.tokenizer.encode(text).ids;
    // Cut as Python's tokenizer cuts: the end mark stays the last.
    const cut = ids.length > this.about.tokens ? [...ids.slice(0, this.about.tokens - 1), ids.at(-1)] : ids;
    const whole = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
    const inputs = { input_ids: whole(cut), attention_mask: whole(cut.map(() => 1)) };
    const { logits } = await this.session.run({ ...slots, ...inputs });
    return logits.data[0];
  }
}

const fed = (tensors) =>
  Object.fromEntries(Object.entries(tensors).map(([name, { type, data, dims }]) => [name, new ort.Tensor(type, data, dims)]));

let model;

async function answer() {
  state("busy", "…");
  try {
    const name = element("adapter").value;
    const start = performance.now();
    const score = await model.score(element("text").value, name);
    element("answer").value = name ? (score > 0 ? "yes" : "no") : "no adapter was asked";
    element("answer").dataset.score = score;
    state("ready", `score ${score.toFixed(3)}, ${(performance.now() - start).toFixed(0)} ms`);
  } catch (error) {
    state("failed", String(error));
  }
}

try {
  model = await Model.load();
  for (const name of ["", ...model.about.names]) element("adapter").add(new Option(name || "(no adapter)", name));
  element("adapter").addEventListener("change", answer);
  element("ask").addEventListener("click", answer);
  state("ready", `${model.session.inputNames.length - 2} slots`);
} catch (error) {
  state("failed", String(error));
}
