// Calls Generate with a client generated from the public proto as it is: node client.js ADDRESS PROTO PROMPT
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, proto, prompt] = process.argv.slice(2);
const definition = loader.loadSync(proto, { keepCase: true, longs: String, enums: String, oneofs: true, arrays: true });
const { Inference } = grpc.loadPackageDefinition(definition).sluice.v1;
const client = new Inference(address, grpc.credentials.createInsecure());
const call = client.Generate({ prompt, sampling: { temperature: 0 }, stopping: { max_tokens: 16 } });

const answer = { seed: null, text: "", tokens: [], reason: null };
call.on("data", (response) => {
  if (response.event === "accepted") answer.seed = response.accepted.seed;
  if (response.event === "delta") {
    answer.text += response.delta.text;
    answer.tokens.push(...response.delta.token_ids);
  }
  if (response.event === "finished") answer.reason = response.finished.reason;
});
call.on("error", (error) => {
  console.error(`${error.code} ${error.details}`);
  process.exit(1);
});
call.on("end", () => {
  console.log(JSON.stringify(answer));
  client.close();
});
