// Continue prompts with transformers.js: node run_onnx.mjs < request.json
//
// The request: {"folder": node packages, "models": [{"path": a folder, "prompts": [text]}], "tokens": how many to
// generate}. The answer has for each model the greedy text of all prompts as one batch, and the tokens per second of
// the first prompt alone.

import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const request = JSON.parse(readFileSync(0, "utf8"));
const library = `${request.folder}/@huggingface/transformers/dist/transformers.node.mjs`;
const {pipeline, env} = await import(pathToFileURL(library).href);
env.allowRemoteModels = false;

const answers = [];
for (const {path, prompts} of request.models) {
    const generator = await pipeline("text-generation", path, {session_options: {intraOpNumThreads: 1}});
    const options = {do_sample: false, max_new_tokens: request.tokens};
    const batch = await generator(prompts, options);
    const start = performance.now();
    await generator(prompts[0], options);
    const rate = request.tokens / ((performance.now() - start) / 1000);
    answers.push({texts: batch.map(([answer]) => answer.generated_text), rate});
}
console.log(JSON.stringify(answers));
