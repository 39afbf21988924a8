// SPDX-License-Identifier: GPL-2.0-or-later
//! What the engine needs of the world around it.

/// A positive `errno` value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Operation not permitted: the area is clean or released.
    pub const EPERM: Self = Self(1);
    /// Input/output error: the old data is lost.
    pub const EIO: Self = Self(5);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// No space left: the fleecing image or its limit is used up.
    pub const ENOSPC: Self = Self(28);
    /// Connection timed out: no progress within the limit.
    pub const ETIMEDOUT: Self = Self(110);
}

/// Which areas of the disk are needed by the reader (a frozen dirty bitmap).
pub trait NeedMap: Send + Sync {
    /// The first needed area that begins in or reaches into `start..end` (bytes), clipped to it;
    /// none when nothing there is needed.
    fn next_needed(&self, start: u64, end: u64) -> Option<std::ops::Range<u64>>;
}

/// One of the two devices under the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The guest's disk.
    Source,
    /// The fleecing image.
    Log,
}

/// A part of a snapshot read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Where to read.
    pub device: Device,
    /// Byte offset there.
    pub offset: u64,
    /// Bytes to read.
    pub len: usize,
    /// Where in the reader's buffer they go.
    pub at: usize,
}

/// The world around the engine. Every call that does I/O, and [`Io::park`], may yield to other
/// tasks; the engine calls them with no lock held.
pub trait Io {
    /// A task that waits: a coroutine or a thread.
    type Task: Send;
    /// A buffer for old data, aligned as the devices like it.
    type Block: AsRef<[u8]> + AsMut<[u8]> + Send + Sync;
    /// Where a snapshot read puts its data.
    type Buf: ?Sized;

    /// A monotonic clock in nanoseconds.
    fn now_ns(&self) -> u64;

    /// The calling task.
    fn current(&self) -> Self::Task;
    /// Suspends the calling task until [`Io::unpark`]. The engine has published the task before,
    /// so the wake-up may come first; it must not be lost.
    fn park(&self);
    /// Resumes a task, exactly once for each time it was published.
    fn unpark(&self, task: Self::Task);
    /// Starts a task that asks for [`crate::Engine::next_batch`] and flushes it until there is none.
    fn spawn_flusher(&self);
    /// The state became worse; may be called from any task.
    fn notify(&self);

    /// A buffer of `len` bytes with any content, or none when there is no memory.
    fn alloc(&self, len: usize) -> Option<Self::Block>;
    /// Fills `block[at..at + len]` from the source.
    ///
    /// # Errors
    /// The device's error.
    fn read_source(
        &self,
        offset: u64,
        block: &mut Self::Block,
        at: usize,
        len: usize,
    ) -> Result<(), Errno>;
    /// Reads all parts into the reader's buffer, in any order and side by side. Parts do not
    /// overlap.
    ///
    /// # Errors
    /// The first error of a device; the buffer's content is undefined then.
    fn fetch(&self, parts: &[Fetch], buf: &mut Self::Buf) -> Result<(), Errno>;
    /// Whether the source is known to be zero from `offset`, and for how many bytes the answer
    /// holds (at least one, at most `len`).
    ///
    /// # Errors
    /// The device's error.
    fn source_is_zero(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno>;
    /// Discards a part of the source: a guest's discard that was postponed. Failures do not matter.
    fn discard_source(&self, offset: u64, len: u64);
    /// Writes to the fleecing image.
    ///
    /// # Errors
    /// The device's error.
    fn write_log(&self, offset: u64, parts: &[&[u8]]) -> Result<(), Errno>;
    /// Lets the fleecing image share the blocks of a part of the source (a reflink): afterwards it
    /// has the part's content there, whatever is written to the source later.
    ///
    /// # Errors
    /// The two cannot share; what is there in the image is undefined then.
    fn share_source(&self, offset: u64, log_offset: u64, len: u64) -> Result<(), Errno>;
    /// Gives space of the fleecing image back; failures do not matter.
    fn discard_log(&self, offset: u64, len: u64);

    /// Copies old data from RAM into the reader's buffer.
    fn copy_into(&self, buf: &mut Self::Buf, at: usize, data: &[u8]);
    /// Fills a part of the reader's buffer with zeroes.
    fn zero_into(&self, buf: &mut Self::Buf, at: usize, len: usize);
}
