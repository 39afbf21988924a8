// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that is a boot sector: it counts its boots, writes to its disk all the time, and switches
//! off when the power button is pressed. It boots within a second or two where a Linux takes many.

/// What the guest does after it has counted its boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// It writes until the power button is pressed, and switches off.
    Writes,
    /// It sleeps (S3) at once.
    Sleeps,
    /// It writes and does not care for the power button.
    IsDeaf,
}

/// Where the number of boots is, in bytes.
pub const BOOTS: u64 = 512;
/// Where the number of writes of this boot is: two bytes.
pub const WRITES: u64 = 514;
/// From here on the guest writes nothing.
pub const UNTOUCHED: usize = 1024;

/// 16-bit code for the address 0x7c00; the firmware tells its drive in `dl`. The machine's power
/// registers are at 0x600: status, 0x602: enabled, 0x604: control.
const CODE: &[&[u8]] = &[
    &[0x31, 0xc0],                // 00: xor ax, ax
    &[0x8e, 0xd8],                // 02: mov ds, ax
    &[0x8e, 0xc0],                // 04: mov es, ax
    &[0x8e, 0xd0],                // 06: mov ss, ax
    &[0xbc, 0x00, 0x7c],          // 08: mov sp, 7c00h
    &[0x88, 0x16, 0x80, 0x7c],    // 0b: mov [drive], dl
    &[0xb4, 0x42],                // 0f: mov ah, 42h (read)
    &[0xe8, 0x2c, 0x00],          // 11: call disk
    &[0xfe, 0x06, 0x00, 0x7e],    // 14: inc byte [7e00h]
    &[0xb4, 0x43],                // 18: mov ah, 43h (write)
    &[0xe8, 0x23, 0x00],          // 1a: call disk
    &[0xba, 0x02, 0x06],          // 1d: mov dx, 602h
    &[0xb8, 0x00, 0x01],          // 20: mov ax, 100h (power button)
    &[0xef],                      // 23: out dx, ax
    &[0xff, 0x06, 0x02, 0x7e],    // 24: again: inc word [7e02h]
    &[0xb4, 0x43],                // 28: mov ah, 43h (write)
    &[0xe8, 0x13, 0x00],          // 2a: call disk
    &[0xba, 0x00, 0x06],          // 2d: mov dx, 600h
    &[0xed],                      // 30: in ax, dx
    &[0xf6, 0xc4, 0x01],          // 31: test ah, 1
    &[0x74, 0xee],                // 34: jz again
    &[0xba, 0x04, 0x06],          // 36: off: mov dx, 604h
    &[0xb8, 0x00, 0x20],          // 39: mov ax, 2000h (sleep state S5)
    &[0xef],                      // 3c: out dx, ax
    &[0xf4],                      // 3d: hlt
    &[0xeb, 0xf6],                // 3e: jmp off
    &[0xb0, 0x00],                // 40: disk: mov al, 0
    &[0x8a, 0x16, 0x80, 0x7c],    // 42: mov dl, [drive]
    &[0xbe, 0x84, 0x7c],          // 46: mov si, packet
    &[0xcd, 0x13],                // 49: int 13h
    &[0xc3],                      // 4b: ret
    &[0; 0x38],                   // 4c: at 80: drive
    &[0x10, 0x00],                // 84: packet: its size
    &[0x01, 0x00],                // 86: count
    &[0x00, 0x7e, 0x00, 0x00],    // 88: address
    &[0x01, 0, 0, 0, 0, 0, 0, 0], // 8c: sector
];

/// The first sector of the guest's disk.
pub fn sector(guest: Guest) -> [u8; 512] {
    let code = CODE.concat();
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    match guest {
        Guest::Writes => {}
        // jmp off, in the place of the power button's registers; the sleep state is S3.
        Guest::Sleeps => {
            sector[0x1d..0x1f].copy_from_slice(&[0xeb, 0x17]);
            sector[0x3b] = 0x24;
        }
        // jmp again, in the place of jz.
        Guest::IsDeaf => sector[0x34] = 0xeb,
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}
