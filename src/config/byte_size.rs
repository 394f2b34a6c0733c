//! Numbers of bytes with units.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// A number of bytes, written as a whole number or with a unit: `12GiB`, `800MB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    /// In the largest decimal unit that leaves something in front of the point: `23.40 GB`, `812.4 MB`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_units = |unit: u64| self.0 as f64 / unit as f64;
        let text = match self.0 {
            bytes @ 0..1_000 => format!("{bytes} B"),
            1_000..1_000_000 => format!("{:.1} kB", in_units(1_000)),
            1_000_000..1_000_000_000 => format!("{:.1} MB", in_units(1_000_000)),
            _ => format!("{:.2} GB", in_units(1_000_000_000)),
        };
        out.pad(&text)
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let (number, unit) = (&text[..text.len() - digits.len()], digits.trim());
        let scale: Option<u64> = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => Some(1),
            "kb" => Some(1_000),
            "mb" => Some(1_000_000),
            "gb" => Some(1_000_000_000),
            "kib" => Some(1 << 10),
            "mib" => Some(1 << 20),
            "gib" => Some(1 << 30),
            _ => None,
        };
        number
            .parse::<u64>()
            .ok()
            .zip(scale)
            .and_then(|(number, scale)| number.checked_mul(scale))
            .map(ByteSize)
            .ok_or_else(|| format!("expected bytes such as 12GiB or 800MB, found `{text}`"))
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected bytes such as \"12GiB\" or 800000000")]
        enum Typed {
            Number(u64),
            Text(String),
        }
        match Typed::deserialize(deserializer)? {
            Typed::Number(bytes) => Ok(ByteSize(bytes)),
            Typed::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_the_unit_that_suits_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (812_400_000, "812.4 MB"),
            (23_400_000_000, "23.40 GB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>8}", ByteSize(5)), "     5 B");
    }

    #[test]
    fn bytes_have_units() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("12GiB", Some(12 << 30)),
            ("800 MB", Some(800_000_000)),
            ("7kib", Some(7 << 10)),
            ("1.5GB", None),
            ("GiB", None),
            ("-1", None),
            ("99999999999999GiB", None),
        ] {
            assert_eq!(
                text.parse::<ByteSize>().ok().map(|size| size.0),
                bytes,
                "{text}"
            );
        }
    }
}
