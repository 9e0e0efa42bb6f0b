//! Tokens of preprocessed MSL text: enough to find declarations, no more.

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A name or keyword.
    Word,
    /// A number, string or character.
    Literal,
    /// One character of punctuation, or `::` or `->`.
    Mark,
}

/// A token and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// What it is.
    pub kind: Kind,
    /// Its text.
    pub text: &'a str,
    /// Byte offset of its first character.
    pub start: usize,
}

impl Token<'_> {
    /// Byte offset behind its last character.
    pub fn end(&self) -> usize {
        self.start + self.text.len()
    }

    /// Whether this is the given word or mark.
    pub fn is(&self, text: &str) -> bool {
        self.kind != Kind::Literal && self.text == text
    }
}

/// Splits text whose comments are gone; lines that begin with `#` (line markers, pragmas) are passed over.
pub fn tokenize(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    let mut line_is_empty = true;
    while at < bytes.len() {
        let start = at;
        let byte = bytes[at];
        if byte == b'\n' {
            line_is_empty = true;
            at += 1;
            continue;
        }
        if byte.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if byte == b'#' && line_is_empty {
            at = line_end(bytes, at);
            continue;
        }
        line_is_empty = false;
        let kind = if byte.is_ascii_alphabetic() || byte == b'_' {
            at = skip_while(bytes, at, is_word_byte);
            Kind::Word
        } else if byte.is_ascii_digit() || (byte == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)) {
            at = number_end(bytes, at);
            Kind::Literal
        } else if byte == b'"' || byte == b'\'' {
            at = string_end(bytes, at);
            Kind::Literal
        } else {
            let pair = bytes.get(at..at + 2);
            at += if pair == Some(b"::") || pair == Some(b"->") { 2 } else { character_bytes(text, at) };
            Kind::Mark
        };
        tokens.push(Token { kind, text: &text[start..at], start });
    }
    tokens
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn skip_while(bytes: &[u8], mut at: usize, belongs: fn(u8) -> bool) -> usize {
    while at < bytes.len() && belongs(bytes[at]) {
        at += 1;
    }
    at
}

/// The end of a line, continuations included.
fn line_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() && !(bytes[at] == b'\n' && bytes[at - 1] != b'\\') {
        at += 1;
    }
    at
}

/// Digits, letters, points, and the signs of exponents.
fn number_end(bytes: &[u8], mut at: usize) -> usize {
    let hexadecimal = bytes[at] == b'0' && matches!(bytes.get(at + 1), Some(b'x' | b'X'));
    let exponents: &[u8] = if hexadecimal { b"pP" } else { b"eE" };
    while at < bytes.len() {
        let sign = matches!(bytes[at], b'+' | b'-') && exponents.contains(&bytes[at - 1]);
        if !is_word_byte(bytes[at]) && bytes[at] != b'.' && !sign {
            break;
        }
        at += 1;
    }
    at
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != bytes[start] {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

fn character_bytes(text: &str, at: usize) -> usize {
    text[at..].chars().next().map_or(1, char::len_utf8)
}

/// The index of the token that closes the bracket at `open`.
pub fn closing(tokens: &[Token<'_>], open: usize) -> Option<usize> {
    let (opener, closer) = match tokens[open].text {
        "(" => ("(", ")"),
        "[" => ("[", "]"),
        "{" => ("{", "}"),
        "<" => ("<", ">"),
        _ => return None,
    };
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        if token.is(opener) {
            depth += 1;
        } else if token.is(closer) {
            depth -= 1;
            if depth == 0 {
                return Some(index);
            }
        } else if opener == "<" && (token.is(";") || token.is("{")) {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<&str> {
        tokenize(text).iter().map(|token| token.text).collect()
    }

    #[test]
    fn numbers_keep_their_signs_and_suffixes() {
        assert_eq!(texts("a=1.5e-3f+0x1p-4h-.5;"), ["a", "=", "1.5e-3f", "+", "0x1p-4h", "-", ".5", ";"]);
        assert_eq!(texts("0xe+1"), ["0xe", "+", "1"]);
    }

    #[test]
    fn markers_and_pragmas_are_no_tokens() {
        assert_eq!(texts("# 3 \"kernel.metal\"\nx\n #pragma unroll\ny"), ["x", "y"]);
    }

    #[test]
    fn brackets_match() {
        let tokens = tokenize("vec<array<half, 2>, 4>(x)");
        assert_eq!(closing(&tokens, 1), Some(10));
        assert_eq!(closing(&tokenize("a < b; c >"), 1), None);
    }
}
