#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# The first process of the guest that has EFI variables and a TPM: says what is in them, and does what it
# is told on its console.
/bin/busybox mkdir -p /bin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
    insmod "$module" || echo "ERROR cannot load $module"
done
mount -t efivarfs efivarfs /sys/firmware/efi/efivars || echo "ERROR no EFI variables"
stty -echo
guest-secrets read
while read -r command number; do
    case "$command" in
    write) guest-secrets write "$number" ;;
    read) guest-secrets read ;;
    off) poweroff -f ;;
    esac
done
