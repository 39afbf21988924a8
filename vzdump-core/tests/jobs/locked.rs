// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMs with which something else is being done, and such whose configuration is lost: neither a backup nor a removal
//! touches them.

use vzdump_core::task_log::NoLog;
use vzdump_core::vm::destroy::destroy;

use crate::modes::make_disks;
use crate::provider::Script;
use crate::world::{ID, World};

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_vm_is_neither_backed_up_nor_pruned() {
    for (lock, why) in [
        ("backup", "VM 100 is locked (backup); remove the key 'lock' if that is left over"),
        ("migrate", "is locked (migrate)"),
        ("create", "is locked (create)"),
        ("restore", "another `vzdump restore --force` brings it back"),
        ("live-restore", "`vzdump restore --resume 100` goes on with it"),
    ] {
        let mut world = World::with(&format!("lock: {lock}\n"), Script::default());
        world.options.prune = Some("keep-last=1".parse().unwrap());
        let error = world.backup().await.error.unwrap();
        assert!(error.contains(why), "{error}");
        for call in ["start_guest", "list", "remove"] {
            assert_eq!(world.provider.count(call), 0, "{lock}: {call}");
        }
        assert!(world.peer.log().is_empty(), "something was done to the VM");
        world.assert_no_files(lock);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_an_empty_configuration_is_not_backed_up() {
    let world = World::new();
    for text in ["", "\n#name: web\n", "[PENDING]\nname: web\n"] {
        std::fs::write(world.ctx.layout.vm_config_path(ID), text).unwrap();
        let error = world.backup().await.error.unwrap();
        assert!(error.contains("The configuration of VM 100 is empty"), "{error}");
        assert_eq!(world.provider.count("start_guest"), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_not_made_completely_is_removed_in_spite_of_its_lock() {
    for (lock, is_removed) in [
        ("backup", false),
        ("migrate", false),
        ("suspended", false),
        ("create", true),
        ("restore", true),
        ("live-restore", true),
    ] {
        let mut world = World::with(&format!("lock: {lock}\n"), Script::default());
        world.kill_qemu();
        make_disks(&world);
        let destroyed = destroy(&world.ctx, ID, &NoLog).await;
        assert_eq!(destroyed.is_ok(), is_removed, "{lock}: {destroyed:?}");
        let has_disk = world.root.join("state/storage/images/100/vm-100-disk-0.raw").exists();
        let has_config = world.ctx.layout.vm_config_path(ID).exists();
        assert_eq!((has_disk, has_config), (!is_removed, !is_removed), "{lock}");
        if let Err(error) = destroyed {
            assert!(error.to_string().contains(&format!("is locked ({lock})")), "{error}");
        }
    }
}
