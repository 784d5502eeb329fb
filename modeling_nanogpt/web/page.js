// Continues a prompt with the model in the folder model/. The model runs in this browser, and text does not leave it.

import {AutoModelForCausalLM, AutoTokenizer, DynamicCache, Tensor, env} from "transformers.js";

const FRAME = 30; // milliseconds between two updates of the page

const at = id => document.getElementById(id);
let stopped = false;

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.useBrowserCache = false; // it would keep a model that was replaced; the browser's own cache asks the server
const library = import.meta.resolve("transformers.js");
if (new URL(library).origin === location.origin) {
  // by default, transformers.js would load these two files from the network
  const runtime = new URL("ort-wasm-simd-threaded", library).href;
  env.backends.onnx.wasm.wasmPaths = {mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm`};
}

// Yields the next token id, at most `length` times. Once the context is full, the older half is dropped and the newer
// half is read again: positions are absolute, so the cache is only valid while no token moves.
async function* continuePrompt(model, ids, {length, temperature, topK}) {
  const contextSize = model.config.n_positions;
  const stride = Math.max(Math.floor(contextSize / 2), 1);
  const end = model.config.eos_token_id;
  let context = ids.slice(-contextSize); // what the model sees
  let unread = context; // what the cache does not hold yet
  let cache = null;
  for (let step = 0; step < length; step++) {
    const outputs = await model({
      input_ids: integers(unread),
      attention_mask: integers(context.map(() => 1)),
      past_key_values: cache,
    });
    const token = choose(outputs.logits.data.slice(-outputs.logits.dims[2]), temperature, topK);
    yield token;
    if (token === end) return;
    if (context.length < contextSize) {
      unread = [token];
      context = [...context, token];
      cache = keep(outputs);
    } else {
      context = [...context.slice(stride), token];
      unread = context;
      cache = null;
    }
  }
}

// A row of T numbers as the model takes it, (1, T) int64.
function integers(row) {
  return new Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]);
}

// The cache for the next step, out of the outputs of this one.
function keep(outputs) {
  const entries = Object.entries(outputs).filter(([name]) => name.startsWith("present"));
  return new DynamicCache(
    Object.fromEntries(entries.map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor])),
  );
}

// The likeliest token, or a draw from the softmax of the topK likeliest. Temperature 0 takes the likeliest; topK 0
// draws from all.
function choose(logits, temperature, topK) {
  const best = logits.reduce((best, logit, token) => (logit > logits[best] ? token : best), 0);
  if (temperature === 0) return best;
  const least = topK > 0 && topK < logits.length ? Float32Array.from(logits).sort().at(-topK) : -Infinity;
  const weights = logits.map(logit => (logit < least ? 0 : Math.exp((logit - logits[best]) / temperature)));
  let left = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  return Math.max(weights.findIndex(weight => (left -= weight) < 0), 0);
}

// Continues the prompt on the page, and shows the text as it grows.
async function generate(model, tokenizer) {
  const prompt = at("prompt").value;
  const numbers = {
    temperature: at("temperature").valueAsNumber,
    topK: at("top_k").valueAsNumber,
    length: at("length").valueAsNumber,
  };
  const shown = Object.assign(document.createElement("span"), {className: "prompt", textContent: prompt});
  const continuation = document.createElement("span");
  at("text").replaceChildren(shown, continuation);

  let ids = tokenizer.encode(prompt || "\n");
  if (ids.length === 0) ids = [model.config.eos_token_id ?? 0];
  const tokens = [];
  const started = performance.now(); // milliseconds, as the next two
  let first = 0;
  let painted = started;
  const report = () => {
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens.length > 1 ? `, then ${((tokens.length - 1) / seconds).toFixed(0)} tokens/s` : "";
    continuation.textContent = tokenizer.decode(tokens, {skip_special_tokens: true});
    at("status").textContent = `${tokens.length} tokens: the first after ${(first - started).toFixed(0)} ms${rate}`;
  };
  for await (const token of continuePrompt(model, ids, numbers)) {
    tokens.push(token);
    first ||= performance.now();
    if (performance.now() - painted > FRAME) {
      report();
      await new Promise(resolve => setTimeout(resolve)); // lets the browser paint, and see a click on Stop
      painted = performance.now();
    }
    if (stopped) break;
  }
  report();
}

async function start() {
  const model = await AutoModelForCausalLM.from_pretrained("model", {device: "wasm"});
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  at("form").addEventListener("submit", async event => {
    event.preventDefault();
    stopped = false;
    at("generate").disabled = true;
    at("stop").disabled = false;
    try {
      await generate(model, tokenizer);
    } catch (error) {
      at("status").textContent = `The model stopped: ${error.message ?? error}`;
    }
    at("generate").disabled = false;
    at("stop").disabled = true;
  });
  at("stop").addEventListener("click", () => (stopped = true));
  at("generate").disabled = false;
  at("status").textContent = "Ready. The text is made in this browser, and does not leave it.";
}

start().catch(error => {
  at("status").textContent = `The model cannot be loaded: ${error.message ?? error}`;
});
