//! ROUGE-1, ROUGE-2 and ROUGE-L of one answer against one reference, over words: Lin 2004, counted as
//! the Python package `rouge_chinese` counts (each n-gram once, the longest common subsequence over
//! the whole text).

use std::collections::HashSet;

/// F values, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    /// Single words.
    pub one: f64,
    /// Pairs of words.
    pub two: f64,
    /// The longest common subsequence.
    pub longest: f64,
}

/// The values of the words of an answer and those of a reference; `None` where one of them has
/// nothing but white space.
pub fn rouge(answer: &[&str], reference: &[&str]) -> Option<Rouge> {
    let (answer, reference) = (counted_words(answer), counted_words(reference));
    if answer.is_empty() || reference.is_empty() {
        return None;
    }
    let (answer, reference) = (as_strs(&answer), as_strs(&reference));
    let common = common_subsequence(&answer, &reference);
    Some(Rouge {
        one: ngrams(&answer, &reference, 1),
        two: ngrams(&answer, &reference, 2),
        longest: f_value(common, answer.len(), reference.len()),
    })
}

fn as_strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// White space as Python has it: Unicode's, and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The words that count. The package cuts the text, its words joined by spaces, into sentences, and
/// joins them again; three things are left of that. White space is no word. Six points end a sentence
/// even inside a word, which makes two of it. And a sentence of nothing but white space, as between
/// two ends of lines, counts as an empty word.
fn counted_words(words: &[&str]) -> Vec<String> {
    let text: Vec<char> = words.join(" ").chars().collect();
    let sentence_ends = |rest: &[char]| usize::from(matches!(rest, ['。' | '！' | '？' | '?', ..]));
    let points = |rest: &[char]| match rest.starts_with(&['.'; 6]) {
        true => 6,
        false => 0,
    };
    let text: String = broken_after(&broken_after(&text, sentence_ends), points)
        .into_iter()
        .collect();
    let mut counted = Vec::new();
    for sentence in text.trim_end_matches(is_space).split('\n') {
        let before = counted.len();
        let words = sentence.split(is_space).filter(|word| !word.is_empty());
        counted.extend(words.map(str::to_owned));
        if counted.len() == before && !sentence.is_empty() {
            counted.push(String::new());
        }
    }
    counted
}

/// The text with a line's end behind whatever `ends` finds (its length), unless a closing quotation
/// mark or nothing follows. What follows is not looked at again.
fn broken_after(text: &[char], ends: impl Fn(&[char]) -> usize) -> Vec<char> {
    let mut broken = Vec::with_capacity(text.len());
    let mut i = 0;
    while i < text.len() {
        let found = ends(&text[i..]);
        match text.get(i + found) {
            Some(&next) if found > 0 && !matches!(next, '”' | '’') => {
                broken.extend_from_slice(&text[i..i + found]);
                broken.extend(['\n', next]);
                i += found + 1;
            }
            _ => {
                broken.push(text[i]);
                i += 1;
            }
        }
    }
    broken
}

/// F of the n-grams that both have, each counted once.
fn ngrams(answer: &[&str], reference: &[&str], n: usize) -> f64 {
    let answer: HashSet<&[&str]> = answer.windows(n).collect();
    let reference: HashSet<&[&str]> = reference.windows(n).collect();
    let common = answer.intersection(&reference).count();
    f_value(common, answer.len(), reference.len())
}

/// The balanced F value of precision and recall, by the package's own formula for the case that both
/// are 0.
fn f_value(common: usize, answer: usize, reference: usize) -> f64 {
    let share = |of: usize| match of {
        0 => 0.0,
        _ => common as f64 / of as f64,
    };
    let (precision, recall) = (share(answer), share(reference));
    2.0 * (precision * recall / (precision + recall + 1e-8))
}

/// Length of the longest common subsequence, in memory of one row.
fn common_subsequence(a: &[&str], b: &[&str]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = match word == other {
                true => diagonal + 1,
                false => above.max(row[j]),
            };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn near(found: f64, expected: f64) -> bool {
        (found - expected).abs() < 1e-7
    }

    #[test]
    fn what_is_known_by_hand() {
        let values = rouge(&["a", "b", "a", "c"], &["a", "c", "d"]).unwrap();
        // {a b c} and {a c d}; {ab ba ac} and {ac cd}; a c of 4 and 3 words.
        assert!(near(values.one, 2.0 / 3.0), "{values:?}");
        assert!(near(values.two, 2.0 / 5.0), "{values:?}");
        assert!(near(values.longest, 4.0 / 7.0), "{values:?}");
        let one_word = rouge(&["a"], &["a"]).unwrap();
        assert!(near(one_word.one, 1.0) && near(one_word.longest, 1.0));
        assert_eq!(one_word.two, 0.0);
        assert_eq!(rouge(&["a"], &["b"]), Some(Rouge::default()));
        assert_eq!(rouge(&[], &["b"]), None);
        assert_eq!(rouge(&["b"], &[" ", "\n"]), None);
    }

    #[test]
    fn words_are_what_the_package_counts() {
        let counted = |words: &[&str]| counted_words(words);
        assert_eq!(counted(&["a", " ", "b", "\u{3000}"]), ["a", "b"]);
        assert_eq!(counted(&["a", "。", "b", "？"]), ["a", "。", "b", "？"]);
        assert_eq!(counted(&["a", "\n", "\n", "b"]), ["a", "", "b"]);
        assert_eq!(counted(&["。", " ", "\n", "b"]), ["。", "", "b"]);
        assert_eq!(counted(&["........", "b"]), ["......", "..", "b"]);
        assert_eq!(counted(&[".....", "b"]), [".....", "b"]);
    }
}
