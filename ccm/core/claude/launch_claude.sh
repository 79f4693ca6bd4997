#!/bin/sh
# Starts Claude Code for one run (processes.py sets the variables).
#
# CCM_LAUNCHER starts it in a session of its own, so that Ctrl-C at the service's terminal does not reach it directly, and
# makes the kernel end it when the service dies. CCM_HIDDEN names the service's own variables, which the agent must not
# see. CCM_CLAUDE is the program. CCM_STDERR is a file: the SDK stops reading a pipe at the first byte that is not UTF-8,
# and the run would hang once the pipe is full. CCM_OPEN_FILES is the limit with which the service was started: the
# service raises its own, and some programs cannot cope with more than 1024.
launcher=$CCM_LAUNCHER
claude=$CCM_CLAUDE
stderr=$CCM_STDERR
[ -z "$CCM_OPEN_FILES" ] || ulimit -Sn "$CCM_OPEN_FILES"
unset CCM_LAUNCHER CCM_CLAUDE CCM_STDERR CCM_OPEN_FILES $CCM_HIDDEN CCM_HIDDEN
exec $launcher "$claude" "$@" 2>"$stderr"
