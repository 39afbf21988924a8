// SPDX-License-Identifier: MIT OR Apache-2.0
//! The smallest guest: a boot sector that the firmware starts from the first disk. It counts its
//! boots in the disk's second sector and fills the disk's second MiB with that number, over and
//! over, through the firmware's driver of the disk. At its third boot it switches the machine off.

/// At which boot it switches off.
pub(super) const LAST_BOOT: u8 = 3;
/// Where the number of boots is, in bytes.
pub(super) const COUNTER: u64 = 512;
/// What it fills, in bytes.
pub(super) const FILLED: std::ops::Range<u64> = 1 << 20..2 << 20;

/// 16-bit code for the address 0x7c00; the firmware tells its drive in `dl`.
const CODE: &[&[u8]] = &[
    &[0x31, 0xc0],                                     // 00: xor ax, ax
    &[0x8e, 0xd8],                                     // 02: mov ds, ax
    &[0x8e, 0xc0],                                     // 04: mov es, ax
    &[0x8e, 0xd0],                                     // 06: mov ss, ax
    &[0xbc, 0x00, 0x7c],                               // 08: mov sp, 7c00h
    &[0x88, 0x16, 0x70, 0x7c],                         // 0b: mov [drive], dl
    &[0xb4, 0x42],                                     // 0f: mov ah, 42h (read)
    &[0xe8, 0x50, 0x00],                               // 11: call disk
    &[0xfe, 0x06, 0x00, 0x7e],                         // 14: inc byte [7e00h]
    &[0xb4, 0x43],                                     // 18: mov ah, 43h (write)
    &[0xe8, 0x47, 0x00],                               // 1a: call disk
    &[0xa0, 0x00, 0x7e],                               // 1d: mov al, [7e00h]
    &[0x3c, LAST_BOOT],                                // 20: cmp al, LAST_BOOT
    &[0x73, 0x36],                                     // 22: jae off
    &[0xbf, 0x00, 0x80],                               // 24: mov di, 8000h
    &[0xb9, 0x00, 0x80],                               // 27: mov cx, 8000h
    &[0xfc],                                           // 2a: cld
    &[0xf3, 0xaa],                                     // 2b: rep stosb
    &[0xc7, 0x06, 0x76, 0x7c, 0x40, 0x00],             // 2d: mov word [count], 64
    &[0xc7, 0x06, 0x78, 0x7c, 0x00, 0x80],             // 33: mov word [address], 8000h
    &[0x66, 0xc7, 0x06, 0x7c, 0x7c, 0x00, 0x08, 0, 0], // 39: again: mov dword [sector], 2048
    &[0xb4, 0x43],                                     // 42: next: mov ah, 43h (write)
    &[0xe8, 0x1d, 0x00],                               // 44: call disk
    &[0x66, 0x83, 0x06, 0x7c, 0x7c, 0x40],             // 47: add dword [sector], 64
    &[0x66, 0x81, 0x3e, 0x7c, 0x7c, 0x00, 0x10, 0, 0], // 4d: cmp dword [sector], 4096
    &[0x72, 0xea],                                     // 56: jb next
    &[0xeb, 0xdf],                                     // 58: jmp again
    &[0xba, 0x04, 0x06],                               // 5a: off: mov dx, 604h (PM1a control)
    &[0xb8, 0x00, 0x20],                               // 5d: mov ax, 2000h (sleep state S5)
    &[0xef],                                           // 60: out dx, ax
    &[0xf4],                                           // 61: hlt
    &[0xeb, 0xf6],                                     // 62: jmp off
    &[0xb0, 0x00],                                     // 64: disk: mov al, 0
    &[0x8a, 0x16, 0x70, 0x7c],                         // 66: mov dl, [drive]
    &[0xbe, 0x74, 0x7c],                               // 6a: mov si, packet
    &[0xcd, 0x13],                                     // 6d: int 13h
    &[0xc3],                                           // 6f: ret
    &[0x00],                                           // 70: drive
    &[0x00, 0x00, 0x00],                               // 71:
    &[0x10, 0x00],                                     // 74: packet: its size
    &[0x01, 0x00],                                     // 76: count
    &[0x00, 0x7e, 0x00, 0x00],                         // 78: address
    &[0x01, 0, 0, 0, 0, 0, 0, 0],                      // 7c: sector
];

/// The first sector of the guest's disk.
pub(super) fn sector() -> [u8; 512] {
    let code = CODE.concat();
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}
