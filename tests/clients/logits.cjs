// node logits.cjs MODEL IDS: the last token's logits after IDS (a JSON list), from a decoder with an empty cache.
const ort = require("onnxruntime-node");

const ids = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

async function main(model, tokens) {
  const session = await ort.InferenceSession.create(model);
  const feed = {
    input_ids: ids(tokens),
    attention_mask: ids(tokens.map(() => 1)),
    position_ids: ids([...tokens.keys()]),
  };
  for (const { name, shape } of session.inputMetadata) {
    if (name.startsWith("past_key_values")) {
      feed[name] = new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
    }
  }
  const { logits } = await session.run(feed);
  console.log(JSON.stringify(Array.from(logits.data.slice(-logits.dims[2]))));
}

main(process.argv[2], JSON.parse(process.argv[3]));
