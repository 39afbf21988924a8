#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# First process of the guest that is measured: writes to its disk and says on the console how it went.
/bin/busybox mkdir -p /bin /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    insmod "$module" || echo "ERROR cannot load $module"
done
for word in $(cat /proc/cmdline); do
    case "$word" in "load="*) load="$(echo "${word#*=}" | tr , ' ')" ;; esac
done
# Depth, seconds and seed.
guest-load /dev/vda $load || echo "LOAD FAILED"
while :; do sleep 60; done
