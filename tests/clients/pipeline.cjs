// node pipeline.cjs FOLDER TASK INPUT OPTIONS: what a pipeline of transformers.js makes of an input (both in JSON),
// from the files of a local folder alone.
const path = require("node:path");
const { env, pipeline } = require("@huggingface/transformers");

async function main(folder, task, input, options) {
  env.allowRemoteModels = false;
  env.localModelPath = path.dirname(folder);
  const run = await pipeline(task, path.basename(folder), { dtype: "q4" });
  const output = await run(input, options);
  console.log(JSON.stringify(output.tolist?.() ?? output));
}

const [folder, task, input, options] = process.argv.slice(2);
main(folder, task, JSON.parse(input), JSON.parse(options));
