// SPDX-License-Identifier: MIT OR Apache-2.0
//! The template of notes: text with `{{guestname}}`, `{{vmid}}`, `{{node}}` and `{{cluster}}`, and
//! `\n` and `\\` for a line break and a backslash. Pure.

use provider_api::check_notes;

/// What a template names.
#[derive(Debug, Clone, Copy)]
pub struct Variables<'a> {
    /// The guest's name; untrusted text.
    pub guestname: &'a str,
    /// The guest's number.
    pub vmid: u32,
    /// Name of this host.
    pub node: &'a str,
    /// Name of the cluster.
    pub cluster: &'a str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variable {
    Guestname,
    Vmid,
    Node,
    Cluster,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(Variable),
}

/// A template that has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotesTemplate {
    parts: Vec<Part>,
}

impl NotesTemplate {
    /// Checks a template.
    ///
    /// # Errors
    /// A sentence that names the unknown variable or escape.
    pub fn parse(template: &str) -> Result<Self, String> {
        check_notes(template).map_err(|fault| format!("The notes template: {fault}"))?;
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some((text, after)) = rest.split_once("{{") {
            parts.push(Part::Text(unescape(text)?));
            let (name, after) = after.split_once("}}").ok_or_else(|| {
                format!("The notes template '{template}' has a '{{{{' without its '}}}}'.")
            })?;
            parts.push(Part::Variable(variable(name)?));
            rest = after;
        }
        parts.push(Part::Text(unescape(rest)?));
        Ok(Self { parts })
    }

    /// The notes of one guest. Characters of its name that notes cannot have are replaced.
    #[must_use]
    pub fn expand(&self, variables: &Variables<'_>) -> String {
        let printable = |text: &str| {
            text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect::<String>()
        };
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Variable(Variable::Guestname) => printable(variables.guestname),
            Part::Variable(Variable::Vmid) => variables.vmid.to_string(),
            Part::Variable(Variable::Node) => printable(variables.node),
            Part::Variable(Variable::Cluster) => printable(variables.cluster),
        };
        self.parts.iter().map(part).collect()
    }
}

fn variable(name: &str) -> Result<Variable, String> {
    match name.trim() {
        "guestname" => Ok(Variable::Guestname),
        "vmid" => Ok(Variable::Vmid),
        "node" => Ok(Variable::Node),
        "cluster" => Ok(Variable::Cluster),
        other => Err(format!(
            "The notes template has the unknown variable '{{{{{other}}}}}'; there are cluster, \
             guestname, node, vmid."
        )),
    }
}

fn unescape(text: &str) -> Result<String, String> {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => plain.push('\n'),
            Some('\\') => plain.push('\\'),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(format!(
                    "The notes template has the unknown escape '\\{other}'; there are \\n and \\\\."
                ));
            }
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: Variables<'_> =
        Variables { guestname: "w\u{1b}eb", vmid: 100, node: "pve1", cluster: "c" };

    #[test]
    fn variables_and_escapes_are_replaced_once() {
        let expand = |text: &str| NotesTemplate::parse(text).unwrap().expand(&WEB);
        assert_eq!(
            expand("{{guestname}} ({{ vmid }})\\n{{node}}@{{cluster}}"),
            "w\u{fffd}eb (100)\npve1@c"
        );
        assert_eq!(expand("C:\\\\new"), "C:\\new");
    }

    /// Scenario 82.
    #[test]
    fn what_is_unknown_is_refused() {
        for (text, fault) in [
            ("{{host}}", "unknown variable '{{host}}'"),
            ("{{vmid", "without its '}}'"),
            ("a\\tb", "unknown escape '\\t'"),
            ("a\\", "unknown escape"),
            ("\u{7}", "cannot be in notes"),
        ] {
            let error = NotesTemplate::parse(text).unwrap_err();
            assert!(error.contains(fault), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_name_that_looks_like_a_variable_is_a_name() {
        let template = NotesTemplate::parse("{{guestname}}").unwrap();
        let odd = Variables { guestname: "{{node}}\\n", ..WEB };
        assert_eq!(template.expand(&odd), "{{node}}\\n");
    }
}
