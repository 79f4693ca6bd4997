import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

type Frame = paths["/api/runs/{runId}/stream"]["get"]["responses"][200]["content"]["text/event-stream"][number];

/** Yields the events of a stream. */
async function* events(stream: ReadableStream<Uint8Array>): AsyncGenerator<Frame> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of stream) {
    const blocks = (text + decoder.decode(chunk, { stream: true })).split("\n\n");
    text = blocks.pop() ?? "";
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      if (fields.data) yield { event: fields.event, id: fields.id, data: JSON.parse(fields.data) } as Frame;
    }
  }
}

const [url, token, cwd] = process.argv.slice(2) as [string, string, string];
const api = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${token}` } });
// Rejects with the service's error, such as { code: "RUN_NOT_FOUND", message: "..." }.
api.use({
  onResponse: async ({ response }) => {
    if (!response.ok) throw (await response.json()).error;
  },
});

const body = { cwd, prompt: "Write a haiku into haiku.txt.", approvals: true };
const run = (await api.POST("/api/runs/start", { body })).data!;
const params = { path: { runId: run.id } };
const stream = (await api.GET("/api/runs/{runId}/stream", { params, parseAs: "stream" })).data!;
for await (const { event, data } of events(stream)) {
  if (event === "message") console.log(data.type);
  if (event === "end") console.log(data.status, data.costUsd);
  if (event === "approval" && data.status === "pending") {
    const decision = data.toolName === "Write" ? "allow" : "deny";
    await api.POST("/api/approvals/{approvalId}", { params: { path: { approvalId: data.id } }, body: { decision } });
  }
}

const next = { sessionId: run.sessionId, prompt: "What did you do?" };
const resumed = (await api.POST("/api/runs/resume", { body: next, params: { query: { wait: 300 } } })).data!;
console.log(resumed.status, resumed.result?.result);

const other = { sessionId: run.sessionId, atRunId: run.id, prompt: "Make it a sonnet." };
const fork = (await api.POST("/api/runs/fork", { body: other })).data!;
const cancelled = (await api.DELETE("/api/runs/{runId}", { params: { path: { runId: fork.id } } })).data!;
console.log(cancelled.mode, cancelled.status);
