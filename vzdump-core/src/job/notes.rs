// SPDX-License-Identifier: MIT OR Apache-2.0
//! The notes of an archive, from a template: `{{guestname}} of {{node}}\nmade by the nightly job`.

/// The longest template, in characters, as with vzdump.
const CHARS_MAX: usize = 1024;

/// What a template may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotesValues<'a> {
    /// Name of the guest.
    pub guest_name: &'a str,
    /// Number of the guest.
    pub guest_id: u32,
    /// Name of this host.
    pub node: &'a str,
    /// Name of the cluster.
    pub cluster: &'a str,
}

/// Checks a template.
///
/// # Errors
/// A sentence that names what is wrong.
pub fn check_notes_template(template: &str) -> Result<(), String> {
    let values = NotesValues { guest_name: "", guest_id: 0, node: "", cluster: "" };
    render_notes(template, &values).map(drop)
}

/// Makes the notes of one guest's archive.
///
/// # Errors
/// A sentence that names what is wrong with the template.
pub fn render_notes(template: &str, values: &NotesValues<'_>) -> Result<String, String> {
    let length = template.chars().count();
    if length > CHARS_MAX {
        return Err(format!(
            "The notes template has {length} characters; {CHARS_MAX} are allowed."
        ));
    }
    if template.contains(['\n', '\r']) {
        return Err("The notes template has a line break; write it as '\\n'.".to_owned());
    }
    let mut notes = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['\\', '{']) {
        notes.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(escaped) = rest.strip_prefix('\\') {
            match escaped.chars().next() {
                Some('n') => notes.push('\n'),
                Some('\\') => notes.push('\\'),
                other => {
                    let shown = other.map_or_else(String::new, |c| c.to_string());
                    return Err(format!(
                        "The notes template has '\\{shown}'; only '\\n' and '\\\\' are allowed."
                    ));
                }
            }
            rest = &escaped[1..];
        } else if let Some(inner) = rest.strip_prefix("{{") {
            let (name, after) =
                inner.split_once("}}").ok_or("The notes template has a '{{' without '}}'.")?;
            notes.push_str(&value_of(name, values)?);
            rest = after;
        } else {
            notes.push('{');
            rest = &rest[1..];
        }
    }
    notes.push_str(rest);
    Ok(notes)
}

fn value_of(name: &str, values: &NotesValues<'_>) -> Result<String, String> {
    Ok(match name {
        "guestname" => values.guest_name.to_owned(),
        "vmid" => values.guest_id.to_string(),
        "node" => values.node.to_owned(),
        "cluster" => values.cluster.to_owned(),
        other => {
            return Err(format!(
                "The notes template names '{other}'; it may name cluster, guestname, node and vmid."
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: NotesValues<'_> =
        NotesValues { guest_name: "web {{x}}", guest_id: 100, node: "pve1", cluster: "c" };

    #[test]
    fn variables_and_escapes_are_replaced() {
        let template = r"{{guestname}}/{{vmid}} on {{node}} of {{cluster}}\n{a}\\n é";
        let notes = render_notes(template, &VALUES).unwrap();
        // What a guest is called is not read as a template.
        assert_eq!(notes, "web {{x}}/100 on pve1 of c\n{a}\\n é");
        assert_eq!(render_notes("", &VALUES).unwrap(), "");
    }

    #[test]
    fn scenario_82_errors_of_a_notes_template_are_named() {
        for (template, fault) in [
            ("{{guest}}", "names 'guest'; it may name cluster, guestname, node and vmid"),
            ("{{vmid", "a '{{' without '}}'"),
            (r"a\t", r"has '\t'"),
            (r"a\", r"has '\'"),
            (r"a\é", r"has '\é'"),
            ("a\nb", "has a line break"),
            (&"x".repeat(1025), "has 1025 characters"),
        ] {
            let error = check_notes_template(template).unwrap_err();
            assert!(error.contains(fault), "{error}");
        }
        check_notes_template(&"x".repeat(1024)).unwrap();
    }
}
