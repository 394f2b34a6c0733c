//! Flags over file over defaults.

use serde::Serialize;

use super::error::{ConfigError, Key, Origin, Place};
use super::file::ConfigFile;
use super::raw::RawConfig;
use super::run::RunConfig;
use super::setting::{Setting, Value, shown};

/// Everything that was typed for a run. A flag wins over the same key in the file.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// From the command line.
    pub flags: RawConfig,
    /// From `--config`.
    pub file: Option<ConfigFile>,
}

impl Layers {
    /// Fills in the defaults and checks everything that can be checked without opening model or data.
    /// The first thing wrong is the error.
    pub fn resolve(&self) -> Result<RunConfig, ConfigError> {
        super::resolve::resolve(self)
    }

    /// The value of one key, with its origin.
    pub(super) fn setting<T: Serialize>(
        &self,
        key: Key,
        get: impl Fn(&RawConfig) -> Option<T>,
    ) -> Setting<T> {
        let from_flag = get(&self.flags).map(|value| Value {
            place: Place {
                key,
                origin: Origin::Flag,
                found: shown(&value),
            },
            value,
        });
        let from_file = || {
            let file = self.file.as_ref()?;
            Some(Value {
                place: file.place(key)?,
                value: get(&file.raw)?,
            })
        };
        Setting {
            key,
            typed: from_flag.or_else(from_file),
        }
    }
}

/// `setting!(layers, section.key)`: the setting of that name, so that name and field cannot differ.
macro_rules! setting {
    ($layers:expr, $section:ident . $key:ident) => {
        $layers.setting(
            $crate::config::error::Key {
                section: stringify!($section),
                name: stringify!($key),
            },
            |raw| raw.$section.$key.clone(),
        )
    };
}
pub(super) use setting;
