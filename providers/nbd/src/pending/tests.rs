// SPDX-License-Identifier: MIT OR Apache-2.0
//! The collection of reads and of block status, against plain oracles.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Does what the reader does with a data chunk.
fn arrive(body: &mut ReadBody, at: u64, data: &[u8]) -> std::result::Result<(), Malformed> {
    match body.claim(at, data.len() as u64)? {
        Place::Append => body.buf.put_slice(data),
        Place::At(index) => body.buf[index..index + data.len()].copy_from_slice(data),
    }
    Ok(())
}

proptest! {
    /// Any cut of a read into chunks, in any order, some of them holes, gives the data.
    #[test]
    fn a_read_is_put_together(
        cuts in vec(1usize..300, 0..12), order in vec(any::<u32>(), 12), holes in any::<u16>(),
        prefix in vec(any::<u8>(), 0..20),
    ) {
        const LEN: usize = 300;
        let mut data: Vec<u8> = (0..LEN).map(|n| n as u8 | 1).collect();
        let mut edges: Vec<usize> = [0, LEN].into_iter().chain(cuts).collect();
        edges.sort_unstable();
        edges.dedup();
        let mut chunks: Vec<(usize, usize)> = edges.windows(2).map(|w| (w[0], w[1])).collect();
        let mut order = order.into_iter().cycle();
        chunks.sort_by_cached_key(|_| order.next());

        let mut body = ReadBody::new(BytesMut::from(&prefix[..]), LEN);
        let place = body.buf.as_ptr();
        for (n, (begin, end)) in chunks.into_iter().enumerate() {
            if holes & (1 << n) != 0 {
                body.hole(begin as u64, (end - begin) as u64).unwrap();
                data[begin..end].fill(0);
            } else {
                arrive(&mut body, begin as u64, &data[begin..end]).unwrap();
            }
        }
        let buf = body.finish().unwrap();
        prop_assert_eq!(buf.as_ptr(), place, "the buffer was moved");
        prop_assert_eq!(&buf[..prefix.len()], &prefix[..]);
        prop_assert_eq!(&buf[prefix.len()..], &data[..]);
    }

    /// Arbitrary claims: accepted exactly when in range, not empty and free.
    #[test]
    fn claims_are_checked(claims in vec((0u64..70, 0u64..70), 0..40)) {
        let mut body = ReadBody::new(BytesMut::new(), 64);
        let mut taken = [false; 64];
        for (at, len) in claims {
            let range = at as usize..(at + len) as usize;
            let free = len > 0 && range.end <= 64 && !taken[range.clone()].contains(&true);
            prop_assert_eq!(body.hole(at, len).is_ok(), free);
            if free {
                taken[range].fill(true);
            }
        }
        prop_assert_eq!(body.finish().is_ok(), !taken.contains(&false));
    }

    #[test]
    fn arbitrary_numbers_never_panic(claims in vec(any::<(u64, u64)>(), 0..20)) {
        let mut body = ReadBody::new(BytesMut::new(), 1000);
        for &(at, len) in &claims {
            let _ = body.hole(at, len);
        }
        let mut status = StatusBody::new(5, u64::MAX - 10, 7, vec![7]);
        let _ = status.take(&StatusPayload { context: 7, extents: claims });
    }
}

#[test]
fn a_read_in_too_many_pieces_is_refused() {
    let mut body = ReadBody::new(BytesMut::new(), 4 * MAX_PIECES);
    let result = (0..2 * MAX_PIECES as u64).try_for_each(|n| body.hole(2 * n, 1));
    assert!(result.unwrap_err().0.contains("too many pieces"));
}

#[test]
fn status_is_clipped_and_checked() {
    let payload =
        |context, extents: &[(u64, u64)]| StatusPayload { context, extents: extents.to_vec() };
    let mut body = StatusBody::new(100, 50, 2, vec![1, 2]);
    body.take(&payload(1, &[(u64::MAX, 0)])).unwrap();
    body.take(&payload(2, &[(20, 3), (u64::MAX, 0)])).unwrap();
    let extents = body.finish().unwrap();
    assert_eq!(
        extents,
        [Extent { offset: 100, len: 20, flags: 3 }, Extent { offset: 120, len: 30, flags: 0 }]
    );

    let fault = |chunks: &[StatusPayload]| {
        let mut body = StatusBody::new(100, 50, 2, vec![1, 2]);
        chunks.iter().try_for_each(|chunk| body.take(chunk)).and_then(|()| body.finish().map(drop))
    };
    assert!(fault(&[]).is_err(), "nothing at all");
    assert!(fault(&[payload(1, &[(50, 0)])]).is_err(), "only the other context");
    assert!(fault(&[payload(3, &[(50, 0)])]).is_err(), "a context that was not negotiated");
    assert!(fault(&[payload(2, &[(1, 0)]), payload(2, &[(1, 0)])]).is_err(), "twice");
    assert!(fault(&[payload(2, &[(0, 0)])]).is_err(), "an empty extent");
    assert!(fault(&[payload(2, &[(50, 0), (1, 0)])]).is_err(), "after the end");
}
