#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Builds qemu-ext as a static library; meson runs it from QEMU's build directory (see qemu.patch).
#
#   build.sh QEMU_SOURCE QEMU_BUILD OUTPUT
#
# QEMU_EXT_DIR         where qemu-ext is (default: `backup-ext/qemu-ext` in QEMU's source tree)
# QEMU_EXT_TARGET_DIR  cargo's target directory (default: `qemu-ext-target` in QEMU's build tree)
# QEMU_EXT_FEATURES    features of the library, for tests (default: none)
# CARGO                the cargo to use (default: the one in PATH)
#
# Where the crates of others lie beside qemu-ext (`cargo xtask qemu --export`), cargo uses no network
# and, unless CARGO_HOME is set, a home in its target directory: package builds have none.
set -eu

QEMU_SRC=$(cd "$1" && pwd -P)
QEMU_BUILD=$(cd "$2" && pwd -P)
export QEMU_SRC QEMU_BUILD
case $3 in
/*) output=$3 ;;
*) output=$PWD/$3 ;;
esac
target=${QEMU_EXT_TARGET_DIR:-$QEMU_BUILD/qemu-ext-target}
ext=${QEMU_EXT_DIR:-$QEMU_SRC/backup-ext/qemu-ext}
if ! [ -f "$ext/Cargo.toml" ]; then
    echo "$ext: no qemu-ext there; set QEMU_EXT_DIR, or make backup-ext/qemu-ext in QEMU's source a link to it" >&2
    exit 1
fi

# Resolve links, so that cargo finds the workspace above the real folder.
cd -P "$ext"
offline=
if [ -d ../vendor ]; then
    offline='--locked --offline'
    CARGO_HOME=${CARGO_HOME:-$target/home}
    export CARGO_HOME
fi
# shellcheck disable=SC2086 # two words or none
"${CARGO:-cargo}" build --release --package qemu-ext --target-dir "$target" $offline \
    ${QEMU_EXT_FEATURES:+--features "$QEMU_EXT_FEATURES"}

# A new time stamp means a new link of every program: only when something changed.
built=$target/release/libqemu_ext.a
cmp -s "$built" "$output" || cp "$built" "$output"
