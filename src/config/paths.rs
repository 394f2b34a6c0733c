//! One path, or several.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// Paths, written as one string or as a list of strings; as a flag, separated by commas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Paths(pub Vec<PathBuf>);

impl FromStr for Paths {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Paths(text.split(',').map(PathBuf::from).collect()))
    }
}

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a path or a list of paths")]
        enum Typed {
            One(PathBuf),
            Many(Vec<PathBuf>),
        }
        Ok(match Typed::deserialize(deserializer)? {
            Typed::One(path) => Paths(vec![path]),
            Typed::Many(paths) => Paths(paths),
        })
    }
}
