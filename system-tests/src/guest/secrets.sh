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
# Its last byte is the value.
secure=$(tail -c 1 /sys/firmware/efi/efivars/SecureBoot-* | hexdump -e '1/1 "%d"')
tpm=/sys/class/tpm/tpm0
version=$(cat $tpm/tpm_version_major)
echo "FIRMWARE secure=$secure tpm=$version key=$(cat $tpm/pubek 2>/dev/null | md5sum | cut -d ' ' -f 1)"
# It speaks the language of version 2.
[ "$version" = 1 ] || guest-secrets read
while read -r command number; do
    case "$command" in
    write) guest-secrets write "$number" ;;
    read) guest-secrets read ;;
    off) poweroff -f ;;
    esac
done
