// Stream an answer: `npm install && npm run build && npm start -- [HOST:PORT] [PROMPT]`.
// A gateway that dies meanwhile costs a pause: the stream is resumed, and no token comes twice.
import * as path from "node:path";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";
import * as protobuf from "protobufjs";

const PROTO_ROOT = process.env.STAGELINE_PROTO ?? path.join(__dirname, "..", "..", "..", "proto");
const TIMEOUT_MS = Number(process.env.STAGELINE_TIMEOUT_MS ?? 120_000); // for the whole answer, pauses included
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2_000;

// What of the protocol is used here; `longs: String`, because a seed has 64 bits and a number of JavaScript 53.
interface Start { request_id: string; model_fingerprint: string; seed: string }
interface Choice { index: number; text: string; token_ids: number[]; finish_reason: string }
interface Reply { start?: Start; choices: Choice[]; usage?: { prompt_tokens: number; completion_tokens: number } }
interface Resume { token_ids: number[]; model_fingerprint: string; seed: string; choice_index: number }
interface Generation {
  conversation?: { messages: { role: string; content: string }[] };
  text?: string;
  stop: { max_tokens: number };
  sampling?: { seed: string };
  resume?: Resume;
}
interface InferenceClient extends grpc.Client {
  StreamGenerate(
    request: { generation: Generation }, metadata: grpc.Metadata, options: grpc.CallOptions,
  ): grpc.ClientReadableStream<Reply>;
}

// The rich part of an error: google.rpc.Status, which comes in the trailer grpc-status-details-bin.
const rpc = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`, { keepCase: true }).root;

interface Any { type_url: string; value: Uint8Array }
interface Rich { reason: string; metadata: Record<string, string>; retryAfterMs?: number }

/** Reason and metadata of an error (stable, for programs), and when to come back where the server says so. */
function richError(error: grpc.ServiceError): Rich {
  const found: Rich = { reason: "", metadata: {} };
  const raw = error.metadata?.get("grpc-status-details-bin")[0];
  if (!(raw instanceof Buffer)) return found; // not from Stageline: a broken connection, a proxy
  const status = rpc.lookupType("Status").decode(raw) as unknown as { details: Any[] };
  for (const detail of status.details) {
    const name = detail.type_url.split("/").pop();
    if (name === "google.rpc.ErrorInfo") {
      const info = rpc.lookupType("ErrorInfo").decode(detail.value) as unknown as Rich;
      found.reason = info.reason;
      found.metadata = info.metadata;
    } else if (name === "google.rpc.RetryInfo") {
      const message = rpc.lookupType("RetryInfo").decode(detail.value);
      const { retry_delay } = rpc.lookupType("RetryInfo").toObject(message, { longs: Number, defaults: true });
      found.retryAfterMs = retry_delay.seconds * 1000 + retry_delay.nanos / 1e6;
    }
  }
  return found;
}

function connect(address: string): InferenceClient {
  const definition = protoLoader.loadSync("stageline/inference/v1/inference_service.proto", {
    includeDirs: [PROTO_ROOT], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
  });
  const loaded = grpc.loadPackageDefinition(definition) as any;
  const channel = { "grpc.keepalive_time_ms": 20_000, "grpc.keepalive_timeout_ms": 10_000 };
  // With security.certificate_file on the server: grpc.credentials.createSsl(rootCertificates).
  return new loaded.stageline.inference.v1.InferenceService(address, grpc.credentials.createInsecure(), channel);
}

function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error;
}

/** Pieces of an answer as they come. Goes on after UNAVAILABLE with the tokens it has, until the deadline. */
async function* generate(client: InferenceClient, generation: Generation): AsyncGenerator<string> {
  const deadline = Date.now() + TIMEOUT_MS;
  const metadata = new grpc.Metadata();
  if (process.env.STAGELINE_API_KEY) metadata.set("authorization", `Bearer ${process.env.STAGELINE_API_KEY}`);
  let start: Start | undefined;
  const tokenIds: number[] = [];
  let ended = false;
  for (let pauseMs = FIRST_PAUSE_MS; ; pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS)) {
    const resume = start && {
      token_ids: tokenIds, model_fingerprint: start.model_fingerprint, seed: start.seed, choice_index: 0,
    };
    const call = client.StreamGenerate({ generation: { ...generation, resume } }, metadata, { deadline });
    try {
      for await (const reply of call as AsyncIterable<Reply>) {
        start ??= reply.start ?? undefined;
        for (const choice of reply.choices) {
          tokenIds.push(...choice.token_ids);
          pauseMs = FIRST_PAUSE_MS;
          yield choice.text;
          ended = choice.finish_reason !== "FINISH_REASON_UNSPECIFIED";
        }
      }
      return;
    } catch (error) {
      if (ended) return; // only the count of tokens is missing
      if (!isServiceError(error)) throw error;
      const busy = error.code === grpc.status.RESOURCE_EXHAUSTED && richError(error).retryAfterMs !== undefined;
      if (error.code !== grpc.status.UNAVAILABLE && !busy) throw error;
      const waitMs = Math.max(richError(error).retryAfterMs ?? 0, pauseMs * (0.5 + Math.random() / 2));
      if (Date.now() + waitMs >= deadline) throw error;
      console.error(`\n[${grpc.status[error.code]}; ${tokenIds.length} tokens are here, on in ${Math.round(waitMs)} ms]`);
      await new Promise((done) => setTimeout(done, waitMs));
    } finally {
      call.cancel(); // where the reader stopped early: the server frees what the request held
    }
  }
}

async function main(): Promise<number> {
  const [address = "127.0.0.1:9000", prompt = "Why is the sky blue?"] = process.argv.slice(2);
  const client = connect(address);
  const maxTokens = Number(process.env.STAGELINE_MAX_TOKENS ?? 128);
  const sampling = process.env.STAGELINE_SEED ? { seed: process.env.STAGELINE_SEED } : undefined;
  const asked: Pick<Generation, "text" | "conversation"> = process.env.STAGELINE_PLAIN_TEXT
    ? { text: prompt } // models without a chat template
    : { conversation: { messages: [{ role: "user", content: prompt }] } };
  try {
    const pieces = generate(client, { ...asked, sampling, stop: { max_tokens: maxTokens } });
    for await (const text of pieces) process.stdout.write(text);
    process.stdout.write("\n");
    return 0;
  } catch (error) {
    if (!isServiceError(error)) throw error;
    const { reason, metadata } = richError(error);
    console.error(`${grpc.status[error.code]} [${reason}] ${error.details} ${JSON.stringify(metadata)}`);
    return 1;
  } finally {
    client.close();
  }
}

main().then((code) => { process.exitCode = code; });
