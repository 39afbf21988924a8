// SPDX-License-Identifier: MIT OR Apache-2.0
//! Passes on what an NBD client sends, its writes of zeroes as trims.
//!
//! A storage daemon makes a write of zeroes of a hole that is punched into its file, which a snapshot
//! refuses: it cannot be written to. What the hole means is a release, and that is a trim. Only one that may
//! leave a hole behind is changed; one that must not stays, and is refused.
//!
//! Reads are to be answered in one piece: else QEMU ends the connection when one fails (`docs/design/0006`),
//! and the daemon, which connects once, could read nothing any more.

use std::io::{self, ErrorKind};

use provider_nbd::wire::{
    MAGIC_OPTION, MAGIC_REQUEST, MAGIC_REQUEST_EXTENDED, Mode, OptionRequest, Request, command,
    command_flag, option,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The client's flags, before its first option.
const CLIENT_FLAGS_LEN: usize = 4;
const MAGIC_LEN: usize = 4;
/// Where the flags and the command of a request are, and the number of an option and its data's length.
const FLAGS: std::ops::Range<usize> = 4..6;
const COMMAND: std::ops::Range<usize> = 6..8;
const OPTION: std::ops::Range<usize> = 8..12;
const OPTION_LENGTH: std::ops::Range<usize> = 12..16;
/// More than any option or write has.
const PAYLOAD_BYTES_MAX: u64 = 64 << 20;

/// Passes on all that a client sends, until it closes its side.
///
/// Whether the negotiation has ended is seen by what a message begins with: options and requests begin
/// differently.
pub(super) async fn pass_on(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut flags = [0; CLIENT_FLAGS_LEN];
    from.read_exact(&mut flags).await?;
    to.write_all(&flags).await?;
    let mut head = [0; Request::LEN_EXTENDED];
    let mut is_structured = false;
    loop {
        if !read_magic(from, &mut head[..MAGIC_LEN]).await? {
            return Ok(());
        }
        let magic = number(&head[..MAGIC_LEN]);
        let mode = match magic {
            MAGIC_REQUEST => Some((Mode::Structured, Request::LEN)),
            MAGIC_REQUEST_EXTENDED => Some((Mode::Extended, Request::LEN_EXTENDED)),
            _ if u64::from(magic) == MAGIC_OPTION >> 32 => None,
            _ => return Err(invalid("a message begins with an unknown magic")),
        };
        let (length, payload_bytes) = if let Some((mode, length)) = mode {
            from.read_exact(&mut head[MAGIC_LEN..length]).await?;
            (length, request(&mut head[..length], mode, is_structured)?)
        } else {
            from.read_exact(&mut head[MAGIC_LEN..OptionRequest::LEN]).await?;
            let asked = number(&head[OPTION]);
            // QEMU grants it, as it grants answers in one piece then.
            is_structured |= matches!(asked, option::STRUCTURED_REPLY | option::EXTENDED_HEADERS);
            (OptionRequest::LEN, u64::from(number(&head[OPTION_LENGTH])))
        };
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(invalid("a message is too long"));
        }
        to.write_all(&head[..length]).await?;
        let copied = tokio::io::copy(&mut from.take(payload_bytes), to).await?;
        if copied != payload_bytes {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Reads what a message begins with; false if there is none any more.
async fn read_magic(from: &mut (impl AsyncRead + Unpin), magic: &mut [u8]) -> io::Result<bool> {
    if from.read(&mut magic[..1]).await? == 0 {
        return Ok(false);
    }
    from.read_exact(&mut magic[1..]).await?;
    Ok(true)
}

/// Four bytes as a number.
fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u32::from(byte))
}

/// Changes the head of a request if need be; the length of what follows it.
fn request(head: &mut [u8], mode: Mode, is_structured: bool) -> io::Result<u64> {
    let request = Request::parse(head, mode).map_err(|error| invalid(error.0))?;
    let is_zeroes = request.command == command::WRITE_ZEROES;
    if is_zeroes && request.flags & command_flag::NO_HOLE == 0 {
        head[FLAGS].copy_from_slice(&(request.flags & command_flag::FUA).to_be_bytes());
        head[COMMAND].copy_from_slice(&command::TRIM.to_be_bytes());
    }
    if request.command == command::READ && is_structured {
        head[FLAGS].copy_from_slice(&(request.flags | command_flag::DF).to_be_bytes());
    }
    // QEMU's client does not set the flag for writes, although it should.
    let is_flagged = mode == Mode::Extended && request.flags & command_flag::PAYLOAD_LEN != 0;
    let has_payload = is_flagged || request.command == command::WRITE;
    Ok(if has_payload { request.length } else { 0 })
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compact(command: u16, flags: u16, length: u32) -> Vec<u8> {
        let mut head = MAGIC_REQUEST.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(7_u64.to_be_bytes());
        head.extend(4096_u64.to_be_bytes());
        head.extend(length.to_be_bytes());
        head
    }

    fn extended(command: u16, flags: u16, length: u64) -> Vec<u8> {
        let mut head = MAGIC_REQUEST_EXTENDED.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend([0; 16]);
        head.extend(length.to_be_bytes());
        head
    }

    fn option_request(payload: &[u8]) -> Vec<u8> {
        let mut head = MAGIC_OPTION.to_be_bytes().to_vec();
        head.extend(7_u32.to_be_bytes());
        head.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        [&head, payload].concat()
    }

    async fn passed(messages: &[Vec<u8>]) -> io::Result<Vec<u8>> {
        let sent = [&[0, 0, 0, 3], &messages.concat()[..]].concat();
        let mut out = Vec::new();
        pass_on(&mut sent.as_slice(), &mut out).await?;
        assert_eq!(out[..4], [0, 0, 0, 3]);
        Ok(out[4..].to_vec())
    }

    #[tokio::test]
    async fn only_zeroes_that_may_be_holes_become_trims() {
        use command::{READ, TRIM, WRITE, WRITE_ZEROES};
        use command_flag::{FAST_ZERO, FUA, NO_HOLE};
        // Data that looks like a request of zeroes.
        let data = compact(WRITE_ZEROES, 0, 1);
        let write = [compact(WRITE, FUA, 28), data.clone()].concat();
        let long = [extended(WRITE, command_flag::PAYLOAD_LEN, 28), data].concat();
        let same = [
            option_request(b"name"),
            option_request(&[]),
            compact(READ, 0, 1 << 20),
            write,
            compact(WRITE_ZEROES, NO_HOLE, 512),
            long,
            [extended(WRITE, 0, 28), compact(WRITE_ZEROES, 0, 1)].concat(),
            [extended(command::BLOCK_STATUS, command_flag::PAYLOAD_LEN, 3), vec![1; 3]].concat(),
            extended(READ, 0, 1 << 40),
        ];
        assert_eq!(passed(&same).await.unwrap(), same.concat());
        let zeroes = [
            compact(WRITE_ZEROES, FAST_ZERO, 1 << 31),
            compact(WRITE_ZEROES, FUA | FAST_ZERO, 512),
            extended(WRITE_ZEROES, 0, 1 << 40),
        ];
        let trims =
            [compact(TRIM, 0, 1 << 31), compact(TRIM, FUA, 512), extended(TRIM, 0, 1 << 40)];
        assert_eq!(passed(&zeroes).await.unwrap(), trims.concat());
    }

    #[tokio::test]
    async fn reads_are_answered_in_one_piece_where_that_is_possible() {
        let read = compact(command::READ, 0, 512);
        let whole = compact(command::READ, command_flag::DF, 512);
        for (asked, expected) in [(option::STRUCTURED_REPLY, &whole), (option::GO, &read)] {
            let mut asking = option_request(&[]);
            asking[OPTION].copy_from_slice(&asked.to_be_bytes());
            let passed = passed(&[asking.clone(), read.clone()]).await.unwrap();
            assert_eq!(passed, [&asking[..], expected].concat());
        }
    }

    #[tokio::test]
    async fn what_is_no_message_ends_the_connection() {
        assert!(passed(&[vec![0; 28]]).await.is_err());
        assert!(passed(&[compact(command::READ, 0, 1)[..20].to_vec()]).await.is_err());
        assert!(passed(&[compact(command::WRITE, 0, 10)]).await.is_err());
        assert!(passed(&[compact(command::WRITE, 0, u32::MAX)]).await.is_err());
        assert!(passed(&[]).await.unwrap().is_empty());
    }
}
