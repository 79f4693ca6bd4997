#!/bin/sh
# Starts Claude Code for one run (core/processes.py sets the three variables).
#
# CCM_LAUNCHER puts it into a session of its own, so that Ctrl-C at the service's terminal does not reach it behind our
# back, and has the kernel end it when the service dies. CCM_HIDDEN names what is the service's own business and not the
# agent's. CCM_CLAUDE is the program.
launcher=$CCM_LAUNCHER
claude=$CCM_CLAUDE
unset CCM_LAUNCHER CCM_CLAUDE $CCM_HIDDEN CCM_HIDDEN
exec $launcher "$claude" "$@"
