//! Settings that the adapter a training starts from has already.

use crate::adapter::files;
use crate::config::raw::{AdapterKind, RawAdapter, RawConfig};
use crate::config::run::AdapterSection;

/// Puts the rank and the like of `init_adapter` into `flags` (the first), where neither they nor the
/// file (the second) say something else. A folder that cannot be read is left for the run to refuse.
pub(super) fn fill(flags: &mut RawConfig, in_file: Option<&RawConfig>) {
    let nothing = RawAdapter::default();
    let in_file = in_file.map_or(&nothing, |raw| &raw.adapter);
    let flags = &mut flags.adapter;
    let folder = flags.init_adapter.as_ref();
    let Some(folder) = folder.or(in_file.init_adapter.as_ref()) else {
        return;
    };
    let (Ok(section), said) = (files::section_of(folder), flags.kind.or(in_file.kind)) else {
        return;
    };
    let kind = match &section {
        AdapterSection::Lora(_) => AdapterKind::Lora,
        AdapterSection::Prefix(_) => AdapterKind::Prefix,
        AdapterSection::Full(_) => AdapterKind::Full,
    };
    if said.is_some_and(|said| said != kind) {
        return;
    }
    fill_one(&mut flags.kind, &in_file.kind, kind);
    match section {
        AdapterSection::Lora(lora) => {
            fill_one(&mut flags.r, &in_file.r, lora.r);
            fill_one(&mut flags.lora_alpha, &in_file.lora_alpha, lora.lora_alpha);
            let targets = lora.target_modules;
            fill_one(&mut flags.target_modules, &in_file.target_modules, targets);
        }
        AdapterSection::Prefix(prefix) => {
            let (length, projection) = (prefix.pre_seq_len, prefix.prefix_projection);
            fill_one(&mut flags.pre_seq_len, &in_file.pre_seq_len, length);
            let said = &in_file.prefix_projection;
            fill_one(&mut flags.prefix_projection, said, projection);
        }
        AdapterSection::Full(_) => {}
    }
}

fn fill_one<T>(flag: &mut Option<T>, in_file: &Option<T>, value: T) {
    if flag.is_none() && in_file.is_none() {
        *flag = Some(value);
    }
}
