//! How many values the rows of a repeated column have: a few bytes can promise billions, which are
//! counted here before anybody reserves room for them.

/// Most values of one row in one column, far more than any conversation has messages.
const MAX_VALUES: u64 = 1 << 20;

/// Counts the values of the row that goes on from page to page.
#[derive(Debug, Default)]
pub(super) struct RowLengths {
    values: u64,
}

impl RowLengths {
    /// Looks through the repetition levels of a page, a mix of runs and packed groups of eight, of
    /// which `num_values` count.
    pub fn page(&mut self, mut levels: &[u8], max: i16, num_values: u32) -> Result<(), String> {
        let width = 16 - u32::from(max.unsigned_abs().leading_zeros() as u16);
        let bytes = width.div_ceil(8) as usize;
        let mut left = u64::from(num_values);
        while left > 0 {
            let head = varint(&mut levels).ok_or(SHORT)?;
            let count = head >> 1;
            if head & 1 == 0 {
                let (level, rest) = levels.split_at_checked(bytes).ok_or(SHORT)?;
                levels = rest;
                let count = count.min(left);
                if count == 0 {
                    return Err(SHORT.to_owned());
                }
                let starts_rows = level.iter().all(|&byte| byte == 0);
                match starts_rows {
                    true => self.values = 1,
                    false => self.add(count)?,
                }
                left -= count;
                continue;
            }
            let packed = count.checked_mul(u64::from(width));
            let packed = packed.and_then(|bytes| usize::try_from(bytes).ok());
            // The last group may be cut off behind the last level.
            let packed = packed.ok_or(SHORT)?.min(levels.len());
            let (group, rest) = levels.split_at(packed);
            levels = rest;
            let held = (packed as u64 * 8 / u64::from(width)).min(left);
            if held == 0 {
                return Err(SHORT.to_owned());
            }
            for index in 0..held {
                match level(group, index * u64::from(width), width) {
                    0 => self.values = 1,
                    _ => self.add(1)?,
                }
            }
            left -= held;
        }
        Ok(())
    }

    fn add(&mut self, values: u64) -> Result<(), String> {
        self.values += values;
        match self.values > MAX_VALUES {
            true => Err(format!("a row has more than {MAX_VALUES} values in a list")),
            false => Ok(()),
        }
    }
}

const SHORT: &str = "a page of less levels than values";

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..35).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The level of `width` bits at a bit, which are in the bytes.
fn level(bytes: &[u8], bit: u64, width: u32) -> u32 {
    let at = |bit: u64| {
        let byte = bytes.get((bit / 8) as usize).copied().unwrap_or_default();
        u32::from(byte >> (bit % 8) & 1)
    };
    (0..width).fold(0, |level, offset| {
        level | at(bit + u64::from(offset)) << offset
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_through_runs_groups_and_pages() {
        let mut lengths = RowLengths::default();
        // A group of eight levels 0 1 1 0 1 1 1 1, then a run of 1,000 ones.
        let levels = [0b11, 0b1111_0110, 0xd0, 0x0f, 1];
        lengths.page(&levels, 1, 1008).unwrap();
        assert_eq!(lengths.values, 1005);
        // The next page goes on with the row, and begins another with its last value.
        lengths.page(&[10, 1, 2, 0], 1, 6).unwrap();
        assert_eq!(lengths.values, 1);
        lengths.page(&[10, 1], 1, 5).unwrap();
        assert_eq!(lengths.values, 6);
        // Two bits to a level: 0 1 2 0, then 2 2 2 1.
        lengths
            .page(&[0b11, 0b0010_0100, 0b0110_1010], 2, 8)
            .unwrap();
        assert_eq!(lengths.values, 5);
    }

    #[test]
    fn a_row_that_promises_billions_is_refused() {
        let most = u32::MAX / 4;
        let run = [0xfe, 0xff, 0xff, 0xff, 0x07, 1];
        let error = RowLengths::default().page(&run, 1, most).unwrap_err();
        assert!(error.contains("more than 1048576 values"), "{error}");
        for short in [&[][..], &[0x80], &[2], &[0, 1], &[3], &[2, 0]] {
            let error = RowLengths::default().page(short, 1, 9).unwrap_err();
            assert_eq!(error, SHORT, "{short:?}");
        }
    }
}
