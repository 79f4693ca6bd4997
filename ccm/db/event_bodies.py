"""The stored form of an event's body.

Most of a body is the same in all events. A preset dictionary lets DEFLATE (RFC 1951) replace it by references, so that
0.75 KB become 0.15 KB. The form does not depend on other rows, which may change or be deleted.
"""

from __future__ import annotations

import zlib

# Never edited, because stored events cannot be read without it. It need not be complete: a field that it lacks only
# takes more bytes. In this order: an approval, Claude Code's result, other states of a run, a new run.
DICTIONARY = (
    b'"approval.requested""approval.resolved"'
    b'"data":{"approval":{"id":"","approvalId":"","runId":"","sessionId":"","toolName":"Write","toolName":"Bash",'
    b'"toolUseId":"toolu_","input":{"file_path":"/","content":"","command":"","description":""},"suggestions":[{"type":'
    b'"addRules","rules":[{"toolName":"Bash","ruleContent":""}],"behavior":"allow","destination":"localSettings"},{'
    b'"type":"setMode","mode":"acceptEdits","destination":"session"}],"title":null,"displayName":null,"description":'
    b'null,"blockedPath":null,"decisionReason":null,"agentId":null,"status":"denied","status":"allowed","status":'
    b'"pending","resolution":"answered","resolution":null,"decision":"allow","decision":null,"updatedInput":null,'
    b'"remember":false,"message":null,"interrupt":false,"decidedBy":null,"createdAt":"","expiresAt":"","resolvedAt":'
    b'null},"run":{'
    b'"result":{"type":"result","subtype":"success","is_error":false,"api_error_status":null,"duration_ms":,'
    b'"duration_api_ms":,"num_turns":1,"result":"","stop_reason":"end_turn","session_id":"","total_cost_usd":0.,'
    b'"usage":{"input_tokens":,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":,'
    b'"output_tokens_details":{"thinking_tokens":0},"server_tool_use":{"web_search_requests":0,"web_fetch_requests":0},'
    b'"service_tier":"standard","cache_creation":{"ephemeral_1h_input_tokens":0,"ephemeral_5m_input_tokens":0},'
    b'"inference_geo":"","iterations":[],"speed":"standard","fallback_credit":null},"modelUsage":{"claude-":{'
    b'"inputTokens":,"outputTokens":,"cacheReadInputTokens":0,"cacheCreationInputTokens":0,"webSearchRequests":0,'
    b'"costUSD":0.,"contextWindow":1000000,"contextWindow":200000,"maxOutputTokens":128000,"thinkingTokens":0,'
    b'"cacheCreationEphemeral5mInputTokens":0,"cacheCreationEphemeral1hInputTokens":0,"canonicalModel":"claude-",'
    b'"provider":"firstParty","costBasis":"list"}},"permission_denials":[],"terminal_reason":"completed",'
    b'"fast_mode_state":"off","fast_mode_disabled_reason":"sdk_opt_in_required","subagent_stats":{"spawned":0,'
    b'"requested":{"background":0,"foreground":0,"unset":0},"started_in_background":0,"max_depth":0,'
    b'"spawned_by_subagents":0,"completed":0,"failed":0,"killed":{"parent":0,"user":0,"system":0},"refused":{'
    b'"depth_limit":0,"concurrency_limit":0,"budget":0},"by_type":{}},"safety_stops":0,"ttft_ms":,"uuid":"",'
    b'"ttft_stream_ms":,"time_to_request_ms":,"first_content_frame_ms":,"user_message_uuid":"","user_message_uuids":["'
    b'"],"request_sent_wall_ms":,"first_request_input_tokens":,"first_request_cache_read_input_tokens":0,'
    b'"queued_turn_count":0,"result_index":0,"model_usage_since_last_result":{"claude-":{'
    b'"error":{"code":"EXECUTION_ERROR","message":""},"status":"error","status":"cancelled","mode":"fork","mode":'
    b'"resume","parentRunId":"","parentSessionId":"","status":"completed","resultType":"success","result":{'
    b'"transcriptStored":true,"startedAt":"2026-,"endedAt":"2026-'
    b'{"type":"run.cancelled","type":"run.failed","type":"run.completed","type":"run.started","type":"run.created",'
    b'"timestamp":"2026-","data":{"run":{"id":"","runId":"","sessionId":"","sdkSessionId":"","parentRunId":null,'
    b'"parentSessionId":null,"mode":"fresh","status":"running","cwd":"/home/","imageCount":0,"timeoutMs":null,'
    b'"approvals":false,"approvalTimeoutMs":null,"webhookUrl":null,"resultType":null,"result":null,"error":null,'
    b'"permissionDenials":[],"costUsd":null,"messageCount":0,"durationMs":null,"queuePosition":null,'
    b'"transcriptStored":false,"createdBy":null,"pendingApprovals":0,"createdAt":"2026-","startedAt":null,'
    b'"endedAt":null}}}'
)
# Negative: without zlib's header and checksum. The small window, 4 KiB, makes it several times as fast.
WINDOW_BITS = -12
# Copied for each body, because indexing the dictionary takes longer than compressing a body.
_COMPRESSOR = zlib.compressobj(wbits=WINDOW_BITS, memLevel=5, zdict=DICTIONARY)
# Longer bodies are stored as text, because compressing them would delay all other writes.
COMPRESSED_LENGTH = 2**16


def columns_of(body: str) -> dict[str, object]:
    """Return the columns for a body, which is ASCII."""
    if len(body) > COMPRESSED_LENGTH:
        return {"size": len(body), "eventJson": body, "compressed": None}
    compressor = _COMPRESSOR.copy()
    compressed = compressor.compress(body.encode("ascii")) + compressor.flush()
    return {"size": len(body), "eventJson": "", "compressed": compressed}


def body_of(event_json: str, compressed: bytes | None) -> str:
    """Return the body from its columns."""
    if compressed is None:
        return event_json
    return zlib.decompressobj(WINDOW_BITS, zdict=DICTIONARY).decompress(compressed).decode("ascii")
