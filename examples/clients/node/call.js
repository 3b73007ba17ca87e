// Kernels called from Node: metadata, arrays both ways, scalars, an error and its field, a deadline, a cancel.
//
//     node call.js 127.0.0.1:8001

const os = require("node:os");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const PROTOS = ["../../../protos/inference.proto", "errors.proto"].map((name) => path.join(__dirname, name));
const definitions = loadSync(PROTOS, { keepCase: true, longs: Number, defaults: true });
const { inference } = grpc.loadPackageDefinition(definitions);

// The wire is little-endian, and so are typed arrays on every machine except mainframes.
if (os.endianness() !== "LE") throw new Error("typed arrays are big-endian here: use DataView");

// The array type of each datatype. Not listed: FP16, which has no typed array, and BYTES, whose elements have lengths.
const TYPED = {
  BOOL: Uint8Array, UINT8: Uint8Array, UINT16: Uint16Array, UINT32: Uint32Array, UINT64: BigUint64Array,
  INT8: Int8Array, INT16: Int16Array, INT32: Int32Array, INT64: BigInt64Array, FP32: Float32Array, FP64: Float64Array,
};

// A typed array's bytes: only its own part of the underlying buffer.
const toRaw = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
// The bytes are copied: a Buffer may begin anywhere, but a typed array only at a multiple of its element's size.
const fromRaw = (datatype, raw) => new TYPED[datatype](Uint8Array.from(raw).buffer);
// Make one call. `arrays` is [[name, datatype, shape, values], …], `parameters` {name: {int64_param: 2}, …}. Returns a
// promise of {name: {shape, values}, …}, with a function `cancel`.
function infer(client, kernel, arrays, parameters = {}, timeoutSeconds = 10) {
  const request = {
    model_name: kernel,
    parameters,
    inputs: arrays.map(([name, datatype, shape]) => ({ name, datatype, shape })),
    raw_input_contents: arrays.map(([, , , values]) => toRaw(values)),
  };
  let call;
  const answered = new Promise((resolve, reject) => {
    call = client.ModelInfer(request, { deadline: Date.now() + timeoutSeconds * 1000 }, (error, response) =>
      error ? reject(error) : resolve(Object.fromEntries(response.outputs.map(({ name, datatype, shape }, i) =>
        [name, { shape, values: fromRaw(datatype, response.raw_output_contents[i]) }]))));
  });
  return Object.assign(answered, { cancel: () => call.cancel() });
}

// The arguments at fault, from the error's details.
function fieldsOf(error) {
  return error.metadata.get("grpc-status-details-bin")
    .flatMap((bytes) => definitions["google.rpc.Status"].deserialize(bytes).details)
    .filter((detail) => detail.type_url.endsWith("/google.rpc.BadRequest"))
    .flatMap((detail) => definitions["google.rpc.BadRequest"].deserialize(detail.value).field_violations)
    .map((violation) => violation.field);
}

const failure = (promise) => promise.then(() => { throw new Error("it should have failed"); }, (error) => error);

async function main(target) {
  // 64 MiB is larger than the gateway's default limit; grpc-js would accept only 4 MiB.
  const client = new inference.GRPCInferenceService(target, grpc.credentials.createInsecure(),
    { "grpc.max_receive_message_length": 64 * 1024 * 1024 });
  const metadata = await new Promise((resolve, reject) =>
    client.ModelMetadata({ name: "histogram" }, (error, response) => (error ? reject(error) : resolve(response))));
  console.log("takes", metadata.inputs.map(({ name, datatype, shape }) => `${name}: ${datatype} [${shape}]`).join(", "));

  const x = ["x", "FP64", [5], Float64Array.of(0, 0.5, 1, 3.5, 4)];
  const { counts, edges } = await infer(client, "histogram", [x], { bins: { int64_param: 4 } });
  console.log("counts", counts.values.join(" "), "edges", edges.values.join(" "));

  const refused = await failure(infer(client, "histogram", [x], { bins: { string_param: "four" } }));
  console.log(grpc.status[refused.code], fieldsOf(refused).join(), refused.details);
  const simulate = (seconds) => infer(client, "monte_carlo_option", [["spot", "FP64", [1], Float64Array.of(100)]],
    { strike: { double_param: 100 }, paths: { int64_param: 20_000_000 } }, seconds);
  console.log(grpc.status[(await failure(simulate(0.02))).code]);
  const unwanted = simulate(10);
  unwanted.cancel();
  console.log(grpc.status[(await failure(unwanted)).code]);
  client.close();
}

main(process.argv[2] ?? "127.0.0.1:8001");
