// SPDX-License-Identifier: MIT OR Apache-2.0
//! The published `nbd` crate as an independent server: no `GO`, simple replies only, one request
//! at a time.

use std::io::{self, Cursor, Seek, SeekFrom, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use bytes::Bytes;
use nbd::server::{Export, handshake, transmission};
use provider_nbd::wire::Mode;
use provider_nbd::{Client, Error, Options, list_unix};

use crate::peer::{pattern, temp_dir};

const SIZE: usize = 8 << 20;

/// Serves `count` clients of one disk in memory, one after the other, and returns its content.
fn serve(listener: UnixListener, count: usize) -> JoinHandle<io::Result<Vec<u8>>> {
    std::thread::spawn(move || {
        let mut disk = Cursor::new(vec![0; SIZE]);
        for _ in 0..count {
            let (mut stream, _) = listener.accept()?;
            let shaken = handshake(&mut stream, |name| match name {
                "disk" => Ok(Export::<()> { size: SIZE as u64, ..Export::default() }),
                _ => Err(io::ErrorKind::NotFound.into()),
            });
            if shaken.is_ok() {
                transmission(&mut stream, &mut disk)?;
            }
        }
        disk.seek(SeekFrom::Start(0))?;
        disk.flush()?;
        Ok(disk.into_inner())
    })
}

#[tokio::test]
async fn an_old_server_is_written_and_read() {
    let dir = temp_dir();
    let path = dir.path().join("s");
    let server = serve(UnixListener::bind(&path).unwrap(), 3);

    let exports = list_unix(&path).await.unwrap();
    assert_eq!(exports[0].name, "rustnbd");
    let missing = Client::connect_unix(&path, "other", Options::default()).await;
    assert!(matches!(missing, Err(Error::NoSuchExport { export }) if export == "other"));

    let client = Client::connect_unix(&path, "disk", Options::default()).await.unwrap();
    assert_eq!((client.mode(), client.size_bytes()), (Mode::Simple, SIZE as u64));
    let data = pattern(3, SIZE);
    let writes = data
        .chunks(100_000)
        .enumerate()
        .map(|(n, part)| client.write(n as u64 * 100_000, Bytes::copy_from_slice(part), true));
    for result in futures_util::future::join_all(writes).await {
        result.unwrap();
    }
    assert!(client.read(0, SIZE).await.unwrap() == data, "content");
    assert!(matches!(client.trim(0, 512).await, Err(Error::Invalid(_))));
    client.disconnect().await.unwrap();
    let content = tokio::task::spawn_blocking(|| server.join().unwrap()).await.unwrap().unwrap();
    assert!(content == data, "content at the server");
}
