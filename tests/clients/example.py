import os
import sys

from ccm.client import Answer, APIError, Approval, Client


def rule(approval: Approval) -> Answer | None:
    if approval["toolName"] == "Write":
        return {"decision": "allow"}
    return {"decision": "deny", "message": "Only write files."}


url, cwd = sys.argv[1:]
client = Client(url, os.environ.get("TOKEN", ""))

run = client.start(cwd, "Write a haiku into haiku.txt, and commit it.", title="Haiku", approvals=True)
for message in client.follow(run["id"], rule):
    print(message["type"])
run = client.get(run["id"])
print(run["status"], run["costUsd"], run["result"] and run["result"]["result"])

resumed = client.resume(run["sessionId"], "What did you just do?", wait=300)
print(resumed["status"], resumed["result"] and resumed["result"]["result"])

fork = client.fork(run["sessionId"], "Make it a sonnet.", atRunId=run["id"])
print(client.cancel(fork["id"])["status"])

try:
    client.cancel(fork["id"] + "x")
except APIError as error:
    print(error.status, error.code, error.message)
