//! tiktoken's file: a line for each token, base64 and rank.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{ByteLevelError, MAX_TOKEN_BYTES, MAX_TOKENS, Tokens};

/// Whether the file is lines of a base64 token and its rank, by its first line.
pub fn is_ranks(bytes: &[u8]) -> bool {
    let first_line = bytes.split(|&byte| byte == b'\n').next();
    let Some((token, rank)) = first_line
        .and_then(|line| std::str::from_utf8(line).ok())
        .and_then(|line| line.trim_end().split_once(' '))
    else {
        return false;
    };
    let is_base64 = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
    !token.is_empty() && token.chars().all(is_base64) && rank.parse::<u32>().is_ok()
}

impl Tokens {
    /// Reads tiktoken's file. The merges are found by what each token falls into when only lower
    /// ranks may be merged: two parts, or it is reached as a whole word only.
    ///
    /// # Errors
    /// [`ByteLevelError`] with the line, or the token, that is wrong.
    pub fn from_ranks(file: &[u8]) -> Result<Self, ByteLevelError> {
        let tokens = in_order(read_lines(file)?)?;
        let mut ranks: HashMap<&[u8], u32> = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0..) {
            if let Some(first) = ranks.insert(token, id) {
                return Err(ByteLevelError::Twice { first, second: id });
            }
        }
        let merges = tokens
            .iter()
            .zip(0..)
            .filter_map(|(token, rank)| last_merge(token, rank, &ranks))
            .collect();
        Ok(Self {
            merges,
            whole_words: true,
            specials: Vec::new(),
            tokens,
        })
    }
}

/// Rank and bytes of every line.
fn read_lines(file: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, ByteLevelError> {
    let mut ranks = Vec::new();
    let file = file.strip_suffix(b"\n").unwrap_or(file);
    for (index, line) in file.split(|&byte| byte == b'\n').enumerate() {
        let fail = |problem| ByteLevelError::Line {
            line: index + 1,
            problem,
        };
        if index == MAX_TOKENS {
            return Err(ByteLevelError::TooManyTokens);
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let space = line.iter().position(|&byte| byte == b' ');
        let (token, rank) = line.split_at(space.ok_or_else(|| fail("has no space"))?);
        let digits = &rank[1..];
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(fail("has no rank behind its space"));
        }
        let rank = std::str::from_utf8(digits).ok();
        let rank: u32 = rank
            .and_then(|rank| rank.parse().ok())
            .ok_or_else(|| fail("has too large a rank"))?;
        // Strict: padding there, and no bits that are lost.
        let token = STANDARD
            .decode(token)
            .map_err(|_| fail("begins with something that is not base64"))?;
        if token.is_empty() {
            return Err(fail("has an empty token"));
        }
        if token.len() > MAX_TOKEN_BYTES {
            return Err(ByteLevelError::LongToken {
                id: rank,
                bytes: token.len(),
            });
        }
        ranks.push((rank, token));
    }
    Ok(ranks)
}

/// Tokens by id, which must count from 0 without a gap.
pub(super) fn in_order(mut tokens: Vec<(u32, Vec<u8>)>) -> Result<Vec<Vec<u8>>, ByteLevelError> {
    tokens.sort_by_key(|(id, _)| *id);
    let count = tokens.len();
    if let Some((missing, _)) = (0..).zip(&tokens).find(|(index, (id, _))| index != id) {
        return Err(ByteLevelError::Gap {
            tokens: count,
            missing,
        });
    }
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// The two tokens that a token is merged of last; `None` for single bytes, and where ranks below
/// its own leave more than two parts.
fn last_merge(token: &[u8], rank: u32, ranks: &HashMap<&[u8], u32>) -> Option<(u32, u32)> {
    let below = |range: std::ops::Range<usize>| {
        let found = ranks.get(token.get(range)?).copied();
        found.filter(|&found| found < rank)
    };
    // Where parts begin, and the rank of each part with the next.
    let mut starts: Vec<usize> = (0..=token.len()).collect();
    let pair =
        |starts: &[usize], i: usize| starts.get(i + 2).and_then(|&end| below(starts[i]..end));
    let mut pairs: Vec<Option<u32>> = (0..token.len()).map(|i| pair(&starts, i)).collect();
    while starts.len() > 3 {
        let lowest = pairs.iter().enumerate();
        let (_, at) = lowest.filter_map(|(i, rank)| Some(((*rank)?, i))).min()?;
        starts.remove(at + 1);
        pairs.remove(at + 1);
        pairs[at] = pair(&starts, at);
        if let Some(before) = at.checked_sub(1) {
            pairs[before] = pair(&starts, before);
        }
    }
    match starts[..] {
        [start, middle, end] => Some((below(start..middle)?, below(middle..end)?)),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// All single bytes, then these.
    fn file(more: &[&str]) -> Vec<u8> {
        let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
        let more = more.iter().map(|token| token.as_bytes().to_vec());
        let lines = bytes.chain(more).zip(0..);
        let line = |(token, rank): (Vec<u8>, u32)| format!("{} {rank}\n", STANDARD.encode(token));
        lines.map(line).collect::<String>().into_bytes()
    }

    #[test]
    fn merges_are_found_by_lower_ranks() {
        let tokens = Tokens::from_ranks(&file(&["ab", "bc", "abc", "xyz"])).unwrap();
        let (a, b, c) = (97, 98, 99);
        // "xyz" has no way to it but as a word.
        assert_eq!(tokens.merges, [(a, b), (b, c), (256, c)]);
        let whole = super::super::ByteLevel::new(tokens).unwrap();
        assert_eq!(
            whole.encode("abc xyz bcabc"),
            [258, 32, 120, 121, 122, 32, 257, 258]
        );
        assert_eq!(whole.encode("xyz"), [259]);
    }
}
