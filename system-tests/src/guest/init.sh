#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# The guest's first process: devices, guest agent, a mounted file system that can be frozen, and
# then the records: check what the disks hold, say so on the console, and go on writing.
# Options on the kernel's command line: vzdump.rate=N, vzdump.write=no, vzdump.passes=N (so many
# threads write the third disk).
/bin/busybox mkdir -p /bin /sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
ln -sfn /run /var/run
for module in /modules/*.ko; do
    insmod "$module" || echo "ERROR cannot load $module"
done

option() {
    for word in $(cat /proc/cmdline); do
        case "$word" in "vzdump.$1="*) echo "${word#*=}" ;; esac
    done
}

# Without a file system the agent would have nothing to freeze. Something writes to it all the time.
file_system() {
    dd if=/dev/zero of=/run/fs.img bs=1M count=8 2>/dev/null &&
        losetup /dev/loop0 /run/fs.img &&
        mke2fs -q /dev/loop0 >/dev/null 2>&1 &&
        mount -t ext2 /dev/loop0 /mnt || { echo "ERROR no file system to freeze"; return; }
    while date >/mnt/tick && sync -d /mnt/tick; do sleep 1; done
}

# The agent's port appears a moment after its driver; a machine without agent has none.
agent() {
    tries=0
    while [ $tries -lt 100 ]; do
        for port in /sys/class/virtio-ports/*; do
            if [ "$(cat "$port/name" 2>/dev/null)" = org.qemu.guest_agent.0 ]; then
                qemu-ga -m virtio-serial -p "/dev/${port##*/}" -d >/dev/null 2>&1 ||
                    echo "ERROR the guest agent does not start"
                echo "GUEST AGENT"
                return
            fi
        done
        tries=$((tries + 1))
        sleep 0.1
    done
}

records() {
    guest-records check --allow-in-flight $DISKS || return
    [ "$(option write)" = no ] && return
    rate="$(option rate)"
    exec guest-records write --rate "${rate:-200}" $DISKS
}

DISKS="/dev/vda /dev/vdb /dev/vdc /dev/vdd /dev/sda /dev/sdb /dev/sdc /dev/sdd"
acpid -l /dev/null
file_system &
agent &
echo "GUEST READY"
records &
passes="$(option passes)"
[ -n "$passes" ] && guest-records passes "$passes" /dev/vdc &
while :; do
    wait
    sleep 1
done
