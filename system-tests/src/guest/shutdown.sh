#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Ends the guest; the agent and the power button call it.
echo "GUEST SHUTDOWN${1:+ BY THE AGENT}" >/dev/console
killall guest-records 2>/dev/null
sync
poweroff -f
