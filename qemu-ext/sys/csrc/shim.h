/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What Rust cannot reach through bindgen: macros, static data behind macros, and symbols that one
 * of the binaries lacks. One function, one purpose.
 */
#ifndef BA_SHIM_H
#define BA_SHIM_H

#include "wrapper.h"

/* Errors. @msg is complete: it is not a format string. */
void ba_error_setg(Error **errp, const char *msg);
void ba_error_setg_device_not_found(Error **errp, const char *msg);

/* QObjects. */
QDict *ba_qdict_ref(QDict *qdict);
void ba_qobject_unref(QDict *qdict);
/* A size in bytes, as a number or as text; 0 if there is none. */
uint64_t ba_qdict_get_size(const QDict *qdict, const char *key);
/* Takes @obj over. */
void ba_qdict_put_qdict(QDict *qdict, const char *key, QDict *obj);

/* Graph. The caller holds the graph lock (or is the main loop). */
bool ba_bs_has_parents(BlockDriverState *bs);
BdrvChild *ba_bs_first_parent(BlockDriverState *bs);
BdrvChild *ba_bs_next_parent(BdrvChild *child);
BdrvChild *ba_bs_first_child(BlockDriverState *bs);
BdrvChild *ba_bs_next_child(BdrvChild *child);
void ba_graph_rdlock_main_loop(void);
void ba_graph_rdunlock_main_loop(void);

/* The BlockBackend of the device with qdev id @id; NULL where the binary has no devices. */
BlockBackend *ba_blk_by_qdev_id(const char *id);

/*
 * Migration blocker with the text @reason. On success *@blocker is to be given to
 * ba_migrate_del_blocker(). A binary without migration succeeds and leaves *@blocker NULL or
 * set: both are accepted by ba_migrate_del_blocker().
 */
bool ba_migrate_add_blocker(Error **blocker, const char *reason, Error **errp);
void ba_migrate_del_blocker(Error **blocker);

/* Event loop. */
void ba_bh_schedule_oneshot(AioContext *ctx, QEMUBHFunc *cb, void *opaque);
bool ba_aio_poll(AioContext *ctx, bool blocking);
QEMUTimer *ba_aio_timer_new_ms(AioContext *ctx, QEMUClockType type, QEMUTimerCB *cb, void *opaque);
/* A timer that only the main loop itself runs, never a nested wait. */
QEMUTimer *ba_main_loop_timer_new_ms(QEMUClockType type, QEMUTimerCB *cb, void *opaque);
void ba_timer_mod_ms(QEMUTimer *timer, int64_t expire_ms);
void ba_timer_del(QEMUTimer *timer);
void ba_timer_free(QEMUTimer *timer);
bool ba_bql_locked(void);

/*
 * Main loop: wait until @done(@opaque) holds, letting bottom halves and @ctx (may be NULL) run.
 */
void ba_aio_wait_while(AioContext *ctx, bool (*busy)(void *), void *opaque);

/* Exports. The list of all exports is static in QEMU: see qmp_query_block_exports(). */
int ba_blk_exp_refcount(BlockExport *exp);
BlockDriverState *ba_blk_exp_bs(BlockExport *exp);

/* The calling code is global-state code: main loop or big lock, and in no coroutine. */
bool ba_in_main_loop(void);
/* The context that only the main loop itself polls, never a nested wait. */
AioContext *ba_main_loop_context(void);

/* Type of the guest device at @blk; NULL if there is none. */
const char *ba_blk_device_type(BlockBackend *blk);
/* What the parent of @child calls itself; to be freed with g_free(). May be NULL. */
char *ba_child_description(BdrvChild *child);
/* The machine runs or has run since it was made; false where the binary has no machine. */
bool ba_vm_has_run(void);
/* Someone uses the bitmap: it can be neither released nor merged. */
bool ba_bitmap_is_busy(BdrvDirtyBitmap *bitmap);

#endif
