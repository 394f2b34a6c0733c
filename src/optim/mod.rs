//! What happens between a finished gradient and a changed parameter.

pub mod curve;
pub mod loss_scale;
