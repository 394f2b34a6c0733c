//! mp-train
