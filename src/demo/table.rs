//! Answers side by side, in columns as wide on the screen as they should be.

/// Screen columns of the questions.
const QUESTION_WIDTH: usize = 22;
/// Screen columns of a model's answers.
const ANSWER_WIDTH: usize = 23;
/// Lines of a cell: more than any right answer needs.
const MOST_LINES: usize = 4;
const GAP: &str = "  ";

/// A table with a head and one row per question; cells that are too wide go over several lines.
pub fn table<const N: usize>(head: [&str; N], rows: &[[&str; N]]) -> String {
    let rule = (0..N).map(|column| "-".repeat(width_of_column(column)));
    let rule = rule.collect::<Vec<_>>().join(GAP);
    let mut text = row(head) + &rule + "\n";
    text.extend(rows.iter().map(|cells| row(*cells)));
    text
}

fn row<const N: usize>(cells: [&str; N]) -> String {
    let mut column = 0;
    let wrapped = cells.map(|cell| {
        column += 1;
        wrap(cell, width_of_column(column - 1))
    });
    let height = wrapped.iter().map(Vec::len).max().unwrap_or(0);
    let mut text = String::new();
    for line in 0..height {
        let mut out = String::new();
        for (column, cell) in wrapped.iter().enumerate() {
            let cell = cell.get(line).map_or("", String::as_str);
            let fill = width_of_column(column).saturating_sub(width(cell));
            out += &(cell.to_owned() + &" ".repeat(fill) + GAP);
        }
        text += out.trim_end();
        text.push('\n');
    }
    text
}

fn width_of_column(column: usize) -> usize {
    if column == 0 {
        QUESTION_WIDTH
    } else {
        ANSWER_WIDTH
    }
}

/// Screen columns of a text: two for a Chinese character, none for one that does not print.
pub fn width(text: &str) -> usize {
    text.chars().map(width_of).sum()
}

fn width_of(character: char) -> usize {
    match character {
        c if c.is_control() => 0,
        c if is_wide(c) => 2,
        _ => 1,
    }
}

/// East Asian wide and full-width characters (Unicode's UAX 11), by block.
fn is_wide(character: char) -> bool {
    matches!(u32::from(character),
        0x1100..=0x115F | 0x2E80..=0xA4CF | 0xAC00..=0xD7A3 | 0xF900..=0xFAFF | 0xFE30..=0xFE4F
        | 0xFF00..=0xFF60 | 0xFFE0..=0xFFE6 | 0x1F300..=0x1FAFF | 0x20000..=0x3FFFD)
}

/// Cuts a text into lines of at most `columns`: between words, or beside a Chinese character. What
/// an untrained model says may hold anything, control characters too: those become spaces.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let mut lines = Vec::new();
    let mut line = String::new();
    for part in parts(text.trim()) {
        if width(&line) + width(part.trim_end()) > columns && !line.is_empty() {
            lines.push(std::mem::take(&mut line).trim_end().to_owned());
        }
        // A word that is wider than a line is cut where it must be.
        for character in part.chars() {
            if width(&line) + width_of(character) > columns && character != ' ' {
                lines.push(std::mem::take(&mut line));
            }
            line.push(character);
        }
    }
    lines.push(line.trim_end().to_owned());
    if lines.len() > MOST_LINES {
        lines.truncate(MOST_LINES);
        if let Some(last) = lines.last_mut() {
            while width(last) >= columns && last.pop().is_some() {}
            last.push('…');
        }
    }
    lines
}

/// Parts that stay on one line: a word with the space behind it, or a wide character with the
/// punctuation behind it.
fn parts(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut before = None;
    for (at, character) in text.char_indices() {
        let closes = "，。！？、：；,.!?:;".contains(character) || character == ' ';
        let breaks = match before {
            None => false,
            Some(' ') => character != ' ',
            Some(before) => !closes && (is_wide(before) || is_wide(character)),
        };
        if breaks {
            parts.push(&text[start..at]);
            start = at;
        }
        before = Some(character);
    }
    parts.push(&text[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_look() {
        assert_eq!(width("青鸟 a。"), 8);
        let text = table(["Q", "base"], &[["你是谁？", "我"], ["Who are you?", "I"]]);
        let columns: Vec<usize> = text
            .lines()
            .skip(2)
            .filter_map(|line| line.find(['我', 'I']).map(|at| width(&line[..at])))
            .collect();
        assert_eq!(columns, [QUESTION_WIDTH + 2, QUESTION_WIDTH + 2]);
    }

    #[test]
    fn long_answers_go_over_several_lines() {
        assert_eq!(
            wrap("Hello, I am Robin, an assistant", 12),
            ["Hello, I am", "Robin, an", "assistant"]
        );
        assert_eq!(wrap("我是青鸟，你好。", 8), ["我是青", "鸟，你", "好。"]);
        assert_eq!(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
        assert_eq!(
            wrap("abcdefghijklmnop", 3),
            ["abc", "def", "ghi", "jk…"],
            "a page has an end"
        );
        assert_eq!(wrap("a\n\tb", 9), ["a  b"]);
        assert_eq!(wrap("", 9), [""]);
    }
}
