#!/bin/sh
# Starts Claude Code for one run (core/processes.py sets the variables).
#
# CCM_LAUNCHER puts it into a session of its own, so that Ctrl-C at the service's terminal does not reach it behind our
# back, and has the kernel end it when the service dies. CCM_HIDDEN names what is the service's own business and not the
# agent's. CCM_CLAUDE is the program. CCM_STDERR is a file: the SDK stops reading a pipe at the first byte that is not
# UTF-8, and the run would hang when it is full.
launcher=$CCM_LAUNCHER
claude=$CCM_CLAUDE
stderr=$CCM_STDERR
unset CCM_LAUNCHER CCM_CLAUDE CCM_STDERR $CCM_HIDDEN CCM_HIDDEN
exec $launcher "$claude" "$@" 2>"$stderr"
