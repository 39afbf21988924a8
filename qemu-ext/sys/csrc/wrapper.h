/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The QEMU headers that qemu-ext uses: the only list of them. bindgen reads this file, the shim
 * includes it. Headers that moved between versions are looked up under each of their names.
 */
#ifndef BA_WRAPPER_H
#define BA_WRAPPER_H

#include "qemu/osdep.h"
#include "block/block.h"
#include "block/block_int.h"
#include "block/dirty-bitmap.h"
#include "block/export.h"
#include "block/nbd.h"
#include "block/thread-pool.h"
#if __has_include("block/aio.h")
#include "block/aio.h"
#else
#include "qemu/aio.h"
#endif
#if __has_include("system/block-backend.h")
#include "system/block-backend.h"
#include "system/runstate.h"
#else
#include "sysemu/block-backend.h"
#include "sysemu/runstate.h"
#endif
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/id.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "qom/object.h"
#if __has_include("qobject/qdict.h")
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#else
#include "qapi/qmp/qdict.h"
#include "qapi/qmp/qlist.h"
#endif
#include "migration/blocker.h"
#include "qapi/qapi-commands-block-core.h"
#include "qapi/qapi-commands-block-export.h"
#include "qapi/qapi-events-backup-access.h"
#include "qapi/qapi-types-backup-access.h"
#include "qapi/qapi-types-block-export.h"

#endif
