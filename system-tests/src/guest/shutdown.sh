#!/bin/busybox sh
# Ends the guest; the agent and the power button call it.
echo "GUEST SHUTDOWN" >/dev/console
killall guest-records 2>/dev/null
sync
poweroff -f
