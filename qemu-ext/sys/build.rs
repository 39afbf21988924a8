// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs bindgen on QEMU's headers and compiles the C shim, with the flags of one configured QEMU
//! build tree, so that every layout is exactly that build's.
//!
//! The tree is named by the environment variables `QEMU_SRC` and `QEMU_BUILD`; without them by the
//! file `target/qemu/build-env` that `cargo xtask qemu` leaves in the checkout.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::exit;

/// What is wanted of QEMU; types reached from these come along.
const FUNCTIONS: &[&str] = &[
    "ba_.*",
    "bdrv_.*",
    "blk_.*",
    "qemu_co_.*",
    "qemu_coroutine.*",
    "qemu_in_coroutine",
    "aio_.*",
    "qemu_bh_.*",
    "qemu_aio_.*",
    "qemu_get_aio_context",
    "qemu_get_current_aio_context",
    "qemu_iovec_.*",
    "iov_.*",
    "qdict_.*",
    "error_.*",
    "thread_pool_submit_co",
    "timer_.*",
    "qemu_clock.*",
    "hbitmap_.*",
    "id_generate",
    "id_wellformed",
    "qapi_free_.*",
    "qapi_event_send_backup.*",
    "qmp_blockdev_.*",
    "qmp_query_block_exports",
    "qmp_query_named.*",
    "qemu_.*blockalign.*",
    "qemu_vfree",
    "buffer_is_zero.*",
    "register_module_init",
    "g_malloc0?",
    "g_free",
    "g_strdup",
    "g_compute_checksum.*",
];
const TYPES: &[&str] = &[
    "BackupAccess.*",
    "BDRV.*",
    "Bdrv.*",
    "BlockDriver.*",
    "BlockExport.*",
    "BlockBackend.*",
    "BlockDirtyInfo.*",
    "BlockDeviceInfo.*",
    "HBitmap.*",
    "QEMUIOVector",
    "QEMUClockType",
    "QEMUTimer.*",
    "module_init_type",
    "strList",
];
const CONSTANTS: &[&str] = &[
    "BackupAccess.*",
    "BACKUP_ACCESS_.*",
    "BDRV_.*",
    "BLK_PERM_.*",
    "BLOCKDEV_.*",
    "BLOCK_EXPORT_.*",
    "BLOCK_ERROR_ACTION_.*",
    "ERROR_CLASS_.*",
    "MODULE_INIT_.*",
    "QEMU_CLOCK_.*",
    "SCALE_.*",
    "child_of_bds",
    "error_abort",
    "error_fatal",
    "qemu_main_context.*",
];
/// Defined on our side of the border.
const OURS: &[&str] = &["qmp_backup_access_.*", "qmp_query_backup_access"];

fn main() {
    println!("cargo::rerun-if-changed=csrc");
    for name in ["QEMU_SRC", "QEMU_BUILD"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let tree = Tree::find().unwrap_or_else(|message| fail(&message));
    for generated in ["config-host.h", "qapi/qapi-types-backup-access.h", "compile_commands.json"] {
        println!("cargo::rerun-if-changed={}", tree.build.join(generated).display());
    }
    let (compiler, flags) = tree.compiler().unwrap_or_else(|message| fail(&message));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    let statics = out.join("statics.c");
    bind(&flags, &out.join("bindings.rs"), &statics).unwrap_or_else(|message| fail(&message));
    compile(&compiler, &flags, &statics);
    println!("cargo::metadata=qemu_build={}", tree.build.display());
}

/// Stops the build with one readable message.
fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    exit(1);
}

/// A configured QEMU build tree.
struct Tree {
    src: PathBuf,
    build: PathBuf,
}

impl Tree {
    fn find() -> Result<Self, String> {
        let env_dir = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let tree = match (env_dir("QEMU_SRC"), env_dir("QEMU_BUILD")) {
            (Some(src), Some(build)) => Self { src, build },
            (None, None) => Self::from_checkout()?,
            _ => return Err("QEMU_SRC and QEMU_BUILD go together: only one is set".into()),
        };
        if !tree.build.join("qapi/qapi-types-backup-access.h").is_file() {
            return Err(format!(
                "{}: not a configured build tree of the patched QEMU; run `cargo xtask qemu`",
                tree.build.display()
            ));
        }
        Ok(tree)
    }

    /// Reads what `cargo xtask qemu` wrote down.
    fn from_checkout() -> Result<Self, String> {
        let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
        let file = manifest.join("../../target/qemu/build-env");
        println!("cargo::rerun-if-changed={}", file.display());
        let text = fs::read_to_string(&file).map_err(|_| {
            "no QEMU build tree to bind to: run `cargo xtask qemu` first \
             (or set QEMU_SRC and QEMU_BUILD)"
                .to_string()
        })?;
        let value = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(PathBuf::from)
                .ok_or_else(|| {
                    format!("{}: no {name} in it; run `cargo xtask qemu`", file.display())
                })
        };
        Ok(Self { src: value("QEMU_SRC")?, build: value("QEMU_BUILD")? })
    }

    /// The compiler and the flags with which the tree compiles its own `block.c`, paths made
    /// absolute.
    fn compiler(&self) -> Result<(String, Vec<String>), String> {
        let file = self.build.join("compile_commands.json");
        let bad = |why: &dyn std::fmt::Display| format!("{}: {why}", file.display());
        let text = fs::read_to_string(&file).map_err(|e| bad(&e))?;
        let commands: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(&e))?;
        let command = commands
            .as_array()
            .into_iter()
            .flatten()
            .find(|c| c["output"].as_str().is_some_and(|o| o.ends_with("libblock.a.p/block.c.o")))
            .and_then(|c| c["command"].as_str())
            .ok_or_else(|| bad(&"no command for block.c in it"))?;
        let words = shell_words(command);
        // `ccache cc …`: the flags are the second one's.
        let compiler = words.iter().find(|word| !word.ends_with("ccache"));
        let compiler = compiler.ok_or_else(|| bad(&"an empty command for block.c"))?.clone();
        let mut flags = select_flags(&words, &self.build);
        // The shim's own directory and the tree's headers, whatever the order above was.
        for dir in [self.src.join("include"), self.build.clone()] {
            flags.extend(["-iquote".into(), dir.display().to_string()]);
        }
        Ok((compiler, flags))
    }
}

/// Splits a command as a shell would, as far as compiler command lines need it.
fn shell_words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '\\') => word.get_or_insert_default().extend(chars.next()),
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Keeps what decides about meaning and layout: include paths, defines, standard, machine and code
/// generation; drops warnings, link-time optimization, and input and output.
fn select_flags(words: &[String], build: &Path) -> Vec<String> {
    let absolute = |path: &str| build.join(path).display().to_string();
    let mut flags = Vec::new();
    let mut words = words.iter().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "-isystem" | "-iquote" | "-idirafter" | "-I" => {
                if let Some(dir) = words.next() {
                    flags.extend([word.clone(), absolute(dir)]);
                }
            }
            "-D" | "-U" | "-include" => {
                flags.push(word.clone());
                flags.extend(words.next().cloned());
            }
            "-MQ" | "-MF" | "-MT" | "-o" | "-c" => {
                words.next();
            }
            _ if word.starts_with("-I") => flags.push(format!("-I{}", absolute(&word[2..]))),
            _ if word.starts_with("-flto") || word.starts_with("-fdiagnostics") => {}
            _ if ["-D", "-U", "-std", "-m", "-f"].iter().any(|p| word.starts_with(p)) => {
                flags.push(word.clone());
            }
            _ => {}
        }
    }
    flags
}

/// Writes the Rust bindings, and C source with callable copies of static inline functions.
fn bind(flags: &[String], bindings: &Path, statics: &Path) -> Result<(), String> {
    let mut builder = bindgen::Builder::default()
        .header("csrc/shim.h")
        // libclang is not the compiler of the tree: code generation flags are not for it.
        .clang_args(flags.iter().filter(|f| !f.starts_with("-f")))
        .clang_arg("-Wno-everything")
        .use_core()
        .rust_edition(bindgen::RustEdition::Edition2024)
        .prepend_enum_name(false)
        .generate_comments(false)
        .derive_default(true)
        .derive_debug(false)
        .merge_extern_blocks(true)
        .wrap_static_fns(true)
        .wrap_static_fns_path(statics)
        .formatter(bindgen::Formatter::Prettyplease);
    for name in FUNCTIONS {
        builder = builder.allowlist_function(name);
    }
    for name in TYPES {
        builder = builder.allowlist_type(name);
    }
    for name in CONSTANTS {
        builder = builder.allowlist_var(name);
    }
    for name in OURS {
        builder = builder.blocklist_function(name);
    }
    let mut text = builder.generate().map_err(|e| format!("bindgen: {e}"))?.to_string();
    text.push_str(block_status_mode(&text));
    fs::write(bindings, text).map_err(|e| format!("{}: {e}", bindings.display()))
}

/// The second argument of a driver's block-status callback became flags after QEMU 10.0: gives
/// its type a name, read from the bindings themselves.
fn block_status_mode(bindings: &str) -> &'static str {
    let callback = bindings.split("pub bdrv_co_block_status:").nth(1).unwrap_or_default();
    let arguments = callback.split("->").next().unwrap_or_default();
    if arguments.contains("bool") {
        "pub type BlockStatusMode = bool;\n"
    } else {
        "pub type BlockStatusMode = ::core::ffi::c_uint;\n"
    }
}

/// Compiles the shim and the static inline functions into one archive.
fn compile(compiler: &str, flags: &[String], statics: &Path) {
    let mut build = cc::Build::new();
    build.compiler(compiler);
    build.warnings(false).include("csrc").include(".").file("csrc/shim.c");
    if statics.is_file() {
        build.file(statics);
    }
    for flag in flags {
        build.flag(flag);
    }
    build.compile("qemu_ext_shim");
}
