// Run a GGUF file with llama.cpp: node run_gguf.mjs < request.json
//
// The request: {"folder": node packages, "model": a file, "prompts": [text], "tokens": how many to generate}. The answer
// has for each prompt its ids, the greedy continuation and the log-probability of each generated token.

import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const request = JSON.parse(readFileSync(0, "utf8"));
const address = pathToFileURL(`${request.folder}/node-llama-cpp/dist/index.js`);
const {getLlama, LlamaLogLevel} = await import(address.href);

const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: request.model});
const context = await model.createContext({contextSize: request.context});
const sequence = context.getSequence();
const options = {temperature: 0, yieldEogToken: true};
const answers = [];
let seconds = 0;
for (const prompt of request.prompts) {
    const ids = model.tokenize(prompt), generated = [], logprobs = [];
    if (request.tokens > 0) await sequence.clearHistory();
    const start = performance.now();
    const steps = request.tokens > 0 ? sequence.evaluateWithMetadata(ids, {confidence: true}, options) : [];
    for await (const {token, confidence} of steps) {
        generated.push(token);
        logprobs.push(Math.log(confidence));
        if (generated.length === request.tokens) break;
    }
    seconds += (performance.now() - start) / 1000;
    answers.push({ids, generated, logprobs, text: model.detokenize(ids)});
}
console.log(JSON.stringify({answers, rate: request.prompts.length * request.tokens / seconds}));
process.exit(0);
