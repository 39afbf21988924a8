// SPDX-License-Identifier: MIT OR Apache-2.0
//! Comma-separated option lists, `local:100/a.raw,cache=none,backup=0`.

use std::fmt;

use super::parse_bool;

/// An option list in its order. The first item may lack a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptionList {
    /// The item without a name, such as the volume of a disk.
    pub first: Option<String>,
    /// Named items in the order of the text.
    pub named: Vec<(String, String)>,
}

impl OptionList {
    /// Reads a list.
    ///
    /// # Errors
    /// A sentence that names the item without a name that is not the first.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut list = Self::default();
        for (index, item) in text.split(',').filter(|item| !item.is_empty()).enumerate() {
            match item.split_once('=') {
                Some((name, value)) => list.named.push((name.to_owned(), value.to_owned())),
                None if index == 0 => list.first = Some(item.to_owned()),
                None => return Err(format!("The item '{item}' of '{text}' has no name.")),
            }
        }
        Ok(list)
    }

    /// The value of a named item; of several, the last.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// A named item as a boolean; `default` when it is missing or no boolean.
    #[must_use]
    pub fn flag(&self, name: &str, default: bool) -> bool {
        self.get(name).and_then(parse_bool).unwrap_or(default)
    }

    /// Sets a named item, in place or at the end.
    pub fn set(&mut self, name: &str, value: &str) {
        match self.named.iter_mut().rev().find(|(n, _)| n == name) {
            Some((_, old)) => value.clone_into(old),
            None => self.named.push((name.to_owned(), value.to_owned())),
        }
    }

    /// Removes all items of a name.
    pub fn remove(&mut self, name: &str) {
        self.named.retain(|(n, _)| n != name);
    }
}

impl fmt::Display for OptionList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(first) = &self.first {
            f.write_str(first)?;
            separator = ",";
        }
        for (name, value) in &self.named {
            write!(f, "{separator}{name}={value}")?;
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_its_order() {
        let text = "local:100/vm-100-disk-0.raw,cache=none,size=32G,backup=0";
        let mut list = OptionList::parse(text).unwrap();
        assert_eq!(list.to_string(), text);
        assert_eq!(list.get("size"), Some("32G"));
        assert!(!list.flag("backup", true));
        list.set("cache", "writeback");
        list.remove("backup");
        assert_eq!(list.to_string(), "local:100/vm-100-disk-0.raw,cache=writeback,size=32G");
    }

    #[test]
    fn only_the_first_item_may_lack_a_name() {
        assert!(OptionList::parse("a=1,b").is_err());
        assert_eq!(OptionList::parse("").unwrap(), OptionList::default());
    }
}
