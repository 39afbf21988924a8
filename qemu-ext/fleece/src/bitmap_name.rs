// SPDX-License-Identifier: GPL-2.0-or-later
//! Names of dirty bitmaps, and the rules of generations that live in them.
//!
//! Of a bitmap only its name survives everything (migration, a stored image), so the name carries
//! what decides whether it may be used: a hash of the target, the size of the disk, how the last
//! access ended, and the generations it is valid for:
//!
//! ```text
//! ba1-<32 hex: hash of the target>-<size in hex>-<s|f|p>-<ids of 10 characters each>
//! ```

use std::fmt;

/// Characters of an id.
const ID_LEN: usize = 10;
/// Characters of the target's hash.
pub const HASH_LEN: usize = 32;
/// The base and the last 16 generations handed out since.
const MAX_IDS: usize = 17;
const PREFIX: &str = "ba1-";
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// A generation: handed out at setup, quoted back by the client later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id(String);

impl Id {
    /// Makes an id of random bytes.
    pub fn from_random(bytes: [u8; ID_LEN]) -> Self {
        Self(bytes.iter().map(|b| char::from(ALPHABET[usize::from(b & 31)])).collect())
    }

    fn parse(text: &str) -> Option<Self> {
        let ok = text.len() == ID_LEN && text.bytes().all(|b| ALPHABET.contains(&b));
        ok.then(|| Self(text.to_owned()))
    }

    /// The id as the client sees it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How the last access that used a bitmap ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The backup was committed: the bitmap covers all changes since then.
    Success,
    /// It was not, or nobody knows: valid only for a generation named by the client.
    Failure,
    /// The access is still on; such a bitmap is not usable.
    Pending,
}

impl Ending {
    fn letter(self) -> char {
        match self {
            Self::Success => 's',
            Self::Failure => 'f',
            Self::Pending => 'p',
        }
    }
}

/// A bitmap's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapName {
    target_hash: String,
    size_bytes: u64,
    ending: Ending,
    ids: Vec<Id>,
}

impl BitmapName {
    /// Puts a name together. Of more than 17 ids the first (the base) and the last 16 are kept.
    pub fn new(target_hash: &str, size_bytes: u64, ending: Ending, mut ids: Vec<Id>) -> Self {
        debug_assert!(is_hash(target_hash), "hash of a target");
        if ids.len() > MAX_IDS {
            ids.drain(1..=ids.len() - MAX_IDS);
        }
        Self { target_hash: target_hash.to_owned(), size_bytes, ending, ids }
    }

    /// Reads a name; none if it is not one of ours or is damaged.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.split('-');
        let target_hash = parts.next().filter(|h| is_hash(h))?.to_owned();
        let size = parts.next()?;
        let size_bytes = u64::from_str_radix(size, 16).ok()?;
        let ending = match parts.next()? {
            "s" => Ending::Success,
            "f" => Ending::Failure,
            "p" => Ending::Pending,
            _ => return None,
        };
        let ids = parts.next()?;
        if parts.next().is_some() || ids.is_empty() || !ids.is_ascii() {
            return None;
        }
        let ids: Vec<Id> = ids
            .as_bytes()
            .chunks(ID_LEN)
            .map(|id| std::str::from_utf8(id).ok().and_then(Id::parse))
            .collect::<Option<_>>()?;
        let parsed = Self { target_hash, size_bytes, ending, ids };
        // One spelling only: no leading zeroes, signs or capitals.
        (parsed.ids.len() <= MAX_IDS && parsed.to_string() == name).then_some(parsed)
    }

    /// The generations the bitmap is valid for, oldest first.
    pub fn ids(&self) -> &[Id] {
        &self.ids
    }

    /// Whether the access that used the bitmap has ended.
    pub fn is_settled(&self) -> bool {
        self.ending != Ending::Pending
    }

    /// Whether a bitmap of this name serves a client whose last committed backup is `generation`.
    fn serves(&self, size_bytes: u64, generation: Option<&str>) -> bool {
        self.size_bytes == size_bytes
            && match generation {
                None => self.ending == Ending::Success,
                Some(wanted) => {
                    self.ending != Ending::Pending && self.ids.iter().any(|id| id.0 == wanted)
                }
            }
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hash, size, ending) = (&self.target_hash, self.size_bytes, self.ending.letter());
        write!(f, "{PREFIX}{hash}-{size:x}-{ending}-")?;
        self.ids.iter().try_for_each(|id| f.write_str(&id.0))
    }
}

pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == HASH_LEN && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a bitmap of this name belongs to the target, also when the rest of it is damaged.
pub fn belongs_to(name: &str, target_hash: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix(target_hash))
        .is_some_and(|rest| rest.starts_with('-'))
}

/// What the client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// No bitmap; an existing one stays.
    Omitted,
    /// No bitmap; an existing one is removed.
    None,
    /// A new bitmap.
    New,
    /// The existing bitmap if it is valid.
    Use,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// No bitmap is used.
    NotUsed,
    /// No bitmap is used, an existing one is removed.
    NotUsedRemoved,
    /// A new one as asked for.
    New,
    /// The existing one is used.
    Used,
    /// The existing one does not fit and is recreated.
    Invalid,
    /// There was none; one is started.
    MissingRecreated,
}

impl Action {
    /// Whether the access has a bitmap.
    pub fn has_bitmap(self) -> bool {
        !matches!(self, Self::NotUsed | Self::NotUsedRemoved)
    }
}

/// A bitmap of the target that exists on the disk.
#[derive(Debug, Clone)]
pub struct Existing {
    /// Its name.
    pub name: String,
    /// Whether it can be used at all (recording since it was made, consistent, of the disk's size).
    pub sound: bool,
}

/// What to do with the bitmaps of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// For the client.
    pub action: Action,
    /// The bitmap that is used, as an index.
    pub used: Option<usize>,
    /// Those that are removed once the access stands, as indices.
    pub removed: Vec<usize>,
}

/// Decides what a setup does with the target's bitmaps.
pub fn decide(
    mode: Mode,
    existing: &[Existing],
    size_bytes: u64,
    generation: Option<&str>,
) -> Decision {
    let all: Vec<usize> = (0..existing.len()).collect();
    let none = existing.is_empty();
    match mode {
        Mode::Omitted => Decision { action: Action::NotUsed, used: None, removed: Vec::new() },
        Mode::None if none => Decision { action: Action::NotUsed, used: None, removed: all },
        Mode::None => Decision { action: Action::NotUsedRemoved, used: None, removed: all },
        Mode::New => Decision { action: Action::New, used: None, removed: all },
        Mode::Use if none => {
            Decision { action: Action::MissingRecreated, used: None, removed: all }
        }
        Mode::Use => {
            let used = existing.iter().position(|bitmap| {
                let name = BitmapName::parse(&bitmap.name);
                bitmap.sound && name.is_some_and(|name| name.serves(size_bytes, generation))
            });
            let action = if used.is_some() { Action::Used } else { Action::Invalid };
            let removed = all.into_iter().filter(|&index| Some(index) != used).collect();
            Decision { action, used, removed }
        }
    }
}

/// The name of the bitmap that a teardown leaves behind.
///
/// `old` is the used bitmap's name (none after any other action), `id` the generation handed out
/// by this access. After a success the bitmap covers the changes since the setup; after a failure
/// the old changes too, and so it is valid for every generation since its base.
pub fn settled(
    target_hash: &str,
    size_bytes: u64,
    old: Option<&BitmapName>,
    id: &Id,
    success: bool,
) -> BitmapName {
    let mut ids = Vec::new();
    if !success {
        ids.extend(old.into_iter().flat_map(|old| old.ids().iter().cloned()));
    }
    ids.push(id.clone());
    let ending = if success { Ending::Success } else { Ending::Failure };
    BitmapName::new(target_hash, size_bytes, ending, ids)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    const HASH: &str = "0123456789abcdef0123456789abcdef";
    const SIZE: u64 = 1 << 30;

    fn id(n: u8) -> Id {
        Id::from_random([n; ID_LEN])
    }

    fn existing(ending: Ending, ids: &[u8]) -> Existing {
        let ids = ids.iter().map(|&n| id(n)).collect();
        Existing { name: BitmapName::new(HASH, SIZE, ending, ids).to_string(), sound: true }
    }

    #[test]
    fn a_name_is_read_back() {
        let name = BitmapName::new(HASH, SIZE, Ending::Failure, vec![id(1), id(2)]);
        let text = name.to_string();
        assert_eq!(text, format!("ba1-{HASH}-40000000-f-bbbbbbbbbbcccccccccc"));
        assert_eq!(BitmapName::parse(&text), Some(name));
        assert!(belongs_to(&text, HASH));
    }

    #[test]
    fn damaged_and_foreign_names_are_not_read() {
        for bad in [
            "",
            "bitmap0",
            "ba1-",
            &format!("ba1-{HASH}-40000000-s-"),
            &format!("ba1-{HASH}-40000000-x-bbbbbbbbbb"),
            &format!("ba1-{HASH}-40000000-s-bbbbbbbbb"),
            &format!("ba1-{HASH}-040000000-s-bbbbbbbbbb"),
            &format!("ba1-{HASH}-+4-s-bbbbbbbbbb"),
            &format!("ba1-{HASH}-4-s-bbbbbbbbbb-"),
            &format!("ba1-{}-4-s-bbbbbbbbbb", &HASH[1..]),
            &format!("ba1-{HASH}-4-s-bbbbbbbbbé"),
            &format!("ba1-{HASH}-4-s-{}", "b".repeat(180)),
        ] {
            assert_eq!(BitmapName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_longest_name_survives_migration() {
        let ids = (0..40).map(id).collect();
        let name = BitmapName::new(HASH, u64::MAX, Ending::Success, ids);
        assert_eq!(name.ids().len(), MAX_IDS);
        assert_eq!(name.ids()[0], id(0), "the base stays");
        assert_eq!(name.ids()[MAX_IDS - 1], id(39 % 32));
        assert!(name.to_string().len() <= 255);
    }

    #[test]
    fn modes_without_a_bitmap() {
        let old = [existing(Ending::Success, &[1])];
        assert_eq!(decide(Mode::Omitted, &old, SIZE, None).removed, [] as [usize; 0]);
        assert_eq!(decide(Mode::Omitted, &old, SIZE, None).action, Action::NotUsed);
        assert_eq!(decide(Mode::None, &[], SIZE, None).action, Action::NotUsed);
        let removed = decide(Mode::None, &old, SIZE, None);
        assert_eq!((removed.action, removed.removed), (Action::NotUsedRemoved, vec![0]));
    }

    #[test]
    fn use_takes_only_a_valid_bitmap() {
        let action =
            |old: &[Existing], size, generation| decide(Mode::Use, old, size, generation).action;
        let good = [existing(Ending::Success, &[1])];
        let failed = [existing(Ending::Failure, &[1, 2])];
        assert_eq!(action(&[], SIZE, None), Action::MissingRecreated);
        assert_eq!(action(&good, SIZE, None), Action::Used);
        assert_eq!(action(&good, SIZE, Some("bbbbbbbbbb")), Action::Used);
        assert_eq!(action(&good, SIZE, Some("cccccccccc")), Action::Invalid);
        assert_eq!(action(&good, SIZE * 2, None), Action::Invalid);
        assert_eq!(action(&failed, SIZE, None), Action::Invalid);
        assert_eq!(action(&failed, SIZE, Some("bbbbbbbbbb")), Action::Used);
        assert_eq!(action(&failed, SIZE, Some("cccccccccc")), Action::Used);
        let pending = [existing(Ending::Pending, &[1])];
        assert_eq!(action(&pending, SIZE, Some("bbbbbbbbbb")), Action::Invalid);
        let unsound = [Existing { sound: false, ..good[0].clone() }];
        assert_eq!(action(&unsound, SIZE, None), Action::Invalid);
    }

    #[test]
    fn everything_but_the_used_bitmap_is_removed() {
        let old = [
            existing(Ending::Failure, &[1]),
            existing(Ending::Success, &[2]),
            Existing { name: format!("ba1-{HASH}-nonsense"), sound: true },
        ];
        let decision = decide(Mode::Use, &old, SIZE, None);
        assert_eq!((decision.used, decision.removed), (Some(1), vec![0, 2]));
    }

    /// A client and a disk over many accesses: whenever a bitmap is used for a generation, the
    /// changes it covers begin at or before that backup.
    fn history(accesses: &[(bool, bool, bool)]) {
        // Position in the list of changes from which the bitmap covers everything.
        let mut bitmap: Option<(BitmapName, usize)> = None;
        let mut committed: Option<(Id, usize)> = None;
        for (now, &(commits, told, quotes)) in accesses.iter().enumerate() {
            let old: Vec<_> = bitmap
                .iter()
                .map(|(name, _)| Existing { name: name.to_string(), sound: true })
                .collect();
            let generation = committed.as_ref().filter(|_| quotes).map(|(id, _)| id.as_str());
            let decision = decide(Mode::Use, &old, SIZE, generation);
            let mut number = [0; ID_LEN];
            number[0] = u8::try_from(now % 32).unwrap();
            number[1] = u8::try_from(now / 32).unwrap();
            let id = Id::from_random(number);
            let used = decision.used.and(bitmap.as_ref());
            if let (Some((_, since)), Some((_, backup))) = (used, &committed) {
                // A client that quotes nothing vouches itself for the last teardown's success.
                assert!(!quotes || since <= backup, "covers from {since}, backup at {backup}");
            }
            let success = commits && told;
            let name = settled(HASH, SIZE, used.map(|(name, _)| name), &id, success);
            let since = if success { now } else { used.map_or(now, |(_, since)| *since) };
            assert_eq!(BitmapName::parse(&name.to_string()).as_ref(), Some(&name));
            if commits {
                committed = Some((id, now));
                // The crash between commit and teardown costs no full backup.
                assert!(name.serves(SIZE, committed.as_ref().map(|(id, _)| id.as_str())));
            }
            bitmap = Some((name, since));
        }
    }

    proptest! {
        #[test]
        fn a_used_bitmap_always_covers_enough(
            accesses in proptest::collection::vec(any::<(bool, bool, bool)>(), 1..60)
        ) {
            history(&accesses);
        }

        #[test]
        fn reading_names_never_panics(name in "\\PC{0,300}") {
            let _ = BitmapName::parse(&name);
            let _ = belongs_to(&name, HASH);
        }
    }
}
