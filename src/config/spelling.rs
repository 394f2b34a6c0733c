//! "Did you mean": the nearest known word.

/// The candidate that `word` was most likely meant to be, if one is near enough: at most one edit for
/// every three letters, and at least one allowed.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let allowed = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Letters inserted, removed, replaced or swapped with their neighbour to get from one word to the
/// other (optimal string alignment).
fn edit_distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let replaced = above[j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut best = replaced.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_edits_and_swaps() {
        for (from, to, distance) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("leraning_rate", "learning_rate", 1),
            ("r", "r", 0),
            ("ca", "abc", 3),
        ] {
            assert_eq!(edit_distance(from, to), distance, "{from} -> {to}");
        }
    }

    #[test]
    fn far_words_are_not_suggested() {
        assert_eq!(
            nearest("max_step", ["max_steps", "log_steps"]),
            Some("max_steps")
        );
        assert_eq!(nearest("colour", ["max_steps", "log_steps"]), None);
    }
}
