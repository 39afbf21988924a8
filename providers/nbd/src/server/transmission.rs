// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of one connection: read in order, carried out at the same time, answered as they end.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::negotiation::Chosen;
use super::{Refusal, broken};
use crate::Errno;
use crate::wire::{
    Chunk, DEFAULT_MAX_BLOCK, ErrorPayload, Mode, Reply, Request, StatusPayload, chunk, command,
    command_flag, flag, put_data_offset,
};

/// Requests of one connection that are carried out at once.
const REQUESTS_MAX: usize = 64;
/// Memory for data of one connection's requests.
const MEMORY_UNIT_BYTES: u64 = 4096;
const MEMORY_UNITS: usize = (64 << 20) / MEMORY_UNIT_BYTES as usize;
/// Extents in one reply; a client asks again for the rest.
const EXTENTS_MAX: usize = 4096;

/// A reply: its head, and data that need not be copied.
struct Answer {
    head: BytesMut,
    data: Bytes,
}

/// Serves requests until the client leaves or breaks the rules.
pub(super) async fn serve(stream: UnixStream, chosen: Chosen) -> io::Result<()> {
    let (mut reader, writer) = stream.into_split();
    let (answers, waiting) = mpsc::channel(REQUESTS_MAX);
    let hang_up = CancellationToken::new();
    // Also when this future is dropped.
    let writing = AbortOnDropHandle::new(tokio::spawn(write_all(writer, waiting, hang_up.clone())));
    let mut tasks = JoinSet::new();
    let reading = read_all(&mut reader, Arc::new(chosen), answers, &hang_up, &mut tasks);
    let ended = tokio::select! {
        biased;
        () = hang_up.cancelled() => None,
        ended = reading => Some(ended),
    };
    let Some(ended) = ended else {
        tasks.shutdown().await;
        return Ok(());
    };
    // What was asked for before a farewell is still answered; the last task ends the writer.
    while tasks.join_next().await.is_some() {}
    let _ = writing.await;
    ended
}

async fn read_all(
    reader: &mut OwnedReadHalf,
    chosen: Arc<Chosen>,
    answers: mpsc::Sender<Answer>,
    hang_up: &CancellationToken,
    tasks: &mut JoinSet<()>,
) -> io::Result<()> {
    let memory = Arc::new(Semaphore::new(MEMORY_UNITS));
    let places = Arc::new(Semaphore::new(REQUESTS_MAX));
    while let Some(request) = next(reader, chosen.mode).await? {
        while tasks.try_join_next().is_some() {}
        let room = Arc::clone(&memory).acquire_many_owned(units(&request)).await;
        let place = Arc::clone(&places).acquire_owned().await;
        let (Ok(room), Ok(place)) = (room, place) else { return Ok(()) };
        let payload = payload(reader, &request, chosen.mode).await?;
        let (chosen, answers) = (Arc::clone(&chosen), answers.clone());
        let broken = hang_up.clone().drop_guard();
        tasks.spawn(async move {
            // A panic in an export hangs up, too: only an answer disarms the guard.
            if let Some(answer) = answer(&chosen, &request, payload).await {
                broken.disarm();
                // Fails only when the client is gone.
                let _ = answers.send(answer).await;
            }
            drop((room, place));
        });
    }
    Ok(())
}

/// Writes answers until all that may make one are gone.
async fn write_all(
    mut writer: OwnedWriteHalf,
    mut waiting: mpsc::Receiver<Answer>,
    hang_up: CancellationToken,
) {
    while let Some(Answer { head, data }) = waiting.recv().await {
        let written = async {
            writer.write_all(&head).await?;
            writer.write_all(&data).await
        };
        if let Err(error) = written.await {
            tracing::debug!("A client does not take its answers: {error}");
            hang_up.cancel();
            return;
        }
    }
}

/// The head of the next request; `None` after a farewell, or when the client is gone.
async fn next(reader: &mut OwnedReadHalf, mode: Mode) -> io::Result<Option<Request>> {
    let len = if mode == Mode::Extended { Request::LEN_EXTENDED } else { Request::LEN };
    let mut head = [0; Request::LEN_EXTENDED];
    match reader.read_exact(&mut head[..len]).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let request = Request::parse(&head[..len], mode)?;
    if request.command == command::DISC {
        return Ok(None);
    }
    if payload_len(&request, mode) > u64::from(DEFAULT_MAX_BLOCK) {
        return Err(broken("a request of the client has too much data"));
    }
    Ok(Some(request))
}

fn payload_len(request: &Request, mode: Mode) -> u64 {
    let has_payload = if mode == Mode::Extended {
        request.flags & command_flag::PAYLOAD_LEN != 0
    } else {
        request.command == command::WRITE
    };
    if has_payload { request.length } else { 0 }
}

async fn payload(reader: &mut OwnedReadHalf, request: &Request, mode: Mode) -> io::Result<Bytes> {
    let len = usize::try_from(payload_len(request, mode))
        .map_err(|_| broken("a request of the client has too much data"))?;
    let mut data = vec![0; len];
    reader.read_exact(&mut data).await?;
    Ok(data.into())
}

/// Memory that the request's data takes, in units of the connection's budget.
fn units(request: &Request) -> u32 {
    let bytes = match request.command {
        // Larger reads are refused without reading.
        command::READ | command::WRITE => request.length.min(u64::from(DEFAULT_MAX_BLOCK)),
        _ => 1,
    };
    u32::try_from(bytes.div_ceil(MEMORY_UNIT_BYTES)).unwrap_or(u32::MAX).max(1)
}

/// What a command of an export gave.
enum Outcome {
    Done,
    Data(Bytes),
    Status(Vec<StatusPayload>),
}

/// `None` hangs up.
async fn answer(chosen: &Chosen, request: &Request, payload: Bytes) -> Option<Answer> {
    let outcome = match check(chosen, request) {
        Ok(()) => act(chosen, request, payload).await,
        Err(refusal) => Err(refusal),
    };
    match outcome {
        Ok(outcome) => Some(success(chosen.mode, request, outcome)),
        Err(Refusal::Error { errno, message }) => {
            Some(failure(chosen.mode, request, errno, message))
        }
        Err(Refusal::HangUp) => None,
    }
}

fn check(chosen: &Chosen, request: &Request) -> Result<(), Refusal> {
    let invalid = |what: &str| Err(Refusal::new(Errno::EINVAL, what));
    let export = chosen.export.as_ref();
    let Request { offset, length, .. } = *request;
    if request.command == command::FLUSH {
        return Ok(());
    }
    let end = offset.checked_add(length);
    if length == 0 || end.is_none_or(|end| end > export.size_bytes()) {
        return invalid("the range is empty or exceeds the export");
    }
    let unit = u64::from(export.block_sizes().min.max(1));
    if !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
        return invalid("the range is not a multiple of the minimum block size");
    }
    let is_data = matches!(request.command, command::READ | command::WRITE);
    if is_data && length > u64::from(export.block_sizes().max.min(DEFAULT_MAX_BLOCK)) {
        return invalid("the range is larger than the maximum block size");
    }
    let has_payload = request.flags & command_flag::PAYLOAD_LEN != 0;
    if has_payload && request.command != command::WRITE {
        return invalid("this request has no payload");
    }
    let writes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && export.flags() & flag::READ_ONLY != 0 {
        return Err(Refusal::new(Errno::EPERM, "the export is read-only"));
    }
    Ok(())
}

async fn act(chosen: &Chosen, request: &Request, payload: Bytes) -> Result<Outcome, Refusal> {
    let export = chosen.export.as_ref();
    let Request { offset, length, flags, .. } = *request;
    match request.command {
        command::READ => {
            let len = usize::try_from(length)
                .map_err(|_| Refusal::new(Errno::EINVAL, "the range is too long"))?;
            let data = export.read(offset, len).await?;
            if data.len() != len {
                tracing::warn!("An export gave {} bytes instead of {len}.", data.len());
                return Err(Refusal::new(Errno::EIO, "the export gave another number of bytes"));
            }
            return Ok(Outcome::Data(data));
        }
        command::BLOCK_STATUS => return status(chosen, request).await,
        command::WRITE => export.write(offset, payload).await?,
        command::TRIM => export.trim(offset, length).await?,
        command::WRITE_ZEROES => {
            let may_trim = flags & command_flag::NO_HOLE == 0;
            export.write_zeroes(offset, length, may_trim).await?;
        }
        command::FLUSH => export.flush().await?,
        _ => return Err(Refusal::new(Errno::EINVAL, "the command is not known")),
    }
    if flags & command_flag::FUA != 0 && request.command != command::FLUSH {
        export.flush().await?;
    }
    Ok(Outcome::Done)
}

async fn status(chosen: &Chosen, request: &Request) -> Result<Outcome, Refusal> {
    let Request { offset, length, flags, .. } = *request;
    if chosen.contexts.is_empty() {
        return Err(Refusal::new(Errno::EINVAL, "no metadata context was chosen"));
    }
    let most = if flags & command_flag::REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
    let wide = chosen.mode == Mode::Extended;
    let mut all = Vec::new();
    for (id, context) in chosen.contexts.iter().enumerate() {
        let mut extents = chosen.export.block_status(context, offset, length).await?;
        extents.truncate(most);
        if !wide {
            // An answer may be shorter than what was asked for.
            let long = extents.iter().position(|(len, _)| *len > u64::from(u32::MAX));
            if let Some(long) = long {
                extents.truncate(long + 1);
                extents[long].0 = u64::from(u32::MAX) & !0xfff;
            }
        }
        all.push(StatusPayload { context: id as u32, extents });
    }
    Ok(Outcome::Status(all))
}

fn put_chunk(
    out: &mut BytesMut,
    mode: Mode,
    request: &Request,
    kind: u16,
    is_last: bool,
    len: u64,
) {
    let flags = if is_last { chunk::DONE } else { 0 };
    let Request { cookie, offset, .. } = *request;
    Reply::Chunk(Chunk { flags, kind, cookie, offset, length: len }).put(out, mode);
}

fn success(mode: Mode, request: &Request, outcome: Outcome) -> Answer {
    let mut head = BytesMut::new();
    let mut data = Bytes::new();
    if mode == Mode::Simple {
        Reply::Simple { error: 0, cookie: request.cookie }.put(&mut head, mode);
        if let Outcome::Data(read) = outcome {
            data = read;
        }
        return Answer { head, data };
    }
    match outcome {
        Outcome::Done => put_chunk(&mut head, mode, request, chunk::NONE, true, 0),
        Outcome::Data(read) => {
            let len = read.len() as u64 + 8;
            put_chunk(&mut head, mode, request, chunk::OFFSET_DATA, true, len);
            put_data_offset(&mut head, request.offset);
            data = read;
        }
        Outcome::Status(all) => {
            let wide = mode == Mode::Extended;
            let kind = if wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
            let last = all.len().saturating_sub(1);
            for (n, payload) in all.iter().enumerate() {
                let mut bytes = BytesMut::new();
                payload.put(&mut bytes, wide);
                put_chunk(&mut head, mode, request, kind, n == last, bytes.len() as u64);
                head.put_slice(&bytes);
            }
        }
    }
    Answer { head, data }
}

fn failure(mode: Mode, request: &Request, errno: Errno, message: String) -> Answer {
    let mut head = BytesMut::new();
    let error = errno.to_wire();
    if mode == Mode::Simple {
        Reply::Simple { error, cookie: request.cookie }.put(&mut head, mode);
    } else {
        let mut payload = BytesMut::new();
        ErrorPayload { error, message, offset: None }.put(&mut payload);
        put_chunk(&mut head, mode, request, chunk::ERROR, true, payload.len() as u64);
        head.put_slice(&payload);
    }
    Answer { head, data: Bytes::new() }
}
