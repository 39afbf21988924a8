/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Functions around QEMU's macros and around symbols that only one binary has. See shim.h.
 */
#include "wrapper.h"
#include "shim.h"

/* Only the system emulator defines them. */
#pragma weak blk_by_qdev_id
#pragma weak runstate_check

void ba_error_setg(Error **errp, const char *msg)
{
    error_setg(errp, "%s", msg);
}

void ba_error_setg_device_not_found(Error **errp, const char *msg)
{
    error_set(errp, ERROR_CLASS_DEVICE_NOT_FOUND, "%s", msg);
}

QDict *ba_qdict_ref(QDict *qdict)
{
    return qobject_ref(qdict);
}

void ba_qobject_unref(QDict *qdict)
{
    qobject_unref(qdict);
}

uint64_t ba_qdict_get_size(const QDict *qdict, const char *key)
{
    const char *text = qdict_get_try_str(qdict, key);
    uint64_t size = 0;

    if (!text) {
        return qdict_get_try_int(qdict, key, 0);
    }
    return qemu_strtosz(text, NULL, &size) < 0 ? 0 : size;
}

void ba_qdict_put_qdict(QDict *qdict, const char *key, QDict *obj)
{
    qdict_put(qdict, key, obj);
}

bool ba_bs_has_parents(BlockDriverState *bs)
{
    return !QLIST_EMPTY(&bs->parents);
}

BdrvChild *ba_bs_first_parent(BlockDriverState *bs)
{
    return QLIST_FIRST(&bs->parents);
}

BdrvChild *ba_bs_next_parent(BdrvChild *child)
{
    return QLIST_NEXT(child, next_parent);
}

BdrvChild *ba_bs_first_child(BlockDriverState *bs)
{
    return QLIST_FIRST(&bs->children);
}

BdrvChild *ba_bs_next_child(BdrvChild *child)
{
    return QLIST_NEXT(child, next);
}

void ba_graph_rdlock_main_loop(void)
{
    bdrv_graph_rdlock_main_loop();
}

void ba_graph_rdunlock_main_loop(void)
{
    bdrv_graph_rdunlock_main_loop();
}

BlockBackend *ba_blk_by_qdev_id(const char *id)
{
    return blk_by_qdev_id ? blk_by_qdev_id(id, NULL) : NULL;
}

bool ba_migrate_add_blocker(Error **blocker, const char *reason, Error **errp)
{
    *blocker = NULL;
    error_setg(blocker, "%s", reason);
    if (migrate_add_blocker(blocker, errp) < 0) {
        /* Already NULL where the callee freed it. */
        error_free(*blocker);
        *blocker = NULL;
        return false;
    }
    return true;
}

void ba_migrate_del_blocker(Error **blocker)
{
    if (*blocker) {
        migrate_del_blocker(blocker);
    }
    /* The storage daemon's stub leaves it to us. */
    error_free(*blocker);
    *blocker = NULL;
}

void ba_bh_schedule_oneshot(AioContext *ctx, QEMUBHFunc *cb, void *opaque)
{
    aio_bh_schedule_oneshot_full(ctx, cb, opaque, "backup-access");
}

bool ba_aio_poll(AioContext *ctx, bool blocking)
{
    return aio_poll(ctx, blocking);
}

QEMUTimer *ba_aio_timer_new_ms(AioContext *ctx, QEMUClockType type, QEMUTimerCB *cb, void *opaque)
{
    return aio_timer_new(ctx, type, SCALE_MS, cb, opaque);
}

QEMUTimer *ba_main_loop_timer_new_ms(QEMUClockType type, QEMUTimerCB *cb, void *opaque)
{
    return timer_new_ms(type, cb, opaque);
}

void ba_timer_mod_ms(QEMUTimer *timer, int64_t expire_ms)
{
    timer_mod(timer, expire_ms);
}

void ba_timer_del(QEMUTimer *timer)
{
    timer_del(timer);
}

void ba_timer_free(QEMUTimer *timer)
{
    timer_free(timer);
}

bool ba_bql_locked(void)
{
    return bql_locked();
}

void ba_aio_wait_while(AioContext *ctx, bool (*busy)(void *), void *opaque)
{
    AIO_WAIT_WHILE_UNLOCKED(ctx, busy(opaque));
}

int ba_blk_exp_refcount(BlockExport *exp)
{
    return qatomic_read(&exp->refcount);
}

BlockDriverState *ba_blk_exp_bs(BlockExport *exp)
{
    return exp->blk ? blk_bs(exp->blk) : NULL;
}

bool ba_in_main_loop(void)
{
    return qemu_in_main_thread() && !qemu_in_coroutine();
}

AioContext *ba_main_loop_context(void)
{
    return iohandler_get_aio_context();
}

const char *ba_blk_device_type(BlockBackend *blk)
{
    DeviceState *dev = blk_get_attached_dev(blk);

    return dev ? object_get_typename(OBJECT(dev)) : NULL;
}

char *ba_child_description(BdrvChild *child)
{
    return child->klass->get_parent_desc ? child->klass->get_parent_desc(child) : NULL;
}

bool ba_vm_has_run(void)
{
    return runstate_check && !runstate_check(RUN_STATE_PRELAUNCH);
}

bool ba_bitmap_is_busy(BdrvDirtyBitmap *bitmap)
{
    return bdrv_dirty_bitmap_check(bitmap, BDRV_BITMAP_BUSY, NULL) != 0 ||
           bdrv_dirty_bitmap_has_successor(bitmap);
}
