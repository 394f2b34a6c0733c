//! BLEU-4 of one answer against one reference, over characters: Papineni et al. 2002, with the third
//! smoothing of Chen and Cherry 2014, as nltk's `sentence_bleu` computes it.

use std::collections::HashMap;

/// Longest n-grams that are counted, each length with the same weight.
const LONGEST: usize = 4;

/// BLEU-4, 0 to 1; 0 where no character of the answer is in the reference.
pub fn bleu4(answer: &str, reference: &str) -> f64 {
    let answer: Vec<char> = answer.chars().collect();
    let reference: Vec<char> = reference.chars().collect();
    if matches(&answer, &reference, 1) == 0 {
        return 0.0;
    }
    let mut missing = 0;
    let logarithms = (1..=LONGEST).map(|n| {
        let all = (answer.len() + 1).saturating_sub(n).max(1) as f64;
        let precision = match matches(&answer, &reference, n) {
            // The first length without a match counts as half a match, the next as a quarter, ..
            0 => {
                missing += 1;
                1.0 / (f64::from(1_u32 << missing) * all)
            }
            found => found as f64 / all,
        };
        precision.ln() / LONGEST as f64
    });
    let mean = logarithms.sum::<f64>().exp();
    // An answer shorter than the reference leaves something out that precision does not see.
    let brevity = 1.0 - reference.len() as f64 / answer.len() as f64;
    mean * brevity.min(0.0).exp()
}

/// How many n-grams of the answer are in the reference, each as often as it is there at most.
fn matches(answer: &[char], reference: &[char], n: usize) -> usize {
    let mut left: HashMap<&[char], usize> = HashMap::new();
    for gram in reference.windows(n) {
        *left.entry(gram).or_default() += 1;
    }
    let taken = answer.windows(n).filter(|gram| match left.get_mut(gram) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        _ => false,
    });
    taken.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_by_hand() {
        assert_eq!(bleu4("宽松的衬衫", "宽松的衬衫"), 1.0);
        assert_eq!(bleu4("甲", "乙"), 0.0);
        assert_eq!(bleu4("", "乙"), 0.0);
        assert_eq!(bleu4("乙", ""), 0.0);
        // Precisions 2/2, 1/1, then 1/2 and 1/4 of nothing; the reference is twice as long.
        let expected = (1.0_f64 * 1.0 * 0.5 * 0.25).powf(0.25) * (-1.0_f64).exp();
        assert!((bleu4("ab", "abcd") - expected).abs() < 1e-12);
        // Of "aaaa" one a is in the reference: 1/4, then 1/2, 1/4, 1/8 of 3, 2, 1.
        let expected = (0.25_f64 / (2.0 * 3.0) / (4.0 * 2.0) / 8.0).powf(0.25);
        assert!((bleu4("aaaa", "abc") - expected).abs() < 1e-12);
    }
}
