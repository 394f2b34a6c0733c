//! `mp-train export`.

use super::args::ExportArgs;
use super::failure::{Failure, FailureClass};
use super::{print, signals};
use crate::config::byte_size::ByteSize;
use crate::export::{self, ExportError, ExportOptions};

pub(super) fn run(args: &ExportArgs) -> Result<(), Failure> {
    let options = ExportOptions {
        model: args.model.clone(),
        adapter: args.adapter.clone(),
        output: args.output.clone(),
        format: args.format,
        dtype: args.dtype,
        quantization: args.quantization,
        max_shard_size: args.max_shard_size.0,
    };
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let exported = export::run(&options, &stop)?;
    if exported.requantised {
        eprintln!(
            "warning: the adapter was added to weights that are rounded to codes, before or after; \
             answers may differ from those of model and adapter apart"
        );
    }
    let merged = match exported.merged {
        0 => String::new(),
        merged => format!(", the adapter added into {merged} linear layers"),
    };
    print(&format!(
        "{}: {} tensors, {}, in {} {}{merged}\n",
        args.output.display(),
        exported.tensors,
        ByteSize(exported.bytes),
        exported.files,
        if exported.files == 1 { "file" } else { "files" },
    ))
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        Failure::new(error.class(), &error)
    }
}
