// SPDX-License-Identifier: MIT OR Apache-2.0
//! Just enough of Rust's lexer to know what is code and what is comment or text.

/// The lines, from 1, on which `word` stands as an identifier in code.
pub(super) fn lines_with_word(source: &str, word: &str) -> Vec<usize> {
    code_only(source)
        .lines()
        .enumerate()
        .filter(|(_, line)| {
            line.split(|c: char| c != '_' && !c.is_alphanumeric()).any(|w| w == word)
        })
        .map(|(index, _)| index + 1)
        .collect()
}

/// The source with comments and literals blanked out; lines stay where they are.
pub(crate) fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => line_end(&chars, at),
            '/' if chars.get(at + 1) == Some(&'*') => comment_end(&chars, at),
            '"' => text_end(&chars, at),
            'r' if !follows_identifier(&chars, at) => raw_end(&chars, at).unwrap_or(at),
            '\'' => char_end(&chars, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            code.push(chars[at]);
            at += 1;
        } else {
            // Blanks keep words apart, newlines keep the count.
            code.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    code
}

fn line_end(chars: &[char], at: usize) -> usize {
    chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |n| at + n)
}

/// Block comments nest.
fn comment_end(chars: &[char], at: usize) -> usize {
    let mut depth = 0_u32;
    let mut next = at;
    while next + 1 < chars.len() {
        match (chars[next], chars[next + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                next += 1;
                continue;
            }
        }
        next += 2;
        if depth == 0 {
            return next;
        }
    }
    chars.len()
}

fn text_end(chars: &[char], at: usize) -> usize {
    let mut next = at + 1;
    while next < chars.len() {
        match chars[next] {
            '\\' => next += 2,
            '"' => return next + 1,
            _ => next += 1,
        }
    }
    chars.len()
}

/// `r"…"`, `r#"…"#` and so on.
fn raw_end(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let close = (open + 1..chars.len()).find(|&i| {
        chars[i] == '"'
            && chars[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
    });
    Some(close.map_or(chars.len(), |i| i + 1 + hashes))
}

/// A character literal; a lifetime is not one.
fn char_end(chars: &[char], at: usize) -> Option<usize> {
    match chars.get(at + 1)? {
        '\\' => chars.get(at + 3..)?.iter().position(|c| *c == '\'').map(|n| at + 3 + n + 1),
        _ => (chars.get(at + 2) == Some(&'\'')).then_some(at + 3),
    }
}

/// Whether what stands at `at` continues an identifier; `br"…"` and `cr"…"` are literals as well.
fn follows_identifier(chars: &[char], at: usize) -> bool {
    let part =
        |n: usize| at.checked_sub(n).is_some_and(|i| chars[i] == '_' || chars[i].is_alphanumeric());
    let prefix = at > 0 && matches!(chars[at - 1], 'b' | 'c') && !part(2);
    part(1) && !prefix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_words_in_code_only() {
        let source = "// danger\n/* danger /* danger */ danger */ danger {}\n\
            let a = \"danger \\\" danger\"; let b = r#\"danger \" danger\"#;\n\
            let c = '\"'; danger();\nlet d: &'a str = br\"danger\"; let e = '\\'';\n\
            dangerous(); danger_zone(); #![forbid(danger_code)]\nfor_danger\n#[danger(x)]";
        assert_eq!(lines_with_word(source, "danger"), [2, 4, 8]);
    }

    #[test]
    fn unfinished_source_ends() {
        for source in ["\"", "/*", "r#\"", "'", "'\\", "//", "r", "/* /*"] {
            assert!(lines_with_word(source, "x").is_empty(), "{source}");
        }
    }
}
