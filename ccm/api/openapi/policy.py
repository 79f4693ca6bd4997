"""What the operator's settings forbid, limit or provide, as extensions (`x-...`) and sentences of the schemas.

The settings' values are not told: the document is the same for every service of one version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.core.policy.ceilings import CEILINGS
from ccm.core.policy.permitted_options import ALWAYS_PRIVILEGED
from ccm.settings.settings import PRIVILEGED_PERMISSION_MODES

# The schemas of the bodies that start a run.
BODIES = ("StartBody", "ResumeBody", "ForkBody")
# The settings that provide a value where a request has none.
DEFAULTS = {
    "options.permissionMode": "CCM_PERMISSION_MODE",
    "options.settingSources": "CCM_SETTING_SOURCES",
    "approvalTimeoutMs": "CCM_APPROVAL_TIMEOUT",
}
# The settings that name the permitted values. Empty, they permit all.
ALLOWED = {"cwd": "CCM_ALLOWED_ROOTS", "webhookUrl": "CCM_WEBHOOK_ALLOW"}
WIDER = "Values that CCM_SETTING_SOURCES leaves out"
PRIVILEGED: Mapping[str, tuple[Any, str]] = {
    **{f"options.{name}": (True, "This option") for name in ALWAYS_PRIVILEGED},
    "options.permissionMode": (list(PRIVILEGED_PERMISSION_MODES), " and ".join(PRIVILEGED_PERMISSION_MODES)),
    "options.settingSources": ("wider than CCM_SETTING_SOURCES", WIDER),
    "agent.mcpServers": (True, "This field"),
    "agent.permissionMode": (list(PRIVILEGED_PERMISSION_MODES), " and ".join(PRIVILEGED_PERMISSION_MODES)),
}


def describe_policy(components: Mapping[str, dict[str, Any]]) -> None:
    """Add to each field of the requests what the settings say about it."""
    for prefix, names in (("options.", ("Options",)), ("agent.", ("Agent",)), ("", BODIES)):
        for name in names:
            for field, schema in components[name]["properties"].items():
                _describe(schema, prefix + field)


def _describe(schema: dict[str, Any], field: str) -> None:
    sentences = []
    ceiling = CEILINGS.get(field.replace("agent.", "options."))
    if ceiling is not None:
        schema["x-ceiling-setting"] = ceiling
        sentences.append(f"{ceiling} is the highest value that the service accepts, and its default.")
    if field in DEFAULTS:
        schema["x-default-setting"] = DEFAULTS[field]
        sentences.append(f"The default is {DEFAULTS[field]}.")
    if field in ALLOWED:
        schema["x-allowed-by-setting"] = ALLOWED[field]
        sentences.append(f"{ALLOWED[field]} may limit it.")
    if field in PRIVILEGED:
        schema["x-privileged"], subject = PRIVILEGED[field]
        option = field.partition(".")[2]
        verb = "needs" if subject.startswith("This") else "need"
        sentences.append(f"{subject} {verb} the operator's permission: {option} in CCM_PRIVILEGED_OPTIONS.")
    if sentences:
        schema["description"] = " ".join([*filter(None, [schema.get("description")]), *sentences])
