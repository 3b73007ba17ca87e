// k6 drives ModelInfer: callers at work side by side, each answer checked, status and bytes.
//
//     k6 run -e TARGET=127.0.0.1:8001 -e SECONDS=60 tests/mesh/clients/infer.js

import { check } from "k6";
import encoding from "k6/encoding";
import grpc from "k6/net/grpc";

const client = new grpc.Client();
client.load(["../../.."], "protos/inference.proto");

export const options = {
  scenarios: {
    callers: { executor: "constant-vus", vus: 8, duration: `${__ENV.SECONDS || 5}s` },
  },
  thresholds: { checks: ["rate==1"] },
};

const base64 = (typed) => encoding.b64encode(typed.buffer);

// A 2 x 2 matrix that is this caller's and this round's own: an answer that was meant for another is noticed.
function product() {
  const [a, b] = [__VU, __ITER];
  return {
    request: {
      model_name: "matmul",
      id: `${__VU}-${__ITER}`,
      inputs: ["a", "b"].map((name) => ({ name, datatype: "FP64", shape: [2, 2] })),
      raw_input_contents: [Float64Array.of(a, b, 0, 1), Float64Array.of(1, b, 1, a)].map(base64),
    },
    answer: base64(Float64Array.of(a + b, 2 * a * b, 1, a)),
  };
}

export default function () {
  if (__ITER === 0) client.connect(__ENV.TARGET, { plaintext: true });
  const { request, answer } = product();
  const response = client.invoke("inference.GRPCInferenceService/ModelInfer", request, { timeout: "10s" });
  check(response, {
    "status is OK": ({ status }) => status === grpc.StatusOK,
    "id is the request's": ({ message }) => message !== null && message.id === request.id,
    "bytes are the product's": ({ message }) => message !== null && message.rawOutputContents[0] === answer,
  });
}
