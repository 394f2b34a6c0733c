//! Whitespace as pieces, and the Hugging Face clean-up: what ChatGLM-6B does to text around
//! SentencePiece.

/// The piece for a newline.
pub(super) const NEWLINE: &str = "<n>";
/// The piece for a tab.
pub(super) const TAB: &str = "<|tab|>";
/// Longest run of spaces with a piece of its own, `<|blank_80|>`; the shortest is two.
pub(super) const MAX_BLANK: usize = 80;

/// The piece for a run of spaces.
pub(super) fn blank(spaces: usize) -> String {
    format!("<|blank_{spaces}|>")
}

/// Newlines, tabs and runs of spaces become the text of their pieces.
pub(super) fn to_pieces(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['\n', '\t', ' ']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let spaces = rest.len() - rest.trim_start_matches(' ').len();
        if spaces == 0 {
            out.push_str(if rest.starts_with('\n') { NEWLINE } else { TAB });
            rest = &rest[1..];
            continue;
        }
        for _ in 0..spaces / MAX_BLANK {
            out.push_str(&blank(MAX_BLANK));
        }
        match spaces % MAX_BLANK {
            0 => {}
            1 => out.push(' '),
            several => out.push_str(&blank(several)),
        }
        rest = &rest[spaces..];
    }
    out.push_str(rest);
    out
}

/// The way back: the text of whitespace pieces becomes whitespace.
pub(super) fn from_pieces(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(behind) = rest.strip_prefix(NEWLINE) {
            out.push('\n');
            rest = behind;
        } else if let Some(behind) = rest.strip_prefix(TAB) {
            out.push('\t');
            rest = behind;
        } else if let Some((spaces, behind)) = leading_blank(rest) {
            out.extend(std::iter::repeat_n(' ', spaces));
            rest = behind;
        } else {
            out.push('<');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

fn leading_blank(text: &str) -> Option<(usize, &str)> {
    let (digits, behind) = text.strip_prefix("<|blank_")?.split_once("|>")?;
    let spaces: usize = digits.parse().ok()?;
    let exact = (2..=MAX_BLANK).contains(&spaces) && spaces.to_string() == digits;
    exact.then_some((spaces, behind))
}

/// `clean_up_tokenization` of the transformers library, its replacements in its order.
pub(super) fn clean_up(text: &str) -> String {
    const REPLACEMENTS: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    REPLACEMENTS
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_becomes_pieces_and_returns() {
        let spaces = " ".repeat(163);
        let text = format!("a  b c\n\n\td{spaces}e\r");
        let pieces = to_pieces(&text);
        assert_eq!(
            pieces,
            "a<|blank_2|>b c<n><n><|tab|>d<|blank_80|><|blank_80|><|blank_3|>e\r"
        );
        assert_eq!(from_pieces(&pieces), text);
        assert_eq!(to_pieces(&" ".repeat(81)), "<|blank_80|> ");
    }

    #[test]
    fn what_is_no_whitespace_piece_stays() {
        for text in [
            "<|blank_1|>",
            "<|blank_81|>",
            "<|blank_02|>",
            "<|blank_",
            "<<",
            "<|blank_+2|>",
        ] {
            assert_eq!(from_pieces(text), text);
        }
        assert_eq!(from_pieces("<<n>"), "<\n");
    }
}
