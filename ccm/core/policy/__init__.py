"""The operator's policy for runs: permitted options, resource ceilings, working directories and webhook hosts.

A request is checked when it arrives. Options and directory are checked again when the run starts, because a restart may
have changed the settings while the run was waiting.
"""
