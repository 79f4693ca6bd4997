import json
import sys
from collections.abc import Iterator
from uuid import UUID

from cc_manager_client import AuthenticatedClient, models
from cc_manager_client.api.approvals import answer_approval
from cc_manager_client.api.runs import cancel_run, fork_run, resume_run, start_run
from httpx import Timeout

Frame = models.MessageFrame | models.ApprovalFrame | models.EndFrame
FRAMES: dict[str, type[Frame]] = {
    "message": models.MessageFrame,
    "approval": models.ApprovalFrame,
    "end": models.EndFrame,
}


def stream(run_id: str) -> Iterator[Frame]:
    """Yield the events of a run."""
    fields = dict[str, str]()
    with client.get_httpx_client().stream("GET", f"/api/runs/{run_id}/stream", timeout=None) as response:
        for line in response.raise_for_status().iter_lines():
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
            elif "data" in fields:
                yield FRAMES[fields["event"]].from_dict(fields | {"data": json.loads(fields["data"])})
                fields = {}


def successful(answer: object) -> models.Run:
    """Return the run of an answer, or end the program with the service's error."""
    return answer if isinstance(answer, models.Run) else sys.exit(str(answer))


url, token, cwd = sys.argv[1:]
client = AuthenticatedClient(base_url=url, token=token, timeout=Timeout(330))

start = models.StartBody(cwd=cwd, prompt="Write a haiku into haiku.txt.", approvals=True)
run = successful(start_run.sync(client=client, body=start))
for frame in stream(run.id):
    if isinstance(frame, models.MessageFrame):
        print(frame.data.type_)
    elif isinstance(frame, models.EndFrame):
        print(frame.data.status, frame.data.cost_usd)
    elif frame.data.status == "pending":
        decision = models.Decision.ALLOW if frame.data.tool_name == "Write" else models.Decision.DENY
        answer_approval.sync(frame.data.id, client=client, body=models.ApprovalBody(decision=decision))

resume = models.ResumeBody(session_id=UUID(run.session_id), prompt="What did you do?")
resumed = successful(resume_run.sync(client=client, body=resume, wait=300))
print(resumed.status, resumed.result and resumed.result["result"])

other = models.ForkBody(session_id=UUID(run.session_id), at_run_id=run.id, prompt="Make it a sonnet.")
fork = successful(fork_run.sync(client=client, body=other))
cancelled = successful(cancel_run.sync(fork.id, client=client))
print(cancelled.mode, cancelled.status)
